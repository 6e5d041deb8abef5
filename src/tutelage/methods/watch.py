"""What watches a stage: the regression gate and the graduation monitor, on one fixed probe set."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.monitors import GraduationMonitor, GraduationSettings, Prober, RegressionGate
from tutelage.types import Monitor, Task

if TYPE_CHECKING:
    from tutelage.methods.workbench import Workbench


def monitors_of(settings: Any, bench: "Workbench") -> tuple[Monitor, ...]:
    """The monitors that a stage's settings ask for: `gate`, and `until: graduation`. They share their probes."""
    is_graduating = settings.until == "graduation"
    if not settings.gate and not is_graduating:
        return ()
    probe, rollout = settings.probe, settings.rollout
    asked = settings.graduation
    prober = Prober(
        probe_tasks(settings, bench, max(probe.questions, asked.min_tasks if is_graduating else 1)),
        bench.verifier(settings.verifier),
        text=bench.text,
        seed=bench.config.seed,
        step=lambda: bench.steps_done(),
        n=max(probe.n, asked.min_samples if is_graduating else 1),
        max_new_tokens=probe.max_new_tokens or rollout.max_new_tokens,
        stop=rollout.stop,
        author="policy",
        extras=(lambda: keep_weights(bench)) if is_graduating else dict,
    )
    out: list[Monitor] = [RegressionGate(probe=prober)] if settings.gate else []
    if is_graduating:
        thresholds = GraduationSettings(**asked.model_dump())
        out.append(GraduationMonitor(thresholds, probe=prober, every_steps=probe.every_steps))
    return tuple(out)


def probe_tasks(settings: Any, bench: "Workbench", count: int) -> list[Task]:
    """The first held-out questions, in an order fixed by their ids; training questions where none are held out."""
    tasks = bench.heldout_tasks(settings.tasks) or bench.train_tasks(settings.tasks)
    return sorted(tasks, key=lambda t: t.hash)[:count]


def keep_weights(bench: "Workbench", *, count: int = GraduationSettings().last_checkpoints) -> Mapping[str, Any]:
    """Keep the probed weights under RUN/probes, the last few of them: what a graduation hands over is among them."""
    name = f"step-{bench.steps_done():07d}"
    root = Path(bench.config.run_dir) / "probes"
    if bench.processes.is_first:
        bench.save_weights(root / name)
        for old in sorted(root.glob("step-*"))[:-count]:
            shutil.rmtree(old)
    bench.processes.wait()
    return {"checkpoint": name}
