"""Pure functions of tensors: log-probabilities, divergences, reductions, policy-gradient terms, and their chunked
forms. No files, no settings, no process groups. Student first, teacher second; nats per position.

Names are imported on first use, so that the modules without tensors (`advantages`, `facts`) load without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutelage.numerics.advantages import future_sums, group_advantages
    from tutelage.numerics.chunked import chunked_loss, chunked_nats
    from tutelage.numerics.divergence import (
        forward_kl,
        hinton_loss,
        jsd,
        reverse_kl,
        skew_kl,
        skew_reverse_kl,
        top_k_kl,
    )
    from tutelage.numerics.facts import (
        accepted_kl,
        all_same_probability,
        best_of_k_kl_bound,
        expected_max_of_normals,
        mixed_probability,
    )
    from tutelage.numerics.logprobs import entropy, shape_logits, target_logprobs
    from tutelage.numerics.losses import (
        CrossEntropy,
        TeacherHeadLoss,
        chunked_divergence,
        chunked_target_logprobs,
        cross_entropy,
        entropy_stats,
    )
    from tutelage.numerics.policy_gradient import (
        clipped_likelihood_loss,
        clipped_ratio_loss,
        kl_estimates,
        reinforce_loss,
        sampled_reverse_kl,
        sampler_weight,
    )
    from tutelage.numerics.reduce import mean_over_tokens, weighted_sum

__all__ = [
    "CrossEntropy",
    "TeacherHeadLoss",
    "accepted_kl",
    "all_same_probability",
    "best_of_k_kl_bound",
    "chunked_divergence",
    "chunked_loss",
    "chunked_nats",
    "chunked_target_logprobs",
    "clipped_likelihood_loss",
    "clipped_ratio_loss",
    "cross_entropy",
    "entropy",
    "entropy_stats",
    "expected_max_of_normals",
    "forward_kl",
    "future_sums",
    "group_advantages",
    "hinton_loss",
    "jsd",
    "kl_estimates",
    "mean_over_tokens",
    "mixed_probability",
    "reinforce_loss",
    "reverse_kl",
    "sampled_reverse_kl",
    "sampler_weight",
    "shape_logits",
    "skew_kl",
    "skew_reverse_kl",
    "target_logprobs",
    "top_k_kl",
    "weighted_sum",
]

_MODULES = {
    "advantages": ("future_sums", "group_advantages"),
    "chunked": ("chunked_loss", "chunked_nats"),
    "divergence": ("forward_kl", "hinton_loss", "jsd", "reverse_kl", "skew_kl", "skew_reverse_kl", "top_k_kl"),
    "facts": (
        "accepted_kl",
        "all_same_probability",
        "best_of_k_kl_bound",
        "expected_max_of_normals",
        "mixed_probability",
    ),
    "logprobs": ("entropy", "shape_logits", "target_logprobs"),
    "losses": (
        "CrossEntropy",
        "TeacherHeadLoss",
        "chunked_divergence",
        "chunked_target_logprobs",
        "cross_entropy",
        "entropy_stats",
    ),
    "policy_gradient": (
        "clipped_likelihood_loss",
        "clipped_ratio_loss",
        "kl_estimates",
        "reinforce_loss",
        "sampled_reverse_kl",
        "sampler_weight",
    ),
    "reduce": ("mean_over_tokens", "weighted_sum"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
