"""A small world for the claims: walks on a grid from a start to a goal, and small transformers that walk.

A question is `goal start`, an answer the squares stepped on and an end: `14 2 -> 3 4 9 14 <end>` on a 5 x 5 grid. A
verifier accepts an answer whose every step goes to a neighbouring square, and which ends by itself on the goal. A wrong
but legal step costs length, not the answer: who knows the way from everywhere recovers. Sampling, judging, signals,
updates and the ledger are the library's own.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from tutelage.evals.evaluate import evaluate
from tutelage.evals.result import EvalResult
from tutelage.policies.policy import Policy
from tutelage.policies.sampler import InProcessSampler
from tutelage.policies.teachers import InProcessTeacher
from tutelage.signals import HardTargets
from tutelage.signals.policy_gradient import PolicyGradient
from tutelage.sources import Drawn, Judged, Recorded
from tutelage.train.costs import RunLedger
from tutelage.train.distributed import Processes
from tutelage.train.ledger import cost_of
from tutelage.train.optim import Optimizer
from tutelage.train.trainer import Place, Trainer, TrainerSettings
from tutelage.types import (
    Draw,
    DrawContext,
    Group,
    SamplingParams,
    Signal,
    Source,
    Span,
    Status,
    Task,
    Trajectory,
    Verdict,
    seed_for,
)

SIDE = 5
SQUARES = SIDE * SIDE
END, VOCAB_SIZE = SQUARES, 32
SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=12)
"""The longest shortest way has 8 steps and an end: a few detours are affordable."""

WriteAnswer = Callable[[Task, np.random.Generator], Sequence[int]]


def neighbours(square: int) -> list[int]:
    """Squares one step away."""
    y, x = divmod(square, SIDE)
    around = ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
    return [SIDE * j + i for j, i in around if 0 <= j < SIDE and 0 <= i < SIDE]


def distance(a: int, b: int) -> int:
    """Steps of the shortest way."""
    return abs(a // SIDE - b // SIDE) + abs(a % SIDE - b % SIDE)


class WalkText:
    """Renders tasks to tokens: a square is its own id."""

    fingerprint = "walks"

    def render_prompt(self, task: Task) -> tuple[Span, ...]:
        return (Span(token_ids=tuple(task.metadata["ids"]), role="user", author="user"),)


def decode(ids: Sequence[int]) -> str:
    """Tokens as text."""
    return " ".join(str(i) for i in ids)


class Arrives:
    """Accepts a walk of legal steps that ends on the goal by itself."""

    name, version = "arrives", "1"

    def judge(self, task: Task, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        goal, start = task.metadata["ids"]
        out = []
        for t in trajectories:
            walk = [start, *(int(s) for s in t.completion.split())]
            is_legal = all(b < SQUARES and b in neighbours(a) for a, b in pairwise(walk))
            is_right = t.finish == "stop" and walk[-1] == goal and is_legal
            out.append(Verdict(status=Status.ACCEPT if is_right else Status.REJECT, score=float(is_right)))
        return out


def all_tasks() -> list[Task]:
    """One task for each goal and each other start."""
    pairs = [(goal, start) for goal in range(SQUARES) for start in range(SQUARES) if goal != start]
    return [
        Task(
            id=f"{goal}-{start}",
            messages=({"role": "user", "content": f"to {goal} from {start}"},),
            answer=str(goal),
            metadata={"ids": [goal, start]},
        )
        for goal, start in pairs
    ]


def split_tasks(seed: int, *, train: int) -> tuple[list[Task], list[Task]]:
    """`train` tasks and the others, by a shuffle."""
    tasks = all_tasks()
    order = np.random.default_rng(seed_for(seed, "split")).permutation(len(tasks))
    return [tasks[i] for i in order[:train]], [tasks[i] for i in order[train:]]


def shortest(task: Task, rng: np.random.Generator, *, start: int | None = None) -> list[int]:
    """A shortest way, each step drawn from those that come nearer, and the end."""
    goal, at = task.metadata["ids"][0], task.metadata["ids"][1] if start is None else start
    out = []
    while at != goal:
        at = int(rng.choice([s for s in neighbours(at) if distance(s, goal) < distance(at, goal)]))
        out.append(at)
    return [*out, END]


def straying(share: float) -> WriteAnswer:
    """Ways whose every step is, with this probability, to a neighbour drawn at random."""

    def write(task: Task, rng: np.random.Generator) -> list[int]:
        goal, at = task.metadata["ids"]
        out: list[int] = []
        while at != goal:
            near = [s for s in neighbours(at) if distance(s, goal) < distance(at, goal)]
            at = int(rng.choice(neighbours(at) if rng.random() < share else near))
            out.append(at)
        return [*out, END]

    return write


def demonstrations(tasks: Sequence[Task], write: WriteAnswer, seed: int, *, most: int = 20) -> list[Group]:
    """Each task with one answer; those longer than `most` tokens are written again."""
    text, rng = WalkText(), np.random.default_rng(seed_for(seed, "demonstrations"))
    groups = []
    for i, task in enumerate(tasks):
        ids = tuple(write(task, rng))
        while len(ids) > most:
            ids = tuple(write(task, rng))
        span = Span(token_ids=ids, role="assistant", author="human", is_sampled=True, is_trainable=True)
        t = Trajectory(
            id=f"demo{i}",
            task_id=task.id,
            task_hash=task.hash,
            spans=(*text.render_prompt(task), span),
            messages=(*task.messages, {"role": "assistant", "content": decode(ids[:-1])}),
            completion=decode(ids[:-1]),
            tokenizer=text.fingerprint,
        )
        groups.append(Group(task=task, trajectories=(t,)))
    return groups


def small_model(*, width: int, layers: int, seed: int) -> Any:
    """A Llama with random weights fixed by the seed. Weights of size 0.1, or a model this narrow learns slowly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=None,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@dataclass
class Learner:
    """A model in training, with the operations it has cost so far."""

    model: Any
    seed: int
    teachers: dict[str, Any] = field(default_factory=dict)
    """Other models that may write trajectories, by author."""

    def __post_init__(self) -> None:
        self.policy = Policy(self.model)
        self.optimizer = Optimizer(self.policy.named_parameters(), betas=(0.9, 0.99))
        self.trainer = Trainer(self.policy, self.optimizer, processes=Processes())
        self.ledger = RunLedger(cost_of(self.model), authors={n: cost_of(m) for n, m in self.teachers.items()})
        self.rounds = 0
        self._samplers: dict[str, InProcessSampler] = {}

    def sampler(self, author: str) -> InProcessSampler:
        if author not in self._samplers:
            model = self.model if author == "student" else self.teachers[author]
            self._samplers[author] = InProcessSampler(
                model, stop_ids=(END,), decode=decode, author=author, max_batch=512
            )
        return self._samplers[author]

    def draw(self, source: Source) -> Draw:
        """One draw, its sampling in the ledger."""
        ctx = DrawContext(seed=self.seed, stage=0, round=self.rounds, sampler=self.sampler, text=WalkText())
        draw = source.draw(ctx)
        self.ledger.drawn(draw)
        return draw

    def score(self, trajectories: Sequence[Trajectory]) -> list[Sequence[float]]:
        self.ledger.scored(trajectories)
        return self.trainer.score(trajectories)

    def round(
        self, source: Source, signal: Signal, *, lr: float, batch_size: int | None = None, epochs: int = 1
    ) -> Draw:
        """One round of the loop: draw, prepare, update."""
        settings = TrainerSettings(
            lr=lr,
            batch_size=batch_size,
            epochs=epochs,
            schedule="constant",
            max_tokens=1 << 14,
            layout="padded",
        )
        draw = self.draw(source)
        targets = signal.prepare(draw, score_student=self.score)
        place = Place(seed=self.seed, stage=0, round=self.rounds, num_rounds=self.rounds + 1)
        batches = self.trainer.batches(targets.rows, settings, place)
        for batch, _ in zip(batches, self.trainer.steps(targets, signal, settings, place), strict=True):
            self.ledger.updated([targets.rows[i].trajectory for i in batch if targets.rows[i].is_trained])
        self.rounds += 1
        return draw

    def imitate(self, groups: Sequence[Group], *, lr: float, steps: int, batch_size: int = 64) -> None:
        """SFT for about `steps` updates."""
        epochs = max(1, round(steps * batch_size / len(groups)))
        self.round(Recorded(groups), HardTargets(), lr=lr, batch_size=batch_size, epochs=epochs)

    def copy(self, *, seed: int | None = None, teachers: dict[str, Any] | None = None) -> "Learner":
        """The same weights with a new optimiser and an empty ledger."""
        model = copy.deepcopy(self.model)
        return Learner(
            model, self.seed if seed is None else seed, teachers=self.teachers if teachers is None else teachers
        )

    def evaluate(self, tasks: Sequence[Task], *, n: int = 8, ks: Sequence[int] = (1,)) -> EvalResult:
        """Samples at temperature 1. Not part of the ledger."""
        return evaluate(
            self.sampler("student"),
            tasks,
            Arrives(),
            text=WalkText(),
            n=n,
            params=SAMPLING,
            seed=self.seed,
            ks=ks,
            greedy=False,
            chance=False,
        )

    def pass_at(self, k: int, tasks: Sequence[Task], *, n: int = 8) -> float:
        """Mean over the tasks of the unbiased pass@k."""
        return float(np.mean(list(self.evaluate(tasks, n=n, ks=(k,)).by_task(f"pass@{k}").values())))


def own_walks(tasks: Sequence[Task], *, n: int, per_round: int, author: str = "student") -> Judged:
    """`n` judged walks each for the next `per_round` tasks."""
    return Judged(Drawn(tasks, author=author, n=n, params=SAMPLING, per_round=per_round), Arrives())


def grown(
    seed: int,
    name: str,
    tasks: Sequence[Task],
    write: WriteAnswer,
    *,
    width: int,
    layers: int,
    most: int,
    until: float | None = None,
    then: WriteAnswer | None = None,
) -> Learner:
    """A model trained from nothing on fresh demonstrations for `most` updates, or until its pass@1 on some of the tasks
    is at least `until`. The rate falls tenfold on the way; from the middle on, `then` writes, where it is given."""
    learner = Learner(small_model(width=width, layers=layers, seed=seed_for(seed, name) % 2**62), seed_for(seed, name))
    part = 20
    for done in range(0, most, part):
        fresh = [tasks[i % len(tasks)] for i in range(done * 64, (done + part) * 64)]
        author = then if then is not None and done >= most / 2 else write
        groups = demonstrations(fresh, author, seed_for(seed, name, done))
        learner.imitate(groups, lr=3e-3 * 0.1 ** (done / most), steps=part)
        if until is not None and learner.pass_at(1, tasks[:128], n=4) >= until:
            break
    return learner


def good_teacher(seed: int, tasks: Sequence[Task], *, most: int) -> Learner:
    """Knows the way from everywhere: it has first seen walks that strayed, then straight ones."""
    return grown(seed, "teacher", tasks, straying(0.3), then=shortest, width=64, layers=2, most=most)


def watched(learner: Learner, teacher: Learner) -> InProcessTeacher:
    """The teacher for a distillation signal, what runs through it in the learner's ledger."""
    out = InProcessTeacher(copy.deepcopy(teacher.model))
    out.on_scored = learner.ledger.counter(cost_of(teacher.model))
    return out


def grpo() -> PolicyGradient:
    """One update a draw, so that no ratio is needed: `old` and sampler are the weights themselves."""
    return PolicyGradient("grpo", clip=None, sampler_cap=None, recompute=False)
