"""Floating-point operations of a run, split into sampling, teacher scoring and training: what "cheaper" is measured in.

One multiply and add counts as two operations. Layer sizes come from the model's config; embeddings look up and cost
nothing; norms, softmaxes and optimiser updates are left out (a few per cent at most).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tutelage.errors import ConfigError
from tutelage.types import Trajectory

PARTS = ("sampling", "teacher", "scoring", "training")


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """What one token costs to run forward through a model."""

    body: float
    """Operations a token in the layers' matrices, attention over the past not included."""
    attention: float
    """Operations a token for each token it attends to."""
    head: float
    """Operations of the output layer for one position."""
    trained_share: float = 1.0
    """Share of the body's weights that get a gradient; with LoRA a small one."""
    head_trained: bool = True

    def __add__(self, other: "ModelCost") -> "ModelCost":
        """Two models run side by side on the same tokens, neither of them trained."""
        return ModelCost(
            body=self.body + other.body, attention=self.attention + other.attention, head=self.head + other.head
        )

    def forward(self, length: int, *, heads: int | None = None, start: int = 0) -> float:
        """Tokens `start` to `length` of one sequence, logits at `heads` positions (None: all of them)."""
        n = length - start
        pairs = (length * (length + 1) - start * (start + 1)) / 2
        return n * self.body + pairs * self.attention + (n if heads is None else heads) * self.head

    def training(self, length: int, *, heads: int) -> float:
        """Forward and backward: gradients with respect to activations cost a forward, and with respect to trained
        weights another."""
        pairs = length * (length + 1) / 2
        body = length * self.body * (2 + self.trained_share) + pairs * self.attention * 3
        return body + heads * self.head * (3 if self.head_trained else 2)


def cost_of(model: Any, *, trained_share: float = 1.0, head_trained: bool | None = None) -> ModelCost:
    """The cost of a transformers causal model, from its config.

    Args:
        model: the model or its config; dense decoders and mixtures of experts with the usual config names.
        trained_share: share of the layers' weights that are trained.

    Raises:
        ConfigError: the config does not name its sizes.
    """
    config = getattr(model, "config", model)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [n for n in names if not getattr(config, n, None)]
    if missing:
        raise ConfigError(f"the model's config must name {', '.join(missing)} for its operations to be counted")
    width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or width // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None) or 4 * width
    active = getattr(config, "num_experts_per_tok", None) or 1
    matrices = 3 if str(getattr(config, "hidden_act", getattr(config, "activation_function", "silu"))) == "silu" else 2
    attention_weights = width * head_width * (2 * heads + 2 * kv_heads)
    mlp_weights = matrices * width * inner * active
    return ModelCost(
        body=2.0 * layers * (attention_weights + mlp_weights),
        attention=4.0 * layers * heads * head_width,
        head=2.0 * width * config.vocab_size,
        trained_share=trained_share,
        head_trained=trained_share == 1.0 if head_trained is None else head_trained,
    )


@dataclass
class Ledger:
    """Adds up operations by what they were for. JSON-able, so that it is saved with a run."""

    flops: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))

    def sampled(self, cost: ModelCost, trajectories: Iterable[Trajectory], *, prompt_shared: int = 1) -> None:
        """Drawn by a model: each prompt once for its `prompt_shared` samples, then token by token."""
        for t in trajectories:
            prompt = t.num_tokens - t.num_sampled
            total = cost.forward(t.num_tokens, heads=t.num_sampled)
            saved = cost.forward(prompt, heads=0) * (1 - 1 / prompt_shared)
            self._add("sampling", total - saved, t.num_sampled)

    def scored(self, part: str, cost: ModelCost, trajectories: Iterable[Trajectory]) -> None:
        """Run forward once with logits at the targets: `part` is "teacher", or "scoring" for the student's own.

        Raises:
            ConfigError: unknown part.
        """
        if part not in ("teacher", "scoring"):
            raise ConfigError(f'scored operations belong to "teacher" or "scoring", got {part!r}')
        for t in trajectories:
            if t.num_targets:
                self._add(part, cost.forward(_run_length(t), heads=t.num_targets), t.num_targets)

    def trained(self, cost: ModelCost, trajectories: Iterable[Trajectory], *, epochs: int = 1) -> None:
        """Forward and backward on the targets."""
        for t in trajectories:
            if t.num_targets:
                operations = cost.training(_run_length(t), heads=t.num_targets)
                self._add("training", epochs * operations, epochs * t.num_targets)

    def _add(self, part: str, operations: float, tokens: int) -> None:
        self.flops[part] += operations
        self.tokens[part] += tokens

    @property
    def total(self) -> float:
        return sum(self.flops.values())

    def metrics(self) -> dict[str, float]:
        """Operations by part and in all, and each part's share."""
        total = self.total
        out = {f"compute/{part}_flops": value for part, value in self.flops.items()}
        out["compute/total_flops"] = total
        if total > 0:
            out |= {f"compute/frac_{part}": value / total for part, value in self.flops.items()}
        return out

    def state(self) -> Mapping[str, Any]:
        return {"flops": dict(self.flops), "tokens": dict(self.tokens)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.flops, self.tokens = dict(state["flops"]), dict(state["tokens"])


def _run_length(t: Trajectory) -> int:
    """Tokens before the last target: what is run."""
    flags = t.is_target
    return max(i for i, hit in enumerate(flags) if hit)
