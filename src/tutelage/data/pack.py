"""Which trajectories of an optimiser step go through the model together, under a budget of tokens.

The loss of a step does not depend on the grouping; its memory and time do. A group's memory is bounded by its
tokens (padding included when padded), so the budget bounds it, except for a single trajectory longer than the
budget, which gets a group of its own.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from tutelage.errors import ConfigError

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How the trajectories of a step are grouped, and how much of the computation is real."""

    groups: tuple[tuple[int, ...], ...]
    """Indices of the trajectories in each microbatch. Every trajectory of length > 0 is in exactly one."""
    num_tokens: int
    """Tokens that belong to trajectories."""
    num_computed: int
    """Tokens the model runs over, padding included."""
    max_computed: int
    """Tokens of the largest microbatch, padding included: what its memory grows with."""
    num_overlong: int
    """Trajectories longer than the budget, each alone in its microbatch."""

    @property
    def frac_real(self) -> float:
        """Share of the computed tokens that are not padding; 1 when nothing is computed."""
        return self.num_tokens / self.num_computed if self.num_computed else 1.0


def pack_tokens(lengths: Sequence[int], *, max_tokens: int, max_rows: int | None = None) -> Packing:
    """Group for the packed layout: best-fit decreasing, at most 11/9 of the fewest groups plus one.

    Longest first, each into the fullest group that still has room; ties go to the lower index, so equal input gives
    equal groups. Trajectories keep their order inside a group, and groups are ordered by their first trajectory.

    Args:
        lengths: tokens of each trajectory; those of length 0 are left out.
        max_tokens: budget of a group.
        max_rows: most trajectories in a group; None for no limit.

    Raises:
        ConfigError: max_tokens or max_rows is below 1.
    """
    _check_budget(max_tokens, max_rows)
    groups: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, group), sorted, of groups that may still grow
    for i in sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: (-lengths[i], i)):
        at = bisect_left(free, (lengths[i], -1))
        if at < len(free):
            left, group = free.pop(at)
        else:
            left, group = max_tokens, len(groups)
            groups.append([])
        groups[group].append(i)
        if left - lengths[i] > 0 and (max_rows is None or len(groups[group]) < max_rows):
            insort(free, (left - lengths[i], group))
    return _packing(groups, lengths, max_tokens, [sum(lengths[i] for i in g) for g in groups])


def pack_padded(lengths: Sequence[int], *, max_tokens: int, max_rows: int | None = None) -> Packing:
    """Group for the padded layout: neighbours in length share a group, so that little is padded.

    Longest first; a group takes the next trajectory while rows times its longest length stays within the budget.
    Deterministic; order inside and between groups as in `pack_tokens`.

    Raises:
        ConfigError: max_tokens or max_rows is below 1.
    """
    _check_budget(max_tokens, max_rows)
    groups: list[list[int]] = []
    for i in sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: (-lengths[i], i)):
        group = groups[-1] if groups else None
        has_room = (
            group is not None
            and (len(group) + 1) * lengths[group[0]] <= max_tokens
            and (max_rows is None or len(group) < max_rows)
        )
        if group is not None and has_room:
            group.append(i)
        else:
            groups.append([i])
    return _packing(groups, lengths, max_tokens, [len(g) * lengths[g[0]] for g in groups])


def microbatches(
    items: Sequence[Item],
    *,
    max_tokens: int,
    length: Callable[[Item], int] | None = None,
    layout: Literal["packed", "padded"] = "packed",
    max_rows: int | None = None,
) -> list[list[Item]]:
    """The items of one optimiser step in groups within the budget; equal input gives equal groups.

    Args:
        items: usually target rows.
        max_tokens: budget of a group, padding included when padded.
        length: tokens of an item; by default `collate.input_length`, what a target row puts through the model.
            Items of length 0 (nothing to train on) are in no group.
        layout: "packed" fills groups to the budget; "padded" also keeps like lengths together.
        max_rows: most items in a group.

    Raises:
        ConfigError: max_tokens or max_rows is below 1.
    """
    if length is None:
        from tutelage.data.collate import input_length

        length = input_length  # type: ignore[assignment]
    assert length is not None
    pack = pack_tokens if layout == "packed" else pack_padded
    packing = pack([length(item) for item in items], max_tokens=max_tokens, max_rows=max_rows)
    return [[items[i] for i in group] for group in packing.groups]


def _packing(groups: list[list[int]], lengths: Sequence[int], max_tokens: int, computed: list[int]) -> Packing:
    return Packing(
        groups=tuple(sorted(tuple(sorted(g)) for g in groups)),
        num_tokens=sum(lengths[i] for g in groups for i in g),
        num_computed=sum(computed),
        max_computed=max(computed, default=0),
        num_overlong=sum(n > max_tokens for n in lengths),
    )


def _check_budget(max_tokens: int, max_rows: int | None) -> None:
    problems = []
    if max_tokens < 1:
        problems.append(f"max_tokens_per_microbatch must be at least 1, got {max_tokens}")
    if max_rows is not None and max_rows < 1:
        problems.append(f"max_rows must be at least 1 or None, got {max_rows}")
    if problems:
        raise ConfigError(problems)
