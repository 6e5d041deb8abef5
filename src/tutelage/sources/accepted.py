"""Keep rules: which of a judged draw's trajectories are trained on. They mark; they never remove."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from tutelage.errors import ConfigError
from tutelage.sources.edit_distance import edit_distance
from tutelage.types import Draw, DrawContext, Group, Source, Trajectory, seed_for

Budget = Callable[[DrawContext, Group], int]
"""How many of a group are kept in this round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Which accepted trajectories are kept, applied in the order of the fields."""

    min_score: float | None = None
    """Keep what scores at least this, instead of what the verdict accepts."""
    drop_truncated: bool = True
    """Never keep a completion that ran into the token limit: its end was not the author's choice."""
    drop_all_correct: bool = False
    """From the second round on, leave out prompts whose every valid sample was accepted: they have little to teach
    and narrow the policy."""
    distinct: Literal["text", "key"] | None = "text"
    """Keep one of each text, or of each solution by the verifier's own key."""
    best_of: int | None = None
    """Keep only the highest-scoring this many of a prompt (RAFT: 1)."""
    cap: int | None = None
    """Keep at most this many of a prompt."""
    order: Literal["shortest", "sampled", "farthest"] = "shortest"
    """Which come first where a rule must choose: the shortest, or as they were sampled. farthest: as sampled, but of
    two that are the same by `distinct` the one whose text is farther from the other kept ones (RFT)."""
    random_budget: bool = False
    """The control arm: keep as many as the rules would (or a budget says), chosen at random among all samples of the
    prompt."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least 1, got {value}"
            for name, value in (("cap", self.cap), ("best_of", self.best_of))
            if value is not None and value < 1
        ]
        if problems:
            raise ConfigError(problems)


class Accepted:
    """What the inner source draws, with weight 0 and a mark on everything the rules leave out. What the inner source
    left out itself stays out and counts for no rule.

    Group statistics, control arms and later thresholds still see all of it.

    Args:
        budget: with `random_budget`, how many of a group are kept in this round, instead of as many as the rules would.
    """

    def __init__(self, source: Source, keep: Keep | None = None, *, budget: Budget | None = None) -> None:
        self.source, self.keep, self.budget = source, keep or Keep(), budget

    def draw(self, ctx: DrawContext) -> Draw:
        draw = self.source.draw(ctx)
        out = draw.with_trajectories([t for g in draw.groups for t in marked_in(g, self.keep, ctx, self.budget)])
        return replace(out, stats={**out.stats, **keep_stats(out)})

    def state(self) -> Mapping[str, Any]:
        return self.source.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.source.restore(state)


def marked_in(group: Group, keep: Keep, ctx: DrawContext, budget: Budget | None = None) -> list[Trajectory]:
    """A prompt's trajectories with the marks of the rules in this round. What had weight 0 before keeps its own mark,
    or loses it where the lot chose it."""
    out = []
    for t, mark in zip(group.trajectories, marks_in(group, keep, ctx, budget), strict=True):
        if mark is None:
            out.append(t if t.weight else replace(t, weight=1.0, marks=t.marks[:-1]))
        else:
            out.append(t.marked(mark) if t.weight else t)
    return out


def marks_in(group: Group, keep: Keep, ctx: DrawContext, budget: Budget | None = None) -> list[str | None]:
    """`keep_marks` as they are in this round, or with `random_budget` as many drawn by lot."""
    marks = keep_marks(group, keep if ctx.round else replace(keep, drop_all_correct=False))
    if not keep.random_budget:
        return marks
    count = sum(m is None for m in marks) if budget is None else budget(ctx, group)
    seed = seed_for(ctx.seed, ctx.stage, ctx.round, group.task.hash, "budget")
    chosen = set(np.random.default_rng(seed).permutation(len(marks))[:count].tolist())
    return [None if i in chosen else (m or "random budget") for i, m in enumerate(marks)]


def keep_marks(group: Group, keep: Keep) -> list[str | None]:
    """For each trajectory of a prompt: None if kept, else why not."""
    ts = group.trajectories
    marks: list[str | None] = [_first_reason(t, keep) for t in ts]
    valid = [t for t in ts if t.verdict is not None and t.verdict.status != "error"]
    if keep.drop_all_correct and valid and all(t.verdict is not None and t.verdict.is_accepted for t in valid):
        return [m or "all correct" for m in marks]
    left = _in_order([i for i, m in enumerate(marks) if m is None], ts, keep)
    if keep.distinct:
        same = {i: same_as(ts[i], keep.distinct) for i in left}
        pick = _farthest(left, same, ts) if keep.order == "farthest" else None
        left = _mark_after_first(left, marks, same, "duplicate", pick)
    if keep.best_of is not None:
        left.sort(key=lambda i: -_score(ts[i]))  # stable: ties stay in order
        left = _mark_rest(left, marks, keep.best_of, "not best")
    if keep.cap is not None:
        _mark_rest(left, marks, keep.cap, "over cap")
    return marks


def _first_reason(t: Trajectory, keep: Keep) -> str | None:
    if t.weight == 0:
        return t.marks[-1] if t.marks else "weight 0"
    if t.verdict is None:
        return "not judged"
    if t.verdict.status == "error":
        return "error"
    if t.is_truncated and keep.drop_truncated:
        return "truncated"
    if keep.min_score is not None:
        return None if _score(t) >= keep.min_score else "below threshold"
    return None if t.verdict.is_accepted else "rejected"


def _score(t: Trajectory) -> float:
    return t.verdict.score if t.verdict is not None and t.verdict.score is not None else 0.0


def same_as(t: Trajectory, kind: str | None) -> str:
    """What distinctness compares: the verdict's key, or the text where there is none."""
    key = t.verdict.key if t.verdict is not None else None
    return key if kind == "key" and key is not None else t.completion.strip()


def _in_order(indices: list[int], ts: Sequence[Trajectory], keep: Keep) -> list[int]:
    return sorted(indices, key=lambda i: ts[i].num_sampled) if keep.order == "shortest" else indices


def _mark_after_first(
    indices: list[int], marks: list[str | None], same: Mapping[int, str], mark: str, pick: Mapping[str, int] | None
) -> list[int]:
    """One of each key: the first, or the one picked."""
    chosen: dict[str, int] = {}
    for i in indices:
        chosen.setdefault(same[i], i)
    kept = set((pick or chosen).values())
    for i in indices:
        if i not in kept:
            marks[i] = mark
    return [i for i in indices if i in kept]


def _farthest(indices: list[int], same: Mapping[int, str], ts: Sequence[Trajectory]) -> dict[str, int]:
    """Key -> the one kept: a later one takes the place of an earlier one of its key where the sum of its edit distances
    to those kept of the other keys is larger."""
    chosen: dict[str, int] = {}
    for i in indices:
        key = same[i]
        if key in chosen:
            others = [ts[j].completion for k, j in chosen.items() if k != key]
            sums = [sum(edit_distance(ts[j].completion, o) for o in others) for j in (chosen[key], i)]
            if sums[1] <= sums[0]:
                continue
        chosen[key] = i
    return chosen


def _mark_rest(indices: list[int], marks: list[str | None], limit: int, mark: str) -> list[int]:
    for i in indices[limit:]:
        marks[i] = mark
    return indices[:limit]


def keep_stats(draw: Draw) -> dict[str, float]:
    """Counts after the keep rules, and why the rest was left out."""
    kept = draw.kept()
    accepted = [t for t in draw if t.verdict is not None and t.verdict.is_accepted]
    distinct = {(t.prompt_index, t.completion.strip()) for t in accepted}
    solved = {t.prompt_index for t in accepted}
    out = {
        "data/num_accepted": float(len(accepted)),
        "data/num_distinct_accepted": float(len(distinct)),
        "data/num_prompts_solved": float(len(solved)),
        "data/num_kept": float(len(kept)),
    }
    for t in draw:
        if t.weight == 0 and t.marks:
            name = f"data/num_left_out/{t.marks[-1]}"
            out[name] = out.get(name, 0.0) + 1
    return out
