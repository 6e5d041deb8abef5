"""Decoding written out for Llama-shaped models: packed weights, grouped attention over a preallocated cache.

`FusedEngine` prefills with the model's own forward and decodes with the same arithmetic in fewer operations: query, key
and value in one product, gate and up in one, weights laid out once for the matrix kernels, the cache written in place.
It covers Llama, Mistral without a sliding window, Qwen2 and Qwen3, with LoRA adapters folded in. The weights are
snapshots: `refresh` takes them again when the model's have changed, and the sampler calls it at every draw.

Dimension letters in this file:
  A  rows now in the batch    R  rows of a pool    C  columns of a pool    N  key/value heads    D  head width
  K  layers    E  hidden width    V  vocabulary    Q  all query and key heads    F  output features
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tutelage.policies.kvcache import PlainEngine, RowPools, RowState, can_share_cache

Linear = Callable[[Tensor], Tensor]

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def fused_refusal(model: Any) -> str | None:
    """Why `FusedEngine` does not fit a model; None where it does."""
    config = model.config
    if config.model_type not in _MODEL_TYPES:
        return f"it is written for {', '.join(_MODEL_TYPES)}; this model is a {config.model_type}"
    if not hasattr(model, "lm_head") or not hasattr(getattr(model, "model", None), "layers"):
        return f"a {type(model).__name__} is not put together like its family's causal model"
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    ):
        return "it has no sliding window"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"it is written for silu, this model uses {config.hidden_act}"
    for name, module in _linear_modules(model):
        reason = _linear_refusal(module)
        if reason is not None:
            return f"{name}: {reason}"
    return can_share_cache(model)


def _linear_modules(model: Any) -> list[tuple[str, Any]]:
    found = [("lm_head", model.lm_head)]
    for i, layer in enumerate(model.model.layers):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found.append((f"layer {i} {part}", getattr(layer.self_attn, part)))
        for part in ("gate_proj", "up_proj", "down_proj"):
            found.append((f"layer {i} {part}", getattr(layer.mlp, part)))
    return found


def _linear_refusal(module: Any) -> str | None:
    if type(module) is torch.nn.Linear:
        return None
    base = getattr(module, "base_layer", None)
    if type(base) is not torch.nn.Linear or not hasattr(module, "get_delta_weight"):
        return f"a {type(module).__name__} is not a plain linear layer"
    for adapter in module.active_adapters:
        if getattr(module, "use_dora", {}).get(adapter):
            return "DoRA adapters are not folded in"
        if any(getattr(b, "bias", None) is not None for b in (module.lora_B[adapter],) if adapter in module.lora_B):
            return "adapters with a bias are not folded in"
    return None


def effective_weight(module: Any) -> tuple[Tensor, Tensor | None]:
    """((F, E) weight, bias) of a linear layer with its active LoRA adapters folded in."""
    if type(module) is torch.nn.Linear:
        return module.weight.detach(), None if module.bias is None else module.bias.detach()
    base = module.base_layer
    weight: Tensor = base.weight.detach()
    if not module.merged and not module.disable_adapters:
        for adapter in module.active_adapters:
            if adapter in module.lora_A:
                weight = weight + module.get_delta_weight(adapter).detach().to(weight.dtype)
    return weight, None if base.bias is None else base.bias.detach()


def packed_linear(modules: Sequence[Any], batch: int) -> Linear:
    """One product for linear layers that read the same input: their outputs side by side.

    On a CPU the weight is laid out for oneDNN once, which halves the time of a product with few rows; elsewhere, or
    where torch was built without it, this is `functional.linear` over the concatenated weight.
    """
    parts = [effective_weight(m) for m in modules]
    weight_FE = parts[0][0] if len(parts) == 1 else torch.cat([w for w, _ in parts])
    bias_F = None
    if any(b is not None for _, b in parts):
        bias_F = torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in parts])
    if weight_FE.device.type == "cpu" and _has_packed_linear(weight_FE.dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_FE.contiguous(), batch)
        run = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: run(x, packed, bias_F, "none", [], "")
    snapshot = weight_FE.clone() if len(parts) == 1 else weight_FE
    return lambda x: functional.linear(x, snapshot, bias_F)


def _has_packed_linear(dtype: torch.dtype) -> bool:
    return (
        dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and (dtype is torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) with the statistic in float32, rounded where transformers rounds."""
    wide = x.float()
    scale = torch.linalg.vecdot(wide, wide).mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    normed: Tensor = (wide * scale.unsqueeze(-1)).to(x.dtype) * weight
    return normed


@dataclass
class _Layer:
    norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class FusedEngine:
    """Decodes Llama-shaped models from packed snapshots of their weights. See the module's docstring."""

    name = "fused"

    def __init__(self, model: Any) -> None:
        self._model = model
        self._plain = PlainEngine(model)
        config = model.config
        attention = model.model.layers[0].self_attn
        self._head_width = int(attention.head_dim)
        self._num_keys = int(config.num_key_value_heads)
        self._num_queries = int(config.num_attention_heads)
        self._scaling = float(attention.scaling)
        self._eps = float(config.rms_norm_eps)
        self._fingerprint: tuple[Any, ...] | None = None
        self._layers: list[_Layer] = []
        self._head: Linear = lambda x: x
        self._pools = RowPools(len(model.model.layers), self._num_keys, self._head_width, model.dtype, model.device)
        self.refresh()

    def refresh(self, *, force: bool = False) -> None:
        """Take the weights again if they have changed since the last time, or if told to."""
        now = weights_fingerprint(self._model)
        if now == self._fingerprint and not force:
            return
        model, batch = self._model, 64
        self._layers = [
            _Layer(
                norm=layer.input_layernorm.weight.detach().clone(),
                qkv=packed_linear([getattr(layer.self_attn, f"{p}_proj") for p in "qkv"], batch),
                q_norm=_norm_weight(layer.self_attn, "q_norm"),
                k_norm=_norm_weight(layer.self_attn, "k_norm"),
                out=packed_linear([layer.self_attn.o_proj], batch),
                mlp_norm=layer.post_attention_layernorm.weight.detach().clone(),
                gate_up=packed_linear([layer.mlp.gate_proj, layer.mlp.up_proj], batch),
                down=packed_linear([layer.mlp.down_proj], batch),
            )
            for layer in model.model.layers
        ]
        self._head = packed_linear([model.lm_head], batch)
        self._fingerprint = now

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[Any]]:
        logits_PV, states = self._plain.prefill(prompts)
        return logits_PV, [(s.length, _stacked(s)) for s in states]

    def recompose(self, leaving: Sequence[int], joining: Sequence[Any]) -> list[int]:
        return self._pools.recompose(leaving, joining)

    def reset(self) -> None:
        self._pools.reset()
        self._plain.reset()

    def step(self, tokens_A: Sequence[int]) -> Tensor:
        model = self._model.model
        device = self._model.device
        pools = self._pools
        positions_A = torch.tensor(pools.lengths(), device=device)
        hidden_AE = model.embed_tokens(torch.tensor(tokens_A, device=device))
        cos, sin = model.rotary_emb(hidden_AE[:, None], position_ids=positions_A[:, None])
        half = self._head_width // 2
        # rotate_half(x) * sin = swap(x) * (-sin of the first half, sin of the second)
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        views = pools.open_step()
        for index, layer in enumerate(self._layers):
            normed_AE = rms_norm(hidden_AE, layer.norm, self._eps)
            attended_AE = self._attend(layer, index, layer.qkv(normed_AE), cos, sin, views)
            hidden_AE = hidden_AE + layer.out(attended_AE)
            gate, up = layer.gate_up(rms_norm(hidden_AE, layer.mlp_norm, self._eps)).chunk(2, -1)
            hidden_AE = hidden_AE + layer.down(functional.silu(gate) * up)
        pools.close_step()
        return self._head(rms_norm(hidden_AE, model.norm.weight, self._eps))

    def _attend(self, layer: _Layer, index: int, qkv_AF: Tensor, cos: Tensor, sin: Tensor, views: Any) -> Tensor:
        """(A, queries * D) attention of the newest tokens over their rows, which they are added to first."""
        num_rows, width, half = qkv_AF.shape[0], self._head_width, self._head_width // 2
        heads = qkv_AF.view(num_rows, -1, width)
        turning_AQD = heads[:, : self._num_queries + self._num_keys]
        if layer.q_norm is not None and layer.k_norm is not None:
            queries, keys = turning_AQD.split([self._num_queries, self._num_keys], 1)
            queries, keys = rms_norm(queries, layer.q_norm, self._eps), rms_norm(keys, layer.k_norm, self._eps)
            turning_AQD = torch.cat([queries, keys], 1)
        swapped_AQD = torch.cat([turning_AQD[..., half:], turning_AQD[..., :half]], -1)
        turned_AQD = (turning_AQD * cos).addcmul_(swapped_AQD, sin)
        values_AND = heads[:, self._num_queries + self._num_keys :]
        parts = []
        for view in views:
            rows = slice(view.start, view.stop)
            keys_RNCD, values_RNCD = view.append(index, turned_AQD[rows, self._num_queries :], values_AND[rows])
            parts.append(
                functional.scaled_dot_product_attention(
                    turned_AQD[rows, : self._num_queries, None],
                    keys_RNCD,
                    values_RNCD,
                    attn_mask=view.mask,
                    scale=self._scaling,
                    enable_gqa=True,
                )
            )
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return attended.reshape(num_rows, -1)


def _norm_weight(attention: Any, name: str) -> Tensor | None:
    module = getattr(attention, name, None)
    return None if module is None else module.weight.detach().clone()


def _stacked(state: RowState) -> Tensor:
    """(2, K, N, L, D): keys and values of one prompt in every layer."""
    keys = [layer.keys[0] for layer in state.layers if layer.keys is not None]
    values = [layer.values[0] for layer in state.layers if layer.values is not None]
    return torch.stack([torch.stack(keys), torch.stack(values)])


def weights_fingerprint(model: Any) -> tuple[Any, ...]:
    """Changes whenever the weights do: storage, torch's own count of in-place writes, and a sum over some elements.

    The sum is for writes that the count does not see, such as those through `parameter.data`.
    """
    found = []
    for parameter in model.parameters():
        flat = parameter.detach().view(-1) if parameter.is_contiguous() else parameter.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 256)].double()
        found.append((parameter.data_ptr(), parameter._version, float(some.sum()), float((some * some).sum())))
    adapters = [
        (
            tuple(m.active_adapters),
            bool(m.disable_adapters),
            bool(m.merged),
            tuple(sorted(getattr(m, "scaling", {}).items())),
        )
        for m in model.modules()
        if hasattr(m, "base_layer") and hasattr(m, "active_adapters")
    ]
    return (*found, *adapters)
