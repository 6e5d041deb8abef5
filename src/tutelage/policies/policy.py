"""The trained policy: a causal model seen as hidden states at target positions and an output layer.

Only target positions go through the output layer, in chunks: logits of size (N, V) never exist. The loss is computed
inside `forward`, so a wrapper that synchronises gradients around `forward` (FSDP) sees all of it.

Dimension letters:  B rows   T positions   N targets of the microbatch   D hidden width   V vocabulary
"""

import contextlib
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from tutelage.data.collate import Batch
from tutelage.errors import ConfigError, NumericsError
from tutelage.numerics.chunked import chunked_loss
from tutelage.policies import packed_attention
from tutelage.policies.fused_layers import FusedLayers

LossFn = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class OutputLayer:
    """What turns hidden states into logits."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    """Applied to the logits: soft cap, scale. None where the model has none."""

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """(N, V), in the weights' dtype: for a few positions only."""
        out = nn.functional.linear(hidden_ND, self.weight_VD, self.bias_V)
        return out if self.transform is None else self.transform(out)


class Policy(nn.Module):
    """A transformers causal model, whole or with LoRA adapters.

    Args:
        model: `AutoModelForCausalLM` or a `PeftModel` around one.
        chunk_size: targets whose logits exist at one time; None lets the numerics choose.
        fused_layers: run norms, MLPs and attention in the cheaper forms of `fused_layers`, in bfloat16 on a CPU.
    """

    def __init__(self, model: Any, *, chunk_size: int | None = None, fused_layers: bool = True) -> None:
        super().__init__()
        self.model = model
        self.chunk_size = chunk_size
        self.fused_layers = fused_layers
        self._fused: FusedLayers | None = None
        packed_attention.register()
        self._plain_attention = self.causal_model.config._attn_implementation

    @property
    def causal_model(self) -> Any:
        """The causal model itself, under any adapters."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def supports_packing(self) -> bool:
        return bool(getattr(self.causal_model, "_supports_attention_backend", False)) and _is_pure_attention(
            self.causal_model.config
        )

    @property
    def dropout(self) -> float:
        """The largest share of anything that training drops at random: the adapters' or the model's own."""
        own = [m.p for m in self.modules() if isinstance(m, _DropoutNd)]
        attention = [getattr(m, "attention_dropout", 0.0) for m in self.modules()]  # a number in newer architectures
        return max([0.0, *own, *(p for p in attention if isinstance(p, float))])

    @property
    def output_layer(self) -> OutputLayer:
        head = self.causal_model.get_output_embeddings()
        return OutputLayer(head.weight, getattr(head, "bias", None), logit_transform(self.causal_model.config))

    def hidden_states(self, batch: Batch) -> Tensor:
        """(B, T, D) last hidden states, after the final norm."""
        is_packed = batch.cu_seqlens is not None
        inputs: dict[str, Any] = {"input_ids": batch.token_ids_BT, "position_ids": batch.position_ids_BT}
        if is_packed:
            inputs |= {"attention_mask": None, "cu_seq_lens_q": batch.cu_seqlens}
        else:
            inputs["attention_mask"] = batch.attention_mask_BT
        self._use_attention(packed_attention.NAME if is_packed else self._plain_attention)
        body = self.causal_model.base_model
        with self._layers() if is_packed else contextlib.nullcontext():
            hidden_BTD: Tensor = body(use_cache=False, **inputs).last_hidden_state
        return hidden_BTD

    def _layers(self) -> AbstractContextManager[None]:
        """The cheaper forms of the layers in place, where they are cheaper."""
        weight = self.output_layer.weight_VD
        is_there = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        if not self.fused_layers or not is_there:
            return contextlib.nullcontext()
        # A checkpointed layer runs again in backward, when its own forward is back in place.
        if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            return contextlib.nullcontext()
        if self._fused is None:
            self._fused = FusedLayers(self.model)
        return self._fused.swapped()

    def _use_attention(self, name: str) -> None:
        """Set the attention of every part; samplers set theirs before they run, so this is set before each use."""
        config = self.causal_model.config
        if config._attn_implementation != name:
            config._attn_implementation = name

    def use_plain_attention(self) -> None:
        """Leave the model as transformers loaded it, for code that calls it directly."""
        self._use_attention(self._plain_attention)

    def target_hidden(self, batch: Batch) -> Tensor:
        """(N, D) hidden states at the positions targets are predicted from."""
        return self._target_hidden(batch)

    def _target_hidden(self, batch: Batch) -> Tensor:
        """For the methods here: `target_hidden` itself gathers and drops a sharded model's weights."""
        return self.hidden_states(batch).flatten(0, 1)[batch.target_positions_N]

    def target_logits(self, batch: Batch) -> Tensor:
        """(N, V) logits at the positions targets are predicted from, as training makes them: for a few rows only."""
        return self.output_layer.logits(self._target_hidden(batch))

    def own_logits(self, batch: Batch) -> Tensor:
        """(N, V) the same as transformers makes them, from a padded batch."""
        self.use_plain_attention()
        logits_BTV = self.model(
            input_ids=batch.token_ids_BT,
            attention_mask=batch.attention_mask_BT,
            position_ids=batch.position_ids_BT,
            use_cache=False,
        ).logits
        return logits_BTV.flatten(0, 1)[batch.target_positions_N]  # type: ignore[no-any-return]

    def per_target(self, batch: Batch, fn: LossFn) -> Tensor:
        """(N,) what `fn(logits_CV, columns_C)` says of every target."""
        return per_target(self._target_hidden(batch), self.output_layer, batch, fn)

    def forward(
        self,
        batch: Batch,
        loss_fn: LossFn,
        *,
        divisor: float,
        stats_fn: Callable[[Tensor, Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Weighted sum of the targets' losses over the step's divisor, and the sums `stats_fn` asks for."""
        layer = self.output_layer
        return chunked_loss(
            self._target_hidden(batch),
            layer.weight_VD,
            batch.columns,
            loss_fn,
            divisor=divisor,
            chunk_size=self.chunk_size,
            bias_V=layer.bias_V,
            logit_transform=layer.transform,
            stats_fn=stats_fn,
        )


def per_target(hidden_ND: Tensor, layer: OutputLayer, batch: Batch, fn: LossFn, *, chunk_size: int = 256) -> Tensor:
    """(N,) what `fn(logits_CV, columns_C)` says of every target, a chunk at a time, from float32 logits or wider."""
    found = []
    for start in range(0, hidden_ND.shape[0], chunk_size):
        part = slice(start, start + chunk_size)
        logits_CV = layer.logits(hidden_ND[part])
        logits_CV = logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()
        found.append(fn(logits_CV, {k: v[part] for k, v in batch.columns.items()}))
    return torch.cat(found) if found else hidden_ND.new_zeros(0)


def logit_transform(config: Any) -> Callable[[Tensor], Tensor] | None:
    """What the architecture does to its logits after the output layer, read from its config."""
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap:
        return lambda logits: softcap * torch.tanh(logits / softcap)
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies
    if scale is not None and scale != 1:
        return lambda logits: logits * scale
    divisor = getattr(config, "logits_scaling", None)  # Granite divides
    if divisor is not None and divisor != 1:
        return lambda logits: logits / divisor
    return None


def _is_pure_attention(config: Any) -> bool:
    """False where some layer carries state along the row (Mamba, linear attention): documents would leak."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds <= {"full_attention", "sliding_attention"} and not hasattr(config, "mamba_d_state")


@torch.no_grad()
def check_forward(
    policy: Policy, batches: Mapping[str, Batch], *, tolerance: float, layouts: Collection[str] | None = None
) -> float:
    """How far the logits used in training are from the model's own, at most over the given batches.

    Run once at the start of a run: it catches an architecture whose logits are made differently from what
    `OutputLayer` assumes, and an attention that lets packed documents see each other. The forward pass is training's,
    with gradients: without them attention takes another way.

    Args:
        batches: the same trajectories, in the layouts the run will use, plus "plain": one a row, right-padded.
        layouts: those to compare with the model's own; None for all.
        tolerance: largest allowed difference (root mean square), as a share of the logits' standard deviation.

    Raises:
        NumericsError: the difference is larger; the message names the layout.
    """
    was_training = policy.training
    policy.eval()
    expected = policy.own_logits(batches["plain"]).float()
    scale = expected.std().clamp_min(1e-6)
    worst = 0.0
    for name, batch in batches.items():
        if layouts is not None and name not in layouts:
            continue
        with torch.enable_grad():
            got = policy.target_logits(batch).detach().float()
        gap = float((got - expected).pow(2).mean().sqrt() / scale)
        worst = max(worst, gap)
        if not gap <= tolerance:
            raise NumericsError(
                f"the logits used in training must be the model's own: in the {name} layout they differ by {gap:.3g} "
                f"standard deviations (allowed {tolerance:g}) for {type(policy.causal_model).__name__}. "
                + ("Set train.layout=padded." if name == "packed" else "This architecture is not supported.")
            )
    policy.use_plain_attention()
    policy.train(was_training)
    return worst


def add_lora(model: Any, *, r: int, alpha: float, dropout: float, target: str, seed: int) -> Any:
    """The model with low-rank adapters on all linear layers (by default) and nothing else trainable.

    W x -> W x + (alpha / r) B A x, with B = 0 at the start, so the first forward equals the base model's.

    Raises:
        ConfigError: the output layer is targeted (it is computed in chunks, outside the adapter's reach).
    """
    from peft import LoraConfig, get_peft_model

    if "lm_head" in target:
        raise ConfigError(
            "lora.target may not name lm_head: the output layer is computed in chunks from its own weight"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # peft draws A from the global generator
        config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target, task_type="CAUSAL_LM")
        return get_peft_model(model, config)


def merged_copy(model: Any) -> Any:
    """The causal model with its adapters folded in, as a copy: the trained model is left as it was.

    Folding in place and out again in bfloat16 drifts a little each time; a copy cannot.
    """
    import copy

    if not hasattr(model, "merge_and_unload"):
        return model
    return copy.deepcopy(model).merge_and_unload()
