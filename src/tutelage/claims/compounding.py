"""Claim 2: off-policy imitation compounds its errors as eps T^2, on-policy as eps T, and when it does not.

A tightrope: at every step the learner sees whether it is on the rope and picks one of eight actions. On the rope one
action is right and any other leaves it; off the rope another is right and leads back. Every wrong action costs 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tutelage.claims.base import Claim, Numbers, Prediction, Predictions, log_slope
from tutelage.policies.table import TablePolicy
from tutelage.signals import HardTargets
from tutelage.train.distributed import Processes
from tutelage.train.optim import Optimizer
from tutelage.train.trainer import Trainer, TrainerSettings
from tutelage.types import Draw, Group, Span, Task, Trajectory, seed_for

NUM_ACTIONS = 8
ON, OFF = NUM_ACTIONS, NUM_ACTIONS + 1
"""Observation tokens come after the actions."""
RIGHT = {ON: 0, OFF: 1}
WRONG = 2
OFF_ERRORS = {"q1": 1.0, "q09": 0.9, "q06": 0.6, "q03": 0.3}
"""Chance of a wrong action in a state that was never trained on."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the experiment is."""

    horizons: tuple[int, ...] = (5, 10, 20, 40, 80, 160)
    eps: float = 0.002
    """The expert's own share of wrong labels, so that no learner can do better in a state it was trained on."""
    tolerance: float = 0.05
    """A round trains until the mean error over its labelled states is within this share of eps."""
    rounds: int = 5
    episodes: int = 2
    """Episodes a round: both learners see rounds * episodes * horizon labels."""
    max_steps: int = 2000


def untrained(off_error: float, seed: int) -> TablePolicy:
    """A table with noise in it, whose chance of a wrong action off the rope is as given."""
    policy = TablePolicy(NUM_ACTIONS + 2, order=1, seed=seed)
    with torch.no_grad():
        policy.table_VD.mul_(0.3)
        policy.table_VD[NUM_ACTIONS:] = -1e9  # observations are never chosen
        others = torch.ones(NUM_ACTIONS, dtype=torch.bool)
        others[RIGHT[OFF]] = False
        rest = policy.table_VD[:NUM_ACTIONS, OFF][others].logsumexp(0)
        odds = max(1 - off_error, 1e-12) / max(off_error, 1e-12)
        policy.table_VD[RIGHT[OFF], OFF] = rest + np.log(odds)
    return policy


def error(policy: TablePolicy, state: int) -> float:
    """Chance of a wrong action in a state."""
    probs_V = policy.table_VD[:, state].detach().softmax(0)
    return float(probs_V.sum() - probs_V[RIGHT[state]])


def expected_cost(on_error: float, off_error: float, horizon: int) -> float:
    """Wrong actions expected in an episode, exactly: a chain of two states."""
    on, cost = 1.0, 0.0
    for _ in range(horizon):
        cost += on * on_error + (1 - on) * off_error
        on = on * (1 - on_error) + (1 - on) * (1 - off_error)
    return cost


def episode(policy: TablePolicy | None, horizon: int, rng: np.random.Generator) -> list[int]:
    """States that the policy (None: the expert, who stays on the rope) visits."""
    states = [ON]
    while len(states) < horizon:
        is_right = policy is None or rng.random() >= error(policy, states[-1])
        states.append(ON if is_right else OFF)
    return states


def labelled(states: Sequence[int], name: str, eps: float) -> list[Trajectory]:
    """The states with the right action (weight 1 - eps) and with a wrong one (weight eps): its labels on average."""
    out = []
    for kind, weight, action_of in (("right", 1 - eps, RIGHT), ("wrong", eps, {ON: WRONG, OFF: WRONG})):
        spans: list[Span] = []
        for state in states:
            spans.append(Span(token_ids=(state,), role="tool", author="environment"))
            action = (action_of[state],)
            spans.append(Span(token_ids=action, role="assistant", author="expert", is_sampled=True, is_trainable=True))
        t = Trajectory(id=f"{name}-{kind}", task_id="rope", task_hash="rope", spans=tuple(spans), weight=weight)
        out.append(t)
    return out


def imitate(policy: TablePolicy, *, is_on_policy: bool, horizon: int, seed: int, size: Size) -> TablePolicy:
    """Collect states, label them, train on them; again. Only who walks differs between the learners."""
    trainer = Trainer(
        policy, Optimizer(policy.named_parameters(), kind="adamw", betas=(0.9, 0.95)), processes=Processes()
    )
    settings = TrainerSettings(lr=0.1, batch_size=None, schedule="constant", max_grad_norm=None, max_tokens=1 << 20)
    rng = np.random.default_rng(seed_for(seed, horizon, "walk"))
    signal = HardTargets()
    for round_ in range(size.rounds):
        walks = [episode(policy if is_on_policy else None, horizon, rng) for _ in range(size.episodes)]
        examples = [t for i, states in enumerate(walks) for t in labelled(states, f"r{round_}e{i}", size.eps)]
        group = Group(task=Task(id="rope", messages=()), trajectories=tuple(examples))
        rows = signal.prepare(Draw(groups=(group,), author="expert"), score_student=_never).rows
        visited = [state for states in walks for state in states]
        for _ in range(size.max_steps):
            errors = {state: error(policy, state) for state in (ON, OFF)}
            mean = float(np.mean([errors[s] for s in visited]))
            if abs(mean - size.eps) < size.tolerance * size.eps:
                break
            trainer.step(rows, signal, settings, lr=settings.lr)
    return policy


def _never(trajectories: Sequence[Trajectory]) -> list[Sequence[float]]:
    raise AssertionError("hard targets never ask for the student's scores")


def measure(seed: int, size: Size = Size()) -> Numbers:
    """Exact expected costs of cloning and DAgger over the horizon, and their exponents."""
    costs: dict[str, list[float]] = {name: [] for name in ("dagger", *OFF_ERRORS)}
    success: dict[str, float] = {}
    moved = 0.0
    for horizon in size.horizons:
        cloned = imitate(untrained(1.0, seed), is_on_policy=False, horizon=horizon, seed=seed, size=size)
        moved = max(
            moved, float((cloned.table_VD[:, OFF] - untrained(1.0, seed).table_VD[:, OFF]).detach().abs().max())
        )
        on = error(cloned, ON)
        for name, off_error in OFF_ERRORS.items():
            costs[name].append(expected_cost(on, off_error, horizon))
        dagger = imitate(untrained(1.0, seed), is_on_policy=True, horizon=horizon, seed=seed, size=size)
        costs["dagger"].append(expected_cost(error(dagger, ON), error(dagger, OFF), horizon))
        success = {"cloning": (1 - on) ** horizon, "dagger": (1 - error(dagger, ON)) ** horizon}
    out = {f"slope_cloning_{name}": log_slope(size.horizons, costs[name]) for name in OFF_ERRORS}
    out["slope_dagger"] = log_slope(size.horizons, costs["dagger"])
    for horizon, a, b in zip(size.horizons, costs["q1"], costs["dagger"], strict=True):
        out[f"cost_ratio_T{horizon}"] = a / b
    out["cost_ratio_longest_over_half_T"] = costs["q1"][-1] / costs["dagger"][-1] / (size.horizons[-1] / 2)
    out["flawless_difference"] = success["cloning"] - success["dagger"]
    out["unseen_state_moved"] = moved
    return out


CLAIM = Claim(
    name="compounding",
    number=2,
    line="SFT is off-policy: its errors compound as eps T^2 where on-policy imitation's grow as eps T; and when not",
    source="Ross & Bagnell 2010, theorem 2.1; Ross et al. 2011 (DAgger), arXiv:1011.0686",
    design=(
        "A tightrope of T = 5 to 160 steps: one of 8 actions keeps the learner on it, another leads back from "
        "beside it, each wrong action costs 1. Cloning and DAgger train a table by the library's hard targets on as "
        "many labels of an expert that mislabels a share of 0.002; cloning labels the states the expert visits, "
        "DAgger those it visits itself. Costs are exact. States that cloning never saw keep the error q they had: 1 "
        "(never recovers), 0.9, 0.6, 0.3. Predicted: the exponent of cloning's cost is in 1.8 to 2.05 at q = 1 and "
        "below 1.1 at q = 0.3 (where the learner recovers it does not compound); DAgger's is in 0.95 to 1.05; at T "
        "= 160 cloning costs more than half of T/2 times what DAgger does. If only flawless episodes count, the two "
        "differ by less than 0.05: then on-policy data is no help."
    ),
    measure=measure,
    judge=Predictions(
        Prediction(name="slope_cloning_q1", what="exponent of cloning's cost, no recovery", above=1.8, below=2.05),
        Prediction(name="slope_dagger", what="exponent of DAgger's cost", above=0.95, below=1.05),
        Prediction(name="slope_cloning_q03", what="exponent of cloning's cost where it recovers", below=1.1),
        Prediction(
            name="cost_ratio_longest_over_half_T", what="cloning's cost over DAgger's at T = 160, over T/2", above=0.5
        ),
        Prediction(name="flawless_difference", what="flawless episodes, cloning minus DAgger", above=-0.05, below=0.05),
        Prediction(name="unseen_state_moved", what="largest change of a logit in an unseen state", below=1e-12),
    ),
    minutes=1.0,
)
