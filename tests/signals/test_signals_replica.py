"""Divergence times data source, where the student cannot match: a second-order chain, a first-order student.

States are weighed by their exact occupancy, so there is no sampling noise; the losses are the library's.
"""

import pytest
import torch

from tutelage.numerics.divergence import forward_kl, jsd, reverse_kl
from tutelage.numerics.logprobs import entropy

V, LENGTH = 12, 24

LOSSES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd0.1": lambda s, t: jsd(s, t, 0.1, normalised=True),
    "jsd0.5": lambda s, t: jsd(s, t, 0.5, normalised=True),
    "jsd0.9": lambda s, t: jsd(s, t, 0.9, normalised=True),
}


def occupancy(probs_ABV):
    """(A, B): expected visits to each pair of last tokens over LENGTH steps, from a uniform start."""
    state_AB = torch.full((V, V), 1 / V**2, dtype=torch.float64)
    total_AB = torch.zeros_like(state_AB)
    for _ in range(LENGTH):
        total_AB += state_AB
        state_AB = torch.einsum("ab,abc->bc", state_AB, probs_ABV)
    return total_AB / LENGTH


def shown(student_BV):
    return student_BV.unsqueeze(0).expand(V, V, V)


def train(loss, share_on, teacher_ABV, *, steps=200):
    """A student trained with occupancy share_on * own + (1 - share_on) * teacher's; the occupancy is a constant."""
    student_BV = torch.zeros(V, V, dtype=torch.float64, requires_grad=True)
    off_AB = occupancy(teacher_ABV.softmax(-1))
    optimizer = torch.optim.Adam([student_BV], lr=0.05)
    for _ in range(steps):
        with torch.no_grad():
            on_AB = occupancy(shown(student_BV).softmax(-1))
        weight_AB = share_on * on_AB + (1 - share_on) * off_AB
        optimizer.zero_grad()
        (weight_AB * LOSSES[loss](shown(student_BV), teacher_ABV)).sum().backward()
        optimizer.step()
    with torch.no_grad():
        on_AB = occupancy(shown(student_BV).softmax(-1))
        return {
            "sequence_reverse_kl": float((on_AB * reverse_kl(shown(student_BV), teacher_ABV)).sum()),
            "entropy": float((on_AB * entropy(shown(student_BV))).sum()),
            "forward_kl_on_teacher": float((off_AB * forward_kl(shown(student_BV), teacher_ABV)).sum()),
        }


@pytest.mark.slow
def test_on_policy_reverse_kl_buys_precision_with_entropy():
    g = torch.Generator().manual_seed(0)
    teacher_ABV = 4.0 * torch.randn(V, V, V, dtype=torch.float64, generator=g)
    found = {(n, s): train(n, s, teacher_ABV) for n in LOSSES for s in (0.0, 1.0)}
    found["reverse_kl", 0.5] = train("reverse_kl", 0.5, teacher_ABV)
    kl = {key: value["sequence_reverse_kl"] for key, value in found.items()}
    order = [("forward_kl", 0.0), ("forward_kl", 1.0), ("reverse_kl", 0.0), ("reverse_kl", 0.5), ("reverse_kl", 1.0)]
    assert [kl[k] for k in order] == sorted((kl[k] for k in order), reverse=True), kl
    assert kl["jsd0.5", 0.0] > kl["jsd0.5", 1.0]
    assert kl["jsd0.1", 1.0] > kl["jsd0.5", 1.0] > kl["jsd0.9", 1.0]
    supervised, on_policy = found["forward_kl", 0.0], found["reverse_kl", 1.0]
    assert on_policy["sequence_reverse_kl"] < 0.7 * supervised["sequence_reverse_kl"]
    assert on_policy["entropy"] < 0.75 * supervised["entropy"]
    assert on_policy["forward_kl_on_teacher"] > 1.3 * supervised["forward_kl_on_teacher"]
