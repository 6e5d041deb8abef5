"""Sampling from a mixture of teacher and student, token by token: the student's prefixes with the teacher's help.

Dimension letters:  A  rows now in the batch    V  vocabulary entries    P  prompts
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tutelage.errors import ConfigError
from tutelage.policies.kvcache import Engine
from tutelage.policies.sampler import InProcessSampler
from tutelage.types import Completion, Progress, SampleRequest, SamplingParams


class TeacherMixedSampler(InProcessSampler):
    """Draws every token from share * p_teacher + (1 - share) * p_student.

    A span's log-probabilities are those of the mixture, so p_student / p_mixture is the importance weight of each token
    (at most 1 / (1 - share)). Keeps a weak student from sampling what the teacher has no opinion on.

    Args:
        model, teacher: transformers causal models with one tokenizer; the student's vocabulary is the mixture's, and
            what the teacher's has beyond it is left out.
        share: the teacher's, in [0, 1]. 0 is the student, 1 the teacher.
        options: as `InProcessSampler`.

    Source:
        Gu et al. 2023 (MiniLLM), arXiv:2306.08543, section 2.2, share 0.2.
    """

    def __init__(
        self,
        model: Any,
        teacher: Any,
        *,
        share: float = 0.2,
        stop_ids: Sequence[int],
        decode: Callable[[Sequence[int]], str],
        author: str = "mixed",
        **options: Any,
    ) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(f"share must be in [0, 1], got {share}: it is the teacher's part of the mixture")
        super().__init__(model, stop_ids=stop_ids, decode=decode, author=author, **options)
        self.share = share
        self._teacher = InProcessSampler(teacher, stop_ids=stop_ids, decode=decode, author="teacher", **options)

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, progress: Progress | None = None
    ) -> list[list[Completion]]:
        """As `InProcessSampler.sample`, at temperature 1 and top-p 1: the mixture is of the models' own distributions.

        Raises:
            ConfigError: another temperature or top-p.
        """
        if not params.samples_own_distribution:
            raise ConfigError(
                "a teacher-mixed draw is at temperature 1 and top_p 1, the distributions whose log-probabilities the "
                f"importance weights use; got temperature {params.temperature:g}, top_p {params.top_p:g}"
            )
        return super().sample(requests, params, progress=progress)

    def _choose_engine(self) -> Engine:
        return MixtureEngine(super()._choose_engine(), self._teacher._choose_engine(), self.share)


class MixtureEngine:
    """Two engines in step. Rows may lie in another order in each; the first one's order is shown."""

    name = "mixture"

    def __init__(self, student: Engine, teacher: Engine, share: float) -> None:
        self._student, self._teacher, self.share = student, teacher, share
        self._place: list[int] = []
        """Where each row of the student is in the teacher."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[Any]]:
        logits_PV, states = self._student.prefill(prompts)
        teacher_PV, teacher_states = self._teacher.prefill(prompts)
        return self._mixed(logits_PV, teacher_PV), list(zip(states, teacher_states, strict=True))

    def recompose(self, leaving: Sequence[int], joining: Sequence[Any]) -> list[int]:
        order = self._student.recompose(leaving, [s for s, _ in joining])
        teacher_order = self._teacher.recompose([self._place[i] for i in leaving], [t for _, t in joining])
        new_place = {old: new for new, old in enumerate(teacher_order)}
        self._place = [new_place[self._place[i] if i >= 0 else i] for i in order]
        return order

    def step(self, tokens_A: Sequence[int]) -> Tensor:
        teacher_tokens = [0] * len(tokens_A)
        for row, place in enumerate(self._place):
            teacher_tokens[place] = tokens_A[row]
        teacher_AV = self._teacher.step(teacher_tokens)
        return self._mixed(self._student.step(tokens_A), teacher_AV[self._place])

    def refresh(self, *, force: bool = False) -> None:
        self._student.refresh(force=force)
        self._teacher.refresh(force=force)

    def reset(self) -> None:
        self._student.reset()
        self._teacher.reset()
        self._place = []

    def _mixed(self, student_AV: Tensor, teacher_AV: Tensor) -> Tensor:
        """Log of the mixture. Entries the teacher does not have keep the student's share only."""
        q = student_AV.float().softmax(-1)
        p = teacher_AV[:, : q.shape[1]].float().to(q.device).softmax(-1)
        p = torch.nn.functional.pad(p, (0, q.shape[1] - p.shape[1]))
        return (self.share * p + (1 - self.share) * q).log()
