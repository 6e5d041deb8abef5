"""Cheaper forms of a transformer's norms, gated MLPs and attention, for training in bfloat16 on a CPU.

There a norm in plain tensor operations takes a dozen passes over memory in its backward, rotary positions another
dozen, and the gradient of a weight is a matrix product with a transposed left side, at half the speed of the others.
Here the same formulas have a backward written by hand, in pieces small enough for the processor's caches.

The modules keep their weights; their `forward` is swapped while a policy computes hidden states, and only then. Norms
and MLPs are swapped where their own forward and gradient are the formula's on a trial input; attention where its class
is one of `ATTENTION`. Everything else stays as it is, and `check_forward` compares the whole with the plain model once
a run.

Dimension letters:
  N  tokens          R  tokens of a slice       D  hidden width     F  MLP width
  H  query heads     J  key/value heads         G  query heads for each key head
  L  tokens of one document                     E  head width
"""

import contextlib
import ctypes
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.policies.packed_attention import PRODUCTS, window_is_wide

ATTENTION = ("LlamaAttention", "MistralAttention", "Qwen2Attention")
"""Classes of transformers that attend as `packed_self_attention` does: rotary positions on whole heads, no more."""
_SLICE_ELEMENTS = 1 << 17
"""Elements of a slice of rows: half a MiB in float32."""
_TRIAL_TOLERANCE = 1e-4
"""Most that a module may differ from the formula on a trial input in float32."""


class RMSNorm(torch.autograd.Function):
    """y = weight * x / rms(x), with rms(x) = sqrt(mean(x^2) + eps) over each row; rounded where the plain form rounds.

    Backward, with x' = x / rms and g = weight * dy: dx = (g - x' * mean(g * x')) / rms and dweight = sum of dy * x',
    in float32 (float64 for float64).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_ND = x.detach().reshape(-1, x.shape[-1])
        wide = torch.promote_types(x.dtype, torch.float32)
        out_ND = torch.empty(x_ND.shape, dtype=torch.promote_types(x.dtype, weight_D.dtype), device=x.device)
        inverse_N1 = torch.empty(len(x_ND), 1, dtype=wide, device=x.device)
        for part in _slices(x_ND):
            wide_RD = x_ND[part].to(wide)
            inverse_R1 = wide_RD.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
            inverse_N1[part] = inverse_R1
            torch.mul(weight_D.detach(), (wide_RD * inverse_R1).to(x.dtype), out=out_ND[part])
        ctx.save_for_backward(x_ND, weight_D, inverse_N1)
        return out_ND.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x_ND, weight_D, inverse_N1 = ctx.saved_tensors
        grad_ND = grad_outputs[0].reshape(x_ND.shape)
        wide, width = inverse_N1.dtype, x_ND.shape[-1]
        wide_weight_D = weight_D.to(wide)
        out_ND = torch.empty_like(x_ND)
        sum_D = torch.zeros(width, dtype=wide, device=x_ND.device)
        for part in _slices(x_ND):
            inverse_R1 = inverse_N1[part]
            normal_RD = x_ND[part].to(wide, copy=True).mul_(inverse_R1)
            grad_RD = grad_ND[part].to(wide, copy=True)
            product_RD = grad_RD * normal_RD
            sum_D += product_RD.sum(0)
            mean_R1 = torch.mv(product_RD, wide_weight_D).div_(width).unsqueeze(-1)
            out_ND[part] = grad_RD.mul_(wide_weight_D).addcmul_(normal_RD, mean_R1, value=-1).mul_(inverse_R1)
        return out_ND.view(grad_outputs[0].shape), sum_D.to(weight_D.dtype) if ctx.needs_input_grad[1] else None, None


class GatedMLP(torch.autograd.Function):
    """y = (silu(x Wg') * (x Wu')) Wd'.

    The gradient of a weight is a product with a contiguous left side, or the transpose of such a product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
        x_ND = x.detach().reshape(-1, x.shape[-1])
        gate_NF, up_NF = x_ND @ gate_FD.detach().t(), x_ND @ up_FD.detach().t()
        open_NF = nn.functional.silu(gate_NF)
        hidden_NF = open_NF * up_NF
        ctx.save_for_backward(x_ND, gate_FD, up_FD, down_DF, gate_NF, up_NF, open_NF, hidden_NF)
        return (hidden_NF @ down_DF.detach().t()).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x_ND, gate_FD, up_FD, down_DF, gate_NF, up_NF, open_NF, hidden_NF = ctx.saved_tensors
        wants_x, wants_gate, wants_up, wants_down = ctx.needs_input_grad
        grad_ND = grad_outputs[0].reshape(len(x_ND), -1)
        grad_down = grad_ND.t().contiguous() @ hidden_NF if wants_down else None
        grad_NF = grad_ND @ down_DF
        grad_up_NF = open_NF * grad_NF
        grad_gate_NF = torch.ops.aten.silu_backward(grad_NF.mul_(up_NF), gate_NF)
        grad_x = grad_gate = grad_up = None
        if wants_x:
            grad_x = (grad_up_NF @ up_FD).addmm_(grad_gate_NF, gate_FD).view(*grad_outputs[0].shape[:-1], -1)
        if wants_gate or wants_up:
            x_DN = x_ND.t().contiguous()
            grad_gate = (x_DN @ grad_gate_NF).t() if wants_gate else None
            grad_up = (x_DN @ grad_up_NF).t() if wants_up else None
        return grad_x, grad_gate, grad_up, grad_down


class DocumentAttention(torch.autograd.Function):
    """Rotary positions and causal attention within each document of one packed row, as plain matrix products.

    Per document: P = softmax(scale * Q K' + mask), O = P V. Backward: dV = P' dO, dS = P * (dP - sum(dP * P)) with
    dP = dO V', dQ = scale * dS K, dK = scale * dS' Q, turned back by the rotation's transpose.

    Args (forward):
        query_NQ, key_NK, value_NK: the projections, heads side by side.
        cos_NE, sin_NE: as transformers' rotary embedding gives them.
        bounds: document d is tokens [bounds[d], bounds[d + 1]).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_NQ: Tensor,
        key_NK: Tensor,
        value_NK: Tensor,
        cos_NE: Tensor,
        sin_NE: Tensor,
        bounds: tuple[int, ...],
        scale: float,
    ) -> Tensor:
        width = cos_NE.shape[-1]
        longest = max(b - a for a, b in itertools.pairwise(bounds))
        hidden_LL = query_NQ.new_full((longest, longest), float("-inf")).triu_(1)
        out_NQ = torch.empty_like(query_NQ)
        saved = []
        for start, stop in itertools.pairwise(bounds):
            length = stop - start
            cos_LE, sin_LE = cos_NE[start:stop], sin_NE[start:stop]
            query_HLE = _rotated(_heads(query_NQ[start:stop], width), cos_LE, sin_LE)
            key_JLE = _rotated(_heads(key_NK[start:stop], width), cos_LE, sin_LE)
            value_JLE = _heads(value_NK[start:stop], width).contiguous()
            groups = len(query_HLE) // len(key_JLE)
            query = query_HLE.view(len(key_JLE), groups * length, width)
            mask = hidden_LL[:length, :length].repeat(groups, 1)
            weights = torch.baddbmm(mask, query, key_JLE.transpose(1, 2), alpha=scale).softmax(-1)
            mixed_HLE = torch.bmm(weights, value_JLE).view(-1, length, width)
            _heads(out_NQ[start:stop], width).copy_(mixed_HLE)
            saved += [query, key_JLE, value_JLE, weights]
        ctx.save_for_backward(cos_NE, sin_NE, *saved)
        ctx.bounds, ctx.scale = bounds, scale
        return out_NQ

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        cos_NE, sin_NE, *saved = ctx.saved_tensors
        (grad_NQ,) = grad_outputs
        width, scale = cos_NE.shape[-1], ctx.scale
        out_NQ = torch.empty_like(grad_NQ, memory_format=torch.contiguous_format)
        key_width = saved[1].shape[0] * width
        out_key_NK, out_value_NK = (grad_NQ.new_empty(len(grad_NQ), key_width) for _ in range(2))
        for d, (start, stop) in enumerate(itertools.pairwise(ctx.bounds)):
            query, key_JLE, value_JLE, weights = saved[4 * d : 4 * d + 4]
            part, cos_LE, sin_LE = slice(start, stop), cos_NE[start:stop], sin_NE[start:stop]
            grad = _heads(grad_NQ[part], width).contiguous().view(query.shape)
            _heads(out_value_NK[part], width).copy_(torch.bmm(weights.transpose(1, 2), grad))
            scores = torch.bmm(grad, value_JLE.transpose(1, 2))
            scores = torch.ops.aten._softmax_backward_data(scores, weights, -1, scores.dtype)
            grad_query = torch.baddbmm(query, scores, key_JLE, beta=0, alpha=scale).view(-1, stop - start, width)
            grad_key = torch.baddbmm(key_JLE, scores.transpose(1, 2), query, beta=0, alpha=scale)
            _rotated(grad_query, cos_LE, sin_LE, backwards=True, out=_heads(out_NQ[part], width))
            _rotated(grad_key, cos_LE, sin_LE, backwards=True, out=_heads(out_key_NK[part], width))
        return out_NQ, out_key_NK, out_value_NK, None, None, None, None


def packed_self_attention(
    module: Any,
    plain: Callable[..., Any],
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    """An attention module's forward on a packed row of documents of up to `PRODUCTS` tokens; else `plain`."""
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is None or past_key_values is not None or hidden_states.shape[0] != 1 or position_embeddings is None:
        return plain(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
    places = tuple(bounds.tolist())
    longest = max(b - a for a, b in itertools.pairwise(places))
    has_dropout = module.training and module.attention_dropout
    window = getattr(module if hasattr(module, "sliding_window") else module.config, "sliding_window", None)
    if longest > PRODUCTS or has_dropout or not window_is_wide(window, longest):
        return plain(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
    x_ND = hidden_states[0]
    cos_NE, sin_NE = (x[0] for x in position_embeddings)
    mixed_NQ = DocumentAttention.apply(
        module.q_proj(x_ND), module.k_proj(x_ND), module.v_proj(x_ND), cos_NE, sin_NE, places, module.scaling
    )
    return module.o_proj(mixed_NQ)[None], None


class FusedLayers:
    """The modules of one model that can be swapped, found once."""

    def __init__(self, model: nn.Module) -> None:
        self.forwards: list[tuple[nn.Module, Callable[..., Any]]] = []
        known: dict[Any, bool] = {}
        for module in model.modules() if _is_whole(model) else ():
            if "forward" in vars(module):  # somebody else's swap: leave it
                continue
            forward = _norm(module, known) or _mlp(module, known) or _attention(module)
            if forward is not None:
                self.forwards.append((module, forward))
        if self.forwards:
            keep_freed_memory()

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The cheaper forms are in place inside, the modules' own outside."""
        try:
            for module, forward in self.forwards:
                module.forward = forward
            yield
        finally:
            for module, _ in self.forwards:
                vars(module).pop("forward", None)


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc's allocator keep what is freed, where it is the allocator: a training step frees and takes the same
    gigabyte again, and handing it to the system in between costs a page fault for every 4 KiB (3% of a step)."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1  # numbers of malloc.h
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def _norm(module: Any, known: dict[Any, bool]) -> Callable[..., Any] | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float) or not isinstance(weight, Tensor):
        return None
    key = (type(module), tuple(weight.shape), eps)
    if key not in known:
        known[key] = weight.ndim == 1 and _is_formula(
            module, {"weight": tuple(weight.shape)}, lambda x: RMSNorm.apply(x, module.weight, eps)
        )
    return (lambda x: RMSNorm.apply(x, module.weight, eps)) if known[key] else None


def _mlp(module: Any, known: dict[Any, bool]) -> Callable[..., Any] | None:
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if any(type(layer) is not nn.Linear or layer.bias is not None for layer in layers):
        return None
    if len(list(module.parameters())) != len(layers) or not isinstance(getattr(module, "act_fn", None), nn.Module):
        return None

    def forward(x: Tensor) -> Any:
        return GatedMLP.apply(x, module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight)

    key = (type(module), type(getattr(module, "act_fn", None)))
    if key not in known:
        shapes = {"gate_proj.weight": (40, 24), "up_proj.weight": (40, 24), "down_proj.weight": (24, 40)}
        known[key] = _is_formula(module, shapes, forward)
    return forward if known[key] else None


def _attention(module: Any) -> Callable[..., Any] | None:
    kind = type(module)
    if kind.__name__ not in ATTENTION or not kind.__module__.startswith("transformers.models."):
        return None
    return functools.partial(packed_self_attention, module, module.forward)


def _is_whole(model: nn.Module) -> bool:
    """False where weights are sharded, quantised or elsewhere: the forms want plain tensors on the CPU."""
    return all(type(p) is nn.Parameter and p.device.type == "cpu" for p in model.parameters())


def _is_formula(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], formula: Callable[[Tensor], Any]) -> bool:
    """True where the module, with random weights of the given shapes, gives the formula's values and gradients.

    In float32; an MLP is tried with small weights, which its linear layers take as well as their own.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        numbers: Tensor = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5 + 0.1
        return numbers

    weights = {name: random(*shape).requires_grad_() for name, shape in shapes.items()}
    width = next(iter(shapes.values()))[-1]
    x = (3 * random(5, width) * width**0.5).requires_grad_()
    leaves = [x, *weights.values()]
    try:
        with torch.enable_grad():
            own = torch.func.functional_call(module, weights, (x,))
            expected = [own, *torch.autograd.grad(own.sin().sum(), leaves)]
            with torch.nn.utils.stateless._reparametrize_module(module, weights):
                ours = formula(x)
                got = [ours, *torch.autograd.grad(ours.sin().sum(), leaves)]
    except (RuntimeError, TypeError, ValueError):  # its own forward takes something else
        return False
    return all(_is_close(a, b) for a, b in zip(got, expected, strict=True))


def _is_close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= _TRIAL_TOLERANCE * b.abs().max().clamp_min(1e-6))


def _slices(x_ND: Tensor) -> Sequence[slice]:
    step = max(1, _SLICE_ELEMENTS // max(1, x_ND.shape[-1]))
    return [slice(start, start + step) for start in range(0, len(x_ND), step)]


def _heads(x_LQ: Tensor, width: int) -> Tensor:
    """(H, L, E) view of heads that lie side by side."""
    return x_LQ.view(len(x_LQ), -1, width).transpose(0, 1)


def _rotated(
    x_HLE: Tensor, cos_LE: Tensor, sin_LE: Tensor, *, backwards: bool = False, out: Tensor | None = None
) -> Tensor:
    """x * cos + rotate_half(x) * sin, or, backwards, the transpose of that map."""
    half = x_HLE.shape[-1] // 2
    out_HLE = torch.empty(x_HLE.shape, dtype=x_HLE.dtype, device=x_HLE.device) if out is None else out
    (x1, x2), (out1, out2) = x_HLE.split(half, -1), out_HLE.split(half, -1)
    (cos1, cos2), (sin1, sin2) = cos_LE.split(half, -1), sin_LE.split(half, -1)
    torch.mul(x1, cos1, out=out1)
    torch.mul(x2, cos2, out=out2)
    if backwards:
        out1.addcmul_(x2, sin2)
        out2.addcmul_(x1, sin1, value=-1)
    else:
        out1.addcmul_(x2, sin1, value=-1)
        out2.addcmul_(x1, sin2)
    return out_HLE
