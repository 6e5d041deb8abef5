"""Student rollouts and recorded answers in one draw: deterministic coins, an adaptive share, replay, resume."""

from dataclasses import replace

import pytest

from tutelage.errors import ConfigError, DataError
from tutelage.sources.adaptive import AdaptiveShare
from tutelage.sources.beside import Beside
from tutelage.sources.drawn import Drawn
from tutelage.sources.gkd import StudentShare
from tutelage.sources.mixed import Mixed
from tutelage.sources.recorded import Recorded
from tutelage.sources.replay import Replay
from tutelage.train.costs import RunLedger
from tutelage.train.ledger import ModelCost
from tutelage.types import RECORDED, REPLAYED, Completion, DrawContext, Group, Span, Task, Trajectory

NUM = 40


def groups():
    out = []
    for i in range(NUM):
        task = Task(id=f"q{i}", messages=({"role": "user", "content": f"question {i}"},))
        answer = Span(token_ids=(9, 2), role="assistant", author="human", is_sampled=True, is_trainable=True)
        t = Trajectory(id=f"r{i}", task_id=task.id, task_hash=task.hash, spans=(answer,), completion=f"recorded {i}")
        out.append(Group(task=task, trajectories=(t,)))
    return out


class Text:
    fingerprint = "T"

    def render_prompt(self, task):
        return [Span(token_ids=(int(task.id[1:]),), role="user", author="user")]


class Sampler:
    author, version = "student", "v"

    def sample(self, requests, params, *, progress=None):
        return [
            [
                Completion(
                    token_ids=(r.seed % 50,), logprobs=(-1.0,), entropies=(0.0,), finish="stop", text=str(r.seed)
                )
                for _ in range(r.n)
            ]
            for r in requests
        ]


def context(round=0, **kwargs):
    return DrawContext(seed=3, stage=0, round=round, sampler=lambda name: Sampler(), text=Text(), **kwargs)


def authors(draw):
    return [t.spans[-1].author for t in draw]


@pytest.mark.parametrize("share,frac,author,on_policy", [(0.0, 0, "recorded", False), (1.0, 1, "student", True)])
def test_the_ends_are_supervised_and_on_policy(share, frac, author, on_policy):
    draw = StudentShare(groups(), share=share).draw(context())
    assert draw.stats["data/frac_prompts_fresh"] == frac and (draw.author, draw.is_on_policy) == (author, on_policy)
    assert [t.prompt_index for t in draw] == list(range(NUM)) and len({g.task.id for g in draw.groups}) == NUM


def test_coins_are_fair_repeatable_and_belong_to_the_prompt():
    a, b = (StudentShare(groups(), share=0.5).draw(context()) for _ in range(2))
    assert [t.spans for t in a] == [t.spans for t in b] and a.author == "mixed" and not a.is_on_policy
    assert 8 < authors(a).count("student") < 32
    rounds = StudentShare(groups(), share=0.5, per_round=10)
    parts = [t for r in range(4) for t in authors(rounds.draw(context(r)))]
    assert parts == authors(a)  # the same coins, however the stage is cut into rounds
    more = StudentShare(groups(), share=0.8).draw(context())
    assert all(y == "student" for x, y in zip(authors(a), authors(more), strict=True) if x == "student")


def test_answers_go_with_their_own_prompt():
    draw = StudentShare(groups(), share=0.5).draw(context())
    for g in draw.groups:
        (t,) = g.trajectories
        assert t.task_id == g.task.id
        if t.spans[-1].author == "student":
            assert t.spans[0].token_ids == (int(g.task.id[1:]),)
        else:
            assert t.completion == f"recorded {g.task.id[1:]}"


def test_a_share_may_follow_the_round_and_state_comes_back():
    source = StudentShare(groups(), share=lambda r: r / 2, per_round=20)
    assert [source.draw(context(r)).stats["data/frac_prompts_fresh"] for r in range(3)][::2] == [0.0, 1.0]
    whole = StudentShare(groups(), share=0.5, per_round=15)
    draws = [whole.draw(context(r)) for r in range(3)]
    again = StudentShare(groups(), share=0.5, per_round=15)
    again.draw(context(0))
    resumed = StudentShare(groups(), share=0.5, per_round=15)
    resumed.restore(again.state())
    assert [t.spans for t in resumed.draw(context(1))] == [t.spans for t in draws[1]]


def test_the_adaptive_share_grows_only_when_validation_gets_worse():
    share = AdaptiveShare()
    name = share.metric
    seen = [share.update({name: loss}) for loss in (2.0, 1.8, 1.8, 1.85, 1.96, 2.07, 2.0, 2.2)]
    assert seen == [0.0, 0.0, 0.0, 0.0, pytest.approx(0.1), pytest.approx(0.2), pytest.approx(0.2), pytest.approx(0.3)]
    assert share.update({}) == pytest.approx(0.3)
    other = AdaptiveShare()
    other.restore(share.state())
    assert other.update({name: 2.4}) == pytest.approx(0.4) == share.update({name: 2.4})
    for loss in range(3, 30):
        share.update({name: float(loss)})
    assert share.value == 1.0


def test_what_a_prompt_is_answered_with():
    share = AdaptiveShare(start=0.5)
    assert share.choose(0.6, 0.0, is_buffer_full=True) == "recorded"
    assert share.choose(0.4, 0.0, is_buffer_full=True) == "fresh"
    assert share.choose(0.4, 0.5, is_buffer_full=True) == "replay"
    assert share.choose(0.2, 0.5, is_buffer_full=True) == "fresh"
    assert share.choose(0.4, 0.9, is_buffer_full=False) == "fresh"


@pytest.mark.parametrize("stored", [False, True])
def test_replay_uses_earlier_rollouts_and_survives_a_resume(tmp_path, stored):
    def make():
        return StudentShare(groups(), share=AdaptiveShare(start=0.8), per_round=20, rounds=4, buffer_size=5)

    def ctx(r):
        return context(r, store=tmp_path / "work" / f"r{r}", kept=tmp_path / "kept") if stored else context(r)

    source = make()
    draws, states = [], []
    for r in range(4):
        states.append(source.state())
        draws.append(source.draw(ctx(r)))
    last = draws[3]
    assert last.stats["data/frac_prompts_replay"] > 0 and draws[0].stats["data/frac_prompts_replay"] == 0
    early = {t.id for d in draws[:3] for t in d if t.spans[-1].author == "student"}
    replayed = [t for t in last if t.spans[-1].author == "student" and t.id in early]
    assert len(replayed) == last.stats["data/frac_prompts_replay"] * 20
    assert not last.is_on_policy and all(g.task.id == t.task_id for g in last.groups for t in g.trajectories)
    if stored:
        resumed = make()
        resumed.restore(states[3])
        assert [t.id for t in resumed.draw(ctx(3))] == [t.id for t in last]


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(DataError, match="at least one recorded"):
        StudentShare([], share=0.5)
    with pytest.raises(ConfigError, match=r"share must be in \[0, 1\], got 1.2"):
        StudentShare(groups(), share=1.2)
    with pytest.raises(ConfigError, match="rounds"):
        StudentShare(groups(), share=AdaptiveShare())
    with pytest.raises(ConfigError, match="above maximum"):
        AdaptiveShare(start=0.9, maximum=0.5)
    assert replace(groups()[0]).task.id == "q0"


def by_big(group):
    """As a store of the teacher `big`'s answers reads."""
    ts = (replace(t, spans=(replace(t.spans[0], author="big"),)) for t in group.trajectories)
    return replace(group, trajectories=tuple(ts))


def test_what_was_not_sampled_for_the_draw_is_marked_and_costs_no_sampling():
    """A store by the teacher and a replayed rollout were paid for when they were sampled."""
    share = AdaptiveShare(start=0.8)
    source = StudentShare([by_big(g) for g in groups()], share=share, per_round=20, rounds=4, buffer_size=5)
    cost = ModelCost(body=1.0, attention=0.0, head=0.0)
    kinds = set()
    for r in range(4):
        draw = source.draw(context(r))
        ledger = RunLedger(cost, authors={"big": cost})
        ledger.drawn(draw)
        fresh = [t for t in draw if draw.is_fresh(t)]
        assert len(fresh) == 20 * draw.stats["data/frac_prompts_fresh"]
        assert ledger.summary()["tokens"]["sampling"] == sum(t.num_sampled for t in fresh)
        kinds |= {t.marks for t in draw}
    assert kinds == {(), (RECORDED,), (REPLAYED,)}


def test_recorded_trajectories_beside_sampled_ones_cost_no_sampling():
    recorded = [by_big(g) for g in groups()]
    drawn = Drawn([g.task for g in groups()], n=1)
    cost = ModelCost(body=1.0, attention=0.0, head=0.0)
    for source in (Mixed({"a": Recorded(recorded), "b": drawn}), Beside(drawn, Recorded(recorded))):
        ledger = RunLedger(cost, authors={"big": cost})
        draw = source.draw(context())
        ledger.drawn(draw)
        assert len(draw) == 2 * NUM and sum(draw.is_fresh(t) for t in draw) == NUM
        assert ledger.summary()["tokens"]["sampling"] == NUM


def test_a_replayed_round_costs_no_sampling():
    source = Replay(Drawn([g.task for g in groups()[:4]], n=1), distinct=None)
    cost = ModelCost(body=1.0, attention=0.0, head=0.0)
    ledger = RunLedger(cost)
    for r in range(3):
        ledger.drawn(source.draw(context(r)))
    assert ledger.summary()["tokens"]["sampling"] == 3 * 4


def test_a_draw_says_how_long_its_answers_are():
    stats = Drawn([g.task for g in groups()], n=3).draw(context()).stats
    assert stats["data/mean_sampled_tokens"] == stats["data/num_sampled_tokens"] / (3 * NUM) == 1.0
