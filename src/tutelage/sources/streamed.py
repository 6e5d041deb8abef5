"""One large pass of sampling, judging and choosing that holds no more than a chunk: for a million samples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any, cast

import numpy as np

from tutelage.data.rounds import RoundStore
from tutelage.data.select import Selection, SelectionRules, select
from tutelage.data.store import TrajectoryStore
from tutelage.data.token_file import TokenFile, rows_of_store, rows_of_trajectories, write_token_file
from tutelage.sources.drawn import Drawn
from tutelage.sources.judged import Judged
from tutelage.sources.recorded import marked
from tutelage.types import RECORDED, Draw, DrawContext, Group, Task, Trajectory, Verifier


@dataclass(frozen=True, kw_only=True)
class StoredDraw(Draw):
    """A draw that lies on disk: going through it streams; `kept()` reads single trajectories by number."""

    count: int
    tokens: TokenFile

    def __len__(self) -> int:
        return self.count

    def kept(self) -> Sequence[Trajectory]:  # type: ignore[override]
        """What is trained on, without text, log-probabilities and verdicts."""
        return self.tokens


class StoredGroups(Sequence[Group]):
    """The groups of a store in order, one at a time, weighted by a selection; then other groups.

    Args:
        tasks: the prompts in the order they were drawn.
    """

    def __init__(
        self, store: TrajectoryStore, selection: Selection, tasks: Sequence[Task], other: Sequence[Group] = ()
    ) -> None:
        self.store, self.selection, self.tasks, self.other = store, selection, tasks, other

    def __len__(self) -> int:
        return len(self.tasks) + len(self.other)

    def __getitem__(self, index: Any) -> Any:
        raise TypeError("groups on disk are gone through in order, not picked by number")

    def __iter__(self) -> Iterator[Group]:
        marked = (
            t if is_kept or t.weight == 0 else t.marked("left out")
            for t, is_kept in zip(self.store, self.selection.is_kept, strict=True)
        )
        for index, ts in groupby(marked, key=lambda t: t.prompt_index):
            yield Group(task=self.tasks[index], trajectories=tuple(ts))
        yield from self.other


class Streamed:
    """`Accepted(Judged(Drawn))` and other data beside it, chunk by chunk through the disk.

    Every chunk is sampled, judged, committed and forgotten. Rules then choose among the columns they need
    (`data.select`), and what is kept is written once more as bare tokens, which updates read by number in any order.

    Memory: one chunk; 50 to 100 bytes a sample while choosing; 32 bytes a kept one and about 12 more for each epoch's
    order; what Parquet needs to decode (80 MB); `other` as it is. Measured in bench/RESULTS-data.md.

    The rules are those of `SelectionRules`: all at once over the whole draw, so equal text may be dropped across
    prompts too. Off-policy; not for signals that need groups or log-probabilities.

    Args:
        drawn: prompts, author and how they are sampled.
        rules: which of the judged samples are kept.
        other: recorded groups, trained on beside them.
        finish: called with each prompt's judged samples before they are committed (further marks, checks, keys).
    """

    def __init__(
        self,
        drawn: Drawn,
        verifier: Verifier,
        rules: SelectionRules,
        *,
        other: Sequence[Group] = (),
        finish: Callable[[Group], Sequence[Trajectory]] | None = None,
    ) -> None:
        self.drawn, self.rules, self.finish = drawn, rules, finish
        self.other = tuple(marked(g, RECORDED) for g in other)
        self.judged = Judged(drawn, verifier)

    @property
    def tasks(self) -> Sequence[Task]:
        return self.drawn.tasks

    def draw(self, ctx: DrawContext) -> Draw:
        assert ctx.store is not None, "a streamed draw needs a folder"
        chosen, base, chunks = self.drawn.next_prompts(ctx)
        rounds = RoundStore(ctx.store / "streamed")
        self._sample(ctx, rounds, chosen, base, chunks)
        if ctx.processes is None or ctx.processes.is_first:
            rounds.finalise(len(chunks))
        if ctx.processes is not None:
            ctx.processes.wait()
        store = TrajectoryStore(rounds.path)
        selection = select(store, self.rules)
        folder = ctx.store / "tokens"
        if ctx.processes is None or ctx.processes.is_first:
            others = (t for g in self.other for t in g.trajectories if t.weight != 0 and t.num_targets)
            rows = chain(rows_of_store(store, selection.is_kept), rows_of_trajectories(others))
            write_token_file(folder, rows)
        if ctx.processes is not None:
            ctx.processes.wait()
        groups = StoredGroups(store, selection, chosen, self.other)
        return StoredDraw(
            groups=cast("tuple[Group, ...]", groups),
            author="mixed" if self.other else self.drawn.author,
            is_on_policy=False,
            stats=_stats(store, selection, len(chosen)),
            count=len(store) + sum(len(g.trajectories) for g in self.other),
            tokens=TokenFile(folder),
        )

    def _sample(
        self, ctx: DrawContext, rounds: RoundStore, chosen: Sequence[Task], base: int, chunks: Sequence[range]
    ) -> None:
        done = set(rounds.committed())
        share = range(len(chunks)) if ctx.processes is None else ctx.processes.share(range(len(chunks)))
        for index in share:
            if index in done:
                continue
            made = self.drawn.sample_chunk(ctx, chosen, chunks[index], base)
            by_prompt = [tuple(g) for _, g in groupby(made, key=lambda t: t.prompt_index)]
            groups = tuple(Group(task=chosen[g[0].prompt_index], trajectories=g) for g in by_prompt)
            judged: Sequence[Trajectory] = self.judged.judge(groups)
            if self.finish is not None:
                by_prompt = [tuple(g) for _, g in groupby(judged, key=lambda t: t.prompt_index)]
                finished = (self.finish(replace(g, trajectories=ts)) for g, ts in zip(groups, by_prompt, strict=True))
                judged = list(chain.from_iterable(finished))
            rounds.commit(index, judged)
        if ctx.processes is not None:
            ctx.processes.wait()

    def state(self) -> Mapping[str, Any]:
        return self.drawn.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.drawn.restore(state)


def _stats(store: TrajectoryStore, selection: Selection, num_prompts: int) -> dict[str, float]:
    """Counts, from two columns of the store."""
    sampled = accepted = rows = 0
    for batch in store.scan(["num_sampled", "verdict_status"], batch_rows=4096):
        rows += batch.num_rows
        sampled += int(np.asarray(batch.column(0)).sum())
        accepted += sum(s == "accept" for s in batch.column(1).to_pylist())
    left_out = {f"data/num_left_out/{rule}": float(n) for rule, n in selection.left_out.items()}
    return {
        "data/num_prompts": float(num_prompts),
        "data/num_sampled_tokens": float(sampled),
        "data/mean_sampled_tokens": sampled / max(1, rows),
        "data/num_accepted": float(accepted),
        "data/num_kept": float(selection.num_kept),
        **left_out,
    }
