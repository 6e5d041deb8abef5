"""Decoding written out for Llama-shaped models: packed weights, grouped attention over a preallocated cache.

`FusedEngine` does the model's arithmetic in fewer operations: query, key and value in one product, gate and up in one,
weights laid out once for the matrix kernels, the cache written in place.
It covers Llama, Mistral without a sliding window, Qwen2 and Qwen3, with LoRA adapters folded in. The weights are
snapshots: `refresh` takes them again when the model's have changed, and the sampler calls it at every draw.

Dimension letters in this file:
  A  rows now in the batch    P  prompts    L  tokens of a prompt    N  tokens that go through a layer together
  E  hidden width    F  output features    Q  query heads    H  key/value heads    D  head width    V  vocabulary
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tutelage.policies.kvcache import RowPools

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
    return None


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
        config = model.config
        attention = model.model.layers[0].self_attn
        self._head_width = int(attention.head_dim)
        self._num_keys = int(config.num_key_value_heads)
        self._num_queries = int(config.num_attention_heads)
        self._scaling = float(attention.scaling)
        self._eps = float(config.rms_norm_eps)
        self._fingerprint: tuple[Any, ...] | None = None
        self._layers: list[_Layer] = []
        self._head: Linear
        self._norm: Tensor
        self._pools: RowPools
        self.refresh()

    def refresh(self, *, force: bool = False) -> None:
        """Take the weights again if they have changed since the last time, or if told to."""
        now = weights_fingerprint(self._model)
        if now == self._fingerprint and not force:
            return
        model, batch = self._model, 64
        self._pools = RowPools(
            len(model.model.layers), self._num_keys, self._head_width, model.lm_head.weight.dtype, model.device
        )
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
        self._norm = model.model.norm.weight.detach().clone()
        self._head = packed_linear([model.lm_head], batch)
        self._fingerprint = now

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[Any]]:
        device = self._model.device
        lengths_P = torch.tensor([len(p) for p in prompts], device=device)
        num_prompts, longest = len(prompts), int(lengths_P.max())
        # Padded on the right: under a causal mask no token of a prompt sees what comes after it.
        ids_PL = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=device)
        positions_N = torch.arange(longest, device=device).repeat(num_prompts)
        kept = torch.empty(
            (2, len(self._layers), num_prompts, longest, self._num_keys, self._head_width),
            dtype=self._model.lm_head.weight.dtype,
            device=device,
        )

        def attend(index: int, queries_NQD: Tensor, keys_NHD: Tensor, values_NHD: Tensor) -> Tensor:
            queries, keys, values = (
                x.unflatten(0, (num_prompts, longest)) for x in (queries_NQD, keys_NHD, values_NHD)
            )
            kept[0, index], kept[1, index] = keys, values
            attended = functional.scaled_dot_product_attention(
                queries.transpose(1, 2),
                keys.transpose(1, 2),
                values.transpose(1, 2),
                is_causal=True,
                scale=self._scaling,
                enable_gqa=True,
            )
            return attended.transpose(1, 2)

        hidden_NE = self._layers_forward(ids_PL.flatten(), positions_N, attend)
        last_PE = hidden_NE[torch.arange(num_prompts, device=device) * longest + lengths_P - 1]
        states = [(len(p), kept[:, :, r, : len(p)].transpose(2, 3).clone()) for r, p in enumerate(prompts)]
        return self._logits(last_PE), states

    def recompose(self, leaving: Sequence[int], joining: Sequence[Any]) -> list[int]:
        return self._pools.recompose(leaving, joining)

    def reset(self) -> None:
        self._pools.reset()

    def step(self, tokens_A: Sequence[int]) -> Tensor:
        device = self._model.device
        views = self._pools.open_step()

        def attend(index: int, queries_AQD: Tensor, keys_AHD: Tensor, values_AHD: Tensor) -> Tensor:
            parts = []
            for view in views:
                rows = slice(view.start, view.stop)
                keys, values = view.append(index, keys_AHD[rows], values_AHD[rows])
                parts.append(
                    functional.scaled_dot_product_attention(
                        queries_AQD[rows, :, None],
                        keys,
                        values,
                        attn_mask=view.mask,
                        scale=self._scaling,
                        enable_gqa=True,
                    )
                )
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        positions_A = torch.tensor(self._pools.lengths(), device=device)
        hidden_AE = self._layers_forward(torch.tensor(tokens_A, device=device), positions_A, attend)
        self._pools.close_step()
        return self._logits(hidden_AE)

    def _layers_forward(self, ids_N: Tensor, positions_N: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """(N, E) after every layer, for tokens at these positions; `attend` is told the layer and its q, k, v."""
        inner = self._model.model
        hidden_NE: Tensor = inner.embed_tokens(ids_N)
        num_tokens, half = len(ids_N), self._head_width // 2
        cos_N1D, sin_N1D = (x[0, :, None] for x in inner.rotary_emb(hidden_NE[None], position_ids=positions_N[None]))
        # rotate_half(x) * sin = swap(x) * (-sin of the first half, sin of the second)
        sin_N1D = torch.cat([-sin_N1D[..., :half], sin_N1D[..., half:]], -1)
        split = (self._num_queries + self._num_keys, self._num_keys)
        for index, layer in enumerate(self._layers):
            heads = layer.qkv(rms_norm(hidden_NE, layer.norm, self._eps)).view(num_tokens, -1, self._head_width)
            turning_NQD, values_NHD = heads.split(split, 1)
            if layer.q_norm is not None and layer.k_norm is not None:
                queries, keys = turning_NQD.split([self._num_queries, self._num_keys], 1)
                queries, keys = rms_norm(queries, layer.q_norm, self._eps), rms_norm(keys, layer.k_norm, self._eps)
                turning_NQD = torch.cat([queries, keys], 1)
            swapped_NQD = torch.cat([turning_NQD[..., half:], turning_NQD[..., :half]], -1)
            turned_NQD = (turning_NQD * cos_N1D).addcmul_(swapped_NQD, sin_N1D)
            attended = attend(index, *turned_NQD.split([self._num_queries, self._num_keys], 1), values_NHD)
            hidden_NE = hidden_NE + layer.out(attended.reshape(num_tokens, -1))
            gate, up = layer.gate_up(rms_norm(hidden_NE, layer.mlp_norm, self._eps)).chunk(2, -1)
            hidden_NE = hidden_NE + layer.down(functional.silu(gate) * up)
        return hidden_NE

    def _logits(self, hidden_NE: Tensor) -> Tensor:
        return self._head(rms_norm(hidden_NE, self._norm, self._eps))


def _norm_weight(attention: Any, name: str) -> Tensor | None:
    module = getattr(attention, name, None)
    return None if module is None else module.weight.detach().clone()


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
