"""The world of walks, and the claims about distillation and plans that are made in it, too small to judge."""

import numpy as np
import pytest
import torch

from tutelage.claims import (
    distillation_compute,
    off_policy_distillation,
    on_policy_distillation,
    on_policy_walks,
    r1_plan,
)
from tutelage.claims.walks import (
    END,
    Arrives,
    Learner,
    WalkText,
    all_tasks,
    decode,
    demonstrations,
    distance,
    grpo,
    neighbours,
    own_walks,
    shortest,
    small_model,
    split_tasks,
    straying,
    watched,
)
from tutelage.signals.distribution import TeacherDistribution
from tutelage.sources import Recorded
from tutelage.types import Trajectory


def judged(task, ids, finish="stop"):
    text = decode(ids[:-1] if finish == "stop" else ids)
    t = Trajectory(id="t", task_id=task.id, task_hash=task.hash, spans=(), completion=text, finish=finish)
    return Arrives().judge(task, [t])[0].is_accepted


@pytest.fixture(scope="module")
def learner():
    return Learner(small_model(width=8, layers=1, seed=0), 0)


def test_shortest_and_straying_walks_arrive():
    rng = np.random.default_rng(0)
    longer = 0
    for task in all_tasks()[::7]:
        goal, start = task.metadata["ids"]
        straight, astray = shortest(task, rng), straying(0.5)(task, rng)
        assert len(straight) - 1 == distance(goal, start)
        assert judged(task, straight) and judged(task, astray)
        longer += len(astray) > len(straight)
    assert longer > 20


def test_the_verifier_refuses_leaps_wrong_ends_and_walks_that_never_end():
    task = next(t for t in all_tasks() if t.metadata["ids"] == [7, 5])  # from 5 by 6 to 7
    assert judged(task, [6, 7, END])
    assert not judged(task, [7, END])  # a leap
    assert not judged(task, [6, END])  # not there
    assert not judged(task, [6, 7, 8, END])  # walked past
    assert not judged(task, [6, 7], finish="length")
    assert not judged(task, [6, 30, 7, END])  # no square
    assert not judged(task, [END])


def test_the_grid_is_a_grid():
    assert sorted(neighbours(0)) == [1, 5] and sorted(neighbours(12)) == [7, 11, 13, 17]
    assert all(distance(a, b) == 1 and a in neighbours(b) for a in range(25) for b in neighbours(a))
    train, held = split_tasks(3, train=400)
    assert len(train) == 400 and len(held) == 200 and not {t.id for t in train} & {t.id for t in held}


def test_a_copy_shares_no_weights_and_starts_with_an_empty_ledger(learner):
    one = learner.copy()
    one.imitate(demonstrations(all_tasks()[:32], shortest, 0), lr=1e-2, steps=1, batch_size=32)
    assert one.ledger.ledger.total > 0 == one.copy().ledger.ledger.total
    changed = [not torch.equal(a, b) for a, b in zip(one.model.parameters(), learner.model.parameters(), strict=True)]
    assert all(changed)
    assert all(torch.equal(a, b) for a, b in zip(one.copy().model.parameters(), one.model.parameters(), strict=True))


def test_the_ledger_has_what_each_method_did(learner):
    tasks = all_tasks()[:16]
    sft, rl, opd = learner.copy(), learner.copy(), learner.copy()
    sft.round(Recorded(demonstrations(tasks, shortest, 0)), off_policy_distillation.HardTargets(), lr=1e-3)
    assert {k for k, v in sft.ledger.ledger.flops.items() if v} == {"training"}
    rl.round(own_walks(tasks, n=4, per_round=4), grpo(), lr=1e-3)
    assert rl.ledger.ledger.flops["sampling"] > 0 == rl.ledger.ledger.flops["teacher"]
    opd.round(own_walks(tasks, n=1, per_round=16), TeacherDistribution(watched(opd, learner), "reverse_kl"), lr=1e-3)
    flops = opd.ledger.ledger.flops
    assert flops["teacher"] > 0 and flops["sampling"] > 0
    assert flops["training"] == pytest.approx(3 * flops["teacher"])  # the same size of model: forward, and 3 forwards


# -- claim 5 -----------------------------------------------------------------------------------


def test_one_step_of_distillation_is_one_of_sft(learner):
    teacher = Learner(small_model(width=8, layers=1, seed=1), 0)
    assert off_policy_distillation.step_difference(learner, teacher, all_tasks()[:8]) == 0


def test_the_expected_gradient_of_sft_is_the_forward_kls(monkeypatch):
    assert off_policy_distillation.expected_gradient_difference(0) < 1e-12

    class Reversed(TeacherDistribution):
        def __init__(self, teacher, **options):
            super().__init__(teacher, "reverse_kl", **options)

    monkeypatch.setattr(off_policy_distillation, "TeacherDistribution", Reversed)
    assert off_policy_distillation.expected_gradient_difference(0) > 0.1  # the comparison can fail


def test_the_demonstration_is_read_from_the_text_alone(learner):
    draw = learner.draw(own_walks(all_tasks()[:4], n=1, per_round=4))
    for group in draw.groups:
        demo = off_policy_distillation.as_demonstration(group)
        assert demo.token_ids == group.trajectories[0].token_ids
        assert demo.spans[-1].author == "human" and demo.behaviour_logprobs is None


def test_off_policy_distillation_runs_small():
    size = off_policy_distillation.Size(tasks=32, held_out=16, pretraining=20, completions=1, epochs=1)
    found = off_policy_distillation.measure(0, size)
    off_policy_distillation.CLAIM.judge([found, found])
    assert found["refused_worse"] in (0.0, 1.0)


# -- claim 6 -----------------------------------------------------------------------------------

SMALL = on_policy_walks.Size(
    tasks=24, held_out=8, teacher_steps=20, start_steps=20, steps=2, batch=16, compared=8, students=((8, 1),)
)


def test_occupancy_counts_the_visits_of_a_chain():
    """A chain that always goes on to the next token: after the first pair only (a, a + 1) is visited."""
    probs_ABV = torch.eye(4, dtype=torch.float64).roll(1, dims=1).expand(4, 4, 4)
    found_AB = on_policy_distillation.occupancy(probs_ABV, 3)
    expected_AB = (torch.full((4, 4), 1 / 16) + 2 * torch.eye(4).roll(1, dims=1) / 4) / 3
    assert torch.allclose(found_AB, expected_AB.double())


def test_the_chain_orders_the_two_extremes_even_when_small():
    found = on_policy_distillation.measure(0, on_policy_distillation.Size(vocab=5, horizon=6, steps=60))
    assert found["rkl_fkl_off"] > found["rkl_rkl_on"]
    assert found["rkl_cut"] == pytest.approx(1 - found["rkl_rkl_on"] / found["rkl_fkl_off"])
    on_policy_distillation.CLAIM.judge([found, found])


def test_the_gain_ratio_is_gkds():
    assert on_policy_walks.gain_ratio(0.3, [0.1, 0.2]) == pytest.approx(2.0)
    assert on_policy_walks.gain_ratio(0.3, [-0.1, 0.1]) == pytest.approx(30.0)
    found = on_policy_walks.measure(0, SMALL)
    baseline = [found["gain_seqkd"], found["gain_supervised_kd"]]
    for arm in ("forward_kl", "reverse_kl"):  # one student: the mean over students is its own
        expected = on_policy_walks.gain_ratio(found[f"gain_{arm}"], baseline)
        assert found[f"gain_ratio_{arm}"] == pytest.approx(expected)
    on_policy_walks.CLAIM.judge([found, found])


# -- claim 7 -----------------------------------------------------------------------------------


class Climbing:
    """Scores 0.1 more and costs 10 more a step."""

    def __init__(self):
        self.steps = 0

    @property
    def ledger(self):
        return self

    @property
    def total(self):
        return 10.0 * self.steps

    def pass_at(self, k, tasks, *, n):
        return 0.1 * self.steps

    def step(self):
        self.steps += 1


def test_compute_to_a_score_is_taken_between_two_looks():
    climbing = Climbing()
    size = distillation_compute.Size(check_every=3, most_steps=9)
    cost, reached = distillation_compute.compute_to(0.45, climbing, climbing.step, [], size)
    assert reached and cost == pytest.approx(45.0)
    climbing = Climbing()
    assert distillation_compute.compute_to(2.0, climbing, climbing.step, [], size) == (90.0, False)


def test_an_arms_compute_is_its_best_runs():
    assert distillation_compute.best([(5.0, False), (9.0, True), (7.0, True)]) == (7.0, True)
    assert distillation_compute.best([(5.0, False), (6.0, False)]) == (6.0, False)


def test_distillation_compute_runs_small():
    size = distillation_compute.Size(
        tasks=32, held_out=8, pretraining=20, walks=16, group=4, most_steps=2, check_every=1, target=0.0,
        rl_rates=(1e-3,), distil_rates=(1e-3,),
    )  # fmt: skip
    found = distillation_compute.measure(0, size)
    assert found["full_kl_reached"] == found["rl_reached"] == 1.0


# -- claim 12 ----------------------------------------------------------------------------------


def test_the_plan_spends_the_budget_and_starts_its_sft_from_the_base():
    train, _ = split_tasks(0, train=24)
    size = r1_plan.Size(tasks=24, walks=16, group=4, steps=6, samples=2, epochs=1, rl_lr=3e-3, sft_lr=1e-7)
    base = Learner(small_model(width=8, layers=1, seed=0), 0)
    base.imitate(demonstrations(train, shortest, 0), lr=1e-2, steps=60, batch_size=24)
    rl = r1_plan.alone(base, train, size)
    budget = rl.ledger.ledger.total
    stages = r1_plan.plan(base, train, size, budget=budget)
    assert stages["first_rl"].ledger.ledger.total >= 0.5 * budget
    assert budget <= stages["plan"].ledger.ledger.total < budget * 1.35  # one step over at most
    assert drift(stages["sft_from_base"], base) < 1e-5 < 1e-3 < drift(stages["first_rl"], base)
    assert stages["first_rl"].rounds + stages["plan"].rounds <= size.steps


def drift(a, b):
    """Largest difference of a weight."""
    return max(
        float((x - y).abs().max())
        for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    )


def test_r1_plan_runs_small(monkeypatch):
    size = r1_plan.Size(tasks=24, held_out=8, pretraining=20, walks=16, group=4, steps=3, samples=4, epochs=1, base=0.0)
    monkeypatch.setattr(r1_plan, "grown", trained_a_little)
    found = r1_plan.measure(0, size)
    r1_plan.CLAIM.judge([found, found])


def trained_a_little(seed, name, tasks, write, **options):
    learner = Learner(small_model(width=16, layers=1, seed=seed), seed)
    learner.imitate(demonstrations(tasks, shortest, 0), lr=1e-2, steps=80, batch_size=24)
    return learner


def test_walks_render_as_their_ids():
    (span,) = WalkText().render_prompt(all_tasks()[0])
    assert span.token_ids == (0, 1) and not span.is_trainable


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [off_policy_distillation, on_policy_distillation, on_policy_walks, distillation_compute, r1_plan],
    ids=lambda m: m.CLAIM.name,
)
def test_one_seed_of_the_claim_gives_what_is_judged(module):
    found = module.measure(0)
    assert all(np.isfinite(v) for v in found.values())
    module.CLAIM.judge([found, found])
