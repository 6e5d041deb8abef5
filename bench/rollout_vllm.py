"""vLLM's CPU build on the prompts of `bench/rollout.py`, in its own process behind its server: tokens per second.

    OMP_NUM_THREADS=1 .venv/bin/python bench/rollout_vllm.py          # needs `make vllm-env`

The same model, precision, prompts, n=8, length limit and stop tokens as `bench/rollout.py`, asked through `VLLMSampler`
(token ids and log-probabilities over HTTP). The first pass warms the server and is not counted; the others have seeds
of their own, and prefix caching is vLLM's default. "wall" is tokens per second of wall time. "cpu" is per second of CPU
time of this process and of the server's, read from /proc.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from rollout import prompts_of, requests_of
from transformers import AutoTokenizer

from tutelage.policies.smollm2 import smollm2_path
from tutelage.policies.vllm_server import VLLMSampler, launch_server
from tutelage.types import SamplingParams


def cpu_seconds(group: int) -> float:
    """CPU time so far of every living process in a process group."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[2]) == group:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompts-from", type=Path, help="a GSM8K file; without it, sums")
    parser.add_argument("--max-new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="without --enforce-eager")
    args = parser.parse_args()
    path = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = prompts_of(tokenizer, args.prompts, args.prompts_from)
    stop_ids = sorted({tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.convert_tokens_to_ids("<|endoftext|>")})
    options = {
        "max_model_len": 1024,
        "cpu_threads": torch.get_num_threads(),
        "start_s": 420.0,
        "is_eager": not args.compiled,
    }
    with launch_server(path, **options) as server:
        sampler = VLLMSampler(server, stop_ids=stop_ids, decode=tokenizer.decode, workers=128)
        group = os.getpgid(server.process._process.pid)  # type: ignore[union-attr]
        rounds = []
        for number in range(-1, args.rounds):
            wall, cpu = time.perf_counter(), time.process_time() + cpu_seconds(group)
            answers = sampler.sample(requests_of(prompts, number + 1), SamplingParams(max_new_tokens=args.max_new))
            wall, cpu = time.perf_counter() - wall, time.process_time() + cpu_seconds(group) - cpu
            tokens = sum(len(c.token_ids) for g in answers for c in g)
            rounds.append({"tokens": tokens, "wall": tokens / wall, "cpu": tokens / cpu})
            print(number, {k: round(v) for k, v in rounds[-1].items()}, flush=True)
    kept = rounds[1:]
    report = {k: round(statistics.median(r[k] for r in kept), 1) for k in ("tokens", "wall", "cpu")}
    print(json.dumps({"threads": torch.get_num_threads(), "load": os.getloadavg()[0], **report}))


if __name__ == "__main__":
    main()
