"""The graduation criteria G1 to G9: is what imitation can give spent, and is there something for RL to take up?

Each is a pure function of a history of probes and gives a `Criterion`: value, 95% interval, threshold, verdict, and a
sentence. "pass" means the condition named in `title` holds. Entropies are nats; rates are fractions (1 point = 0.01).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from tutelage.monitors.entropy import balance_score
from tutelage.monitors.probe import Probe
from tutelage.numerics.statistics import (
    Estimate,
    all_same_by_task,
    bootstrap,
    fit_beta_binomial,
    mean_over_tasks,
    paired_gain,
    pass_at_k_by_task,
)

PASS, FAIL, INSUFFICIENT = "pass", "fail", "insufficient"


@dataclass(frozen=True, kw_only=True)
class GraduationSettings:
    """Thresholds, each with where it comes from. "Proposed" means: chosen here, checked against no published run."""

    min_tasks: int = 128
    """Probe prompts below which nothing but narrowing is decided. Proposed."""
    min_samples: int = 16
    """Samples a prompt below which nothing but narrowing is decided. Proposed."""
    entropy_ratio: float = 0.25
    """G1: entropy over its first value. The accuracy knee of RAFT++ on Qwen2.5-Math-7B (Xiong et al. 2025, figure)."""
    entropy_slope: float = 0.02
    """G1: largest change per probe, as a share of the first entropy. Same curve: holds from step 140."""
    slope_probes: int = 3
    """G1: probes the slope is fitted over."""
    ceiling_points: int = 5
    """G2: fewest probes for the fit R = b - a exp(H). Cui et al. 2025 (arXiv:2505.22617) predict from 36 steps."""
    ceiling_r2: float = 0.8
    """G2: least R^2 of that fit. Proposed; it is .965 on RAFT++'s first five points."""
    min_gain: float = 0.01
    """G2, G3: a gain not worth going on for (1 point). Proposed; RAFT++ gains 2.2 points in 20 steps before its
    knee and 0.2 after."""
    min_gain_of_first: float = 0.25
    """G3: the same as a share of the first probe's gain; the larger of the two counts. Proposed."""
    plateau_probes: int = 3
    """G3, G7: window, in probes. Proposed."""
    headroom: float = 0.10
    """G4: pass@k - pass@1 that leaves RL something to sharpen. Proposed."""
    coverage_k: int = 16
    """G4: the k of coverage; reduced to the samples a prompt has."""
    group: int = 8
    """G5: samples a prompt that RL will use."""
    min_mixed: float = 0.30
    """G5: least share of groups with both outcomes. Proposed."""
    max_same: float = 0.50
    """G5: most groups all wrong, and most all right. Proposed."""
    min_novelty: float = 0.05
    """G6: new solutions per accepted one. Proposed, after the 33B model of Yuan et al. 2023 (arXiv:2308.01825): many
    correct but few distinct paths, and no gain."""
    novelty_probes: int = 2
    """G6: probes in a row below it. Proposed."""
    balance_target: int = 8
    """G7: distinct correct solutions that are enough (n* in B-STaR's code, arXiv:2412.17256)."""
    last_checkpoints: int = 3
    """G8: probes among which the hand-over checkpoint is chosen. Proposed."""
    max_forward_kl: float | None = None
    """G9: most KL(base || policy), nats per token; None sets no limit (no published value carries over)."""
    agree: int = 2
    """Hysteresis: so many of the last `of` probes must say the same. Proposed."""
    of: int = 3
    """Hysteresis: probes looked at."""
    seed: int = 0
    """Of the bootstraps."""


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One criterion at one probe."""

    name: str
    title: str
    verdict: str
    """"pass" (the condition holds), "fail", or "insufficient" (this cannot be said yet)."""
    value: float | None = None
    ci95: tuple[float, float] | None = None
    threshold: float | None = None
    why: str = ""
    missing: str = ""
    """What would make it decidable; "" unless insufficient."""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool | None:
        """True, False, or None where it cannot be said."""
        return {PASS: True, FAIL: False, INSUFFICIENT: None}[self.verdict]

    def to_json(self) -> dict[str, Any]:
        ci = None if self.ci95 is None else list(self.ci95)
        return {**{f: getattr(self, f) for f in self.__dataclass_fields__}, "ci95": ci, "details": dict(self.details)}


def _decided(holds: bool) -> str:
    return PASS if holds else FAIL


def _ends(e: Estimate | None) -> tuple[float, float] | None:
    return None if e is None else (e.low, e.high)


# -- G1, G2: from the entropy and accuracy series alone -----------------------------------------


def entropy_spent(entropies: Sequence[float], s: GraduationSettings, *, ratio: Estimate | None = None) -> Criterion:
    """G1: H_now / H_first <= 0.25, and |slope| of the last 3 probes < 2% of H_first per probe (least squares)."""
    title = "entropy is spent"
    if not entropies:
        return Criterion(name="G1", title=title, verdict=INSUFFICIENT, missing="token entropies from the sampler")
    first, now = entropies[0], entropies[-1]
    value = now / first if first > 0 else 0.0
    common: dict[str, Any] = dict(name="G1", title=title, value=value, ci95=_ends(ratio), threshold=s.entropy_ratio)
    if value > s.entropy_ratio:
        why = f"entropy is {now:.3f} nats a token, {value:.0%} of its first {first:.3f}; {s.entropy_ratio:.0%} is spent"
        return Criterion(**common, verdict=FAIL, why=why)
    if len(entropies) < s.slope_probes:
        missing = f"{s.slope_probes} probes for the slope, there are {len(entropies)}"
        return Criterion(**common, verdict=INSUFFICIENT, missing=missing, why="the ratio is low; its slope is unknown")
    recent = np.asarray(entropies[-s.slope_probes :], dtype=np.float64)
    slope = float(np.polyfit(np.arange(len(recent)), recent, 1)[0]) / first if first > 0 else 0.0
    flat = abs(slope) < s.entropy_slope
    why = (
        f"entropy is {now:.3f} nats a token, {value:.0%} of its first {first:.3f}, and "
        f"{'flat' if flat else 'still moving'}: {slope:+.1%} of the first per probe over {s.slope_probes} probes "
        f"(flat is under {s.entropy_slope:.0%})"
    )
    return Criterion(**common, verdict=_decided(flat), why=why, details={"slope_share": slope, "entropy_nats": now})


def entropy_ceiling(
    entropies: Sequence[float], accuracies: Sequence[float], s: GraduationSettings, *, half_width: float = 0.0
) -> Criterion:
    """G2: what the entropy left can still buy, g = a (exp(H) - 1) from the fit R = b - a exp(H), is not worth having.

    Args:
        accuracies: pass@1 at each probe, as fractions.
        half_width: of the newest pass@1's interval; a gain smaller than that could not be seen.

    Source:
        Cui et al. 2025, arXiv:2505.22617. Only says when to stop imitating: on a GRPO curve the same fit promised 22
        points and 4 came. Their fit is to on-policy RL; training on another model's data breaks it.
    """
    title = "the entropy left buys no more accuracy"
    if len(entropies) < s.ceiling_points:
        missing = f"{s.ceiling_points} probes with entropies for the fit, there are {len(entropies)}"
        return Criterion(name="G2", title=title, verdict=INSUFFICIENT, missing=missing)
    x, y = np.exp(np.asarray(entropies, dtype=np.float64)), np.asarray(accuracies, dtype=np.float64)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        missing = "entropy and pass@1 that change between probes: both are constant in no fit"
        return Criterion(name="G2", title=title, verdict=INSUFFICIENT, missing=missing)
    fit = stats.linregress(x, y)
    a, b, r2 = -float(fit.slope), float(fit.intercept), float(fit.rvalue) ** 2
    gain, reach = a * (x[-1] - 1), float(stats.t.ppf(0.975, len(x) - 2)) * float(fit.stderr) * (x[-1] - 1)
    threshold = max(s.min_gain, half_width)
    common: dict[str, Any] = dict(
        name="G2",
        title=title,
        value=float(gain),
        ci95=(float(gain - reach), float(gain + reach)),
        threshold=threshold,
        details={"a": a, "b": b, "r2": r2, "ceiling": b - a},
    )
    if r2 < s.ceiling_r2 or a <= 0:
        missing = (
            f"a fit of accuracy against entropy with R^2 >= {s.ceiling_r2:g} and a > 0; it has {r2:.2f}, a = {a:.3g}"
        )
        return Criterion(**common, verdict=INSUFFICIENT, missing=missing, why="accuracy does not follow entropy here")
    why = (
        f"R = {b:.3f} - {a:.3f} exp(H) (R^2 {r2:.3f}) has its ceiling at {b - a:.1%}: {gain:.2%} are left, "
        f"{'less' if gain < threshold else 'no less'} than {threshold:.2%}"
    )
    return Criterion(**common, verdict=_decided(bool(gain < threshold)), why=why)


# -- from probes --------------------------------------------------------------------------------


def token_entropies(history: Sequence[Probe]) -> list[float] | None:
    """Token-averaged entropy of every probe; None if one of them has none."""
    values = [p.entropy.token_mean if p.entropy is not None else None for p in history]
    return [v for v in values if v is not None] if values and None not in values else None


def pass_values(probe: Probe, k: int) -> dict[str, float]:
    """Task id -> pass@k, for tasks with enough samples."""
    values = pass_at_k_by_task([t.n for t in probe.tasks], [t.c for t in probe.tasks], k)
    return {t.task_id: float(v) for t, v in zip(probe.tasks, values, strict=True) if not math.isnan(v)}


def pass_at(probe: Probe, k: int, *, seed: int = 0) -> Estimate | None:
    values = pass_values(probe, k)
    return mean_over_tasks(list(values.values()), seed=seed) if values else None


def pass_mean(probe: Probe, k: int) -> float | None:
    """Mean of pass@k over tasks, without an interval."""
    values = pass_values(probe, k)
    return sum(values.values()) / len(values) if values else None


def gain_between(before: Probe, after: Probe, k: int, *, seed: int = 0, level: float = 0.95) -> Estimate | None:
    """Paired gain in pass@k over the tasks that have it in both; None if there is none."""
    old, new = pass_values(before, k), pass_values(after, k)
    ids = old.keys() & new.keys()
    return paired_gain({i: old[i] for i in ids}, {i: new[i] for i in ids}, seed=seed, level=level) if ids else None


def entropy_ratio(first: Probe, now: Probe, *, seed: int = 0) -> Estimate | None:
    """H_now / H_first (token-averaged), resampled over the prompts that have entropies in both."""
    old = {t.task_id: t for t in first.tasks if t.entropy_tokens}
    both = [(old[t.task_id], t) for t in now.tasks if t.entropy_tokens and t.task_id in old]
    if not both or sum(o.entropy_nats for o, _ in both) <= 0:
        return None
    cols = np.array([(o.entropy_nats, o.entropy_tokens, n.entropy_nats, n.entropy_tokens) for o, n in both]).T

    def ratio(idx: Any) -> Any:
        h0, t0, h1, t1 = (col[idx].sum(axis=-1) for col in cols)
        return (h1 / t1) / np.maximum(h0 / t0, 1e-300)

    return bootstrap(ratio, len(both), value=float(ratio(np.arange(len(both)))), seed=seed)


def plateau(history: Sequence[Probe], s: GraduationSettings) -> Criterion:
    """G3: the gain in pass@1 over the last 3 probes has its upper 95% bound below the gain worth having."""
    title, w = "pass@1 has stopped rising", s.plateau_probes
    if len(history) < w + 1:
        missing = f"{w + 1} probes, there are {len(history)}"
        return Criterion(name="G3", title=title, verdict=INSUFFICIENT, missing=missing)
    gain, first = (gain_between(a, b, 1, seed=s.seed) for a, b in ((history[-1 - w], history[-1]), history[:2]))
    if gain is None:
        return Criterion(name="G3", title=title, verdict=INSUFFICIENT, missing="judged samples in both probes")
    threshold = max(s.min_gain, s.min_gain_of_first * first.value if first is not None else 0.0)
    common: dict[str, Any] = dict(name="G3", title=title, value=gain.value, ci95=_ends(gain), threshold=threshold)
    said = f"pass@1 changed by {gain.value:+.2%} [{gain.low:+.2%}, {gain.high:+.2%}] over {w} probes"
    if gain.high < threshold:
        return Criterion(**common, verdict=PASS, why=f"{said}: surely less than {threshold:.2%}")
    if gain.value >= threshold or gain.low > 0:
        return Criterion(**common, verdict=FAIL, why=f"{said}: it is still rising ({threshold:.2%} is worth having)")
    need = math.ceil(gain.count * ((gain.high - gain.value) / (threshold - gain.value)) ** 2)
    missing = f"about {need} probe prompts to tell {gain.value:+.2%} from {threshold:.2%}, there are {gain.count}"
    return Criterion(**common, verdict=INSUFFICIENT, why=f"{said}: too wide to tell", missing=missing)


def coverage_k(history: Sequence[Probe], s: GraduationSettings) -> int:
    """The k of coverage: `coverage_k`, or as many samples as every probe asked for."""
    return min([s.coverage_k, *(p.samples for p in history)])


def headroom(history: Sequence[Probe], s: GraduationSettings) -> Criterion:
    """G4: pass@k - pass@1 leaves RL something to sharpen."""
    title, k = "RL has something to sharpen", coverage_k(history, s)
    if k < 2:
        return Criterion(name="G4", title=title, verdict=INSUFFICIENT, missing="at least 2 samples a prompt")
    wide, one = pass_values(history[-1], k), pass_values(history[-1], 1)
    if not wide:
        missing = f"prompts with {k} judged samples, there are none"
        return Criterion(name="G4", title=title, verdict=INSUFFICIENT, missing=missing)
    e = mean_over_tasks([wide[i] - one[i] for i in wide], seed=s.seed)
    holds = e.value >= s.headroom
    why = f"pass@{k} is {e.value:.1%} [{e.low:.1%}, {e.high:.1%}] above pass@1; {s.headroom:.0%} is worth sharpening"
    details = {"k": k, "tasks_left_out": len(history[-1].tasks) - len(wide)}
    return Criterion(
        name="G4",
        title=title,
        verdict=_decided(holds),
        value=e.value,
        ci95=_ends(e),
        threshold=s.headroom,
        why=why,
        details=details,
    )


def narrowing(history: Sequence[Probe], s: GraduationSettings) -> Criterion:
    """Coverage has fallen: pass@k is below its best earlier value by more than chance.

    The best of m earlier probes is best partly by luck, so its comparison is made at level 1 - 0.05 / m (Bonferroni).
    """
    title, k = "coverage has fallen", coverage_k(history, s)
    means = [pass_mean(p, k) for p in history]
    earlier = [(m, i) for i, m in enumerate(means[:-1]) if m is not None]
    if not earlier or means[-1] is None:
        missing = f"two probes with prompts of {k} judged samples"
        return Criterion(name="narrowing", title=title, verdict=INSUFFICIENT, missing=missing)
    best = max(earlier)[1]
    level = 1 - 0.05 / len(earlier)
    change = gain_between(history[best], history[-1], k, seed=s.seed, level=level)
    if change is None:
        missing = f"prompts with {k} judged samples in both probes"
        return Criterion(name="narrowing", title=title, verdict=INSUFFICIENT, missing=missing)
    why = (
        f"pass@{k} is {means[-1]:.1%}, {change.value:+.1%} [{change.low:+.1%}, {change.high:+.1%}] from its "
        f"best, at step {history[best].step}"
    )
    return Criterion(
        name="narrowing",
        title=title,
        verdict=_decided(change.high < 0),
        value=change.value,
        ci95=_ends(change),
        threshold=0.0,
        why=why,
        details={"k": k, "best_step": history[best].step, "level": level},
    )


def group_signal(history: Sequence[Probe], s: GraduationSettings) -> Criterion:
    """G5: enough groups of RL's size have both outcomes; not more than half are all wrong, or all right.

    Shares are unbiased from c among n >= g samples; the beta-binomial fit's E[p^g + (1 - p)^g] stands beside them.
    """
    title, g, probe = "groups carry a signal for RL", s.group, history[-1]
    used = [(t.n, t.c) for t in probe.tasks if t.n >= g]
    if not used:
        missing = f"prompts with {g} judged samples, there are none"
        return Criterion(name="G5", title=title, verdict=INSUFFICIENT, missing=missing)
    wrong_P, right_P = all_same_by_task([n for n, _ in used], [c for _, c in used], g)
    mixed = mean_over_tasks(np.clip(1 - wrong_P - right_P, 0, 1), seed=s.seed)
    wrong, right = float(wrong_P.mean()), float(right_P.mean())
    fit = fit_beta_binomial([n for n, _ in used], [c for _, c in used])
    reasons = []
    if wrong > s.max_same:
        reasons.append("too many are all wrong: leave out prompts with no accepted sample, or close the knowledge gap")
    if right > s.max_same:
        reasons.append("too many are all right: bring new prompts")
    if mixed.value < s.min_mixed and not reasons:
        reasons.append("too few have both outcomes: choose prompts nearer to a half")
    why = f"of groups of {g}, {mixed.value:.0%} have both outcomes, {wrong:.0%} are all wrong, {right:.0%} all right"
    return Criterion(
        name="G5",
        title=title,
        verdict=_decided(not reasons),
        value=mixed.value,
        ci95=_ends(mixed),
        threshold=s.min_mixed,
        why=why + "".join(f"; {r}" for r in reasons),
        details={
            "all_wrong": wrong,
            "all_right": right,
            "all_same": 1 - mixed.value,
            "expected_all_wrong": fit.all_wrong(g),
            "expected_all_right": fit.all_right(g),
            "beta": [fit.a, fit.b],
            "group": g,
            "tasks_left_out": len(probe.tasks) - len(used),
        },
    )


def duplicates(probe: Probe, novelties: Sequence[float | None], s: GraduationSettings) -> Criterion:
    """G6: new accepted solutions are below 5% of the accepted ones for 2 probes: there is nothing new to imitate.

    Args:
        novelties: of every probe so far; the first probe's, against an empty history, is not looked at.
    """
    title, accepted = "accepted solutions are repeats", sum(t.c for t in probe.tasks)
    share = 1 - sum(t.distinct for t in probe.tasks) / accepted if accepted else None
    details = {"duplicate_share": share, "accepted": accepted}
    recent = [v for v in novelties[1:][-s.novelty_probes :] if v is not None]
    if len(recent) < s.novelty_probes:
        missing = f"{s.novelty_probes} probes after the first with accepted samples, there are {len(recent)}"
        value = recent[-1] if recent else None
        return Criterion(
            name="G6", title=title, verdict=INSUFFICIENT, value=value, missing=missing, details=details,
            threshold=s.min_novelty,
        )  # fmt: skip
    holds = all(v < s.min_novelty for v in recent)
    repeats = "" if share is None else f"; {share:.0%} of the accepted repeat another of their prompt"
    why = (
        f"new solutions per accepted one: {', '.join(f'{v:.1%}' for v in recent)} ({s.min_novelty:.0%} is few){repeats}"
    )
    return Criterion(
        name="G6",
        title=title,
        verdict=_decided(holds),
        value=recent[-1],
        threshold=s.min_novelty,
        why=why,
        details=details,
    )


def balance_flat(history: Sequence[Probe], s: GraduationSettings) -> Criterion:
    """G7: with the sampling temperature at its cap, the balance score has not changed for 3 probes beyond chance.

    The value is that change, over the window's probes so far; the score itself is in `details`.
    """
    title, w = "exploration and yield no longer change", s.plateau_probes
    recent = history[-w:]
    change = paired_gain(balance_by_task(recent[0], s), balance_by_task(recent[-1], s), seed=s.seed)
    common: dict[str, Any] = dict(
        name="G7",
        title=title,
        value=change.value,
        ci95=_ends(change),
        threshold=0.0,
        details={"balance": balance(history[-1], s).to_json()},
    )
    if len(recent) < w or any(p.at_temperature_cap is None for p in recent):
        unsaid = "a source that says whether its temperature is at its cap (in a run: probe.temperature_cap)"
        missing = f"{w} probes, there are {len(recent)}" if len(recent) < w else unsaid
        return Criterion(**common, verdict=INSUFFICIENT, missing=missing)
    if not all(p.at_temperature_cap for p in recent):
        why = "the sampling temperature has not been at its cap for so long: raise it before giving up"
        return Criterion(**common, verdict=FAIL, why=why)
    flat = change.low <= 0 <= change.high
    why = (
        f"the balance score changed by {change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}] over {w} probes "
        f"at the temperature cap: {'flat' if flat else 'still moving'}"
    )
    return Criterion(**common, verdict=_decided(flat), why=why)


def balance_by_task(probe: Probe, s: GraduationSettings) -> dict[str, float]:
    return {t.task_id: balance_score(t.distinct, t.c, target=s.balance_target) for t in probe.tasks}


def balance(probe: Probe, s: GraduationSettings) -> Estimate:
    """B-STaR's balance score, mean over prompts; its interval."""
    return mean_over_tasks(list(balance_by_task(probe, s).values()), seed=s.seed)


def hand_over(history: Sequence[Probe], s: GraduationSettings) -> Criterion:
    """G8: the checkpoint to go on from: lowest held-out NLL, else highest pass@k, of the last probes; never pass@1.

    Source:
        2510.01624 (Quagmires): a better SFT score may start a worse RL run; held-out loss and pass@large-k predict it.
    """
    title, k = "a checkpoint to hand over", coverage_k(history, s)
    recent = list(history[-s.last_checkpoints :])
    covered = {i: mean for i, p in enumerate(recent) if (mean := pass_mean(p, k)) is not None}
    nlls = {i: p.heldout_nll for i, p in enumerate(recent) if p.heldout_nll is not None}
    if len(nlls) == len(recent):
        at = min(nlls, key=lambda i: (nlls[i].value, -covered.get(i, 0.0), -i))
        chosen, by, unit = recent[at].heldout_nll, "lowest held-out NLL", " nats a token"
    elif covered:
        at = max(covered, key=lambda i: (covered[i], i))
        chosen, by, unit = pass_at(recent[at], k, seed=s.seed), f"highest pass@{k}", ""
    else:
        missing = f"held-out demonstrations, or prompts with {k} judged samples"
        return Criterion(name="G8", title=title, verdict=INSUFFICIENT, missing=missing)
    assert chosen is not None  # `at` is one of those that have it
    probe = recent[at]
    why = f"step {probe.step} has the {by} of the last {len(recent)} probes: {chosen.value:.3f}{unit}"
    details = {"step": probe.step, "checkpoint": probe.checkpoint, "version": probe.version, "by": by}
    return Criterion(
        name="G8", title=title, verdict=PASS, value=chosen.value, ci95=_ends(chosen), why=why, details=details
    )


def drift(history: Sequence[Probe], s: GraduationSettings) -> Criterion:
    """G9: nothing the base model could do is measurably lost, and KL(base || policy) is within its limit, if any."""
    title, probe = "the base model's abilities are kept", history[-1]
    lost = {name: e for name, e in probe.retention.items() if e.high < 0}
    kls = {"forward": probe.kl_forward, "reverse": probe.kl_reverse}
    said = [f"{name} KL {e.value:.4f} nats a token" for name, e in kls.items() if e is not None]
    said += [f"{name} {e.value:+.1%} [{e.low:+.1%}, {e.high:+.1%}]" for name, e in probe.retention.items()]
    worst = min(probe.retention.values(), key=lambda e: e.value, default=None)
    far = s.max_forward_kl is not None and probe.kl_forward is not None and probe.kl_forward.value > s.max_forward_kl
    limited = s.max_forward_kl is not None and probe.kl_forward is not None
    common: dict[str, Any] = dict(
        name="G9",
        title=title,
        value=None if worst is None else worst.value,
        ci95=_ends(worst),
        threshold=0.0 if worst is not None else None,
        why="; ".join(said),
        details={
            **{f"kl_{name}": None if e is None else {**e.to_json(), "unit": "nats/token"} for name, e in kls.items()},
            "retention": {name: e.to_json() for name, e in probe.retention.items()},
            "lost": sorted(lost),
            "max_forward_kl": s.max_forward_kl,
        },
    )
    if lost or far:
        return Criterion(**common, verdict=FAIL)
    if not probe.retention and not limited:
        return Criterion(**common, verdict=INSUFFICIENT, missing="a retention set, or a limit on the forward KL")
    return Criterion(**common, verdict=PASS)
