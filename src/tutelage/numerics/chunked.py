"""The output layer, the loss and their backward, chunk by chunk: nothing of size (N, V) ever lives.

Dimension letters:
  N  targets      C  targets of one chunk      R  targets of one slice of a chunk
  V  vocabulary   D  student's hidden width    E  teacher's hidden width

Logits of a chunk come from one matrix product in the compute dtype (bf16 weights: bf16 logits, as a plain output
layer gives them). The loss then runs over slices of the chunk in float32 or float64, small enough for the
processor's caches, and its gradient overwrites the chunk's logits. Two matrix products of that gradient finish the
chunk. The gradient of the weights accumulates in float32. Nothing is computed twice.

A loss function is called as `loss_fn(student_logits_CV, columns_C) -> loss_C`: nats per target, unweighted and
unreduced, from differentiable float32 (or float64) logits. It may also have
  value_and_grad(logits_CV, columns_C) -> (loss_C, d sum(loss_C) / d logits_CV): a hand-written gradient; may
      overwrite the logits it is given
  prepare_chunk(columns_C) -> columns_C: run once a chunk without gradients, before it is cut into slices
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tutelage.errors import ConfigError, DataError
from tutelage.numerics.logprobs import at_least_float32
from tutelage.numerics.reduce import check_divisor

Columns = Mapping[str, Tensor]
LossFn = Callable[[Tensor, Columns], Tensor]
LogitTransform = Callable[[Tensor], Tensor]
StatsFn = Callable[[Tensor, Columns], Mapping[str, Tensor]]

_CHUNK_ELEMENTS = 1 << 25
"""Logits of one chunk: large enough for matrix products to run at full speed, 64 MiB in bf16."""
_SLICE_ELEMENTS = 1 << 19
"""Logits of one slice on a CPU, per thread: 2 MiB in float32, which stays in cache, and which the allocator hands
back warm instead of mapping anew (measured: beyond 8 times this every temporary is mapped and zeroed again)."""
_WEIGHT_ROWS = 2048
"""Vocabulary rows of the weight gradient computed at a time, where it accumulates in another dtype."""


def chunked_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    columns: Columns,
    loss_fn: LossFn,
    *,
    divisor: float,
    chunk_size: int | None = None,
    bias_V: Tensor | None = None,
    logit_transform: LogitTransform | None = None,
    stats_fn: StatsFn | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum_n weight_n * loss_fn(hidden_n @ weight.T)_n / divisor, with its gradient taken on the way.

    Args:
        hidden_ND: last hidden states at the target positions (the position each target is predicted from).
        weight_VD: the output layer. Frozen weights (no gradient wanted) cost no weight gradient.
        columns: name -> tensor over the targets, first axis N. `weight_C` weighs each target (absent: all 1);
            targets of weight 0 are left out before the output layer, so their values never matter. Columns are
            constants. `loss_fn` gets them cut to the rows at hand.
        loss_fn: see the module's docstring.
        divisor: what the whole optimiser step divides by, over every microbatch and process.
        chunk_size: targets per matrix product. None picks about 33 million logits.
        bias_V: the output layer's bias.
        logit_transform: applied to the logits before anything sees them (soft-cap, scale). Differentiable, row by row.
        stats_fn: `stats_fn(student_logits_CV, columns_C) -> {name: scalar}`, run without gradients on the same
            logits; the scalars are summed over all rows.

    Shapes:
        hidden_ND (N, D) and weight_VD (V, D), one float dtype. N may be 0: the loss is then 0 with a graph, so
        that every process still runs backward.
        returns loss (), float32 or float64, and the summed stats.

    Gradient:
        To hidden, weight and bias; computed in forward, scaled in backward, once differentiable.
        Under `torch.no_grad` only the value is computed.

    Raises:
        NumericsError: divisor is not positive. DataError: shapes or dtypes do not fit. ConfigError: chunk_size < 1.
    """
    check_divisor(divisor, "divisor")
    job = _job(hidden_ND, weight_VD, columns, loss_fn, chunk_size, bias_V, logit_transform, stats_fn)
    is_grad = torch.is_grad_enabled()
    loss: Tensor = _ReducedLoss.apply(hidden_ND, weight_VD, bias_V, job, float(divisor), is_grad)
    return loss, job.stats


def chunked_nats(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    columns: Columns,
    loss_fn: LossFn,
    *,
    chunk_size: int | None = None,
    bias_V: Tensor | None = None,
    logit_transform: LogitTransform | None = None,
) -> Tensor:
    """loss_fn(hidden_n @ weight.T)_n for every target, differentiable, without ever holding (N, V).

    As each target's weight is known only in backward, backward computes the logits a second time. Where the
    weights are known beforehand, `chunked_loss` does the work once.

    Shapes, Raises: as `chunked_loss`; returns loss_N (N,), float32 or float64. `weight_C` is not applied.
    """
    job = _job(hidden_ND, weight_VD, columns, loss_fn, chunk_size, bias_V, logit_transform, None)
    loss_N: Tensor = _LossPerTarget.apply(hidden_ND, weight_VD, bias_V, job)
    return loss_N


@dataclass(kw_only=True)
class _Job:
    """What a pass over the chunks needs besides tensors that get gradients."""

    columns: Columns
    loss_fn: LossFn
    chunk_size: int
    logit_transform: LogitTransform | None
    stats_fn: StatsFn | None
    compute_dtype: torch.dtype
    loss_dtype: torch.dtype
    stats: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Gradients:
    """Buffers the pass fills; None where no gradient is wanted."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None

    @property
    def is_wanted(self) -> bool:
        return any(g is not None for g in (self.hidden_ND, self.weight_VD, self.bias_V))


def _job(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    columns: Columns,
    loss_fn: LossFn,
    chunk_size: int | None,
    bias_V: Tensor | None,
    logit_transform: LogitTransform | None,
    stats_fn: StatsFn | None,
) -> _Job:
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise DataError(
            "a chunked loss needs hidden states (N, D) and an output layer (V, D); got hidden "
            f"{tuple(hidden_ND.shape)}, weight {tuple(weight_VD.shape)}. Select the target positions first, "
            "hidden_BTD[is_target_BT]."
        )
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise DataError(f"bias needs one entry per row of the weight ({len(weight_VD)}), got {tuple(bias_V.shape)}")
    for name, column in columns.items():
        if column.ndim == 0 or len(column) != len(hidden_ND):
            raise DataError(
                f"column {name!r} needs one row per target ({len(hidden_ND)}), got shape {tuple(column.shape)}"
            )
    if chunk_size is not None and chunk_size < 1:
        raise ConfigError(f"chunk_size must be at least 1 target, got {chunk_size}; None picks one")
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        compute_dtype = torch.get_autocast_dtype(device)
    elif hidden_ND.dtype != weight_VD.dtype:
        raise DataError(
            f"hidden states ({hidden_ND.dtype}) and output layer ({weight_VD.dtype}) need one dtype outside autocast: "
            "cast the hidden states to the layer's dtype"
        )
    else:
        compute_dtype = hidden_ND.dtype
    if chunk_size is None:
        chunk_size = max(256, 1 << (_CHUNK_ELEMENTS // max(1, len(weight_VD))).bit_length() - 1)
    return _Job(
        columns={name: column.detach() for name, column in columns.items()},
        loss_fn=loss_fn,
        chunk_size=min(chunk_size, max(1, len(hidden_ND))),
        logit_transform=logit_transform,
        stats_fn=stats_fn,
        compute_dtype=compute_dtype,
        loss_dtype=at_least_float32(hidden_ND, weight_VD),
    )


class _ReducedLoss(torch.autograd.Function):
    """Value and gradient in forward; backward only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        job: _Job,
        divisor: float,
        is_grad: bool,
    ) -> Tensor:
        want = ctx.needs_input_grad[:3] if is_grad else (False, False, False)
        weight_N = job.columns.get("weight_C")
        rows_N = None
        if weight_N is None:
            weight_N = torch.ones(len(hidden_ND), dtype=job.loss_dtype, device=hidden_ND.device)
        else:
            weight_N = weight_N.to(job.loss_dtype)
            is_used_N = weight_N != 0
            if not bool(is_used_N.all()):
                rows_N = is_used_N.nonzero().flatten()
                weight_N = weight_N[rows_N]
        scale_N = weight_N / divisor
        loss_N, gradients = _run(hidden_ND.detach(), weight_VD.detach(), bias_V, job, rows_N, scale_N, want)
        dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.gradients = tuple(
            None if g is None else g.to(dtype)
            for g, dtype in zip((gradients.hidden_ND, gradients.weight_VD, gradients.bias_V), dtypes, strict=True)
        )
        return (loss_N * weight_N).sum() / divisor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad_output,) = grad_outputs
        # The usual factor is exactly 1; asking a GPU for it would cost more than the multiplication.
        is_one = grad_output.device.type == "cpu" and float(grad_output) == 1.0
        scaled = [g if g is None or is_one else (g * grad_output).to(g.dtype) for g in ctx.gradients]
        return *scaled, None, None, None


class _LossPerTarget(torch.autograd.Function):
    """Values in forward; backward runs the chunks again with the incoming weights."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, job: _Job) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V)
        ctx.job = job
        none = (False, False, False)
        loss_N, _ = _run(hidden_ND.detach(), weight_VD.detach(), bias_V, job, None, None, none)
        return loss_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        hidden_ND, weight_VD, bias_V = ctx.saved_tensors
        # A target nobody asked about may hold inf or nan: it is left out, not multiplied by 0.
        rows_N = grad_outputs[0].nonzero().flatten()
        scale_N = grad_outputs[0][rows_N].to(ctx.job.loss_dtype)
        want = ctx.needs_input_grad[:3]
        _, g = _run(hidden_ND.detach(), weight_VD.detach(), bias_V, ctx.job, rows_N, scale_N, want)
        return g.hidden_ND, g.weight_VD, g.bias_V, None


def _run(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    job: _Job,
    rows_N: Tensor | None,
    scale_N: Tensor | None,
    want: tuple[bool, bool, bool],
) -> tuple[Tensor, _Gradients]:
    """Loss of the chosen rows (None: all), and the gradient of sum(scale * loss), chunk by chunk."""
    size, num_rows = len(weight_VD), len(hidden_ND) if rows_N is None else len(rows_N)
    device, dtype = hidden_ND.device, job.compute_dtype
    gradients = _Gradients(
        torch.zeros_like(hidden_ND) if want[0] else None,
        torch.zeros(weight_VD.shape, dtype=job.loss_dtype, device=device) if want[1] else None,
        torch.zeros(size, dtype=job.loss_dtype, device=device) if want[2] else None,
    )
    loss_N = torch.empty(num_rows, dtype=job.loss_dtype, device=device)
    chunk_size = min(job.chunk_size, max(1, num_rows))
    with torch.autocast(device.type, enabled=False):
        weight_VD = weight_VD.to(dtype)
        # One buffer for every chunk: mapping fresh memory costs more than filling it.
        buffer_CV = torch.empty(chunk_size, size, dtype=dtype, device=device)
        for start in range(0, num_rows, chunk_size):
            stop = min(start + chunk_size, num_rows)
            rows: slice | Tensor = slice(start, stop) if rows_N is None else rows_N[start:stop]
            hidden_CD = hidden_ND[rows].to(dtype)
            logits_CV = torch.mm(hidden_CD, weight_VD.t(), out=buffer_CV[: stop - start])
            columns_C = {name: column[rows] for name, column in job.columns.items()}
            prepare_chunk = getattr(job.loss_fn, "prepare_chunk", None)
            if prepare_chunk is not None:
                columns_C = prepare_chunk(columns_C)
            scale_C = None if scale_N is None else scale_N[start:stop]
            _chunk(logits_CV, columns_C, scale_C, bias_V, job, gradients, out_C=loss_N[start:stop])
            if gradients.hidden_ND is not None:
                gradients.hidden_ND[rows] = (logits_CV @ weight_VD).to(hidden_ND.dtype)
            if gradients.weight_VD is not None:
                _add_product(gradients.weight_VD, logits_CV, hidden_CD)
    return loss_N, gradients


def _chunk(
    logits_CV: Tensor,
    columns_C: Columns,
    scale_C: Tensor | None,
    bias_V: Tensor | None,
    job: _Job,
    gradients: _Gradients,
    *,
    out_C: Tensor,
) -> None:
    """Fills `out_C` with the loss; where gradients are wanted, overwrites the logits with theirs, scaled."""
    num_rows, size = logits_CV.shape
    step = _slice_rows(num_rows, size, logits_CV.device)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        raw_RV = logits_CV[start:stop]
        logits_RV = raw_RV.to(job.loss_dtype)
        if bias_V is not None:
            logits_RV = logits_RV + bias_V.detach().to(job.loss_dtype)
        columns_R = {name: column[start:stop] for name, column in columns_C.items()}
        if not gradients.is_wanted:
            shown_RV = logits_RV if job.logit_transform is None else job.logit_transform(logits_RV)
            _add_stats(job, shown_RV, columns_R)
            out_C[start:stop] = _checked(job.loss_fn(shown_RV, columns_R), stop - start)
            continue
        scale_R = torch.ones_like(out_C[start:stop]) if scale_C is None else scale_C[start:stop]
        loss_R, gradient_RV = _value_and_gradient(logits_RV, columns_R, scale_R, job)
        out_C[start:stop] = loss_R
        if gradients.bias_V is not None:
            gradients.bias_V += gradient_RV.sum(0)
        raw_RV.copy_(gradient_RV)


def _slice_rows(num_rows: int, size: int, device: torch.device) -> int:
    if device.type != "cpu":
        return max(1, num_rows)
    return max(1, _SLICE_ELEMENTS * min(8, torch.get_num_threads()) // max(1, size))


def _value_and_gradient(logits_RV: Tensor, columns_R: Columns, scale_R: Tensor, job: _Job) -> tuple[Tensor, Tensor]:
    """Loss of one slice and the gradient of sum(scale * loss) with respect to the raw logits."""
    by_hand = getattr(job.loss_fn, "value_and_grad", None)
    leaf_RV = logits_RV.detach()
    shown_RV = leaf_RV
    with torch.enable_grad():
        if by_hand is None or job.logit_transform is not None:
            leaf_RV.requires_grad_()
        if job.logit_transform is not None:
            shown_RV = job.logit_transform(leaf_RV)
        _add_stats(job, shown_RV.detach(), columns_R)
        if by_hand is None:
            loss_R = _checked(job.loss_fn(shown_RV, columns_R), len(scale_R))
            if not loss_R.requires_grad:  # a constant loss teaches nothing
                return loss_R, torch.zeros_like(logits_RV)
            (gradient_RV,) = torch.autograd.grad(loss_R, leaf_RV, scale_R.to(loss_R.dtype), allow_unused=True)
            return loss_R.detach(), torch.zeros_like(logits_RV) if gradient_RV is None else gradient_RV
    given_RV = shown_RV.detach() if job.logit_transform is None else shown_RV.detach().clone()
    loss_R, gradient_RV = by_hand(given_RV, columns_R)
    gradient_RV.mul_(scale_R.unsqueeze(-1))
    if job.logit_transform is not None:
        (gradient_RV,) = torch.autograd.grad(shown_RV, leaf_RV, gradient_RV)
    return _checked(loss_R, len(scale_R)), gradient_RV


def _add_product(sum_VD: Tensor, gradient_CV: Tensor, hidden_CD: Tensor) -> None:
    """sum += gradient.T @ hidden. Products of another dtype are added a stretch of the vocabulary at a time."""
    if sum_VD.dtype == gradient_CV.dtype:
        sum_VD.addmm_(gradient_CV.t(), hidden_CD)
        return
    for start in range(0, len(sum_VD), _WEIGHT_ROWS):
        stop = start + _WEIGHT_ROWS
        sum_VD[start:stop] += gradient_CV[:, start:stop].t() @ hidden_CD


def _add_stats(job: _Job, logits_RV: Tensor, columns_R: Columns) -> None:
    if job.stats_fn is None:
        return
    with torch.no_grad():
        for name, value in job.stats_fn(logits_RV, columns_R).items():
            job.stats[name] = job.stats[name] + value if name in job.stats else value.clone()


def _checked(loss_R: Tensor, num_rows: int) -> Tensor:
    if loss_R.shape != (num_rows,):
        raise DataError(
            f"a loss function must return one value per target ({num_rows},), got {tuple(loss_R.shape)}: "
            "no reduction and no masking, the caller does both"
        )
    return loss_R
