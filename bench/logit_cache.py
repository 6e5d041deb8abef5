"""The logit cache: bytes a token, tokens decoded a second on one core, and KL to the whole distribution.

    python bench/logit_cache.py [--tokens 200000] [--real]

Synthetic distributions are Zipf over shuffled ids of a 151,936-entry vocabulary, roughened; `--real` adds SmolLM2-135M
on a page of text, where the model is installed.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from tutelage.data.logit_cache import largest_k, spread_tail
from tutelage.data.logit_codec import Codec, TopK
from tutelage.policies.teachers import top_k_of

QWEN = 151_936


def zipf(vocab: int, exponent: float, n: int, seed: int = 0) -> torch.Tensor:
    """(n, V) log-probabilities, float64."""
    g = torch.Generator().manual_seed(seed)
    rank = torch.arange(1, vocab + 1, dtype=torch.float64)
    rows = []
    for _ in range(n):
        logits = -exponent * rank.log() + 0.2 * torch.randn(vocab, generator=g, dtype=torch.float64)
        rows.append(logits.log_softmax(-1)[torch.randperm(vocab, generator=g)])
    return torch.stack(rows)


def kl_to_stored(full: torch.Tensor, top: TopK) -> torch.Tensor:
    ids, logprobs, tail = (torch.from_numpy(np.asarray(c).copy()) for c in top)
    stored = spread_tail(ids.long(), logprobs.double(), tail.double(), full.shape[1]).log_softmax(-1)
    return (full.exp() * (full - stored)).sum(-1)


def fidelity(full: torch.Tensor, codec: Codec) -> dict[str, float]:
    """Mean and largest KL over distributions below 0.5 nats of entropy, with the numbers shortened and not."""
    entropy = -(full.exp() * full.clamp_min(-1e4)).sum(-1)
    low = entropy < 0.5
    top = top_k_of(full, codec.k)
    packed, exact = kl_to_stored(full, codec.decode(codec.encode(top))), kl_to_stored(full, top)
    out = {
        "num_tokens": float(len(full)),
        "num_low_entropy": float(low.sum()),
        "mean_kl_all_nats": float(packed.mean()),
    }
    if bool(low.any()):
        out |= {
            "mean_kl_low_entropy_nats": float(packed[low].mean()),
            "max_kl_low_entropy_nats": float(packed[low].max()),
            "mean_kl_low_entropy_nats_full_numbers": float(exact[low].mean()),
        }
    return out


def decode_rate(codec: Codec, num_tokens: int, batch: int) -> float:
    """Tokens a second of processor time on one core, from a memory-mapped file, in microbatches of `batch` tokens."""
    torch.set_num_threads(1)
    top = top_k_of(zipf(codec.vocab_size, 4.0, 8), codec.k)
    few = codec.encode(top)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.bin"
        np.tile(few, (num_tokens // len(few), 1)).tofile(path)
        records = np.memmap(path, np.uint8, "r").reshape(-1, codec.record_bytes)
        best = 0.0
        for _ in range(3):
            started = time.process_time()
            for start in range(0, len(records), batch):
                codec.decode(records[start : start + batch])
            best = max(best, len(records) / (time.process_time() - started))
    return best


def real(codec_bytes: int) -> dict[str, float]:
    """SmolLM2-135M on text, at its own vocabulary."""
    from tutelage.policies.load import load_model, load_tokenizer
    from tutelage.policies.smollm2 import ALIAS

    text = (Path(__file__).parents[1] / "README.md", Path(__file__))
    words = next(p for p in text if p.exists()).read_text()
    model, tokenizer = load_model(ALIAS), load_tokenizer(ALIAS)
    ids = tokenizer(words)["input_ids"][:1024]
    with torch.no_grad():
        full = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    vocab = full.shape[1]
    return fidelity(full, Codec(largest_k(vocab, codec_bytes), vocab))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--real", action="store_true")
    args = parser.parse_args()
    codec = Codec(largest_k(QWEN), QWEN)
    result = {
        "vocab_size": QWEN,
        "k": codec.k,
        "bytes_per_token": codec.record_bytes,
        "decode_tokens_per_core_s": {str(b): round(decode_rate(codec, args.tokens, b)) for b in (512, 2048, 8192)},
        "zipf": {str(a): fidelity(zipf(QWEN, a, 16), codec) for a in (3.4, 4.0, 5.0)},
    }
    if args.real:
        result["smollm2_135m_text"] = real(220)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
