"""Settings of a teacher and of what is learned from it, shared by the distillation methods."""

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tutelage.errors import ConfigError
from tutelage.methods.settings import Fraction, Positive, RolloutSettings, ServerSettings, Settings
from tutelage.signals.estimators import DIVERGENCES, check_pair, number_problems

_OVER_VOCABULARY = {"estimator", "top_k", "alpha", "temperature", "t_squared"}
_READ_BY = {
    "forward_kl": _OVER_VOCABULARY,
    "reverse_kl": _OVER_VOCABULARY,
    "jsd": _OVER_VOCABULARY | {"beta", "is_normalised"},
    "skew_kl": _OVER_VOCABULARY | {"skew"},
    "skew_reverse_kl": _OVER_VOCABULARY | {"skew"},
    "sampled_reverse_kl": {"discount", "clip"},
    "minillm": {"clip", "length_norm"},
}
"""What each kind of divergence reads of its settings; another one that is set would be ignored."""


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
    decay: float = Field(0.99, ge=0, lt=1)
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
        if self.cache is not None and (self.hint or self.system_prompt):
            raise ValueError(
                "teacher.cache holds what the teacher said without a hint or a system prompt of its own: leave those "
                "out, or leave the cache out"
            )
        if self.cache is not None and self.is_own:
            raise ValueError(
                f"teacher.name={self.name} follows the student while it is trained, and teacher.cache does not: leave "
                "the cache out, or give the name of the model that wrote it"
            )
        return self

    @property
    def is_own(self) -> bool:
        """The student's own weights, or an average of them: a teacher that changes."""
        return self.name == "self" or self.is_own_average

    @property
    def form(self) -> str:
        """Where its answers come from: "cache", "server" or "process"."""
        return "cache" if self.cache is not None else "server" if self.url is not None else "process"

    @property
    def can_sample_with_student(self) -> bool:
        """A model of its own, in this process, that reads what the student reads."""
        is_plain = not (self.hint or self.system_prompt or self.by_task or self.cache or self.url)
        return is_plain and not self.is_own

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

    @field_validator("estimator", mode="before")
    @classmethod
    def _paired(cls, value: Any, info: ValidationInfo) -> Any:
        kind = info.data.get("kind")
        if kind in DIVERGENCES and isinstance(value, str):
            try:
                check_pair(kind, value)
            except ConfigError as error:
                hint = (
                    "; in a config policy_gradient is kind: sampled_reverse_kl"
                    if "policy_gradient" in str(error)
                    else ""
                )
                raise ValueError(f"{error}{hint}") from error
            if value not in ("full", "top_k_tail"):
                raise ValueError(f"{value} works from sampled tokens: set kind: sampled_reverse_kl, without estimator")
        return value

    @model_validator(mode="after")
    def _read(self) -> "DivergenceSettings":
        fields = type(self).model_fields
        idle = [n for n in fields if n != "kind" and n not in _READ_BY[self.kind]]
        if wrong := [n for n in idle if getattr(self, n) != fields[n].default]:
            readers = {n: ", ".join(k for k, read in _READ_BY.items() if n in read) for n in wrong}
            raise ValueError(
                "; ".join(f"{n} is not read by kind {self.kind}, but by {readers[n]}" for n in wrong)
                + ": leave it out, or change the kind"
            )
        if self.kind in DIVERGENCES:
            check_pair(self.kind, self.estimator, top_k=self.top_k)
            numbers = {"alpha": self.alpha, "beta": self.beta, "skew": self.skew}
            if problems := number_problems(self.kind, normalised=self.is_normalised, **numbers):
                raise ConfigError(problems)
        if self.top_k is not None and self.estimator != "top_k_tail":
            raise ValueError(
                f"top_k={self.top_k} is read by estimator top_k_tail only, and this one is {self.estimator}"
            )
        return self

    @property
    def is_over_vocabulary(self) -> bool:
        """A divergence between two distributions, and not of sampled tokens."""
        return self.kind in DIVERGENCES


def check_answers(teacher: TeacherSettings, d: DivergenceSettings) -> None:
    """Raise unless every teacher can answer what the divergence asks.

    Raises:
        ConfigError: all that it cannot.
    """
    teachers = (teacher, *teacher.by_task.values())
    forms, out = {t.form for t in teachers}, []
    if d.is_over_vocabulary and "process" in forms and len(forms) > 1:
        out.append("teachers must all be in this process, or all give top-k columns (teacher.url, teacher.cache)")
    elif forms == {"process"} and d.estimator == "top_k_tail" and d.top_k is None:
        out.append("estimator top_k_tail needs divergence.top_k, the number of a teacher's entries that are kept")
    if d.is_over_vocabulary and "server" in forms and d.estimator == "full":
        out.append("a server gives a teacher's most likely tokens, not the whole vocabulary: use estimator top_k_tail")
    if d.kind == "sampled_reverse_kl" and "cache" in forms:
        out.append(
            "a cache cannot score given tokens, which sampled_reverse_kl needs: use a teacher in process or on a server"
        )
    is_moving = any(t.is_own for t in teachers)
    if d.kind == "sampled_reverse_kl" and is_moving and (d.discount > 0 or d.clip is not None):
        out.append("discount and clip need a teacher's scores before the update, and self and average change with it")
    if d.kind == "minillm" and (forms != {"process"} or is_moving):
        out.append("minillm needs teachers in this process that do not change: no teacher.cache, url, self or average")
    if out:
        raise ConfigError(out)


def check_sampled(teacher: TeacherSettings, d: DivergenceSettings, rollout: RolloutSettings) -> None:
    """Raise unless what the student samples can be graded under the distribution it was sampled from.

    Raises:
        ConfigError: all that stands against it.
    """
    out = []
    if rollout.temperature == 0:
        out.append("rollout.temperature=0 takes the likeliest token, no sample of what is graded: set it above 0")
    elif d.temperature is not None and (rollout.temperature != d.temperature or rollout.top_p != 1):
        out.append(
            "on-policy tokens are graded under the distribution they were sampled from: rollout has temperature "
            f"{rollout.temperature:g} and top_p {rollout.top_p:g}, and divergence.temperature is {d.temperature:g}. "
            "Leave it out: it then follows each sample"
        )
    forms = {t.form for t in (teacher, *teacher.by_task.values())}
    if rollout.temperature > 0 and rollout.temperature != 1 and "server" in forms:
        out.append(f"a served teacher answers at temperature 1, and rollout.temperature is {rollout.temperature:g}")
    if d.kind == "forward_kl" and rollout.top_p < 1:
        out.append(
            f"the forward KL to a student cut by rollout.top_p={rollout.top_p:g} is infinite: set it to 1, or use "
            "reverse_kl, jsd or a skewed form"
        )
    if "cache" in forms:
        out.append("teacher.cache holds answers to recorded data, none to what the student samples: leave it out")
    if out:
        raise ConfigError(out)


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
