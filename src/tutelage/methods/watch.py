"""What watches a stage: the regression gate and the graduation monitor, on one fixed probe set."""

from typing import TYPE_CHECKING, Any

from tutelage.methods.probing import PolicyScorer, ProbeInputs, heldout_demonstrations, probe_tasks
from tutelage.monitors import GraduationMonitor, GraduationSettings, Prober, RegressionGate
from tutelage.types import Monitor

if TYPE_CHECKING:
    from tutelage.methods.workbench import Workbench


def monitors_of(settings: Any, bench: "Workbench") -> tuple[Monitor, ...]:
    """The monitors that a stage's settings ask for: `gate`, and `until: graduation`. They share their probes."""
    is_graduating = settings.until == "graduation"
    if not settings.gate and not is_graduating:
        return ()
    probe, rollout = settings.probe, settings.rollout
    asked = settings.graduation
    tasks = probe_tasks(bench, settings)
    more: dict[str, Any] = {}
    if is_graduating:
        inputs = ProbeInputs(bench, settings, tasks)
        more = {"extras": inputs.fields, "heldout": heldout_demonstrations(settings, bench)}
        more["policy_scorer"] = PolicyScorer(bench)
        if probe.kl:
            more |= {"base_scorer": inputs.reference, "base_samples": inputs.reference_samples}
    prober = Prober(
        tasks,
        bench.verifier(settings.verifier),
        text=bench.text,
        seed=bench.config.seed,
        step=lambda: bench.steps_done(),
        n=max(probe.n, asked.min_samples if is_graduating else 1),
        max_new_tokens=probe.max_new_tokens or rollout.max_new_tokens,
        stop=rollout.stop,
        author="policy",
        **more,
    )
    out: list[Monitor] = [RegressionGate(probe=prober)] if settings.gate else []
    if is_graduating:
        thresholds = GraduationSettings(**asked.model_dump())
        out.append(GraduationMonitor(thresholds, probe=prober, every_steps=probe.every_steps))
    return tuple(out)
