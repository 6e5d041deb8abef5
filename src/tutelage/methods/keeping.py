"""Keep rules from settings, and the control arm's budget: how many of each prompt another run kept."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.data.select import SelectionRules
from tutelage.data.store import TrajectoryStore
from tutelage.errors import ConfigError
from tutelage.methods.settings import KeepSettings
from tutelage.methods.stored import is_store
from tutelage.sources import Accepted, Keep
from tutelage.types import REPLAYED, DrawContext, Group, Source

if TYPE_CHECKING:
    from tutelage.methods.workbench import Workbench


def keep_of(settings: KeepSettings) -> Keep:
    """The rules that the settings name."""
    fields = settings.model_dump()
    return Keep(**{**fields, "random_budget": bool(fields["random_budget"])})


def unstreamable(settings: Any) -> list[str]:
    """What of a stage's settings only a draw in memory can do."""
    keep, out = settings.keep, []
    if keep.best_of is not None:
        out.append(f"keep.best_of={keep.best_of} compares scores within a prompt")
    if keep.drop_all_correct:
        out.append("keep.drop_all_correct looks at whole groups")
    if keep.random_budget:
        out.append("keep.random_budget draws lots within a prompt")
    if keep.order == "farthest":
        out.append("keep.order=farthest compares texts within a prompt")
    if settings.train.divisor == "sampled":
        out.append("train.divisor=sampled counts what was rejected too")
    return out


def selection_of(settings: Any) -> SelectionRules:
    """The keep rules of a streamed stage."""
    keep: KeepSettings = settings.keep
    return SelectionRules(
        is_weighted=getattr(settings, "filters", None) is not None,
        is_accepted=keep.min_score is None,
        min_score=keep.min_score,
        is_whole=keep.drop_truncated,
        is_unique=settings.is_unique,
        distinct=keep.distinct,
        max_per_prompt=keep.cap,
        order="shortest" if keep.order == "shortest" else "first",
    )


def accepted_of(source: Source, settings: KeepSettings, bench: "Workbench", *, keep: Keep | None = None) -> Accepted:
    """The source with its keep rules; `keep` where a method changed them."""
    return Accepted(source, keep or keep_of(settings), budget=budget_of(settings, bench))


def budget_of(settings: KeepSettings, bench: "Workbench") -> Callable[[DrawContext, Group], int] | None:
    """What `keep.random_budget` counts, where it names a run: nothing in rounds that the run took back.

    Raises:
        ConfigError: the folder holds no run that kept anything.
    """
    if isinstance(settings.random_budget, bool):
        return None
    run = bench.path(settings.random_budget)
    folder = run / "trajectories"
    if not is_store(folder):
        raise ConfigError(f"keep.random_budget={settings.random_budget!r}: {folder} holds no trajectories of a run")
    counts: dict[tuple[int, int, str, int], int] = {}
    drawn = _Turns()

    def budget(ctx: DrawContext, group: Group) -> int:
        if not counts:
            gone = taken_back(run)
            counts.update({key: n for key, n in kept_counts(folder).items() if key[:2] not in gone})
        if not group.trajectories:
            return 0
        place = (ctx.stage, ctx.round, group.task.hash)
        return counts.get((*place, drawn.turn(place, group.trajectories[0].prompt_index)), 0)

    return budget


class _Turns:
    """Where a prompt comes more than once in a round: which time it is."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int, str], list[int]] = {}

    def turn(self, place: tuple[int, int, str], prompt_index: int) -> int:
        """How many others of (stage, round, prompt) came first, asked for in the order of the draw."""
        indices = self.seen.setdefault(place, [])
        if prompt_index not in indices:
            indices.append(prompt_index)
        return indices.index(prompt_index)


def kept_counts(folder: Path) -> Counter[tuple[int, int, str, int]]:
    """(stage, round, prompt, its turn in the round) -> judged samples that a run kept, from its trajectories. What was
    replayed from earlier rounds, and what nobody judged (gold solutions), is not counted.

    Memory: two entries a prompt of each round.
    """
    store = TrajectoryStore(folder)
    places = [_place(shard.name) for shard in store.shards for _ in range(shard.rows)]
    found: Counter[tuple[int, int, str, int]] = Counter()
    drawn = _Turns()
    row = 0
    for batch in store.scan(["task_hash", "prompt_index", "weight", "verdict_status", "marks"]):
        columns = (batch.column(i).to_pylist() for i in range(5))
        for task, index, weight, status, marks in zip(*columns, strict=True):
            if status is not None and REPLAYED not in marks:
                place = (*places[row], task)
                turn = drawn.turn(place, index)
                if weight:
                    found[(*place, turn)] += 1
            row += 1
    return found


def taken_back(run: Path) -> set[tuple[int, int]]:
    """(stage, round) of what the regression gate took back, from a run's events."""
    path = run / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    reverts = [e for e in map(json.loads, lines) if e["event"] == "revert"]
    return {(e["stage"], e["round"]) for e in reverts}


def _place(shard: str) -> tuple[int, int]:
    """ "stage0-round00002.parquet" -> (0, 2)"""
    stage, _, rest = shard.removeprefix("stage").partition("-round")
    return int(stage), int(rest.removesuffix(".parquet"))
