"""Settings shared by the methods: frozen, with no unknown key, read from YAML and `key=value`.

The string under a field is its help text.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Frozen; unknown keys are errors; the string under a field is its help text.

    A section given in part, as a mapping, keeps the rest of this model's own default for it: `train: {lr: 1e-5}` under
    GRPO changes the learning rate of GRPO's `train`, not of a bare `TrainSettings`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _over_own_defaults(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        defaults = {
            n: cls.model_fields[n].get_default(call_default_factory=True) for n in values if n in cls.model_fields
        }
        return {n: _over(defaults.get(n), value) for n, value in values.items()}


def _over(default: Any, value: Any) -> Any:
    """A mapping laid over what a default section sets; anything else as it is."""
    if not isinstance(default, Settings) or not isinstance(value, Mapping):
        return value
    preset = {n: getattr(default, n) for n in default.model_fields_set}
    return {**preset, **{n: _over(preset.get(n), v) for n, v in value.items()}}


class LoraSettings(Settings):
    """Low-rank adapters instead of all weights. The learning rate's default is then ten times higher."""

    r: Positive = 32
    """Rank."""
    alpha: float = 32.0
    """The adapter's output is scaled by alpha / r."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    target: str = "all-linear"
    """Which layers get one: all linear layers, or a regular expression. The output layer cannot."""


class ModelSettings(Settings):
    """The student."""

    name: str = "smollm2-135m-instruct"
    """A folder, a hub name `org/name@revision`, or the bundled small model `smollm2-135m-instruct`."""
    precision: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Of the weights in forward and backward. bfloat16 keeps float32 masters. auto: bfloat16 where the processor has
    units for it, else float32."""
    fused_layers: bool = True
    """In bfloat16 on a CPU, run norms, MLPs and attention in cheaper forms with the same formulas, where the
    architecture allows. false: the model's own code throughout."""
    lora: LoraSettings | None = None
    """Train adapters instead of all weights."""
    system_prompt: str | None = None
    """Put before every prompt that has no system message of its own."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the chat template, e.g. {enable_thinking: false}."""


class DataSettings(Settings):
    """Demonstrations."""

    path: str
    """JSONL, JSON or Parquet: chat `messages`, `prompt` and `completion`, `question` and `answer`, or ShareGPT; or a
    trajectory store (its kept trajectories)."""
    format: str = "auto"
    """Which of those; auto looks at each record."""
    train_on: Literal["all", "last"] = "all"
    """Train on every assistant turn, or on the last only. A message's own `trainable` flag wins."""
    max_length: Positive = 2048
    """Longest conversation in tokens."""
    overlong: Literal["error", "drop", "split"] = "error"
    """What happens to a longer one: stop with its place; leave it out, counted; or split it between turns."""
    on_bad_record: Literal["quarantine", "error"] = "quarantine"
    """An unreadable record goes to `quarantine.jsonl` with file, line and reason; or stops the run."""
    limit: Positive | None = None
    """Use only the first this many records."""


class TaskSettings(Settings):
    """Questions with something to judge the answers by."""

    kind: Literal["jsonl", "gsm8k", "math500", "reasoning_gym"] = "jsonl"
    """Where they come from: your own JSONL file, GSM8K's or MATH-500's file, or a procedural task of reasoning-gym."""
    path: str | None = None
    """The file, for all kinds but reasoning_gym."""
    name: str | None = None
    """reasoning_gym: the task's name, e.g. chain_sum."""
    options: dict[str, Any] = Field(default_factory=dict)
    """reasoning_gym: the task's own settings, e.g. {min_terms: 2, max_terms: 2}."""
    size: Positive | None = None
    """How many training questions; None takes all there are."""
    heldout: int = Field(0, ge=0)
    """How many questions are kept out of training for evaluation, none of them equal to a training question."""
    canonical: str | None = None
    """Which questions count as equal: None for equal text; `commutative_terms` ignores the order of a sum's terms."""
    prompt: str | None = None
    """A template around the question, with {question} in it."""
    prompt_field: str = "question"
    """jsonl: the field with the question (a string, or chat messages)."""
    answer_field: str = "answer"
    """jsonl: the field with the gold answer."""
    heldout_path: str | None = None
    """A file of its own for the held-out questions, instead of cutting them from `path`."""

    @model_validator(mode="after")
    def _complete(self) -> "TaskSettings":
        if self.kind == "reasoning_gym" and not self.name:
            raise ValueError("tasks.kind=reasoning_gym needs tasks.name, e.g. chain_sum")
        if self.kind != "reasoning_gym" and not self.path:
            raise ValueError(f"tasks.kind={self.kind} needs tasks.path, a file of questions")
        return self


class VerifierSettings(Settings):
    """What accepts or rejects an answer."""

    kind: Literal["exact", "regex", "last_number", "math_verify", "reasoning_gym", "python", "flag"]
    """How: equal text; a pattern; the last number; math-verify; the task's own grader; your function; a flag."""
    function: str | None = None
    """python: `module:function` or `file.py:function`."""
    pattern: str | None = None
    """regex: a pattern; with a group, the group must equal the answer."""
    extract: str | None = None
    """reasoning_gym: which part of the completion is graded: whole, last_number, last_line, answer_tag."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further options of the kind."""
    time_limit_s: float = Field(10.0, gt=0)
    """Longest a verdict may take; then it is an error verdict."""
    memory_limit_mb: Positive = 1024
    """Most memory a verdict may use; then it is an error verdict."""
    workers: Positive | None = None
    """Worker processes; None is one per core, at most 8."""
    accept_truncated: bool = False
    """Judge completions that ran into the token limit, instead of rejecting them."""
    allow_code_outside: bool = False
    """Run a python verifier that lies outside the folder of the config and outside the current folder."""


class ServerSettings(Settings):
    """How vLLM servers are asked, and started where there is none."""

    requests: Positive = 32
    """Requests under way at a time, for each server and process."""
    timeout_s: float = Field(600.0, gt=0)
    """Longest wait for one answer."""
    attempts: Positive = 4
    """Tries of a request before its server counts as dead."""
    revive_s: float = Field(60.0, gt=0)
    """How long a dead server is waited for before the run stops, resumable. One of ours is started again."""
    api_key_env: str | None = None
    """Environment variable with the key."""
    args: tuple[str, ...] = ()
    """Started here: added to vLLM's command line, e.g. [--tensor-parallel-size, "2"]."""
    env: dict[str, str] = Field(default_factory=dict)
    """Started here: added to its environment, e.g. {CUDA_VISIBLE_DEVICES: "1"}."""
    max_model_len: Positive | None = None
    """Started here: longest prompt plus completion; null is the model's own."""
    start_s: float = Field(600.0, gt=0)
    """Started here: longest time until it answers."""


class RolloutSettings(Settings):
    """How the student is sampled."""

    n: Positive = 8
    """Completions a prompt."""
    temperature: float = Field(1.0, ge=0)
    """Divides the logits. 1 samples the model's own distribution."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the most likely tokens that make up this share of probability."""
    max_new_tokens: Positive = 512
    """Longest completion, stop token included."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion."""
    prompts_per_round: Positive | None = None
    """Prompts in a round; None takes every training question once."""
    max_batch: Positive = 128
    """Completions decoded together."""
    decoding: Literal["auto", "fused", "plain", "recompute"] = "auto"
    """How the model in this process is asked: auto takes the fastest way that agrees with a plain forward; plain is the
    model's own forward with its cache, for when the fast way is suspected; recompute keeps no cache."""
    chunk_rows: Positive = 1024
    """Completions committed together: what a kill can cost."""
    engine: Literal["inprocess", "vllm"] = "inprocess"
    """What samples the student: the model in this process, or vLLM servers that get its weights after each round."""
    url: str | tuple[str, ...] | None = None
    """vllm: address of the server, or of several; null starts one here."""
    server: ServerSettings = Field(default_factory=ServerSettings)

    @model_validator(mode="after")
    def _served(self) -> "RolloutSettings":
        if self.url is not None and self.engine != "vllm":
            raise ValueError("rollout.url is set and rollout.engine is inprocess: set rollout.engine=vllm")
        return self

    @model_validator(mode="after")
    def _varied(self) -> "RolloutSettings":
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"rollout.n={self.n} with rollout.temperature=0 draws the same completion every time")
        return self


class KeepSettings(Settings):
    """Which accepted completions are trained on."""

    min_score: float | None = None
    """Keep what scores at least this instead of what the verdict accepts."""
    drop_truncated: bool = True
    """Never keep a completion that ran into the token limit."""
    drop_all_correct: bool = False
    """Leave out prompts whose every sample was accepted, from the second round on."""
    distinct: Literal["text", "key"] | None = "text"
    """One of each text, or of each solution by the verifier's own key; null keeps duplicates."""
    best_of: Positive | None = None
    """Only the best-scoring this many of a prompt."""
    cap: Positive | None = 4
    """At most this many of a prompt."""
    order: Literal["shortest", "sampled", "farthest"] = "shortest"
    """Which come first where a rule must choose. farthest: of two that `distinct` takes for one, the text that is
    farther from the other kept ones by edit distance (RFT); else as sampled."""
    random_budget: bool | str = False
    """The control arm: as many as the rules would keep, drawn by lot among all samples of the prompt. A run's folder:
    as many as that run kept of the prompt in the same round."""


class TextFilterSettings(Settings):
    """Which answers are left out for how they are written (DeepSeek-R1's data). They are marked, not removed."""

    max_other_script: Fraction | None = 0.05
    """Mixed language: largest share of letters in another script than the answer's and the question's."""
    max_paragraph_words: Positive | None = 300
    """Longest paragraph."""
    stray_code: bool = True
    """Fenced code that the question does not ask for."""


class RetentionSettings(Settings):
    """Another ability that training should not cost."""

    name: str
    """What it is called in the verdicts."""
    tasks: TaskSettings
    """Its questions; held-out ones where there are any."""
    verifier: VerifierSettings
    """Judges its answers."""
    questions: Positive = 64
    """How many."""
    n: Positive = 4
    """Samples a question, at temperature 1."""
    max_new_tokens: Positive | None = None
    """Longest answer; None is the rollout's."""


class ProbeSettings(Settings):
    """The fixed probe set that the regression gate and the graduation monitor look at."""

    questions: Positive = 64
    """How many: the first held-out questions, or training questions where none are held out. Graduation takes 128.
    The evaluation leaves them out where it can (evaluation.leave_out)."""
    n: Positive = 8
    """Samples a question, at temperature 1. Graduation takes 16."""
    every_steps: int = Field(0, ge=0)
    """Graduation: also probe within a round, every this many updates, and stop there if the verdict says so. 0 probes
    after rounds only."""
    max_new_tokens: Positive | None = None
    """Longest answer; None is the rollout's."""
    temperature_cap: float | None = Field(1.0, gt=0)
    """Graduation, G7: the highest sampling temperature worth trying; below it a flat balance says nothing yet. null
    leaves G7 undecided."""
    reference: str = "base"
    """Graduation: what drift is measured from: base, the model the run began with, or stage:NAME."""
    kl: bool = True
    """Graduation: measure the KL to the reference, both ways; the reference is then held in memory too."""
    kl_n: Positive = 4
    """Samples a question by the reference, for KL(reference ‖ policy)."""
    retention: tuple[RetentionSettings, ...] = ()
    """Graduation: other abilities, compared with the reference at every probe."""
    heldout: DataSettings | None = None
    """Graduation: demonstrations that nothing trains on; their likelihood chooses the checkpoint to hand over."""


class GraduationThresholds(Settings):
    """When imitation has stopped paying; docs/graduation.md says where each number comes from."""

    min_tasks: Positive = 128
    """Probe questions below which nothing but narrowing is decided."""
    min_samples: Positive = 16
    """Samples a question below which nothing but narrowing is decided."""
    entropy_ratio: float = Field(0.25, gt=0)
    """G1: entropy over its first value."""
    entropy_slope: float = Field(0.02, ge=0)
    """G1: largest change of entropy per probe, as a share of the first."""
    slope_probes: Positive = 3
    """G1: probes the slope is fitted over."""
    ceiling_points: Positive = 5
    """G2: fewest probes for the entropy fit."""
    min_gain: float = Field(0.01, ge=0)
    """G2, G3: a gain of pass@1 not worth going on for."""
    min_gain_of_first: float = Field(0.25, ge=0)
    """G3: the same as a share of the first probe's gain."""
    plateau_probes: Positive = 3
    """G3: probes the gain is measured over."""
    headroom: float = 0.10
    """G4: pass@k - pass@1 that leaves RL something to sharpen."""
    coverage_k: Positive = 16
    """G4: its k."""
    group: Positive = 8
    """G5: samples a prompt that RL will use."""
    min_mixed: Fraction = 0.30
    """G5: least share of groups with both outcomes."""
    max_same: Fraction = 0.50
    """G5: most groups all wrong, and most all right."""
    agree: Positive = 2
    """So many of the last `of` probes must say the same."""
    of: Positive = 3
    """Probes looked at."""


class TrainSettings(Settings):
    """The updates."""

    lr: float | None = Field(None, gt=0)
    """Peak learning rate; None is the method's default (ten times higher with LoRA)."""
    batch_size: Positive | None = 16
    """Trajectories per update; null takes the whole draw in one."""
    epochs: Positive = 1
    """Passes over a round's draw."""
    updates: Positive | None = None
    """Updates in a round, over as many passes as that takes, instead of whole epochs."""
    updates_growth: float = Field(1.0, ge=1)
    """Each later round has this many times the updates of the one before."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Of the learning rate over the stage."""
    warmup: Fraction = 0.03
    """Share of the stage over which the learning rate rises."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Update rule."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of matrices."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay of its two averages."""
    momentum: Fraction = 0.0
    """SGD's momentum."""
    max_grad_norm: float | None = 1.0
    """The gradient is scaled down to this norm; null never does."""
    max_tokens: Positive = 2048
    """Most tokens in one microbatch, padding included: memory, never the result."""
    layout: Literal["packed", "padded"] = "packed"
    """Documents end to end in one row, each seeing only itself; or a row each."""
    divisor: Literal["targets", "sampled", "sequences"] = "targets"
    """What an update's loss is averaged over."""


class EvaluationSettings(Settings):
    """What is measured before and after."""

    n: Positive = 8
    """Samples a question."""
    ks: tuple[Positive, ...] = (1, 8)
    """The k of pass@k."""
    temperature: float = Field(1.0, gt=0)
    """Of the samples."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Of the samples."""
    max_new_tokens: Positive | None = None
    """Longest answer; None is the rollout's."""
    controls: bool = True
    """Also measure the untrained model greedily, at its best temperature, and with worked examples in the prompt."""
    control_temperatures: tuple[float, ...] = (0.3, 0.6)
    """Temperatures tried for the untrained model's best."""
    examples: int = Field(4, ge=0)
    """Worked examples in the prompt of that control."""
    leave_out: int | None = Field(None, ge=0)
    """Held-out questions that are not measured on, since gate and monitor decide on them: the first, as the probe takes
    them. null: as many as it takes where at least as many are left, else none, and the result says so."""
    seed: int = 1234
    """Of the evaluation's samples and intervals: the same for every model compared."""

    @model_validator(mode="after")
    def _enough(self) -> "EvaluationSettings":
        if max(self.ks) > self.n:
            raise ValueError(f"evaluation.ks asks for pass@{max(self.ks)} but evaluation.n is {self.n}: raise n")
        return self


class SavingSettings(Settings):
    """Checkpoints."""

    every_steps: Positive | None = None
    """Make one every this many updates."""
    every_minutes: float = Field(5.0, gt=0)
    """Make one at least this often."""
    keep: Positive = 2
    """How many are kept; while a gate may take the round back at least 2: the newest, and the round's start."""


class DistributedSettings(Settings):
    """Several processes, started with `accelerate launch` or torchrun."""

    sharding: Literal["auto", "none", "full"] = "auto"
    """none: each process holds the whole model. full: each holds a part of every weight, gradient and moment (FSDP2).
    auto: full where `accelerate launch --use_fsdp` started the run, else none."""


class SystemSettings(Settings):
    """The machine."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    threads: Positive | None = None
    """Threads of the processor; None is one per core, and on resume as many as before. Part of what fixes a
    run to the bit."""
