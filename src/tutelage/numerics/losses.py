"""Loss functions for `chunked`, and the chunked forms of the divergences.

Dimension letters:
  B  sequences   T  positions   C  targets of one chunk   V  vocabulary   D, E  hidden width of student, teacher
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tutelage.errors import ConfigError, DataError
from tutelage.numerics import divergence
from tutelage.numerics.chunked import Columns, LogitTransform, chunked_nats
from tutelage.numerics.logprobs import entropy, target_logprobs

Divergence = Callable[..., Tensor]

_BY_NAME: dict[str, Divergence] = {
    "forward_kl": divergence.forward_kl,
    "reverse_kl": divergence.reverse_kl,
    "jsd": divergence.jsd,
    "skew_kl": divergence.skew_kl,
    "skew_reverse_kl": divergence.skew_reverse_kl,
}


class CrossEntropy:
    """-log p(target): the loss of hard targets, with its gradient written by hand for the chunked form.

    Reads the column `target_ids_C`. gradient: p - onehot(target), in place of the logits.
    """

    def __call__(self, student_logits_CV: Tensor, columns_C: Columns) -> Tensor:
        return -target_logprobs(student_logits_CV, columns_C["target_ids_C"])

    def value_and_grad(self, student_logits_CV: Tensor, columns_C: Columns) -> tuple[Tensor, Tensor]:
        ids_C1 = columns_C["target_ids_C"].unsqueeze(-1)
        logprobs_CV = student_logits_CV.log_softmax(-1)
        loss_C = -logprobs_CV.gather(-1, ids_C1).squeeze(-1)
        gradient_CV = logprobs_CV.exp_()
        return loss_C, gradient_CV.scatter_add_(-1, ids_C1, torch.full_like(ids_C1, -1, dtype=gradient_CV.dtype))


cross_entropy = CrossEntropy()


class TeacherHeadLoss:
    """A divergence to a teacher that is given as hidden states and an output layer.

    Reads the column `teacher_hidden_CE`; the teacher's logits exist for one chunk at a time, without gradients.

    Args:
        divergence: `f(student_logits_CV, teacher_logits_CV, **parameters) -> nats_C`.
        teacher_weight_VE: the teacher's output layer, cut to the shared vocabulary.
        temperature: divides both models' logits.
        teacher_transform: the teacher's own logit transform (soft-cap, scale).
        parameters: passed on to the divergence (`beta`, `alpha`, ...).
    """

    def __init__(
        self,
        divergence: Divergence,
        teacher_weight_VE: Tensor,
        *,
        teacher_bias_V: Tensor | None = None,
        teacher_transform: LogitTransform | None = None,
        temperature: float = 1.0,
        **parameters: Any,
    ) -> None:
        if not temperature > 0:
            raise ConfigError(f"temperature must be positive, got {temperature}: it divides the logits of both models")
        self.divergence = divergence
        self.teacher_weight_VE = teacher_weight_VE.detach()
        self.teacher_bias_V = None if teacher_bias_V is None else teacher_bias_V.detach()
        self.teacher_transform = teacher_transform
        self.temperature = temperature
        self.parameters = parameters

    def prepare_chunk(self, columns_C: Columns) -> Columns:
        """Replaces the teacher's hidden states by its logits; the caller runs it without gradients."""
        others = {name: column for name, column in columns_C.items() if name != "teacher_hidden_CE"}
        hidden_CE = columns_C["teacher_hidden_CE"].to(self.teacher_weight_VE.dtype)
        with torch.no_grad():
            return {**others, "teacher_logits_CV": hidden_CE @ self.teacher_weight_VE.t()}

    def __call__(self, student_logits_CV: Tensor, columns_C: Columns) -> Tensor:
        if "teacher_logits_CV" not in columns_C:
            columns_C = self.prepare_chunk(columns_C)
        teacher_logits_CV = columns_C["teacher_logits_CV"].to(student_logits_CV.dtype)
        with torch.no_grad():
            if self.teacher_bias_V is not None:
                teacher_logits_CV = teacher_logits_CV + self.teacher_bias_V
            if self.teacher_transform is not None:
                teacher_logits_CV = self.teacher_transform(teacher_logits_CV)
        if self.temperature != 1:
            student_logits_CV = student_logits_CV / self.temperature
            teacher_logits_CV = teacher_logits_CV / self.temperature
        return self.divergence(student_logits_CV, teacher_logits_CV, **self.parameters)


def chunked_divergence(
    divergence: str | Divergence,
    student_hidden_BTD: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_BTE: Tensor,
    teacher_weight_VE: Tensor,
    *,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
    student_transform: LogitTransform | None = None,
    teacher_transform: LogitTransform | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    **parameters: Any,
) -> Tensor:
    """A divergence at every position from hidden states and output layers; neither model's logits are ever all held.

    Equal to `divergence(student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T, **parameters)`.

    Args:
        divergence: "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", or a function of the same form.
        temperature: divides both models' logits.
        parameters: those of the divergence (`beta`, `normalised`, `alpha`).

    Shapes:
        student_hidden_BTD (B, T, D), student_weight_VD (V, D), teacher_hidden_BTE (B, T, E), teacher_weight_VE (V, E);
        any number of leading axes. returns (B, T), float32 or float64.

    Units:
        Nats.

    Gradient:
        To the student's hidden states, weight and bias; the logits are computed again in backward.

    Raises:
        DataError: positions or vocabularies differ. ConfigError: unknown name or parameter.
    """
    if isinstance(divergence, str):
        if divergence not in _BY_NAME:
            raise ConfigError(f"divergence must be one of {', '.join(_BY_NAME)}, got {divergence!r}")
        divergence = _BY_NAME[divergence]
    if student_hidden_BTD.shape[:-1] != teacher_hidden_BTE.shape[:-1]:
        raise DataError(
            "chunked_divergence needs hidden states at the same positions; got student "
            f"{tuple(student_hidden_BTD.shape)}, teacher {tuple(teacher_hidden_BTE.shape)}"
        )
    if len(student_weight_VD) != len(teacher_weight_VE):
        raise DataError(
            f"chunked_divergence needs one vocabulary; got {len(student_weight_VD)} student rows and "
            f"{len(teacher_weight_VE)} teacher rows. If one model pads its vocabulary, slice both output layers to "
            "the shared part first, weight[:shared_vocabulary]."
        )
    loss_fn = TeacherHeadLoss(
        divergence,
        teacher_weight_VE,
        teacher_bias_V=teacher_bias_V,
        teacher_transform=teacher_transform,
        temperature=temperature,
        **parameters,
    )
    nats_N = chunked_nats(
        student_hidden_BTD.reshape(-1, student_hidden_BTD.shape[-1]),
        student_weight_VD,
        {"teacher_hidden_CE": teacher_hidden_BTE.detach().reshape(-1, teacher_hidden_BTE.shape[-1])},
        loss_fn,
        chunk_size=chunk_size,
        bias_V=student_bias_V,
        logit_transform=student_transform,
    )
    return nats_N.reshape(student_hidden_BTD.shape[:-1])


def chunked_target_logprobs(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    target_ids_BT: Tensor,
    *,
    bias_V: Tensor | None = None,
    logit_transform: LogitTransform | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """`target_logprobs(hidden @ weight.T, target_ids)` without ever holding the logits. (B, T), nats."""
    nats_N = chunked_nats(
        hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
        weight_VD,
        {"target_ids_C": target_ids_BT.reshape(-1)},
        cross_entropy,
        chunk_size=chunk_size,
        bias_V=bias_V,
        logit_transform=logit_transform,
    )
    return -nats_N.reshape(target_ids_BT.shape)


def entropy_stats(student_logits_CV: Tensor, columns_C: Columns) -> dict[str, Tensor]:
    """A `stats_fn` for `chunked_loss`: summed entropy in nats, and the number of targets it was summed over."""
    entropy_C = entropy(student_logits_CV)
    return {"entropy_nats": entropy_C.sum(), "num_targets": torch.full_like(entropy_C[:1].sum(), len(entropy_C))}
