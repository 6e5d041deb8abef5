"""Rollouts: sampled tokens per second against transformers' `generate`, prompts included.

    OMP_NUM_THREADS=2 .venv/bin/python bench/rollout.py
    OMP_NUM_THREADS=1 .venv/bin/python bench/rollout.py --forms fused generate

SmolLM2-135M-Instruct in bfloat16, `--prompts` prompts of ragged length, n=8 samples each at temperature 1, at most
`--max-new` tokens; answers end where the model ends them. The forms take turns for `--rounds` rounds; medians, and the
ratio to `generate` within each round. Forms:

    generate   transformers' generate: left-padded batches with num_return_sequences=8, at the fastest of the batch
               sizes in `--generate-rows` (found first, on the same prompts)
    fused      InProcessSampler, the engine for Llama-shaped models
    plain      InProcessSampler, the engine for any model with a cache
    workers    WorkerSampler: one process per core, one thread each

A token counts if it was sampled up to and including its row's stop token; what `generate` computes after it does not.
"wall" is tokens per second of wall time; "cpu" is tokens per second of this process's CPU time (not shown for workers),
the number to read at OMP_NUM_THREADS=1 on a machine that does other work. Nothing is written unless --out FILE.
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


def ragged_prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Questions of 40 to 120 tokens after the chat template."""
    rng = random.Random(0)
    prompts = []
    for _ in range(count):
        terms = " + ".join(str(rng.randint(1, 99)) for _ in range(rng.choice((2, 2, 3, 4, 8, 16))))
        ask = rng.choice(("What is {}?", "Give only the final answer of {}.", "Think step by step: {} = ?"))
        messages = [{"role": "user", "content": ask.format(terms)}]
        prompts.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    return prompts


def sampler_run(sampler: Any, prompts: list[list[int]], max_new: int) -> Callable[[int], int]:
    def run(seed: int) -> int:
        requests = [
            SampleRequest(prompt_ids=tuple(p), n=SAMPLES, seed=seed * 10_000 + i) for i, p in enumerate(prompts)
        ]
        answers = sampler.sample(requests, SamplingParams(max_new_tokens=max_new))
        return sum(len(c.token_ids) for group in answers for c in group)

    return run


def generate_run(
    model: Any, tokenizer: Any, stop_ids: list[int], prompts: list[list[int]], max_new: int, rows: int
) -> Callable[[int], int]:
    tokenizer.padding_side = "left"
    per_batch = max(1, rows // SAMPLES)

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        total = 0
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
                total += ends[0] + 1 if ends else len(row)
        return total

    return run


def measured(run: Callable[[int], int], seed: int) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = run(seed)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"tokens": tokens, "wall": tokens / wall, "cpu": tokens / cpu}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--max-new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--forms", nargs="+", default=["generate", "fused", "plain", "workers"])
    parser.add_argument("--generate-rows", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--max-batch", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    path = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    stop_ids = sorted({tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.convert_tokens_to_ids("<|endoftext|>")})
    prompts = ragged_prompts(tokenizer, args.prompts)
    shared = {"stop_ids": stop_ids, "decode": tokenizer.decode, "max_batch": args.max_batch}

    runs: dict[str, Callable[[int], int]] = {}
    for form in args.forms:
        if form == "generate":
            speeds = {}
            for rows in args.generate_rows:
                trial = generate_run(model, tokenizer, stop_ids, prompts, args.max_new, rows)
                speeds[rows] = measured(trial, 99)["cpu" if torch.get_num_threads() == 1 else "wall"]
                print(f"generate, {rows} rows: {speeds[rows]:.0f} tok/s", flush=True)
            best = max(speeds, key=lambda rows: speeds[rows])
            runs[form] = generate_run(model, tokenizer, stop_ids, prompts, args.max_new, best)
        else:
            sampler: Any = (
                WorkerSampler(model, **shared) if form == "workers" else InProcessSampler(model, engine=form, **shared)
            )
            runs[form] = sampler_run(sampler, prompts, args.max_new)
            runs[form](98)  # the engine's check and its packing of the weights

    rounds = []
    for number in range(args.rounds):
        rounds.append({form: measured(run, number) for form, run in runs.items()})
        print(f"round {number}:", {f: {k: round(v) for k, v in m.items()} for f, m in rounds[-1].items()}, flush=True)
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "prompt_tokens": sum(map(len, prompts)),
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
