"""Which gap is it? Splits a task set into knowledge, format, execution, exposure, exploration and saturated, with
intervals, and says what each part calls for. Never one label: every share is reported, and what the measurements cannot
tell is a share of its own ("unknown"), with what would tell it.

Axis letters: P prompts, R resamples.

How a prompt is placed (p, t, e: solve rates of the student, of a teacher, of the student helped):

    student solves it almost always (p >= 0.9)                       saturated
    student almost never solves it (p < 3/64)
        few-shot or fixed format lifts it by 0.2                     format        (elicitation, not knowledge)
        low KL on the teacher's prefixes, errors accumulate          exposure
        the teacher is better by 0.1, or a hint lifts it by 0.2      knowledge     (elicitation ruled out, KL not low)
        the teacher is no better                                     exploration
    student solves it sometimes
        low KL on the teacher's prefixes, errors accumulate          exposure
        teacher no better by 0.2, or none, or KLs rule exposure out  execution     (pass@k far above pass@1)
        teacher better by 0.2 and no KLs                             unknown       (execution or exposure)

Rates are not known, counts are: each resample draws prompts with replacement and, for each, rates from their Jeffreys
posteriors Beta(c + 1/2, n - c + 1/2). The shares' intervals are percentiles over resamples, which hold the choice of
prompts and the noise of their samples.

Source: thresholds are proposed here; the patterns are from SFT, distillation and RL reports (docs/evaluation.md). The
3/64 is the rule of three: 0 of 64 bounds a rate below 3/64 with 95% confidence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tutelage.errors import DataError
from tutelage.numerics.statistics import Estimate, jeffreys

LABELS = ("knowledge", "format", "execution", "exposure", "exploration", "saturated", "unknown")
KNOWLEDGE, FORMAT, EXECUTION, EXPOSURE, EXPLORATION, SATURATED, UNKNOWN = range(len(LABELS))
METHODS: Mapping[str, str] = {
    "knowledge": "SFT or off-policy distillation on teacher traces; without a teacher, STaR with hints or a "
    "curriculum. RL gets no gradient here",
    "format": "SFT on a few hundred curated examples",
    "execution": "rejection sampling (distinct, capped per prompt, all-right groups dropped) until the graduation "
    "monitor fires, then RL",
    "exposure": "on-policy distillation or DAgger; with a black-box teacher, rejection sampling from the student and "
    "from teacher-continued prefixes",
    "exploration": "RL with exploration, or search: imitation cannot help",
    "saturated": "new tasks, or a better teacher",
    "unknown": "measure what is missing first",
}
"""What each part calls for. Cost rises from SFT over rejection sampling and on-policy distillation to RL."""

Bools = NDArray[np.bool_]
Rates = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DiagnosisSettings:
    """Thresholds of the table in the module's docstring. Proposed here, checked against no published diagnosis."""

    unsolved_below: float = 3 / 64
    """Solve rate below which a prompt counts as never solved."""
    saturated_above: float = 0.9
    """Solve rate above which nothing is left to gain."""
    elicited: float = 0.2
    """Rise in solve rate that help must bring."""
    teacher_better: float = 0.1
    """Teacher's margin on a prompt the student never solves."""
    teacher_margin: float = 0.2
    """Teacher's margin on a prompt the student sometimes solves, above which exposure must be ruled out."""
    low_kl: float = 0.1
    """KL(teacher || student) on the teacher's prefixes, nats per token, below which the student knows what to do."""
    excess_error: float = 1.0
    """Accumulated error over the error per step, (own-prefix KL - teacher-prefix KL) / teacher-prefix KL: exposure."""
    recovery: float = 0.5
    """Rate at which the teacher, continuing the student's failing prefixes, must still succeed, if measured."""
    cost_slope: float = 1.5
    """Slope of log cost over log length, where it was measured: 1 is independent errors per step, 2 is compounding."""
    resamples: int = 1000
    seed: int = 0


Count = tuple[int, int]
"""(samples judged, samples accepted)."""


@dataclass(frozen=True, kw_only=True)
class PromptMeasures:
    """What was measured on one prompt. Leave out what was not: less can then be said, and nothing is guessed."""

    task_id: str
    student: Count
    """(n, c) at temperature 1; n of 64 or more tells "never" from "seldom"."""
    cluster: str = "default"
    """Sub-population: the split is also given for each."""
    teacher: Count | None = None
    """(n, c) of the teacher; 8 or more."""
    few_shot: Count | None = None
    """(n, c) of the student with worked examples in the prompt."""
    format_fixed: Count | None = None
    """(n, c) of the student with its answers' format repaired or constrained."""
    hint: Count | None = None
    """(n, c) of the student with a hint at the solution."""
    kl_teacher_prefix: float | None = None
    """KL(teacher || student) on the teacher's own prefixes, nats per token."""
    kl_student_prefix: float | None = None
    """The same on the student's prefixes, nats per token."""
    recovery: Count | None = None
    """(n, c) of the teacher continuing the student's failing prefixes."""
    cost_slope: float | None = None
    """Slope of log cost over log horizon for the prompt's cluster."""

    def __post_init__(self) -> None:
        for name in ("student", "teacher", "few_shot", "format_fixed", "hint", "recovery"):
            count = getattr(self, name)
            if count is not None and not 0 <= count[1] <= count[0]:
                raise DataError(
                    f"{name} of prompt {self.task_id!r} needs (judged, accepted), 0 <= accepted <= judged; got {count}"
                )


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The split of one task set."""

    shares: Mapping[str, Estimate]
    """Label -> share of prompts. They sum to 1."""
    clusters: Mapping[str, Mapping[str, Estimate]]
    """The same within each cluster."""
    prompts: Mapping[str, Mapping[str, float]]
    """Prompt -> how likely each label is, given its counts. Labels below 1% are left out."""
    intervals: Mapping[str, Estimate]
    """Prompt -> the student's solve rate with its Jeffreys interval; prompts without a judged sample are left out."""
    missing: Mapping[str, int]
    """Measurement -> number of prompts placed (partly) in "unknown" for want of it."""

    def rows(self) -> list[tuple[str, float, tuple[float, float], str]]:
        """(label, share, 95% interval, method) of every label, largest first, for a text table."""
        order = sorted(self.shares.items(), key=lambda item: -item[1].value)
        return [(name, e.value, (e.low, e.high), METHODS[name]) for name, e in order]

    def sentence(self) -> str:
        """The split in one line."""
        return ", ".join(f"{100 * e.value:.0f}% {name}" for name, e in self.shares.items())

    def to_json(self) -> dict[str, Any]:
        def split(shares: Mapping[str, Estimate]) -> dict[str, Any]:
            return {name: {**e.to_json(), "method": METHODS[name]} for name, e in shares.items()}

        return {
            "shares": split(self.shares),
            "clusters": {name: split(shares) for name, shares in self.clusters.items()},
            "prompts": {name: dict(p) for name, p in self.prompts.items()},
            "solve_rates": {name: e.to_json() for name, e in self.intervals.items()},
            "missing": dict(self.missing),
        }


def diagnose(prompts: Sequence[PromptMeasures], settings: DiagnosisSettings | None = None) -> Diagnosis:
    """The split over prompts, with bootstrap intervals, by the table in the module's docstring.

    Raises:
        DataError: there is no prompt, or an id is repeated.
    """
    s = settings or DiagnosisSettings()
    ids = [p.task_id for p in prompts]
    if not ids or len(set(ids)) != len(ids):
        raise DataError(f"a diagnosis needs at least one prompt and unique ids; got {len(ids)}, {len(set(ids))} unique")
    rng = np.random.default_rng(s.seed)
    labels_RP = _labels(prompts, s, rng)
    clusters: dict[str, list[int]] = {}
    for i, p in enumerate(prompts):
        clusters.setdefault(p.cluster, []).append(i)
    likely_PL = np.stack([(labels_RP == label).mean(axis=0) for label in range(len(LABELS))], axis=1)
    likely = {
        p.task_id: {LABELS[j]: float(x) for j, x in enumerate(row) if x >= 0.01}
        for p, row in zip(prompts, likely_PL, strict=True)
    }
    return Diagnosis(
        shares=_shares(labels_RP, likely_PL, rng),
        clusters={name: _shares(labels_RP[:, rows], likely_PL[rows], rng) for name, rows in clusters.items()},
        prompts=likely,
        intervals={p.task_id: jeffreys(p.student[1], p.student[0]) for p in prompts if p.student[0] > 0},
        missing=_missing(prompts, likely_PL, s),
    )


def _shares(labels_RP: NDArray[np.int64], likely_PL: Rates, rng: np.random.Generator) -> dict[str, Estimate]:
    resamples, count = labels_RP.shape
    columns_RP = rng.integers(0, count, size=(resamples, count))
    drawn_RP = np.take_along_axis(labels_RP, columns_RP, axis=1)
    shares = {}
    for label, name in enumerate(LABELS):
        share_R = (drawn_RP == label).mean(axis=1)
        low, high = np.quantile(share_R, [0.025, 0.975])
        value = float(likely_PL[:, label].mean())
        if low == high:  # every resample agrees: what P equal observations still allow (see mean_over_tasks)
            q = 1 - 0.025 ** (1 / count)
            low, high = value * (1 - q), value + q * (1 - value)
        low, high = min(float(low), value), max(float(high), value)
        shares[name] = Estimate(value=value, low=low, high=high, count=count, method="percentile")
    return shares


def _labels(prompts: Sequence[PromptMeasures], s: DiagnosisSettings, rng: np.random.Generator) -> NDArray[np.int64]:
    """(R, P) a label for each prompt under each draw of the rates."""

    def rates(name: str) -> tuple[Rates, Bools]:
        """(R, P) posterior draws, and (P,) where it was measured."""
        counts = [getattr(p, name) or (0, 0) for p in prompts]
        n, c = (np.array(col, dtype=np.float64) for col in zip(*counts, strict=True))
        return rng.beta(c + 0.5, n - c + 0.5, size=(s.resamples, len(prompts))), n > 0

    p_RP, sampled = rates("student")
    t_RP, has_teacher = rates("teacher")
    lifts, tried = [], []
    for name in ("few_shot", "format_fixed", "hint"):
        e_RP, measured = rates(name)
        lifts.append(measured & (e_RP - p_RP >= s.elicited))
        tried.append(measured)
    elicited_RP, has_elicitation = lifts[0] | lifts[1], tried[0] | tried[1]
    exposure_RP, has_exposure = _exposure(prompts, s, rates("recovery"))
    margin_RP = t_RP - p_RP

    unsolved_RP, saturated_RP = p_RP < s.unsolved_below, p_RP >= s.saturated_above
    follows = np.array([p.kl_teacher_prefix is not None and p.kl_teacher_prefix < s.low_kl for p in prompts])
    better_RP = (has_teacher & (margin_RP >= s.teacher_better)) | lifts[2]
    labels = np.full(p_RP.shape, UNKNOWN, dtype=np.int64)
    # Later lines win over earlier ones, so the strongest evidence stands last.
    labels[unsolved_RP & has_teacher & has_elicitation & ~better_RP] = EXPLORATION
    labels[unsolved_RP & has_elicitation & better_RP & ~follows] = KNOWLEDGE
    labels[unsolved_RP & has_exposure & exposure_RP] = EXPOSURE
    labels[unsolved_RP & elicited_RP] = FORMAT
    sometimes_RP = ~unsolved_RP & ~saturated_RP
    near_RP = ~has_teacher | (margin_RP < s.teacher_margin)
    labels[sometimes_RP & (near_RP | has_exposure)] = EXECUTION
    labels[sometimes_RP & has_exposure & exposure_RP] = EXPOSURE
    labels[saturated_RP] = SATURATED
    labels[:, ~sampled] = UNKNOWN
    return labels


def _exposure(
    prompts: Sequence[PromptMeasures], s: DiagnosisSettings, recovery: tuple[Rates, Bools]
) -> tuple[Bools, Bools]:
    """(R, P) whether the pattern of exposure holds, and (P,) whether the KLs it needs were measured.

    Excess accumulated error (Arora et al. 2022, as a ratio): (r - e) / e, with e and r the KL per token on the
    teacher's and on the student's prefixes. Recovery and slope must agree where they were measured.
    """

    def column(name: str) -> Rates:
        return np.array([np.nan if getattr(p, name) is None else getattr(p, name) for p in prompts], dtype=np.float64)

    e, r, slope = (column(name) for name in ("kl_teacher_prefix", "kl_student_prefix", "cost_slope"))
    known = np.isfinite(e) & np.isfinite(r)
    excess = np.where(known, (r - e) / np.maximum(e, 1e-9), 0.0)
    pattern = known & (np.where(known, e, np.inf) < s.low_kl) & (excess >= s.excess_error)
    pattern &= ~np.isfinite(slope) | (np.where(np.isfinite(slope), slope, 0.0) >= s.cost_slope)
    recovery_RP, has_recovery = recovery
    return pattern & (~has_recovery | (recovery_RP >= s.recovery)), known


def _missing(prompts: Sequence[PromptMeasures], likely_PL: Rates, s: DiagnosisSettings) -> dict[str, int]:
    """What the prompts that are unknown (by 5% or more) lack."""
    counts: dict[str, int] = {}
    for p, row in zip(prompts, likely_PL, strict=True):
        if row[UNKNOWN] < 0.05:
            continue
        lacks = []
        if p.student[0] == 0:
            lacks.append("judged samples of the student")
        else:
            if p.student[0] < 64 and p.student[1] == 0:
                lacks.append("64 samples of the student")
            seldom = p.student[1] < s.unsolved_below * p.student[0] or p.student[1] == 0
            if seldom and p.few_shot is None and p.format_fixed is None:
                lacks.append("a few-shot or format-fixed run")
            if seldom and p.teacher is None:
                lacks.append("samples of a teacher")
            if not seldom and (p.kl_teacher_prefix is None or p.kl_student_prefix is None):
                lacks.append("KL to the teacher on its own and on the student's prefixes")
        for name in lacks:
            counts[name] = counts.get(name, 0) + 1
    return counts


@dataclass(frozen=True, kw_only=True)
class Slope:
    """log cost against log horizon."""

    value: float
    low: float
    high: float
    reading: str = field(default="")
    """What it says: errors compound (near 2), or each step errs by itself (near 1)."""


def cost_slope(horizons: Sequence[float], costs: Sequence[float]) -> Slope:
    """Slope of log cost over log horizon (least squares, 95% t interval): 1 for independent errors, 2 if they compound.

    The square is a worst case: it needs no recovery off the demonstrated states, and few errors in all (eps T << 1).

    Raises:
        DataError: fewer than 3 points, or one that is not positive.
    """
    from scipy import stats

    if len(horizons) != len(costs) or len(horizons) < 3 or min(*horizons, *costs) <= 0:
        raise DataError(
            f"a cost slope needs at least 3 positive horizons and costs, got {len(horizons)} and {len(costs)} with "
            f"smallest {min([*horizons, *costs], default=float('nan'))}"
        )
    fit = stats.linregress(np.log(horizons), np.log(costs))
    reach = float(stats.t.ppf(0.975, len(horizons) - 2)) * float(fit.stderr)
    slope = float(fit.slope)
    low, high = slope - reach, slope + reach
    if low > 1.25:
        reading = "errors compound with length: on-policy data helps"
    elif high < 1.75:
        reading = (
            "errors come step by step: better data or a larger model helps, on-policy data gives no asymptotic gain"
        )
    else:
        reading = "the interval allows both compounding and independent errors: measure more lengths"
    return Slope(value=slope, low=low, high=high, reading=reading)
