"""Small cases that can be enumerated: every completion of a tabular student, weighed by its probability."""

import itertools
import math
from dataclasses import replace

import torch

from tutelage.numerics.logprobs import shape_logits
from tutelage.policies.table import TablePolicy
from tutelage.policies.teachers import InProcessTeacher
from tutelage.train.distributed import Processes
from tutelage.train.optim import Optimizer
from tutelage.train.trainer import Trainer, TrainerSettings
from tutelage.types import Draw, Group, SamplingParams, Span, Task, Trajectory

V, LENGTH, PROMPT = 4, 3, (0, 2)


def student(**kwargs):
    return TablePolicy(V, order=1, seed=1, **kwargs)


def teacher(seed=2, order=2, **kwargs):
    return InProcessTeacher(TablePolicy(V, order=order, seed=seed), **kwargs)


def task(name="default"):
    return Task(id=name, messages=({"role": "user", "content": "?"},), name=name)


def trajectory(ids, *, prompt=PROMPT, name="default", logprobs=None, author="student", params=None, weight=1.0, at="0"):
    spans = (
        Span(token_ids=tuple(prompt), role="user", author="user"),
        Span(
            token_ids=tuple(ids),
            role="assistant",
            author=author,
            is_sampled=True,
            is_trainable=True,
            logprobs=None if logprobs is None else tuple(logprobs),
            sampling=params,
        ),
    )
    return Trajectory(id=at, task_id=name, task_hash=name, task_name=name, spans=spans, weight=weight)


def draw_of(trajectories, *, on_policy=True, author="student"):
    by_name = {}
    for t in trajectories:
        by_name.setdefault(t.task_name, []).append(t)
    groups = tuple(Group(task=task(n), trajectories=tuple(ts)) for n, ts in by_name.items())
    return Draw(groups=groups, author=author, is_on_policy=on_policy)


@torch.no_grad()
def shaped_logprobs(policy, ids, params=None):
    """Log-probabilities of a completion after PROMPT, and the distribution's logits at each position."""
    tokens = torch.tensor([[*PROMPT, *ids]])
    logits = policy.logits(tokens)[0, len(PROMPT) - 1 : -1]
    if params is not None:
        logits = shape_logits(logits, temperature=params.temperature, top_p=params.top_p)
    lp = logits.log_softmax(-1)
    return lp[torch.arange(len(ids)), list(ids)].tolist()


def every_completion(policy, *, params=None, sampler=None, length=LENGTH):
    """All completions with the probability that `sampler` (the policy) gives them as weight."""
    out = []
    for n, ids in enumerate(itertools.product(range(V), repeat=length)):
        lps = shaped_logprobs(sampler or policy, ids, params)
        p = math.exp(sum(lps))
        if p > 0:
            out.append(
                trajectory(
                    ids, logprobs=lps, params=params or SamplingParams(max_new_tokens=length), weight=p, at=str(n)
                )
            )
    return out


def trainer_of(policy):
    return Trainer(policy, Optimizer(policy.named_parameters(), kind="sgd"), processes=Processes())


def settings(**kwargs):
    return TrainerSettings(**{"lr": 0.0, "batch_size": None, "max_grad_norm": None, **kwargs})


def gradient(policy, signal, draw, *, layout="packed", max_tokens=2048):
    """The gradient of one step on a draw, and its metrics."""
    trainer = trainer_of(policy)
    targets = signal.prepare(draw, score_student=trainer.score)
    metrics = step(trainer, targets, signal, layout=layout, max_tokens=max_tokens)
    return {n: g.clone() for n, g in trainer.optimizer.gradients().items()}, metrics


def step(trainer, targets, signal, **kwargs):
    """One update at learning rate 0: its gradient stays in the optimiser."""
    return trainer.step(list(targets.rows), signal, settings(**kwargs), lr=0.0)


def expected_gradient(policy, signal, draw, **kwargs):
    """The gradient times the number of trajectories: with the divisor "sequences", the expectation over the draw."""
    grads, _ = gradient(policy, signal, draw, **kwargs)
    return grads["table_VD"] * len(draw)


def exact_gradient(policy, teacher_, divergence, trajectories, *, params=None, temperature=1.0):
    """d/d table of sum_y q(y) sum_t D_t by autograd, the visiting probabilities q taken as constants."""
    policy.zero_grad()
    total = 0.0
    for t in trajectories:
        tokens = torch.tensor([t.token_ids])
        at = slice(len(PROMPT) - 1, -1)
        s, p = policy.logits(tokens)[0, at], teacher_.policy.logits(tokens)[0, at].detach()
        if params is not None:
            s = shape_logits(s, temperature=params.temperature, top_p=params.top_p)
            p = p / params.temperature
        total = total + t.weight * divergence(s / temperature, p / temperature).sum()
    (g,) = torch.autograd.grad(total, policy.table_VD)
    return g


def sequence_reverse_kl_gradient(policy, teacher_, *, length=LENGTH):
    """d/d table of sum_y q(y) log(q(y) / p(y)), through q(y) as well."""
    total = 0.0
    for ids in itertools.product(range(V), repeat=length):
        tokens = torch.tensor([[*PROMPT, *ids]])
        at = slice(len(PROMPT) - 1, -1)
        pick = (torch.arange(length), torch.tensor(ids))
        lq = policy.logits(tokens)[0, at].log_softmax(-1)[pick].sum()
        lp = teacher_.policy.logits(tokens)[0, at].log_softmax(-1)[pick].sum().detach()
        total = total + lq.exp() * (lq - lp)
    (g,) = torch.autograd.grad(total, policy.table_VD)
    return g


def same(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def replace_name(trajectory_, name, at):
    """The same trajectory as another task's."""
    return replace(trajectory_, task_name=name, task_id=name, id=at)
