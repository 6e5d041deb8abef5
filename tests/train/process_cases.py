"""Steps that must not depend on how many processes make them, nor on whether these hold whole weights or parts.

    torchrun --nproc-per-node=2 tests/train/process_cases.py OUT CACHE URL

runs every case below under both, and writes what came of it; `test_sharded_steps.py` makes the same steps alone.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tutelage.data.logit_cache import LogitCache
from tutelage.policies.policy import Policy, add_lora
from tutelage.policies.teachers import InProcessTeacher, ServedTeacher
from tutelage.policies.vllm_server import VLLMScorer, VLLMServer
from tutelage.signals import HardTargets, MiniLLM, PolicyGradient, SampledLogRatio, TeacherDistribution
from tutelage.testing.tiny import tiny_model
from tutelage.train import sharding
from tutelage.train.distributed import Processes
from tutelage.train.optim import Optimizer
from tutelage.train.trainer import Trainer, TrainerSettings
from tutelage.types import Draw, Group, SamplingParams, Span, Status, Task, Trajectory, Verdict

CASES: dict[str, dict[str, Any]] = {
    "sft": {},
    "sft, padded": {"layout": "padded"},
    "sft, float64": {"dtype": torch.float64},
    "sft, bfloat16": {"dtype": torch.bfloat16},
    "sft, lora": {"lora": True},
    "sft, adamw": {"kind": "adamw"},
    "sft, one microbatch": {"max_tokens": 4096},
    "distillation, teacher in process": {"signal": "reverse_kl"},
    "distillation, lora": {"signal": "reverse_kl", "lora": True},
    "distillation, cache": {"signal": "cache"},
    "distillation, server": {"signal": "server"},
    "distillation, sampled tokens": {"signal": "sampled"},
    "distillation, sampled tokens, server": {"signal": "sampled, server"},
    "distillation, MiniLLM": {"signal": "minillm"},
    "grpo": {"signal": "grpo"},
    "raft++": {"signal": "raft"},
}
"""What differs from: SFT, whole weights trained in float32 by plain descent, packed, small microbatches."""
CUT_STEP = 0.05
"""Gradients are clipped to this norm, which every case exceeds."""
STEPS = 2


def trajectories(seed: int = 0, count: int = 9) -> list[Trajectory]:
    """Sampled completions of uneven lengths, three a prompt, some rejected."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        prompt, answer = rng.integers(0, 256, int(rng.integers(2, 6))), rng.integers(0, 256, int(rng.integers(2, 14)))
        logprobs = tuple((-5.5 + 0.2 * rng.standard_normal(len(answer))).tolist())
        is_right = bool(rng.random() < 0.6)
        spans = (
            Span(token_ids=tuple(prompt.tolist()), role="user", author="user"),
            Span(
                token_ids=tuple(answer.tolist()),
                role="assistant",
                author="student",
                is_sampled=True,
                is_trainable=True,
                logprobs=logprobs,
                sampling=SamplingParams(),
            ),
        )
        verdict = Verdict(status=Status.ACCEPT if is_right else Status.REJECT, score=float(is_right))
        out.append(Trajectory(id=f"t{i}", task_id=f"q{i // 3}", task_hash="h", spans=spans, verdict=verdict))
    return out


def draw() -> Draw:
    found = trajectories()
    groups = []
    for start in range(0, len(found), 3):
        task = Task(id=f"q{start // 3}", messages=({"role": "user", "content": "?"},))
        groups.append(Group(task=task, trajectories=tuple(found[start : start + 3])))
    return Draw(groups=tuple(groups), author="student", is_on_policy=True)


def signal_of(kind: str, processes: Processes, cache: Path, url: str) -> Any:
    if kind == "hard":
        return HardTargets()
    if kind in ("grpo", "raft"):
        return PolicyGradient(kind)
    if kind == "cache":
        return TeacherDistribution(LogitCache(cache), "forward_kl", estimator="top_k_tail", temperature=1.0)
    if "server" in kind:
        scorer = VLLMScorer(VLLMServer(url), workers=2)
        served = ServedTeacher(scorer, k=8, processes=processes)
        if kind == "server":
            return TeacherDistribution(served, "forward_kl", estimator="top_k_tail")
        return SampledLogRatio(served)
    teacher = InProcessTeacher(tiny_model(seed=1), processes=processes, max_tokens=64)
    if kind == "sampled":
        return SampledLogRatio(teacher)
    return MiniLLM(teacher) if kind == "minillm" else TeacherDistribution(teacher, kind)


def made(processes: Processes, *, is_sharded: bool, dtype: torch.dtype, lora: bool, kind: str) -> Trainer:
    model = tiny_model(seed=0, dtype=dtype)
    if lora:
        model = add_lora(model, r=4, alpha=8, dropout=0.0, target="all-linear", seed=0)
        with torch.no_grad():  # B is 0 at the start, and A's gradient with it
            for name, p in sorted(model.named_parameters()):
                if "lora_B" in name:
                    p.copy_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    policy = Policy(model)
    if is_sharded:
        sharding.shard(policy)
    optimizer = Optimizer(
        policy.model.named_parameters(),
        kind=kind,
        sum_parts=lambda x: processes.sum_numbers({"": x})[""],
    )
    return Trainer(policy, optimizer, processes=processes)


def run_case(name: str, processes: Processes, cache: Path, url: str, *, is_sharded: bool = False) -> dict[str, Any]:
    """Losses, norms, scores and weights of a few updates; the weights only in the first process."""
    case = CASES[name]
    kind = case.get("kind", "sgd")
    dtype = case.get("dtype", torch.float32)
    trainer = made(processes, is_sharded=is_sharded, dtype=dtype, lora="lora" in case, kind=kind)
    signal = signal_of(case.get("signal", "hard"), processes, cache, url)
    lr = 1e-3 if kind == "adamw" else 0.5
    settings = TrainerSettings(
        lr=lr,
        batch_size=None,
        max_grad_norm=CUT_STEP,
        max_tokens=case.get("max_tokens", 40),
        layout=case.get("layout", "packed"),
    )
    targets = signal.prepare(draw(), score_student=trainer.score)
    metrics = [trainer.step(list(targets.rows), signal, settings, lr=lr) for _ in range(STEPS)]
    scores = trainer.score(trajectories(seed=1, count=5), max_tokens=24)
    with trainer.optimizer.gathered():
        weights, moments = {}, {}
        if processes.is_first:
            weights = {n: w.detach().clone() for n, w in trainer.optimizer.weights().items()}
            path = cache.parent / "moments.safetensors"
            trainer.optimizer.save(path)
            from safetensors.torch import load_file

            moments = load_file(path)
    steps = [{k: v for k, v in m.items() if not k.startswith("time/")} for m in metrics]
    return {"steps": steps, "scores": scores, "weights": weights, "moments": moments}


def main(out: Path, cache: Path, url: str) -> None:
    from accelerate import Accelerator

    torch.set_num_threads(1)
    processes = Processes(Accelerator(cpu=True))
    for is_sharded in (False, True):
        for index, name in enumerate(CASES):
            found = run_case(name, processes, cache, url, is_sharded=is_sharded)
            if processes.is_first:
                torch.save({k: found[k] for k in ("weights", "moments")}, out / f"{index}-{is_sharded}.pt")
                body = {k: found[k] for k in ("steps", "scores")}
                (out / f"{index}-{is_sharded}.json").write_text(json.dumps(body))
    processes.wait()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
