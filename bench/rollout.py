"""Rollouts: sampled tokens per second against transformers' `generate`, prompts included.

    OMP_NUM_THREADS=1 .venv/bin/python bench/rollout.py --search          # the fastest setting of `generate` first
    OMP_NUM_THREADS=1 .venv/bin/python bench/rollout.py --generate 128 sdpa
    OMP_NUM_THREADS=1 .venv/bin/python bench/rollout.py --prompts-from .../gsm8k/test.jsonl --max-new 192

SmolLM2-135M-Instruct in bfloat16, `--prompts` prompts of ragged length, n=8 samples each at temperature 1, at most
`--max-new` tokens; answers end where the model ends them. The forms take turns for `--rounds` rounds; medians, and the
ratio to `generate` within each round. Forms:

    generate   transformers' generate: left-padded batches with num_return_sequences=8, at `--generate ROWS ATTENTION`;
               `--search` tries each of some settings once and takes the fastest
    fused      InProcessSampler, the engine for Llama-shaped models
    plain      InProcessSampler, the engine for any model with a cache
    workers    WorkerSampler: one process per core, one thread each

A token counts if it was sampled up to and including its row's stop token; what `generate` computes after it does not.
Ours hand back every token's log-probability and the entropy of its distribution; `generate` does neither here.
"wall" is tokens per second of wall time; "cpu" is tokens per second of this process's CPU time (not shown for workers),
the number to read at OMP_NUM_THREADS=1 on a machine that does other work. Nothing is written unless --out FILE.
`bench/rollout_vllm.py` asks a vLLM server the same prompts.
"""

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutelage.policies.sampler import InProcessSampler
from tutelage.policies.sampling_workers import WorkerSampler
from tutelage.policies.smollm2 import smollm2_path
from tutelage.types import SampleRequest, SamplingParams

SAMPLES = 8
SEARCH = [(rows, attention) for attention in ("sdpa", "eager") for rows in (32, 64, 128)]


def prompts_of(tokenizer: Any, count: int, source: Path | None) -> list[list[int]]:
    """Sums of 2 to 16 terms, 30 to 120 tokens after the chat template; or the questions of a GSM8K file."""
    rng = random.Random(0)
    if source is not None:
        asked = [json.loads(line)["question"] for line in source.read_text().splitlines()[:count]]
    else:
        asked = []
        for _ in range(count):
            terms = " + ".join(str(rng.randint(1, 99)) for _ in range(rng.choice((2, 2, 3, 4, 8, 16))))
            ask = rng.choice(("What is {}?", "Give only the final answer of {}.", "Think step by step: {} = ?"))
            asked.append(ask.format(terms))
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in asked
    ]


def requests_of(prompts: list[list[int]], seed: int) -> list[SampleRequest]:
    return [SampleRequest(prompt_ids=tuple(p), n=SAMPLES, seed=seed * 10_000 + i) for i, p in enumerate(prompts)]


def sampler_run(sampler: Any, prompts: list[list[int]], max_new: int) -> Callable[[int], list[int]]:
    def run(seed: int) -> list[int]:
        answers = sampler.sample(requests_of(prompts, seed), SamplingParams(max_new_tokens=max_new))
        return [len(c.token_ids) for group in answers for c in group]

    return run


def generate_run(
    model: Any, tokenizer: Any, stop_ids: list[int], prompts: list[list[int]], max_new: int, rows: int, attention: str
) -> Callable[[int], list[int]]:
    tokenizer.padding_side = "left"
    per_batch = max(1, rows // SAMPLES)

    def run(seed: int) -> list[int]:
        torch.manual_seed(seed)
        model.set_attn_implementation(attention)
        lengths = []
        for start in range(0, len(prompts), per_batch):
            batch = tokenizer.pad({"input_ids": prompts[start : start + per_batch]}, return_tensors="pt")
            out = model.generate(
                **batch,
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                num_return_sequences=SAMPLES,
                max_new_tokens=max_new,
                eos_token_id=stop_ids,
                pad_token_id=tokenizer.pad_token_id,
            )
            for row in out[:, batch["input_ids"].shape[1] :].tolist():
                ends = [i for i, token in enumerate(row) if token in stop_ids]
                lengths.append(ends[0] + 1 if ends else len(row))
        return lengths

    return run


def measured(run: Callable[[int], list[int]], seed: int) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    lengths = run(seed)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = sum(lengths)
    return {"tokens": tokens, "longest": max(lengths), "wall": tokens / wall, "cpu": tokens / cpu}


def searched(trial: Callable[[int, str], Callable[[int], list[int]]]) -> tuple[int, str]:
    """The fastest of the settings of `generate`, each tried once."""
    speeds = {}
    for rows, attention in SEARCH:
        found = measured(trial(rows, attention), 99)
        speeds[rows, attention] = found["cpu" if torch.get_num_threads() == 1 else "wall"]
        print(f"generate, {rows} rows, {attention}: {speeds[rows, attention]:.0f} tok/s", flush=True)
    return max(speeds, key=lambda key: speeds[key])


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompts-from", type=Path, help="a GSM8K file; without it, sums")
    parser.add_argument("--max-new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--forms", nargs="+", default=["generate", "fused"])
    parser.add_argument("--generate", nargs=2, default=["128", "sdpa"], metavar=("ROWS", "ATTENTION"))
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--max-batch", type=int, default=128)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parsed()
    path = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    stop_ids = sorted({tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.convert_tokens_to_ids("<|endoftext|>")})
    prompts = prompts_of(tokenizer, args.prompts, args.prompts_from)
    shared = {"stop_ids": stop_ids, "decode": tokenizer.decode, "max_batch": args.max_batch}

    runs: dict[str, Callable[[int], list[int]]] = {}
    for form in args.forms:
        if form == "generate":

            def trial(rows: int, attention: str) -> Callable[[int], list[int]]:
                return generate_run(model, tokenizer, stop_ids, prompts, args.max_new, rows, attention)

            best = searched(trial) if args.search else (int(args.generate[0]), args.generate[1])
            runs[form] = trial(*best)
        else:
            sampler: Any = (
                WorkerSampler(model, **shared) if form == "workers" else InProcessSampler(model, engine=form, **shared)
            )
            runs[form] = sampler_run(sampler, prompts, args.max_new)
            sampler_run(sampler, prompts[:2], 8)(98)  # the engine's check and its packing of the weights

    rounds = []
    for number in range(args.rounds):
        order = list(runs) if number % 2 == 0 else list(runs)[::-1]
        rounds.append({form: measured(runs[form], number) for form in order})
        print(f"round {number}:", {f: {k: round(v) for k, v in m.items()} for f, m in rounds[-1].items()}, flush=True)
    if not rounds:
        return
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "prompt_tokens": [min(map(len, prompts)), sum(map(len, prompts)), max(map(len, prompts))],
        "settings": {k: str(v) for k, v in vars(args).items()},
    }
    for form in runs:
        entry = {k: statistics.median(r[form][k] for r in rounds) for k in ("tokens", "wall", "cpu")}
        if "generate" in runs:
            for k in ("wall", "cpu"):
                entry[f"{k} ratio"] = statistics.median(r[form][k] / r["generate"][k] for r in rounds)
        report[form] = {k: round(v, 2) for k, v in entry.items()}
    text = json.dumps(report, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
