"""Kill a run at a chosen instant, resume it, and compare it with one that was never killed.

    python tests/train/kill_run.py --kills 200 [--kind distillation]

kills 200 runs at random instants (SIGKILL before a random call of a random one of `POINTS`), resumes each, and prints
how many came back with bit-identical weights, metrics (times apart), trajectories and evaluations. One line a run.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

POINTS = {
    "evaluating": ("tutelage.evals.evaluate", "sample_tasks"),
    "sampling": ("tutelage.policies.sampler", "draw_tokens"),
    "committing a chunk": ("tutelage.data.rounds", "write_shard"),
    "judging": ("tutelage.sources.judged", "Judged.judge"),
    "keeping": ("tutelage.sources.accepted", "keep_marks"),
    "scoring": ("tutelage.train.trainer", "Trainer.score"),
    "asking the teacher": ("tutelage.policies.teachers", "InProcessTeacher.hidden"),
    "moving the teacher": ("tutelage.policies.teachers", "AveragedTeacher.after_step"),
    "saving the teacher": ("tutelage.policies.teachers", "AveragedTeacher.save"),
    "training": ("tutelage.train.trainer", "Trainer.step"),
    "rounding the masters": ("tutelage.train.optim", "Optimizer._publish"),
    "logging": ("tutelage.train.run_directory", "JsonLines.write"),
    "saving weights": ("tutelage.methods.workbench", "Workbench.save_weights"),
    "saving the optimiser": ("tutelage.train.optim", "Optimizer.save"),
    "naming a checkpoint": ("tutelage.train.checkpoint", "write_atomically"),
    "dropping an old checkpoint": ("tutelage.train.checkpoint", "drop_old"),
    "dropping finished work": ("tutelage.train.session", "Session._drop_finished_work"),
    "keeping probed weights": ("tutelage.train.probed", "save"),
    "dropping probed weights": ("tutelage.train.probed", "_drop_old"),
    "handing over": ("tutelage.train.session", "Session._hand_over"),
    "publishing a round": ("tutelage.data.rounds", "RoundStore.publish"),
    "writing json": ("tutelage.train.run_directory", "write_atomically"),
}
"""Instants by name: just before a call of this function."""

KINDS: dict[str, dict[str, Any]] = {
    "rejection_sampling": {},
    "distillation": {
        "method": "distill_on_policy",
        "teacher": {"name": "average", "decay": 0.5},
        "divergence": {"kind": "jsd", "alpha": 0.5},
        "train": {"lr": 1e-3, "batch_size": 18},
        "keep": None,
    },
    "graduation": {
        "until": "graduation",
        "then": "rl",
        "rl": {"rounds": 1, "truncated": "keep", "train": {"lr": 1e-3, "batch_size": 18}},
        "gate": False,
        "rounds": 6,
        "train": {"lr": 1e-3, "batch_size": 3, "epochs": 1},
        "probe": {"questions": 3, "n": 4, "every_steps": 1},
        "graduation": {
            **{"min_tasks": 3, "min_samples": 4, "entropy_ratio": 5.0, "entropy_slope": 5.0, "slope_probes": 2},
            **{"plateau_probes": 9, "min_gain": 0.9, "headroom": -1.0, "min_mixed": 0.0, "max_same": 1.0},
            **{"agree": 1, "of": 1, "group": 2, "coverage_k": 4},
        },
        "saving": {"every_steps": 100, "keep": 2},
    },
    "rl": {
        "method": "grpo",
        "truncated": "keep",
        "kl_to_base": 0.1,
        "train": {"lr": 1e-3, "batch_size": 18},
        "gate": True,
        "keep": None,
    },
}
"""What differs from a run of rejection sampling. None: no such setting."""


def settings(folder: Path, model: Path, run: str, kind: str = "rejection_sampling") -> dict[str, Any]:
    """A run with every part in it: two rounds, three chunks each, checkpoints within rounds, evaluations."""
    (folder / "q.jsonl").write_text(
        "".join(json.dumps({"question": f"What is {i}?", "answer": str(i)}) + "\n" for i in range(12))
    )
    (folder / "judge.py").write_text("def judge(task, completion, trajectory):\n    return len(completion) % 2 == 0\n")
    body = {
        "method": "rejection_sampling",
        "run_dir": str(folder / run),
        "model": {"name": str(model), "precision": "bfloat16"},
        "tasks": {"kind": "jsonl", "path": str(folder / "q.jsonl"), "heldout": 3},
        "verifier": {
            "kind": "python",
            "function": f"{folder / 'judge.py'}:judge",
            "allow_code_outside": True,
            "accept_truncated": True,
            "options": {"isolate": False},
            "workers": 1,
        },
        "rollout": {"n": 4, "max_new_tokens": 5, "chunk_rows": 12},
        "keep": {"distinct": None, "cap": None, "drop_truncated": False},
        "train": {"lr": 1e-3, "batch_size": 6, "epochs": 1},
        "saving": {"every_steps": 2, "keep": 2},
        "evaluation": {"n": 2, "ks": [1, 2], "controls": False},
        "rounds": 2,
        **KINDS[kind],
    }
    return {k: v for k, v in body.items() if v is not None}


def run(folder: Path, model: Path, name: str, kind: str) -> None:
    """Start the run, or resume it where it was started before."""
    from tutelage.methods.config import load_config
    from tutelage.methods.job import Job, config_of

    if (folder / name / "config.yaml").exists():
        config, place = config_of(folder / name)
        Job(config, place, is_resume=True)()
    else:
        config, place = load_config(settings(folder, model, name, kind))
        Job(config, place)()


def wrap(point: str, before: Callable[[], None]) -> None:
    """Call `before` ahead of every call of the point's function."""
    module_name, path = POINTS[point]
    owner: Any = importlib.import_module(module_name)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    is_static = isinstance(owner.__dict__.get(name), staticmethod)
    inner = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before()
        return inner(*args, **kwargs)

    setattr(owner, name, staticmethod(wrapped) if is_static else wrapped)


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process; its exit status as `waitpid` gives it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            if not os.environ.get("KILL_RUN_STDERR"):
                os.dup2(sink, 2)
            torch.set_num_threads(1)
            work()
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def killed(folder: Path, model: Path, name: str, point: str, call: int, kind: str = "rejection_sampling") -> bool:
    """Run until just before the point's call number `call` (from 1), then SIGKILL. False if it ended before that."""

    def work() -> None:
        left = [call]

        def before() -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        wrap(point, before)
        run(folder, model, name, kind)

    status = in_child(work)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def completed(folder: Path, model: Path, name: str, kind: str = "rejection_sampling") -> bool:
    """Start or resume, and go to the end."""
    return in_child(lambda: run(folder, model, name, kind)) == 0


def counted(folder: Path, model: Path, name: str, kind: str = "rejection_sampling") -> dict[str, int]:
    """How often each point is called in a run that is never killed."""

    def work() -> None:
        counts: Counter[str] = Counter()
        for point in POINTS:
            wrap(point, lambda point=point: counts.update([point]))  # type: ignore[misc]
        run(folder, model, name, kind)
        (folder / "counts.json").write_text(json.dumps(counts))

    assert in_child(work) == 0, "the run that is never killed failed"
    return json.loads((folder / "counts.json").read_text())


def differences(a: Path, b: Path) -> list[str]:
    """What of two finished runs is not the same to the bit, times apart."""
    from safetensors.torch import load_file

    from tutelage.data.store import TrajectoryStore

    def metrics(path: Path) -> list[Any]:
        lines = [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in m.items() if not k.startswith("time/")} for m in lines]

    def result(path: Path) -> dict[str, Any]:
        body = json.loads((path / "result.json").read_text())
        for side in ("before", "after"):
            body[side].pop("seconds")
        return {k: body[k] for k in ("before", "after", "gain", "counts")}

    found = []
    wa, wb = (load_file(p / "model" / "model.safetensors") for p in (a, b))
    if wa.keys() != wb.keys() or not all(torch.equal(wa[k], wb[k]) for k in wa):
        found.append("weights")
    if metrics(a) != metrics(b):
        found.append("metrics")
    for store in ("trajectories", "evaluation/trajectories"):
        if list(TrajectoryStore(a / store)) != list(TrajectoryStore(b / store)):
            found.append(store)
    if result(a) != result(b):
        found.append("result")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(KINDS), default="rejection_sampling")
    options = parser.parse_args()
    from tutelage.testing.tiny import save_tiny

    folder = Path(tempfile.mkdtemp(prefix="kill-run-"))
    model = save_tiny(folder / "model")
    counts = counted(folder, model, "whole", options.kind)
    instants = [(p, i) for p, n in counts.items() for i in range(1, n + 1)]
    rng = random.Random(options.seed)
    same = 0
    for k in range(options.kills):
        point, call = rng.choice(instants)
        died = killed(folder, model, "cut", point, call, options.kind)
        ended = completed(folder, model, "cut", options.kind)
        found = differences(folder / "whole", folder / "cut") if ended else ["did not finish"]
        same += not found
        print(f"{k + 1:4d}  before call {call} of {point}{'' if died else ' (ran to its end)'}: {found or 'identical'}")
        sys.stdout.flush()
        shutil.rmtree(folder / "cut")
    print(f"{same} of {options.kills} killed runs came back identical")
    shutil.rmtree(folder)
    return 0 if same == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
