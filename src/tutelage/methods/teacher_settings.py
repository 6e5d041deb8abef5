"""Settings of a teacher and of what is learned from it, shared by the distillation methods."""

from typing import Literal

from pydantic import Field, model_validator

from tutelage.methods.settings import Fraction, Positive, Settings


class TeacherSettings(Settings):
    """Who teaches."""

    name: str
    """A folder or hub name; `self` for the student with a hint; `average` for an average of the student's weights."""
    hint: str | None = None
    """Shown to the teacher only, after the question; may hold {answer} or any field of the task's metadata."""
    decay: Fraction = 0.99
    """average: how slowly the average follows."""
    cache: str | None = None
    """A logit cache made with `tutelage teacher cache`, instead of running the teacher."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the teacher's weights."""
    is_checked: bool = True
    """Compare teacher and student on the held-out questions first, and stop where the teacher is not better."""
    allow_worse: bool = False
    """Go on with a teacher that is not better."""

    @model_validator(mode="after")
    def _sensible(self) -> "TeacherSettings":
        if self.name == "self" and not self.hint:
            raise ValueError(
                "teacher.name=self needs teacher.hint: something that the teacher knows and the student does not"
            )
        return self

    @property
    def is_own_average(self) -> bool:
        return self.name == "average"


class DivergenceSettings(Settings):
    """What is learned from the teacher's distribution."""

    kind: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "sampled_reverse_kl", "minillm"]
    """KL(teacher ‖ student), KL(student ‖ teacher), Jensen-Shannon, skewed forms; the reverse KL of sampled tokens by
    policy gradient; MiniLLM's."""
    estimator: Literal["full", "top_k_tail"] = "full"
    """Over the whole vocabulary, or the teacher's top-k with the rest as one."""
    top_k: Positive | None = None
    """Entries under top_k_tail."""
    beta: Fraction = 0.5
    """jsd: the teacher's share of the mixture."""
    is_normalised: bool = True
    """jsd: divide by beta (1 - beta), so that a learning rate carries over between betas."""
    skew: Fraction = 0.1
    """skewed forms: the share mixed in."""
    alpha: Fraction = 0.0
    """Share of plain cross-entropy on the tokens themselves."""
    temperature: float | None = Field(None, gt=0)
    """Divides both models' logits; null follows how each token was sampled."""
    t_squared: bool = True
    """Multiply by temperature squared (Hinton); GKD does not."""
    discount: Fraction = 0.0
    """sampled_reverse_kl: weight of later tokens' log ratios; 0 grades each token alone."""
    clip: float | None = Field(None, gt=0)
    """sampled_reverse_kl: how far the ratio may go from 1."""
