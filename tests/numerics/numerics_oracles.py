"""The formulas again in Python floats and loops, sharing no code with the package."""

import itertools
import math

from hypothesis import settings
from hypothesis import strategies as st

quick = settings(derandomize=True, deadline=None, max_examples=40)
"""Property tests here try the same cases every time."""

INF = math.inf


def probabilities(row):
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    total = math.fsum(weights)
    return [w / total for w in weights]


def log_probabilities(row):
    top = max(row)
    total = math.log(math.fsum(math.exp(x - top) for x in row))
    return [x - top - total for x in row]


def kl(first, second):
    """KL between two lists of probabilities; 0 log 0 = 0."""
    if any(a > 0 and b == 0 for a, b in zip(first, second, strict=True)):
        return INF
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(first, second, strict=True) if a > 0)


def mix(first, second, share):
    return [share * a + (1 - share) * b for a, b in zip(first, second, strict=True)]


def forward_kl(student, teacher):
    return kl(probabilities(teacher), probabilities(student))


def reverse_kl(student, teacher):
    return kl(probabilities(student), probabilities(teacher))


def jsd(student, teacher, beta):
    p, q = probabilities(teacher), probabilities(student)
    m = mix(p, q, beta)
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def skew_kl(student, teacher, alpha):
    p, q = probabilities(teacher), probabilities(student)
    return kl(p, mix(p, q, alpha))


def skew_reverse_kl(student, teacher, alpha):
    p, q = probabilities(teacher), probabilities(student)
    return kl(q, mix(p, q, 1 - alpha))


def top_k_kl(student, ids, teacher_logprobs, direction):
    q = probabilities(student)
    p_top = [math.exp(x) for x in teacher_logprobs]
    q_top = [q[i] for i in ids]
    p_all = [*p_top, max(0.0, 1 - math.fsum(p_top))]
    q_all = [*q_top, math.fsum(x for i, x in enumerate(q) if i not in ids)]
    return kl(p_all, q_all) if direction == "forward" else kl(q_all, p_all)


def entropy(row):
    return -math.fsum(p * math.log(p) for p in probabilities(row) if p > 0)


def nucleus(row, temperature, top_p):
    """Ids of the smallest set reaching top_p, most likely first, lower ids first among equals."""
    p = probabilities([x / temperature for x in row])
    order = sorted(range(len(row)), key=lambda v: (-row[v], v))
    kept, total = [], 0.0
    for v in order:
        kept.append(v)
        total += p[v]
        if total >= top_p:
            break
    return set(kept)


def sequences(vocabulary, length):
    return list(itertools.product(range(vocabulary), repeat=length))


def rows(size=5, bound=15):
    return st.lists(st.floats(-bound, bound), min_size=size, max_size=size)
