"""Which estimator may stand for which divergence: pairs whose expected gradient is another one's are refused.

The table was made by enumeration: the expected gradient over every token, against the divergence's own.
"""

from tutelage.errors import ConfigError

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl")
ESTIMATORS = (
    "full",
    "top_k_tail",
    "top_k",
    "policy_gradient",
    "k2",
    "k1",
    "k3",
    "policy_gradient_k3",
)
_SAMPLED = ("policy_gradient", "k2", "k1", "k3", "policy_gradient_k3")

_INSTEAD = 'use divergence="reverse_kl" with estimator="policy_gradient" (sampled tokens) or "full" (whole vocabulary)'


def check_pair(divergence: str, estimator: str, *, top_k: int | None = None) -> None:
    """Raise unless the estimator's expected gradient is the divergence's.

    full                  whole vocabulary at every position: exact for every divergence
    top_k_tail            K + 1 outcomes, the rest as one: forward and reverse KL, K at least 2 for the reverse
    policy_gradient       sampled token, log ratio as a constant weight on log p_student: reverse KL
    k2                    sampled token, half the squared log ratio, backpropagated: reverse KL on on-policy tokens
    top_k, k1, k3, policy_gradient_k3   what other libraries offer, and no divergence's gradient but by accident

    Raises:
        ConfigError: unknown names, or a pair that fails; the message names the right pair.
    """
    if divergence not in DIVERGENCES:
        raise ConfigError(f"divergence must be one of {', '.join(DIVERGENCES)}; got {divergence!r}")
    if estimator not in ESTIMATORS:
        raise ConfigError(f"estimator must be one of {', '.join(ESTIMATORS[:2] + _SAMPLED[:2])}; got {estimator!r}")
    reason = _refusal(divergence, estimator, top_k)
    if reason:
        raise ConfigError(f"estimator={estimator!r} for divergence={divergence!r}: {reason}")


def number_problems(divergence: str, *, alpha: float, beta: float, normalised: bool, skew: float) -> list[str]:
    """Numbers out of range, and those at which nothing of the teacher is left, in sentences."""
    out = []
    for name, value in (("alpha", alpha), ("beta", beta), ("skew", skew)):
        if not 0 <= value <= 1:
            out.append(f"{name} must be in [0, 1], got {value}: it is a share")
    if alpha == 1:
        out.append("alpha=1 leaves nothing of the teacher: learn the tokens alone (HardTargets, or method sft)")
    if divergence == "jsd" and not normalised and beta in (0, 1):
        limit = "forward_kl" if beta == 0 else "reverse_kl"
        out.append(f"jsd with beta={beta:g} that is not normalised is 0 for any two models: use {limit}, or normalise")
    if divergence.startswith("skew") and skew == 1:
        out.append("skew=1 compares a model with itself: the loss is 0; 0.1 is the published value")
    return out


def _refusal(divergence: str, estimator: str, top_k: int | None) -> str | None:
    if estimator == "k1":
        return f"backpropagating the log ratio of sampled tokens has an expected gradient of 0: {_INSTEAD}"
    if estimator == "k3":
        return (
            "backpropagating k3 has the forward KL's gradient, not the reverse KL's: "
            f'{_INSTEAD}; for the forward KL, divergence="forward_kl" with estimator="full"'
        )
    if estimator == "policy_gradient_k3":
        return f"k3 as the advantage of a policy gradient is no divergence's gradient: {_INSTEAD}"
    if estimator == "top_k":
        return (
            "without its tail the student's mass outside the teacher's top-k is free, and the student drives mass "
            'there: use estimator="top_k_tail"'
        )
    if estimator in _SAMPLED and divergence != "reverse_kl":
        return f"tokens sampled from the student estimate only the reverse KL: {_INSTEAD}"
    if estimator == "top_k_tail":
        if divergence not in ("forward_kl", "reverse_kl"):
            return 'K + 1 outcomes stand for a forward or reverse KL only: use one of these, or estimator="full"'
        if top_k is not None and top_k < 1:
            return f"top_k must be at least 1, got {top_k}"
        if divergence == "reverse_kl" and top_k == 1:
            return (
                "one token and a tail is a divergence over two outcomes, whose gradient is a small and tilted part of "
                f"the reverse KL's: {_INSTEAD}, or top_k of 16 or more"
            )
    return None
