"""Pooling over samplers and rounds, paths farthest apart, prompts shown with examples, updates that grow."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.data.rounds import RoundStore
from tutelage.errors import DataError
from tutelage.sources import Accepted, Drawn, Keep, Mixed, Pooled, Replay
from tutelage.sources.edit_distance import edit_distance
from tutelage.train.trainer import Place, Trainer, TrainerSettings
from tutelage.types import Completion, Draw, DrawContext, Group, Span, Status, TargetRow, Task, Trajectory, Verdict

TASKS = [Task(id=f"q{i}", messages=({"role": "user", "content": f"{i}"},), answer="1") for i in range(3)]


class Text:
    fingerprint = "t"

    def render_prompt(self, task: Task) -> list[Span]:
        ids = tuple(ord(c) for m in task.messages for c in m["content"])
        return [Span(token_ids=ids, role="user", author="user")]


class Says:
    """Says its name and the length of the prompt it was shown."""

    version = "v"

    def __init__(self, author: str) -> None:
        self.author = author

    def sample(self, requests: Any, params: Any, *, progress: Any = None) -> list[list[Completion]]:
        return [
            [
                Completion(
                    token_ids=(1, 2), logprobs=(-1.0, -1.0), entropies=(0.0, 0.0), finish="stop",
                    text=f"{self.author} {j} {len(r.prompt_ids)}",
                )
                for j in range(r.n)
            ]
            for r in requests
        ]  # fmt: skip


def context(folder: Path | None = None, round: int = 0) -> DrawContext:
    more = {} if folder is None else {"store": folder / "work" / f"r{round}", "kept": folder / "kept"}
    return DrawContext(seed=0, stage=0, round=round, sampler=Says, text=Text(), **more)


def accepted(text: str, key: str | None = None, name: str = "t") -> Trajectory:
    verdict = Verdict(status=Status.ACCEPT, verifier="v", reason="r", score=1.0, key=key)
    return Trajectory(id=name, task_id="q", task_hash="h", spans=(), completion=text, verdict=verdict, task_name="n")


# -- edit distance and the choice of paths ------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.text("abc\U0001f600", max_size=70), st.text("abc\U0001f600", max_size=70))
def test_edit_distance_is_the_textbook_tables(a: str, b: str) -> None:
    row = np.arange(len(b) + 1)
    for i, x in enumerate(a, 1):
        new = [i]
        for j, y in enumerate(b, 1):
            new.append(min(int(row[j - 1]) + (x != y), int(row[j]) + 1, new[-1] + 1))
        row = np.array(new)
    assert edit_distance(a, b) == edit_distance(b, a) == row[-1]


def test_of_one_path_the_text_farther_from_the_others_is_kept() -> None:
    texts = [("aaaa", "k1"), ("bbbb", "k2"), ("aabb", "k1"), ("aazzzz", "k1"), ("bbbb", "k2")]
    group = Group(task=TASKS[0], trajectories=tuple(accepted(t, k, f"t{i}") for i, (t, k) in enumerate(texts)))
    rules = {"farthest": [3, 1], "sampled": [0, 1], "shortest": [0, 1]}
    for order, expected in rules.items():
        source = Accepted(_Fixed(Draw(groups=(group,))), Keep(distinct="key", order=order))  # type: ignore[arg-type]
        kept = [int(t.id[1:]) for t in source.draw(context()) if t.weight]
        # by hand: "aabb" is nearer to "bbbb" (2) than "aaaa" (4), "aazzzz" (6) is farther
        assert sorted(kept) == sorted(expected), order


def test_of_two_equally_far_the_earlier_text_stays() -> None:
    texts = [("bbbb", "k2"), ("aaaa", "k1"), ("aacc", "k1")]
    group = Group(task=TASKS[0], trajectories=tuple(accepted(t, k, f"t{i}") for i, (t, k) in enumerate(texts)))
    source = Accepted(_Fixed(Draw(groups=(group,))), Keep(distinct="key", order="farthest"))
    assert [t.completion for t in source.draw(context()) if t.weight] == ["bbbb", "aaaa"]


class _Fixed:
    def __init__(self, *draws: Draw) -> None:
        self.draws, self.tasks = list(draws), TASKS

    def draw(self, ctx: DrawContext) -> Draw:
        return self.draws[min(ctx.round, len(self.draws) - 1)]

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Any) -> None: ...


# -- pooling ------------------------------------------------------------------------------------


def test_samplers_are_pooled_by_prompt_with_ids_of_their_own(tmp_path: Path) -> None:
    source = Pooled({name: Drawn(TASKS, author=name, n=2) for name in ("student", "other")})
    draw = source.draw(context(tmp_path))
    assert [len(g.trajectories) for g in draw.groups] == [4, 4, 4] and not draw.is_on_policy
    for g in draw.groups:
        assert [t.completion.split()[0] for t in g.trajectories] == ["student"] * 2 + ["other"] * 2
        assert [t.sample_index for t in g.trajectories] == [0, 1, 2, 3]
        assert {t.task_hash for t in g.trajectories} == {g.task.hash}
    assert len({t.id for t in draw}) == 12
    state = source.state()
    fresh = Pooled({name: Drawn(TASKS, author=name, n=2) for name in ("student", "other")})
    fresh.restore(state)
    assert fresh.state() == state and state["other"]["position"] == 3
    other = Pooled({"a": Drawn(TASKS, n=1, is_shuffled=False), "b": Drawn(TASKS[::-1], n=1, is_shuffled=False)})
    with pytest.raises(DataError, match="prompt 0 is another one in source 'b'"):
        other.draw(context(tmp_path / "x"))


def test_rounds_pooled_inside_a_mixture_lie_apart_and_come_back(tmp_path: Path) -> None:
    def made() -> Mixed:
        one = {n: Replay(Accepted(_Fixed(*_rounds(n)), Keep(distinct=None)), distinct="key") for n in ("a", "b")}
        return Mixed(one)

    whole, cut = made(), made()
    for r in range(2):
        last, _ = whole.draw(context(tmp_path / "whole", r)), cut.draw(context(tmp_path / "cut", r)) if r == 0 else None
    resumed = made()
    resumed.restore(cut.state())
    again = resumed.draw(context(tmp_path / "cut", 1))
    said = [(t.completion, "replayed" in t.marks, t.weight) for t in again]
    assert said == [(t.completion, "replayed" in t.marks, t.weight) for t in last]
    assert [s for s in said if s[1]] == [("a0 one", True, 1.0), ("b0 one", True, 1.0)]  # key "same" came again
    for name in ("a", "b"):
        assert RoundStore(tmp_path / "cut" / "kept" / name / "replay").committed() == (0, 1)
    assert {p.name for p in (tmp_path / "cut").iterdir()} <= {"work", "kept"}


def _rounds(name: str) -> list[Draw]:
    out = []
    for r in range(2):
        ts = [
            replace(accepted(f"{name}{r} one", f"k{r}", f"{name}{r}1"), task_hash=TASKS[0].hash),
            replace(accepted(f"{name}{r} two", "same", f"{name}{r}2"), task_hash=TASKS[0].hash),
        ]
        out.append(Draw(groups=(Group(task=TASKS[0], trajectories=tuple(ts)),), author="student"))
    return out


# -- prompts shown with examples ----------------------------------------------------------------


def test_what_is_shown_to_the_sampler_is_taken_out_again(tmp_path: Path) -> None:
    def view(task: Task, round: int) -> Task | None:
        example = {"role": "user", "content": "xxxxxxxxxx"}
        return replace(task, messages=(example, *task.messages)) if round == 0 else None

    source = Drawn(TASKS, n=2, view=view)
    first, second = source.draw(context(round=0)), source.draw(context(round=1))
    assert {t.completion.split()[2] for t in first} == {"11"} and {t.completion.split()[2] for t in second} == {"1"}
    assert not first.is_on_policy and second.is_on_policy
    for t in first:
        assert len(t.spans[0].token_ids) == 1 and t.behaviour_logprobs is None and len(t.messages) == 2
    assert all(t.behaviour_logprobs is not None for t in second)


# -- updates that grow --------------------------------------------------------------------------


@pytest.mark.parametrize(("turn", "expected"), [(0, 10), (1, 12), (2, 14), (3, 17)])
def test_each_loop_has_a_fifth_more_updates_over_as_many_passes_as_that_takes(turn: int, expected: int) -> None:
    rows = [TargetRow(trajectory=accepted(f"{i}"), columns={"weight_C": np.ones(1)}, count=1.0) for i in range(7)]
    trainer: Any = Trainer.__new__(Trainer)
    place = Place(seed=0, stage=0, round=0, turn=turn, num_rounds=1)
    batches = trainer.batches(rows, TrainerSettings(lr=1.0, batch_size=2, updates=10, updates_growth=1.2), place)
    assert len(batches) == expected
    for start in range(0, expected - 3, 4):  # four updates a pass: each row once
        assert sorted(i for b in batches[start : start + 4] for i in b) == list(range(7))
    assert len(trainer.batches(rows, TrainerSettings(lr=1.0, batch_size=2, epochs=3), place)) == 12
