"""One on-policy distillation step (sample, score, train) against TRL's GKDTrainer with lmbda=1.

    OMP_NUM_THREADS=1 .venv/bin/python bench/on_policy_step.py --steps 5

Student and teacher are SmolLM2-135M-Instruct. A step is 4 prompts, one answer of 48 tokens each (no answer ends
earlier), the teacher's grade at each of them, and one clipped AdamW update on the reverse KL (TRL: beta=1). Arms:

    tutelage      bfloat16 weights, float32 masters
    trl           bfloat16 weights without masters: TRL's fastest form
    trl autocast  float32 weights, bfloat16 autocast: the precision of ours

Steps of the arms take turns; medians, and the median of the ratios within each turn. The first step of each is not
counted. "cpu" is the process's CPU time, the number to read at OMP_NUM_THREADS=1 on a machine that does other work.
`--parts` also prints how our steps divide.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from tutelage.policies.load import load_model, load_tokenizer, resolve_model
from tutelage.policies.policy import Policy
from tutelage.policies.sampler import InProcessSampler
from tutelage.policies.teachers import InProcessTeacher
from tutelage.signals import TeacherDistribution
from tutelage.sources import Drawn
from tutelage.text import ChatText
from tutelage.train.distributed import Processes
from tutelage.train.optim import Optimizer
from tutelage.train.trainer import Place, Trainer, TrainerSettings
from tutelage.types import DrawContext, SamplingParams, Task

NAME = "smollm2-135m-instruct"
PROMPTS = [f"What is {a} + {b}? Explain in detail." for a, b in ((3, 4), (15, 6), (20, 31), (7, 9))]


def ours(dtype: str, tokens: int, parts: dict[str, float] | None = None) -> Callable[[], int]:
    policy = Policy(load_model(NAME, dtype=dtype))
    teacher = InProcessTeacher(load_model(NAME, dtype=dtype))
    text = ChatText.from_pretrained(resolve_model(NAME)[0])
    trainer = Trainer(policy, Optimizer(policy.model.named_parameters()), processes=Processes())
    never = max(text.stop_ids) + 0  # a stop token ends an answer: none may here
    sampler = InProcessSampler(policy.model, stop_ids=[_unused(text, never)], decode=text.decode, author="student")
    tasks = [Task(id=str(i), messages=({"role": "user", "content": p},)) for i, p in enumerate(PROMPTS)]
    source = Drawn(tasks, params=SamplingParams(max_new_tokens=tokens))
    signal = TeacherDistribution(teacher, "reverse_kl")
    settings = TrainerSettings(lr=1e-6, batch_size=None, schedule="constant")
    place = {"done": 0}

    def lap(name: str, start: float) -> float:
        now = time.process_time()
        if parts is not None:
            parts[name] = now - start
        return now

    def step() -> int:
        start = time.process_time()
        ctx = DrawContext(seed=0, stage=0, round=place["done"], sampler=lambda _: sampler, text=text)
        draw = source.draw(ctx)
        start = lap("sample", start)
        policy.use_plain_attention()
        targets = signal.prepare(draw, score_student=trainer.score)
        for _ in trainer.steps(targets, signal, settings, Place(seed=0, stage=0, round=0, num_rounds=1)):
            pass
        lap("score, train and update", start)
        place["done"] += 1
        return sum(t.num_sampled for t in draw)

    return step


def _unused(text: ChatText, fallback: int) -> int:
    """A control token that answers do not contain."""
    ids = [text.tokenizer.convert_tokens_to_ids(t) for t in ("<reponame>", "<file_sep>", "<filename>")]
    return next((i for i in ids if isinstance(i, int)), fallback)


def trl(dtype: str, tokens: int, folder: str, is_autocast: bool = False) -> Callable[[], int]:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher = load_model(NAME, dtype=dtype), load_model(NAME, dtype=dtype)
    tokenizer = load_tokenizer(resolve_model(NAME)[0])
    rows = [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": "It is."}]} for p in PROMPTS]
    config = GKDConfig(
        output_dir=folder,
        lmbda=1.0,
        beta=1.0,
        temperature=1.0,
        max_new_tokens=tokens,
        per_device_train_batch_size=4,
        learning_rate=1e-6,
        max_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=is_autocast,
        gradient_checkpointing=False,
        disable_dropout=True,
        logging_strategy="no",
        save_strategy="no",
    )
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.generation_config.eos_token_id = None
    trainer.generation_config.min_new_tokens = tokens
    trainer.create_optimizer_and_scheduler(1000)
    trainer.current_gradient_accumulation_steps = 1  # what `train` sets before it calls `training_step`
    trainer.model = trainer.accelerator.prepare_model(trainer.model)
    loader = trainer.get_train_dataloader()

    def step() -> int:
        batch: Any = next(iter(loader))
        trainer.training_step(trainer.model, batch)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return 4 * tokens

    return step


def timed(step: Callable[[], int]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = step()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--arms", nargs="+", default=["tutelage", "trl", "trl autocast"])
    parser.add_argument("--parts", action="store_true")
    args = parser.parse_args()
    parts: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, Callable[[], Callable[[], int]]] = {
            "tutelage": lambda: ours("bfloat16", args.tokens, parts),
            "trl": lambda: trl("bfloat16", args.tokens, folder),
            "trl autocast": lambda: trl("float32", args.tokens, folder, is_autocast=True),
        }
        forms = {arm: made[arm]() for arm in args.arms}
        turns = []
        for number in range(args.steps + 1):
            parts.clear()
            order = list(forms) if number % 2 == 0 else list(forms)[::-1]
            turns.append({name: timed(forms[name]) for name in order})
            if args.parts:
                print({k: round(v, 2) for k, v in parts.items()})
            print(number, {n: {k: round(v, 2) for k, v in t.items()} for n, t in turns[-1].items()}, flush=True)
    kept = turns[1:]
    report: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "steps": len(kept),
    }
    for key in ("wall_s", "cpu_s"):
        report[key] = {n: round(statistics.median(t[n][key] for t in kept), 2) for n in forms}
        if "tutelage" in forms:
            report[f"{key} ratio"] = {
                n: round(statistics.median(t[n][key] / t["tutelage"][key] for t in kept), 2) for n in forms
            }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
