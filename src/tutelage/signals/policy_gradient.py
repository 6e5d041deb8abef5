"""The policy gradient: sampled tokens pushed up or down by how their completion compares with its group.

Dimension letters:  C  targets of a chunk   V  vocabulary
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tutelage.errors import ConfigError, DataError
from tutelage.numerics.advantages import all_same, group_advantages
from tutelage.numerics.logprobs import target_logprobs
from tutelage.numerics.policy_gradient import clipped_ratio_loss, reinforce_loss, sampled_reverse_kl, sampler_weight
from tutelage.signals.base import Stateless
from tutelage.signals.ratio_stats import RatioStats, ratio_metrics
from tutelage.signals.routing import Router
from tutelage.signals.sampled import behaviour_scores, gap_stats, student_scores, teacher_scores
from tutelage.signals.shapes import shape_columns, shaped
from tutelage.types import Draw, Group, Status, TargetRow, Targets, Trajectory

Advantage = Literal["reinforce", "reinforce_rej", "raft", "accepted", "rloo", "grpo", "grpo_no_std"]
Normalise = Literal["tokens", "sequence_means", "sequences"]
Reward = Literal["accepted", "signed", "score"]
Truncated = Literal["keep", "mask", "drop"]


class PolicyGradient(Stateless):
    """Reinforce, Reinforce-Rej, RLOO, GRPO and RAFT++: one objective, told apart by the advantage.

    loss_t = -w * min(s * A, clip(s, 1 - low, 1 + high) * A) + kl_coef * (s * sg(log p_student - log p_base))
    s = p_student / p_old,  w = min(p_old / p_sampler, sampler_cap)

    `old` is recomputed by the trainer before the first update of a draw. Without `clip` the first term is
    -w * A * log p_student, exact on the first update after a draw. RAFT++ is advantage "raft" with a clip.

    A completion whose verdict is an error leaves its group's statistics, the loss and the divisor. One whose advantage
    is 0 counts in the divisor. So does one that a keep rule gave weight 0, and its group's statistics see it; a group
    whose every weight is 0 is no part of the step.

    Args:
        advantage: of each completion within its prompt's group (`numerics.advantages`).
        reward: "accepted" is 1 or 0, "signed" is 1 or -1, "score" is the verifier's number (1 or 0 where it has none).
        clip: how far the ratio may go below and above 1, e.g. (0.2, 0.28) for clip-higher; None uses no ratio.
        dual_clip: with negative advantages, largest multiple of |A| that the loss may reach.
        normalise: what a step is averaged over. "tokens": all sampled tokens of the step (long completions count
            more); "sequence_means": completions, each the mean over its tokens (GRPO's paper; short ones are pushed
            harder per token); "sequences": completions, each the sum over its tokens (the gradient of the expected
            reward itself).
        truncated: completions cut by their length limit: "keep" treats them like any other; "mask" leaves them in the
            baseline and trains nothing on them; "drop" leaves them out of the baseline too. Neither counts in the
            divisor.
        sampler_cap: largest weight that corrects the sampler to the trainer; None leaves the correction out.
        recompute: False takes the weights at the update as `old`: one forward cheaper, right only where every draw is
            used for one update, and refused with a clip, which would never act.
        ddof: 0 divides GRPO's variance by the group's size, 1 by one less.
        eps: added to GRPO's std.
        kl_coef: weight of the KL to `base`, graded token by token given its prefix.
        base: scores tokens under the base model; needed where kl_coef is not 0.

    Raises:
        ConfigError: unknown names or numbers out of range, all together.

    Source:
        Williams 1992; Xiong et al. 2025, arXiv:2504.11343 (reinforce_rej, RAFT++); Ahmadian et al. 2024,
        arXiv:2402.14740 (RLOO); Shao et al. 2024, arXiv:2402.03300 (GRPO); Liu et al. 2025, arXiv:2503.20783
        (without std); Yu et al. 2025, arXiv:2503.14476 (clip-higher, tokens, truncated completions masked).
    """

    def __init__(
        self,
        advantage: Advantage = "grpo",
        *,
        reward: Reward = "accepted",
        clip: tuple[float, float] | None = (0.2, 0.2),
        dual_clip: float | None = None,
        normalise: Normalise = "tokens",
        truncated: Truncated = "mask",
        sampler_cap: float | None = 2.0,
        recompute: bool = True,
        ddof: int = 0,
        eps: float = 0.0,
        kl_coef: float = 0.0,
        base: Any = None,
    ) -> None:
        self.advantage, self.reward, self.clip, self.dual_clip = advantage, reward, clip, dual_clip
        self.normalise, self.truncated, self.sampler_cap = normalise, truncated, sampler_cap
        self.recompute, self.ddof, self.eps, self.kl_coef = recompute, ddof, eps, kl_coef
        problems = self._problems(base)
        if problems:
            raise ConfigError(problems)
        self.router = Router(base) if kl_coef else None
        self.ratios = RatioStats()
        self.divisor = "sampled" if normalise == "tokens" else "sequences"

    def _problems(self, base: Any) -> list[str]:
        out = []
        for name, value, known in (
            ("advantage", self.advantage, Advantage),
            ("reward", self.reward, Reward),
            ("normalise", self.normalise, Normalise),
            ("truncated", self.truncated, Truncated),
        ):
            if value not in known.__args__:  # type: ignore[attr-defined]
                out.append(f"{name} must be one of {', '.join(known.__args__)}; got {value!r}")  # type: ignore[attr-defined]
        if self.clip is not None and not (0 <= self.clip[0] <= 1 and self.clip[1] >= 0):
            out.append(f"clip must be how far the ratio may go below (0 to 1) and above 1, got {self.clip}")
        if self.clip is not None and not self.recompute:
            out.append(
                "clip compares with log-probabilities before the first update: it needs recompute=True; clip=None uses "
                "no ratio"
            )
        if self.dual_clip is not None and (self.clip is None or self.dual_clip <= 1):
            out.append(f"dual_clip must be above 1 and needs a clip, got {self.dual_clip} with clip {self.clip}")
        if self.sampler_cap is not None and self.sampler_cap < 1:
            out.append(f"sampler_cap must be at least 1, got {self.sampler_cap}; None leaves the correction out")
        if self.ddof not in (0, 1) or self.eps < 0:
            out.append(f"ddof must be 0 or 1 and eps not negative, got {self.ddof} and {self.eps}")
        if self.kl_coef < 0 or (self.kl_coef > 0 and base is None):
            out.append(f"kl_coef must not be negative and needs base, got {self.kl_coef} and base {base!r}")
        return out

    # -- the signal ----------------------------------------------------------------------------

    def prepare(self, draw: Draw, *, score_student: Callable[[Sequence[Trajectory]], list[Sequence[float]]]) -> Targets:
        """Advantages by group, and the log-probabilities that ratios and corrections need.

        Raises:
            DataError: the draw is not the current policy's, a completion was never judged, or its sampler's
                log-probabilities are unknown.
        """
        if not draw.is_on_policy:
            raise DataError(
                f"a policy gradient needs a draw of the policy that is trained; this one is by {draw.author!r} and not "
                "on-policy. Set draw_from=current and start_from=previous, and leave out replay"
            )
        advantages = self.advantages(draw)
        rows = []
        for group, values in zip(draw.groups, advantages, strict=True):
            if all(t.weight == 0 for t in group.trajectories):
                continue  # left out whole, as a refilling source does: no part of the step
            for t, value in zip(group.trajectories, values, strict=True):
                if self._is_counted(t):
                    rows.append(self._row(t, value))
        stats = {"data/num_rows": float(len(rows)), **group_stats(draw, self._rewards(draw), self._valid(draw))}
        shapes = shape_columns(rows)
        old = student_scores(rows, score_student) if self.recompute and self._needs_old else None
        behaviour = behaviour_scores(rows) if self.sampler_cap is not None else None
        base = None
        if self.router is not None:
            self.router.prepare(draw, rows)
            base = teacher_scores(self.router, rows, shapes)
        out = []
        for i, row in enumerate(rows):
            columns = {**row.columns, **shapes[i]}
            for name, scores in (("old", old), ("behaviour", behaviour), ("base", base)):
                if scores is not None:
                    columns[f"{name}_logprobs_C"] = scores[i]
            out.append(replace(row, columns=columns))
        stats |= gap_stats(rows, old, behaviour, self.sampler_cap)
        return Targets(rows=out, divisor=self.divisor, stats=stats)

    @property
    def _needs_old(self) -> bool:
        return self.clip is not None or self.sampler_cap is not None or self.kl_coef > 0

    def advantages(self, draw: Draw) -> list[list[float]]:
        """One number per trajectory, group by group; 0 for those outside their group's statistics."""
        return self._advantages(self._rewards(draw), self._valid(draw))

    def _advantages(self, rewards_P_G: list[list[float]], is_valid_P_G: list[list[bool]]) -> list[list[float]]:
        return group_advantages(
            rewards_P_G,
            self.advantage,
            is_valid_P_G=is_valid_P_G,
            ddof=self.ddof,
            eps=self.eps,
            accept_above=0.0,
        )

    def _rewards(self, draw: Draw) -> list[list[float]]:
        return [self._group_rewards(g) for g in draw.groups]

    def _group_rewards(self, group: Group) -> list[float]:
        return [reward_of(t, self.reward) for t in group.trajectories]

    def _valid(self, draw: Draw) -> list[list[bool]]:
        return [self._group_valid(g) for g in draw.groups]

    def _group_valid(self, group: Group) -> list[bool]:
        """Whose reward is part of its group's statistics."""
        return [not _is_error(t) and not (self.truncated == "drop" and t.is_truncated) for t in group.trajectories]

    def is_useful(self, group: Group) -> bool:
        """Whether a judged group says something: its rewards differ, and one that is trained has an advantage."""
        rewards, is_valid = self._group_rewards(group), self._group_valid(group)
        if is_same(rewards, is_valid):
            return False
        values = self._advantages([rewards], [is_valid])[0]
        return any(v != 0 and self._is_counted(t) for t, v in zip(group.trajectories, values, strict=True))

    def _is_counted(self, t: Trajectory) -> bool:
        return t.num_targets > 0 and not _is_error(t) and (self.truncated == "keep" or not t.is_truncated)

    def _row(self, t: Trajectory, advantage: float) -> TargetRow:
        n = t.num_targets
        weight = t.weight if advantage != 0 or self.kl_coef > 0 else 0.0
        weight /= n if self.normalise == "sequence_means" else 1
        columns = {"weight_C": np.full(n, weight), "advantage_C": np.full(n, advantage)}
        return TargetRow(trajectory=t, columns=columns, count=float(n) if self.normalise == "tokens" else 1.0)

    def loss(self, student_logits_CV: Tensor, targets_C: Mapping[str, Tensor]) -> Tensor:
        student_C = target_logprobs(shaped(student_logits_CV, targets_C), targets_C["target_ids_C"])
        advantage_C = targets_C["advantage_C"].to(student_C.dtype)
        old_C = targets_C["old_logprobs_C"] if "old_logprobs_C" in targets_C else student_C.detach()
        if self.clip is None:
            loss_C = reinforce_loss(student_C, advantage_C)
        else:
            low, high = self.clip
            loss_C = clipped_ratio_loss(
                student_C, old_C, advantage_C, clip_low=low, clip_high=high, dual_clip=self.dual_clip
            )
        if self.kl_coef:
            kl_C = sampled_reverse_kl(student_C, targets_C["base_logprobs_C"], behaviour_logprobs_N=old_C)
            loss_C = loss_C + self.kl_coef * kl_C
        weight_C = None
        if self.sampler_cap is not None:
            weight_C = sampler_weight(old_C, targets_C["behaviour_logprobs_C"], cap=self.sampler_cap)
        self.ratios.add(
            student_C,
            old_C,
            advantage_C,
            targets_C["weight_C"] != 0 if "weight_C" in targets_C else torch.ones_like(student_C, dtype=torch.bool),
            clip=self.clip,
            sampler_weight_C=weight_C,
            cap=self.sampler_cap,
        )
        return loss_C if weight_C is None else loss_C * weight_C

    def take_sums(self) -> dict[str, float]:
        """What the losses since the last call add up to, to be summed over processes and given to `metrics`."""
        return self.ratios.take_sums()

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Ratios, clipping and the sampler's correction (`ratio_stats.ratio_metrics`)."""
        return ratio_metrics(sums, is_clipped=self.clip is not None)


def reward_of(t: Trajectory, kind: Reward) -> float:
    """The reward of one completion; 0 for an error, which no statistic uses.

    Raises:
        DataError: it was never judged.
    """
    if t.verdict is None:
        raise DataError(f"trajectory {t.id!r} has no verdict: a policy gradient needs Judged(source, verifier)")
    if t.verdict.status is Status.ERROR:
        return 0.0
    if kind == "score" and t.verdict.score is not None:
        return float(t.verdict.score)
    lowest = -1.0 if kind == "signed" else 0.0
    return 1.0 if t.verdict.is_accepted else lowest


def _is_error(t: Trajectory) -> bool:
    return t.verdict is not None and t.verdict.status is Status.ERROR


def is_same(rewards: Sequence[float], is_valid: Sequence[bool]) -> bool:
    """Whether a group says nothing: its valid rewards are all the same, or there is none."""
    valid = [r for r, ok in zip(rewards, is_valid, strict=True) if ok]
    return not valid or all_same(valid)


def group_stats(
    draw: Draw, rewards_P_G: Sequence[Sequence[float]], is_valid_P_G: Sequence[Sequence[bool]]
) -> dict[str, float]:
    """Mean reward, and the shares of groups that are mixed, all right and all wrong."""
    valid = [r for rs, oks in zip(rewards_P_G, is_valid_P_G, strict=True) for r, ok in zip(rs, oks, strict=True) if ok]
    kinds = {"mixed": 0, "all_accepted": 0, "none_accepted": 0, "same_score": 0}
    judged = 0
    for group, rewards, is_valid in zip(draw.groups, rewards_P_G, is_valid_P_G, strict=True):
        if any(is_valid):
            judged += 1
            kinds[_kind(group, rewards, is_valid)] += 1
    out = {f"policy/frac_groups_{name}": n / max(1, judged) for name, n in kinds.items()}
    return {**out, "policy/reward": float(np.mean(valid)) if valid else 0.0}


def _kind(group: Group, rewards: Sequence[float], is_valid: Sequence[bool]) -> str:
    if not is_same(rewards, is_valid):
        return "mixed"
    hits = {t.verdict.is_accepted for t, ok in zip(group.trajectories, is_valid, strict=True) if ok and t.verdict}
    return "same_score" if len(hits) == 2 else "all_accepted" if True in hits else "none_accepted"
