"""Keep rules from settings, and the control arm's budget: how many of each prompt another run kept."""

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
    """What `keep.random_budget` counts, where it names a run.

    Raises:
        ConfigError: the folder holds no run that kept anything.
    """
    if isinstance(settings.random_budget, bool):
        return None
    folder = bench.path(settings.random_budget) / "trajectories"
    if not is_store(folder):
        raise ConfigError(f"keep.random_budget={settings.random_budget!r}: {folder} holds no trajectories of a run")
    counts: dict[tuple[int, int, str], int] = {}

    def budget(ctx: DrawContext, group: Group) -> int:
        if not counts:
            counts.update(kept_counts(folder))
        return counts.get((ctx.stage, ctx.round, group.task.hash), 0)

    return budget


def kept_counts(folder: Path) -> Counter[tuple[int, int, str]]:
    """(stage, round, prompt) -> judged samples that a run kept, from its trajectories. What was replayed from
    earlier rounds, and what nobody judged (gold solutions), is not counted.

    Memory: one entry a prompt of each round.
    """
    store = TrajectoryStore(folder)
    places = [_place(shard.name) for shard in store.shards for _ in range(shard.rows)]
    found: Counter[tuple[int, int, str]] = Counter()
    row = 0
    for batch in store.scan(["task_hash", "weight", "verdict_status", "marks"]):
        columns = (batch.column(i).to_pylist() for i in range(4))
        for task, weight, status, marks in zip(*columns, strict=True):
            if weight and status is not None and REPLAYED not in marks:
                found[(*places[row], task)] += 1
            row += 1
    return found


def _place(shard: str) -> tuple[int, int]:
    """ "stage0-round00002.parquet" -> (0, 2)"""
    stage, _, rest = shard.removeprefix("stage").partition("-round")
    return int(stage), int(rest.removesuffix(".parquet"))
