"""Tabular policies in the whole loop: a sampler, the text of a one-token question, and a run in a temporary folder."""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tutelage.errors import ConfigError
from tutelage.policies.table import TablePolicy
from tutelage.train.distributed import Processes
from tutelage.train.loop import Stage, run_plan
from tutelage.train.optim import Optimizer
from tutelage.train.run_directory import RunDirectory
from tutelage.train.session import Session, Weights
from tutelage.train.trainer import Trainer
from tutelage.types import (
    Completion,
    Progress,
    Sampler,
    SampleRequest,
    SamplingParams,
    Span,
    Status,
    Task,
    Trajectory,
    Verdict,
    seed_for,
)


def questions(vocab_size: int) -> list[Task]:
    """One question for each token but the last, which ends an answer."""
    return [Task(id=str(i), messages=({"role": "user", "content": str(i)},)) for i in range(vocab_size - 1)]


class TableText:
    """A question is the token it names."""

    fingerprint = "table"

    def render_prompt(self, task: Task) -> tuple[Span, ...]:
        return (Span(token_ids=(int(task.id),), role="user", author="user"),)


class TableSampler:
    """Samples a table at temperature 1, token by token, until its last token or the limit."""

    def __init__(self, policy: TablePolicy, *, author: str, version: str) -> None:
        self.policy, self.author, self.version = policy, author, version

    @torch.no_grad()
    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, progress: Progress | None = None
    ) -> list[list[Completion]]:
        if not params.samples_own_distribution:
            raise ConfigError(f"a TableSampler samples the table itself, at temperature 1 and top-p 1; got {params}")
        return [[self._one(r.prompt_ids, seed_for(r.seed, j), params) for j in range(r.n)] for r in requests]

    def _one(self, prompt: tuple[int, ...], seed: int, params: SamplingParams) -> Completion:
        generator = torch.Generator().manual_seed(seed % 2**31)
        ids = list(prompt)
        logprobs: list[float] = []
        while len(logprobs) < params.max_new_tokens:
            logprobs_V = self.policy.logits(torch.tensor([ids]))[0, -1].log_softmax(-1)
            token = int(torch.multinomial(logprobs_V.exp(), 1, generator=generator))
            ids.append(token)
            logprobs.append(float(logprobs_V[token]))
            if token == self.policy.vocab_size - 1:
                break
        answer = tuple(ids[len(prompt) :])
        return Completion(
            token_ids=answer,
            logprobs=tuple(logprobs),
            entropies=None,
            finish="stop" if answer[-1] == self.policy.vocab_size - 1 else "length",
            text=" ".join(map(str, answer[:-1])),
        )


class FirstIsEven:
    """Accepts what begins with an even token and ends by itself: about half of a random table's answers."""

    name, version = "first is even", "1"

    def judge(self, task: Task, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        out = []
        for t in trajectories:
            is_right = t.spans[-1].token_ids[0] % 2 == 0 and t.finish == "stop"
            out.append(Verdict(status=Status.ACCEPT if is_right else Status.REJECT, score=float(is_right)))
        return out


def carried_out(plan: Sequence[Stage], start: TablePolicy, seed: int, *, teacher: TablePolicy | None = None) -> Tensor:
    """The table after a plan, by the loop that every run goes through."""
    policy = copy.deepcopy(start)
    optimizer = Optimizer(policy.named_parameters())
    trainer = Trainer(policy, optimizer, processes=Processes())

    def sampler(name: str, version: str) -> Sampler:
        asked = {"student": policy, "base": start, "teacher": teacher}.get(name)
        if asked is None:
            raise ConfigError(f"no sampler {name!r} in this run")
        return TableSampler(asked, author=name, version=version)

    weights = Weights(
        save=lambda folder: folder.mkdir(parents=True, exist_ok=True),
        load=lambda folder: dict(start.named_parameters()),
        load_base=lambda: {name: p.detach() for name, p in start.named_parameters()},
        sampler=sampler,
    )
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder) / "run")
        session = Session(run=run, trainer=trainer, weights=weights, text=TableText(), seed=seed)
        run_plan(plan, session)
        run.close()
    return policy.table_VD.detach()
