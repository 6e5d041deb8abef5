"""Settings of a teacher and of what is learned from it, shared by the distillation methods."""

from typing import Literal

from pydantic import Field, model_validator

from tutelage.methods.settings import Fraction, Positive, ServerSettings, Settings


class TeacherSettings(Settings):
    """Who teaches."""

    name: str
    """A folder or hub name; `self` for the student with a hint; `average` for an average of the student's weights."""
    hint: str | None = None
    """Shown to the teacher only, after the question; may hold {answer} or any field of the task's metadata."""
    system_prompt: str | None = None
    """Shown to the teacher only, in place of the student's system prompt."""
    by_task: "dict[str, TeacherSettings]" = Field(default_factory=dict)
    """Task family -> its own teacher; this one takes all other tasks. A question's family is its `name` field, or the
    name of the procedural task."""
    decay: Fraction = 0.99
    """average: how slowly the average follows."""
    cache: str | None = None
    """A logit cache made with `tutelage teacher cache`, instead of running the teacher."""
    url: str | tuple[str, ...] | None = None
    """Address of a vLLM server that has the teacher, or of several, instead of running it in this process. It gives its
    most likely tokens (estimator top_k_tail) or the log-probabilities of given ones; `name` is then its tokenizer's."""
    server: ServerSettings = Field(default_factory=lambda: ServerSettings(requests=8))
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the teacher's weights."""
    quantise: Literal["4bit", "8bit"] | None = None
    """Load the teacher's linear layers in 8 bits (LLM.int8) or 4 (NF4), through bitsandbytes."""
    is_checked: bool = True
    """Compare teacher and student on the held-out questions first, and stop where the teacher is not better."""
    allow_worse: bool = False
    """Go on with a teacher that is not better."""

    @model_validator(mode="after")
    def _sensible(self) -> "TeacherSettings":
        if self.name == "self" and not self.hint and not self.system_prompt:
            raise ValueError(
                "teacher.name=self needs teacher.hint or teacher.system_prompt: something that the teacher knows and "
                "the student does not"
            )
        if any(t.by_task for t in self.by_task.values()):
            raise ValueError("teacher.by_task holds teachers for task families; those have no by_task of their own")
        if self.url is not None and (self.cache is not None or self.name in ("self", "average")):
            raise ValueError(
                "teacher.url is a server with the teacher: leave teacher.cache out, and give the name of a model"
            )
        return self

    @property
    def can_sample_with_student(self) -> bool:
        """A model of its own, in this process, that reads what the student reads."""
        is_plain = not (self.hint or self.system_prompt or self.by_task or self.cache or self.url)
        return is_plain and self.name != "self" and not self.is_own_average

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
    is_normalised: bool = False
    """jsd: divide by beta (1 - beta), so that a learning rate carries over between betas. Published GKD does not."""
    skew: Fraction = 0.1
    """skewed forms: the share mixed in."""
    alpha: Fraction = 0.0
    """Share of plain cross-entropy on the tokens themselves."""
    temperature: float | None = Field(None, gt=0)
    """Divides both models' logits; null follows how each token was sampled."""
    t_squared: bool | None = None
    """Multiply by temperature squared. null: as published, yes off-policy (Hinton) and no on-policy (GKD)."""
    discount: Fraction = 0.0
    """sampled_reverse_kl: weight of later tokens' log ratios; 0 grades each token alone."""
    clip: float | None = Field(None, gt=0)
    """sampled_reverse_kl, minillm: how far the ratio may go from 1. null: no clip; for minillm its published 0.2."""
    length_norm: bool = True
    """minillm: the mean of the later log ratios instead of their sum."""


class AdaptiveSettings(Settings):
    """A share of student rollouts that grows when validation gets worse, with replay (DistiLLM)."""

    start: Fraction = 0.0
    """The share at first."""
    step: Fraction = 0.1
    """How much it grows."""
    tolerance: float = Field(0.1, ge=0)
    """A validation loss this much above the one before (nats a target) counts as worse."""
    validation: Positive = 64
    """How many recorded prompts are kept out of training to validate on; at most half of them."""
    every_rounds: Positive = 10
    """Validate after every so many rounds."""
    buffer_size: Positive = 1000
    """Earlier rollouts kept for replay."""


class PretrainingSettings(Settings):
    """Plain text, learned beside the distillation (MiniLLM's pretraining loss)."""

    path: str
    """A .txt file (documents parted by empty lines), or JSONL with one document a record."""
    field: str = "text"
    """JSONL: the field with the text."""
    coefficient: float = Field(1.0, gt=0)
    """Weight of its mean cross-entropy beside the distillation loss."""
    per_round: Positive = 16
    """Pieces of text in a round."""
    max_length: Positive = 256
    """Tokens a piece; longer documents are cut into several."""
