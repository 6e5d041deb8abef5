"""Claim 11: watch entropy, then graduate. What does handing over to RL save, and does the monitor find the moment?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tutelage.claims.base import Claim, Numbers, Prediction, Predictions
from tutelage.claims.choices import World, copy_of, logits, network, prompts, reinforce, sample, score, weak_base
from tutelage.monitors.entropy import LOW_ENTROPY_NATS, EntropyStats
from tutelage.monitors.graduation import GRADUATE, STOP_NARROWING, GraduationMonitor
from tutelage.monitors.probe import Probe, TaskProbe
from tutelage.numerics import entropy
from tutelage.types import content_hash, seed_for


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the experiment is."""

    prompts: int = 256
    batch: int = 64
    iterations: int = 800
    updates: int = 4
    """On each batch while imitating; RL makes one."""
    lr: float = 1e-3
    switches: tuple[int, ...] = (0, 100, 200, 400, 800)
    probe_every: int = 40
    probe_prompts: int = 128
    probe_samples: int = 16
    wide_prompts: int = 512
    """Of a second monitor's probe, which shows what more evidence would have said."""
    held_out: int = 1000


def probe_of(policy: nn.Module, world: World, prompts_PD: torch.Tensor, *, seed: int, step: int, samples: int) -> Probe:
    """What a run's prober would see: samples at temperature 1, counted by prompt, with exact token entropies."""
    generator = torch.Generator().manual_seed(seed_for(seed, "probe") % 2**31)
    with torch.no_grad():
        logits_PSV = logits(policy, prompts_PD)
    answers_PGS = sample(logits_PSV, samples, generator)
    is_right_PG = world.is_right(prompts_PD, answers_PGS).tolist()
    entropy_PS = entropy(logits_PSV)
    tasks = []
    for p, (answers, is_right) in enumerate(zip(answers_PGS.tolist(), is_right_PG, strict=True)):
        keys = tuple(content_hash(p, a) for a, ok in zip(answers, is_right, strict=True) if ok)
        tasks.append(
            TaskProbe(
                task_id=str(p),
                n=samples,
                c=len(keys),
                distinct=len(set(keys)),
                keys=keys,
                entropy_nats=float(entropy_PS[p].sum()) * samples,
                entropy_tokens=entropy_PS.shape[1] * samples,
            )
        )
    values = np.repeat(entropy_PS.flatten().numpy(), samples)
    stats = EntropyStats(
        token_mean=float(values.mean()),
        sequence_mean=float(values.mean()),
        p80=float(np.quantile(values, 0.8)),
        low_share=float((values < LOW_ENTROPY_NATS).mean()),
        monte_carlo=None,
        gap=None,
        num_tokens=values.size,
        num_sequences=len(tasks) * samples,
        num_unknown=0,
    )
    return Probe(step=step, tasks=tuple(tasks), samples=samples, entropy=stats)


class Watcher:
    """A graduation monitor beside a run: when it would have stopped imitation, and with which verdict."""

    def __init__(self, prompts_PD: torch.Tensor, iterations: int) -> None:
        self.prompts_PD, self.stopped, self.verdict = prompts_PD, iterations, "never"
        self.monitor = GraduationMonitor()

    def look(self, policy: nn.Module, world: World, *, seed: int, step: int, samples: int) -> None:
        """Probe, unless it has said stop before."""
        if self.verdict == "never":
            report = self.monitor.update(
                probe_of(policy, world, self.prompts_PD, seed=seed, step=step, samples=samples)
            )
            if report.should_stop:
                self.stopped, self.verdict = step, report.verdict


class Run:
    """Imitation by RAFT up to a switch, then GRPO, from one base on one fixed set of prompts."""

    def __init__(self, seed: int, size: Size) -> None:
        self.seed, self.size, self.world = seed, size, World.of(seed)
        self.base = weak_base(seed, self.world, until=0.035)
        generator = torch.Generator().manual_seed(seed_for(seed, "prompts") % 2**31)
        self.held_PD, self.probe_PD = prompts(size.held_out, generator), prompts(size.probe_prompts, generator)
        self.fixed_PD = prompts(size.prompts, generator)
        wide = torch.Generator().manual_seed(seed_for(seed, "wide probe") % 2**31)
        self.wide_PD = prompts(size.wide_prompts, wide)

    def watchers(self) -> list[Watcher]:
        """A monitor with as few prompts as it decides on, and one with more."""
        return [Watcher(self.probe_PD, self.size.iterations), Watcher(self.wide_PD, self.size.iterations)]

    def monitored(self, *, switch: int, watchers: Sequence[Watcher] = ()) -> dict[str, float]:
        """Final numbers of a run that switches at a step; monitors watch its imitation, without acting."""
        size = self.size
        policy = copy_of(self.base, lambda: network(self.seed))
        optimizer = torch.optim.Adam(policy.parameters(), lr=size.lr)
        generator = torch.Generator().manual_seed(seed_for(self.seed, "samples") % 2**31)
        for step in range(size.iterations):
            for w in watchers if step % size.probe_every == 0 else ():
                w.look(policy, self.world, seed=self.seed, step=step, samples=size.probe_samples)
            chosen = torch.randperm(size.prompts, generator=generator)[: size.batch]
            is_imitating = step < switch
            reinforce(
                policy,
                optimizer,
                self.world,
                self.fixed_PD[chosen],
                generator,
                arm="raft" if is_imitating else "grpo",
                updates=size.updates if is_imitating else 1,
            )
        s = score(policy, self.world, self.held_PD)
        ks = (1, 2, 4, 8, 16, 32, 64)
        return {"pass1": s.pass_at(1), "pass64": s.pass_at(64), "mean_pass": sum(map(s.pass_at, ks)) / len(ks)}


def measure(seed: int, size: Size = Size()) -> Numbers:
    """Final numbers of every switch, and of the step at which the monitor would have stopped imitation."""
    run = Run(seed, size)
    few, wide = watchers = run.watchers()
    never = run.monitored(switch=size.iterations, watchers=watchers)
    finals = {size.iterations: never}
    for switch in size.switches:
        if switch not in finals:
            finals[switch] = run.monitored(switch=switch)
    start, at_switch = finals[0], dict(finals)
    for w in watchers:
        if w.stopped not in at_switch:
            at_switch[w.stopped] = run.monitored(switch=w.stopped)
    chosen = at_switch[few.stopped]
    planned = finals[size.switches[len(size.switches) // 2]]
    out = {f"{what}_switch_{s}": finals[s][what] for s in sorted(finals) for what in ("pass1", "pass64", "mean_pass")}
    return {
        **out,
        "coverage_saved_at_200": planned["pass64"] - never["pass64"],
        "pass1_gained_at_200": planned["pass1"] - never["pass1"],
        "pass1_of_imitating_first": planned["pass1"] - start["pass1"],
        "monitor_step": float(few.stopped),
        "monitor_stopped": float(few.stopped < size.iterations),
        "monitor_said_graduate": float(few.verdict == GRADUATE),
        "monitor_said_narrowing": float(few.verdict == STOP_NARROWING),
        "monitor_pass1": chosen["pass1"],
        "monitor_pass64": chosen["pass64"],
        "monitor_coverage_saved": chosen["pass64"] - never["pass64"],
        "monitor_pass1_regret": max(f["pass1"] for f in finals.values()) - chosen["pass1"],
        "monitor_mean_pass_regret": max(f["mean_pass"] for f in finals.values()) - chosen["mean_pass"],
        "wide_monitor_step": float(wide.stopped),
        "wide_monitor_stopped": float(wide.stopped < size.iterations),
        "wide_monitor_said_graduate": float(wide.verdict == GRADUATE),
        "wide_monitor_coverage_saved": at_switch[wide.stopped]["pass64"] - never["pass64"],
        "wide_monitor_pass1_regret": max(f["pass1"] for f in finals.values()) - at_switch[wide.stopped]["pass1"],
    }


CLAIM = Claim(
    name="graduation",
    number=11,
    line="watch entropy, and graduate to RL when it collapses: what that saves, and whether the monitor sees when",
    source="the chapter, after Xiong et al. 2025, arXiv:2504.11343; thresholds of docs/graduation.md",
    design=(
        "The network and 256 fixed prompts of claim 9. RAFT (4 clipped updates a batch) for the first s of 800 "
        "batches, then GRPO (one update), s = 0, 100, 200, 400, or 800, which is never. The library's graduation "
        "monitor, as it comes, watches the run that never switches: 128 held-out prompts, 16 samples each, every 40 "
        "batches; its switch is the first settled verdict that ends imitation. Predicted: graduating at 200 ends "
        "with more than 0.02 more held-out pass@64 than never, and loses less than 0.02 of pass@1; the monitor "
        "stops imitation in every seed, saves more than 0.02 of pass@64, and is less than 0.02 behind the best "
        "switch in hindsight in pass@1 and in pass@k averaged over k = 1, 2, 4, ... 64. Not matched in updates. "
        "Reported beside it: the same monitor with 512 prompts."
    ),
    measure=measure,
    judge=Predictions(
        Prediction(name="coverage_saved_at_200", what="pass@64, switch at 200 minus never", above=0.02),
        Prediction(name="pass1_gained_at_200", what="pass@1, switch at 200 minus never", above=-0.02),
        Prediction(name="monitor_stopped", what="share of seeds where the monitor stops imitation", above=0.99),
        Prediction(name="monitor_coverage_saved", what="pass@64, monitor's switch minus never", above=0.02),
        Prediction(name="monitor_pass1_regret", what="pass@1, best switch minus the monitor's", below=0.02),
        Prediction(name="monitor_mean_pass_regret", what="mean pass@k, best switch minus the monitor's", below=0.02),
    ),
    seeds=tuple(range(12)),
    minutes=4.0,
)
