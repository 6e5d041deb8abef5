"""Target rows to the tensors a model takes. The shift from "token i" to "predicted from position i - 1" is here only.

Dimension letters in this file:
  B  sequences      T  positions of a sequence      N, C  selected targets, flattened over B and T

Token frame: what a trajectory stores; entry i describes token i.
Target frame: what the model is asked; position t predicts token t + 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tutelage.errors import DataError
from tutelage.types import TargetRow

Layout = Literal["packed", "padded"]
Side = Literal["right", "left"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One microbatch: tokens to run the model over, and what to learn at which positions."""

    token_ids_BT: Tensor
    """(B, T) int64. Packed: B is 1 and the documents follow each other without padding."""
    position_ids_BT: Tensor
    """(B, T) int64, index of each token within its own document."""
    attention_mask_BT: Tensor | None
    """(B, T) int64, 1 at tokens and 0 at padding. None when packed: there is no padding, and documents are told
    apart by `position_ids_BT` and `cu_seqlens`."""
    cu_seqlens: Tensor | None
    """(documents + 1,) int32, where each document starts in the packed row, and the end. None when padded."""
    max_seqlen: int
    """Tokens of the longest document."""
    target_positions_N: Tensor
    """(N,) int64, index into the flattened (B*T) positions that each target is predicted FROM."""
    columns: dict[str, Tensor]
    """(N, ...) each, in the order of `target_positions_N`: `target_ids_C`, `weight_C`, the rows' other columns,
    `row_index_C` (which of the given rows) and `target_index_C` (which of that row's targets)."""
    rows: tuple[int, ...]
    """Index of the given row behind each document, in document order."""
    num_tokens: int
    """Tokens run through the model, padding not counted."""

    @property
    def num_targets(self) -> int:
        return self.target_positions_N.numel()

    @property
    def row_index_C(self) -> Tensor:
        """(N,) int64, which of the given rows each target belongs to."""
        return self.columns["row_index_C"]

    @property
    def target_index_C(self) -> Tensor:
        """(N,) int64, which of its row's targets each target is."""
        return self.columns["target_index_C"]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The same batch with every tensor on `device`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            token_ids_BT=move(self.token_ids_BT),
            position_ids_BT=move(self.position_ids_BT),
            attention_mask_BT=None if self.attention_mask_BT is None else move(self.attention_mask_BT),
            cu_seqlens=None if self.cu_seqlens is None else move(self.cu_seqlens),
            target_positions_N=move(self.target_positions_N),
            columns={name: move(column) for name, column in self.columns.items()},
        )

    def with_columns(self, columns: Mapping[str, Tensor]) -> "Batch":
        """The same batch with further columns over its targets (what `Signal.annotate` returns).

        Raises:
            DataError: a column does not have one entry per target.
        """
        for name, column in columns.items():
            if column.shape[:1] != (self.num_targets,):
                raise DataError(
                    f"column {name} needs one entry for each of the batch's {self.num_targets} targets, "
                    f"got shape {tuple(column.shape)}"
                )
        return replace(self, columns={**self.columns, **columns})


@dataclass(frozen=True, slots=True)
class _Document:
    """One row cut to what its selected targets need."""

    row: int
    token_ids: np.ndarray
    """(T,) the tokens before the last selected target: nothing after them can change a causal prediction."""
    target_tokens: np.ndarray
    """(N,) token frame index of each selected target."""
    target_ids: np.ndarray
    selected: np.ndarray
    """(N,) index of each selected target among the row's targets."""
    num_targets: int
    """The row's targets, selected or not."""


def input_length(row: TargetRow) -> int:
    """Tokens of a row that go through the model: those before its last target of non-zero weight; 0 if none."""
    return len(_document(0, row).token_ids)


def collate(
    rows: Sequence[TargetRow],
    *,
    layout: Layout = "packed",
    side: Side = "right",
    pad_id: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Make one microbatch of target rows; every method's training passes through here.

    Only targets of non-zero weight are selected, and a row whose weights are all 0 is left out. A document is the
    tokens of its trajectory up to, not including, the last selected target: T = L - 1 where that is the last token.
    Without any selected target (or any row) the batch is one padding token and no targets, so that a process with
    nothing to do can still take part in a step.

    Args:
        rows: trajectories with their columns, as a signal prepared them.
        layout: "packed" concatenates all documents into one row; "padded" gives each its own row.
        side: where padding goes when padded.
        pad_id: token at padding positions; its embedding is computed and ignored.
        dtype: of every column of floats.

    Shapes:
        packed: token_ids_BT (1, sum of lengths). padded: (documents, longest length).
        columns: (N, ...); floats become `dtype`, integers int64, booleans stay.

    Raises:
        DataError: a column does not have one entry per target of its trajectory; rows differ in their columns or in
            a column's further axes; a weight is not finite; `weight_C` is missing; a column is not numeric.

    >>> from tutelage.types import Span, TargetRow, Trajectory
    >>> spans = (Span(token_ids=(7,), role="user", author="user"),
    ...          Span(token_ids=(8, 9), role="assistant", author="human", is_sampled=True, is_trainable=True))
    >>> t = Trajectory(id="a", task_id="q", task_hash="", spans=spans)
    >>> batch = collate([TargetRow(trajectory=t, columns={"weight_C": [1.0, 1.0]}, count=2.0)])
    >>> batch.token_ids_BT.tolist(), batch.target_positions_N.tolist(), batch.columns["target_ids_C"].tolist()
    ([[7, 8]], [0, 1], [8, 9])
    """
    documents = [d for d in (_document(i, row) for i, row in enumerate(rows)) if len(d.selected)]
    if layout == "packed":
        tokens, positions, mask, cu_seqlens, starts = _packed(documents, pad_id)
    elif layout == "padded":
        tokens, positions, mask, cu_seqlens, starts = _padded(documents, pad_id, side)
    else:
        raise DataError(f'collate needs layout "packed" or "padded", got {layout!r}')
    flat = [start + d.target_tokens - 1 for start, d in zip(starts, documents, strict=True)]
    return Batch(
        token_ids_BT=torch.from_numpy(tokens),
        position_ids_BT=torch.from_numpy(positions),
        attention_mask_BT=None if mask is None else torch.from_numpy(mask),
        cu_seqlens=None if cu_seqlens is None else torch.from_numpy(cu_seqlens),
        max_seqlen=max((len(d.token_ids) for d in documents), default=1),
        target_positions_N=torch.from_numpy(_joined(flat)),
        columns=_columns(rows, documents, dtype),
        rows=tuple(d.row for d in documents),
        num_tokens=sum(len(d.token_ids) for d in documents),
    )


def _document(index: int, row: TargetRow) -> _Document:
    trajectory = row.trajectory
    if "weight_C" not in row.columns:
        raise DataError(f"row {index} ({trajectory.id}) has no column weight_C; it has {sorted(row.columns)}")
    targets = np.flatnonzero(np.asarray(trajectory.is_target, dtype=bool))
    weights = np.asarray(_as_tensor("weight_C", row.columns["weight_C"], index, trajectory.id).to(torch.float64))
    _check_length("weight_C", len(weights), len(targets), index, trajectory.id)
    if not np.isfinite(weights).all():
        bad = int(np.flatnonzero(~np.isfinite(weights))[0])
        raise DataError(
            f"row {index} ({trajectory.id}): weight_C[{bad}] is {weights[bad]}; weights must be finite, "
            "and 0 is what leaves a target out"
        )
    selected = np.flatnonzero(weights)
    if not len(selected):
        nothing = np.zeros(0, dtype=np.int64)
        return _Document(index, nothing, nothing, nothing, nothing, len(targets))
    ids = np.asarray(trajectory.token_ids, dtype=np.int64)
    targets_N = targets[selected]
    return _Document(index, ids[: targets_N[-1]], targets_N, ids[targets_N], selected, len(targets))


def _packed(
    documents: Sequence[_Document], pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray]:
    """Token ids, position ids, no mask, cu_seqlens, and where each document starts."""
    if not documents:
        one = np.array([0, 1], dtype=np.int32)
        return np.full((1, 1), pad_id, np.int64), np.zeros((1, 1), np.int64), None, one, np.zeros(0, np.int64)
    ends = np.cumsum([len(d.token_ids) for d in documents])
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    tokens = np.concatenate([d.token_ids for d in documents])[None]
    positions = np.concatenate([np.arange(len(d.token_ids), dtype=np.int64) for d in documents])[None]
    return tokens, positions, None, np.concatenate([[0], ends]).astype(np.int32), starts


def _padded(
    documents: Sequence[_Document], pad_id: int, side: Side
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray]:
    """Token ids, position ids, mask, no cu_seqlens, and where each document's first token is in the flat batch."""
    if side not in ("left", "right"):
        raise DataError(f'collate needs side "left" or "right", got {side!r}')
    num_rows, longest = max(1, len(documents)), max((len(d.token_ids) for d in documents), default=1)
    tokens = np.full((num_rows, longest), pad_id, dtype=np.int64)
    mask = np.zeros((num_rows, longest), dtype=np.int64)
    positions = np.zeros((num_rows, longest), dtype=np.int64)
    starts = np.zeros(len(documents), dtype=np.int64)
    for b, d in enumerate(documents):
        length = len(d.token_ids)
        first = longest - length if side == "left" else 0
        tokens[b, first : first + length] = d.token_ids
        mask[b, first : first + length] = 1
        # Right padding goes on counting, so that no row looks as if a second document began in it.
        positions[b, first:] = np.arange(longest - first)
        starts[b] = b * longest + first
    if not documents:
        mask[:] = 1  # a row that attends to nothing is nan in some kernels
    return tokens, positions, mask, None, starts


def _columns(rows: Sequence[TargetRow], documents: Sequence[_Document], dtype: torch.dtype) -> dict[str, Tensor]:
    names = tuple(rows[0].columns) if rows else ("weight_C",)
    for i, row in enumerate(rows):
        if set(row.columns) != set(names):
            raise DataError(
                f"every row of a batch needs the same columns: row 0 ({rows[0].trajectory.id}) has {sorted(names)}, "
                f"row {i} ({row.trajectory.id}) has {sorted(row.columns)}"
            )
    columns = {"target_ids_C": torch.from_numpy(_joined([d.target_ids for d in documents]))}
    for name in names:
        if name in ("target_ids_C", "row_index_C", "target_index_C"):
            raise DataError(f"column name {name} is made by collate; the rows must not bring their own")
        columns[name] = _column(name, rows, documents, dtype)
    columns["row_index_C"] = torch.from_numpy(
        _joined([np.full(len(d.selected), d.row, dtype=np.int64) for d in documents])
    )
    columns["target_index_C"] = torch.from_numpy(_joined([d.selected for d in documents]))
    return columns


def _column(name: str, rows: Sequence[TargetRow], documents: Sequence[_Document], dtype: torch.dtype) -> Tensor:
    parts = []
    for d in documents:
        row = rows[d.row]
        column = _as_tensor(name, row.columns[name], d.row, row.trajectory.id)
        _check_length(name, len(column), d.num_targets, d.row, row.trajectory.id)
        parts.append(_cast(column[torch.from_numpy(d.selected)], dtype))
        if parts[-1].shape[1:] != parts[0].shape[1:] or parts[-1].dtype != parts[0].dtype:
            raise DataError(
                f"column {name} must have one shape and kind in every row of a batch: row {documents[0].row} has "
                f"{tuple(parts[0].shape[1:])} {parts[0].dtype}, row {d.row} ({row.trajectory.id}) has "
                f"{tuple(parts[-1].shape[1:])} {parts[-1].dtype}"
            )
    if parts:
        return torch.cat(parts)
    if rows:
        return _cast(_as_tensor(name, rows[0].columns[name], 0, rows[0].trajectory.id)[:0], dtype)
    return torch.zeros(0, dtype=dtype)


def _as_tensor(name: str, values: Any, index: int, id: str) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach()
    try:
        array = np.asarray(values)
        array = array if array.flags.writeable else array.copy()  # a memory-mapped column; torch warns of those
        return torch.from_numpy(np.zeros(0) if array.dtype == object and array.size == 0 else array)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"row {index} ({id}): column {name} must be an array of numbers, got {type(values).__name__}: {error}"
        ) from error


def _cast(column: Tensor, dtype: torch.dtype) -> Tensor:
    if column.is_floating_point():
        return column.to(dtype)
    return column if column.dtype == torch.bool else column.to(torch.int64)


def _check_length(name: str, length: int, num_targets: int, index: int, id: str) -> None:
    if length != num_targets:
        raise DataError(
            f"row {index} ({id}): column {name} needs one entry per target of its trajectory ({num_targets}), "
            f"got {length}. Targets are the trainable tokens, without the first token."
        )


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64)
