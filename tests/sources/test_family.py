"""Sources of the rejection-sampling family: paths, rising thresholds, refilling."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tutelage.errors import ConfigError
from tutelage.methods import METHODS
from tutelage.methods.keeping import keep_of
from tutelage.sources import Accepted, Judged, Keep, Paths, Refilled, RisingThresholds
from tutelage.sources.cleaned import Cleaned, TextRules
from tutelage.sources.drawn import Drawn
from tutelage.sources.paths import equations
from tutelage.types import Draw, DrawContext, Group, Span, Status, Task, Trajectory, Verdict

TASKS = [Task(id=f"t{i}", messages=({"role": "user", "content": str(i)},), answer=str(i)) for i in range(7)]


def said(text: str, task: Task = TASKS[0], *, score: float = 1.0, index: int = 0) -> Trajectory:
    span = Span(token_ids=(1, 2), role="assistant", author="student", is_sampled=True, is_trainable=True)
    status = Status.ACCEPT if score > 0 else Status.REJECT
    return Trajectory(
        id=f"{task.id}{text}{index}",
        task_id=task.id,
        task_hash=task.hash,
        spans=(span,),
        completion=text,
        verdict=Verdict(status=status, score=score),
    )


class Fixed:
    """The same groups every time; counts how often it was asked."""

    def __init__(self, *groups: Sequence[Trajectory]) -> None:
        self.groups, self.tasks, self.asked = groups, TASKS, 0

    def draw(self, ctx: DrawContext) -> Draw:
        self.asked += 1
        groups = tuple(Group(task=TASKS[i], trajectories=tuple(g)) for i, g in enumerate(self.groups))
        return Draw(groups=groups, author="student", is_on_policy=True)

    def state(self) -> Mapping[str, Any]:
        return {"asked": self.asked}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.asked = state["asked"]


def ctx(round: int = 0, **more: Any) -> DrawContext:
    return DrawContext(seed=0, stage=0, round=round, **more)


# -- paths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("2 + 3 = 5, then 5 x 4 = 20.", [("2+3", "5"), ("5*4", "20")]),
        ("<<3*4=12>>12 and 1 + 1 = 3", [("3*4", "12")]),
        ("-3 + 5 = 2", [("-3+5", "2")]),
        ("$1,000 + $20 = $1,020", [("1000+20", "1020")]),
        ("2x + 3 = 7 and 2x + 3 + 4 = 9", []),
        ("the answer is 7", []),
        ("3*4 + 2*6 = 12 + 12 = 24", [("3*4+2*6", "12+12"), ("12+12", "24")]),
        ("3*4 + 2*6\n  = 12 + 12\n  = 24", [("3*4+2*6", "12+12"), ("12+12", "24")]),
        ("1. 2 + 3 = 5, 6 + 1 = 7. (8 - 1 = 7)", [("2+3", "5"), ("6+1", "7"), ("8-1", "7")]),
        ("2 + 3 = **5** and $4 \\times 5 = 20$", [("2+3", "5"), ("4*5", "20")]),
        ("10/3 = 3 1/3", [("10/3", "31/3")]),
        ("2 + 3 >= 4 => 6 + 1", []),
    ],
)
def test_equations_are_read_as_written(text: str, found: list[tuple[str, str]]) -> None:
    assert equations(text) == found


def rejects(text: str) -> bool:
    draw = Paths(Fixed([said(text)])).draw(ctx())
    return draw.stats["data/num_wrong_equations"] == 1


@pytest.mark.parametrize(
    "text",
    [
        "3*4 + 2*6 = 12 + 12 = 24",
        "2*(3+4) = 2*7 = 14",
        "(2 + 3) * 4 = 5 * 4 = 20",
        "5 + 3 = 4 * 2",
        "2+3=50/10",
        "10 - 3 = 7 = 14/2",
        "1. 2 + 3 = 5",
        "2 + 3 = 5, 6 + 1 = 7",
        "(2 + 3 = 5) * 2 = 10",
        # what touches a side, so that it is not the whole of it
        "2^3 + 1 = 9",
        "2 + 7 = 3²",
        "12:30 + 1 = 13:30",
        "100 - 25% = 75",
        "3 / 4 = 75%",
        "10/3 = 3 1/3",
        "10/3 = 3 and 1/3",
        "6 / 4 = 1 R 2",
        "7 / 2 = 3 with a remainder of 1",
        "5 + 5 = 3 (mod 7)",
        "1 000 + 20 = 1 020",
        "12 + 6 = 3x",
        "x -3 + 5 = 9",
        "√16 + 1 = 5",
        "20 x 2 + 1 = 41 and 60 students x 2/3 = 40",
        "3 times 4 + 2 = 14",
        "3 \\times 4 + 2 = 14",
        "25 / 1/3 = 75",
        "$2.50 - $2.24 = 26 cents",
        "10 / 3 = 3.33...",
    ],
)
def test_a_right_equation_is_never_held_against_a_completion(text: str) -> None:
    assert not rejects(text)


@pytest.mark.parametrize(
    "text",
    [
        "3*4 + 2*6 = 12 + 12 = 25",
        "3*4 + 2*6 = 12 + 13 = 25",
        "2*(3+4) = 2*8 = 14",
        "3*4 = 12 + 5 = 17",
        "2+3=60/10",
        "1. 2 + 3 = 6",
        "(2 + 3 = 6)",
        "2 + 3 = **6**",
        "-3 + 5 = 3",
        "$5 * 3 = $16 in all",
        "3 \\times 4 = 13 \\text{ cm}",
        "2 + 3 = 5, 6 + 1 = 8",
    ],
)
def test_a_wrong_equation_is_seen_wherever_it_stands(text: str) -> None:
    assert rejects(text)


@pytest.mark.parametrize("text", ["\n" * 20000, " " * 20000 + "=5", "=" * 20000, "1 1 " * 5000, "(" * 9000 + "2+3 = 5"])
def test_degenerate_texts_take_no_time(text: str) -> None:
    start = time.perf_counter()
    equations(text)
    assert time.perf_counter() - start < 5.0


@pytest.mark.shared_data
def test_gold_solutions_are_hardly_ever_rejected(shared_data: Path) -> None:
    """GSM8K's own solutions without their <<...>>: 0.5% have a wrong equation, most of them misprints."""
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [re.sub(r"<<.*?>>", "", json.loads(line)["answer"]) for line in lines]
    draw = Paths(Fixed([said(t, index=i) for i, t in enumerate(texts)])).draw(ctx())
    assert 0 < draw.stats["data/num_wrong_equations"] <= 0.005 * len(texts)
    assert sum(bool(equations(t)) for t in texts) > 6000


def test_one_completion_of_each_path_is_kept_and_wrong_equations_are_rejected() -> None:
    texts = ["2 + 3 = 5", "So 2+3 = 5!", "3 + 2 = 5", "2 + 3 = 6", "five", "it is five", "1/3 = 0.3333", "1/3 = 0.33"]
    source = Accepted(Paths(Fixed([said(t) for t in texts])), Keep(distinct="key", order="sampled"))
    draw = source.draw(ctx())
    assert [t.completion for t in draw.kept()] == ["2 + 3 = 5", "3 + 2 = 5", "five", "1/3 = 0.3333"]
    assert [t.marks for t in draw][3] == ("rejected",) and draw.stats["data/num_wrong_equations"] == 2
    wrong = list(draw)[3].verdict
    assert wrong is not None and wrong.reason == "accepted answer, but 2+3=6 is wrong"


# -- rising thresholds --------------------------------------------------------------------------


def test_one_draw_serves_every_threshold() -> None:
    inner = Fixed([said("a", score=0.2), said("b", score=0.6), said("c", score=0.9)])
    source = RisingThresholds(inner, [0.0, 0.5, 0.8], keep=Keep(distinct=None))
    kept = [[t.completion for t in source.draw(ctx(r)).kept()] for r in range(4)]
    assert kept == [["a", "b", "c"], ["b", "c"], ["c"], ["a", "b", "c"]] and inner.asked == 2
    assert [source.draw(ctx(r)).is_on_policy for r in (3, 4)] == [True, False]
    quantiles = RisingThresholds(inner, [0.0, 0.5], are_quantiles=True, keep=Keep(distinct=None))
    assert [len(quantiles.draw(ctx(r)).kept()) for r in (0, 1)] == [3, 2]
    with pytest.raises(ConfigError, match="must rise"):
        RisingThresholds(inner, [0.5, 0.1])


def test_a_score_must_be_above_the_threshold_so_rejected_answers_never_pass_the_first() -> None:
    inner = Fixed([said("wrong", score=0.0), said("half", score=0.5), said("right", score=1.0)])
    source = RisingThresholds(inner, [0.0, 0.5, 0.9], keep=Keep(distinct=None))
    draws = [source.draw(ctx(r)) for r in range(3)]
    assert [[t.completion for t in d.kept()] for d in draws] == [["half", "right"], ["right"], ["right"]]
    assert [d.stats["data/threshold"] for d in draws] == [0.0, 0.5, 0.9]
    quantiles = RisingThresholds(inner, [0.5], are_quantiles=True, keep=Keep(distinct=None))
    assert [t.completion for t in quantiles.draw(ctx()).kept()] == ["half", "right"], "the quantile itself passes"


@pytest.mark.parametrize("are_quantiles", [False, True])
def test_a_draw_whose_every_verdict_is_an_error_keeps_nothing(are_quantiles: bool) -> None:
    broken = replace(said("a"), verdict=Verdict(status=Status.ERROR, reason="time limit"))
    draw = RisingThresholds(Fixed([broken, broken]), [0.0], are_quantiles=are_quantiles).draw(ctx())
    assert not draw.kept() and {t.marks for t in draw} == {("error",)}


def test_solved_prompts_are_left_out_from_the_second_round_on() -> None:
    keep = Keep(distinct=None, drop_all_correct=True)
    for source in (
        Accepted(Fixed([said("a"), said("b")]), keep),
        RisingThresholds(Fixed([said("a"), said("b")]), [0.0, 0.5], keep=keep),
    ):
        assert [len(source.draw(ctx(r)).kept()) for r in range(3)] == [2, 0, 0]


def test_raft_takes_the_first_of_equally_good_answers() -> None:
    def long(text: str, tokens: int) -> Trajectory:
        span = Span(token_ids=(1,) * tokens, role="assistant", author="student", is_sampled=True, is_trainable=True)
        return replace(said(text), spans=(span,))

    group = [said("wrong", score=0.0), long("first, and long", 9), long("short", 1), long("medium", 4)]
    section = METHODS["raft"].settings.model_fields["keep"].get_default(call_default_factory=True)
    draw = Accepted(Fixed(group), keep_of(section)).draw(ctx())
    assert [t.completion for t in draw.kept()] == ["first, and long"]


# -- texts --------------------------------------------------------------------------------------


def test_keep_rules_choose_among_what_the_text_rules_left() -> None:
    texts = ["four 四四四", "four, or so", "four"]
    rules = TextRules(rejected=False, truncated=False, duplicates=False)
    found = Accepted(Cleaned(Fixed([said(t) for t in texts]), rules), Keep(order="sampled", cap=1)).draw(ctx())
    assert [t.marks for t in found] == [("mixed language",), (), ("over cap",)]
    assert found.stats["data/num_left_out/mixed language"] == 1 and found.stats["data/num_kept"] == 1
    lots = Keep(order="sampled", random_budget=True)
    arm = Accepted(Cleaned(Fixed([said(t) for t in texts]), rules), lots, budget=lambda *_: 3).draw(ctx())
    assert [(t.weight, t.marks) for t in arm] == [(1.0, ())] * 3, "the control arm draws among all"


def test_score_thresholds_and_text_rules_go_together() -> None:
    """What a verdict says is the keep rules' matter: a score may keep what was not accepted."""
    half = replace(said("half"), verdict=Verdict(status=Status.REJECT, score=0.5))
    rules = TextRules(rejected=False, truncated=False, duplicates=False)
    draw = Accepted(Cleaned(Fixed([half]), rules), Keep(min_score=0.5)).draw(ctx())
    assert [t.completion for t in draw.kept()] == ["half"]


# -- refilling ----------------------------------------------------------------------------------


class Sampler:
    author, version = "student", "v"

    def sample(self, requests: Any, params: Any, *, progress: Any = None) -> Any:
        from tutelage.types import Completion

        def one(r: Any, j: int) -> Completion:
            ids = (int(r.prompt_ids[0]), j)
            return Completion(token_ids=ids, logprobs=(0.0, 0.0), entropies=None, finish="stop", text=str(j))

        return [[one(r, j) for j in range(r.n)] for r in requests]


class Text:
    fingerprint = "f"

    def render_prompt(self, task: Task) -> list[Span]:
        return [Span(token_ids=(int(task.id[1:]),), role="user", author="user")]


class OddIsMixed:
    """Prompts with an odd number get both verdicts, the others only one."""

    name, version = "odd", "1"

    def judge(self, task: Task, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        odd = int(task.id[1:]) % 2
        return [Verdict(status=Status.ACCEPT if j or not odd else Status.REJECT) for j in range(len(trajectories))]


def is_mixed(group: Group) -> bool:
    return len({t.verdict.status for t in group.trajectories if t.verdict}) > 1


def refilled(max_draws: int) -> Refilled:
    drawn = Drawn(TASKS, n=2, per_round=2, is_shuffled=False)
    return Refilled(Judged(drawn, OddIsMixed()), drawn, is_useful=is_mixed, max_draws=max_draws)


def test_groups_of_one_outcome_are_replaced_by_the_next_prompts_and_stay_in_the_draw() -> None:
    source = refilled(10)
    context = ctx(sampler=lambda name: Sampler(), text=Text())
    first = source.draw(context)
    # t0 says nothing, t1 does: t2 replaces it, says nothing, and t3 replaces that.
    assert [g.task.id for g in first.groups] == ["t0", "t1", "t2", "t3"]
    assert [g.task.id for g in first.groups if any(t.weight for t in g.trajectories)] == ["t1", "t3"]
    assert {t.marks for t in first.groups[0].trajectories} == {("same reward",)}
    assert [t.prompt_index for t in first] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert first.stats["data/num_refill_draws"] == 2 and first.stats["data/num_groups_missing"] == 0
    again = refilled(10)
    again.restore(source.state())
    second = again.draw(context)
    assert [g.task.id for g in second.groups] == ["t4", "t5", "t6", "t0", "t1"]
    assert len({t.id for d in (first, second) for t in d}) == len(first) + len(second)


def test_refilling_ends_after_its_draws_and_says_what_is_missing() -> None:
    draw = refilled(2).draw(ctx(sampler=lambda name: Sampler(), text=Text()))
    assert [g.task.id for g in draw.groups] == ["t0", "t1", "t2"] and draw.stats["data/num_groups_missing"] == 1
