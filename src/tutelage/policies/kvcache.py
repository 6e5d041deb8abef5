"""How a model is asked for its next token: engines that keep the rows of a batch and what each has seen.

An engine prefills prompts, lets rows join and leave between steps, and gives the logits after one more token per row.
`PlainEngine` uses the model's own forward with transformers' dynamic cache and works for ragged rows of any attention
model, sliding windows and hybrids with linear attention included. `RecomputeEngine` keeps no cache and runs every
prefix again: slow, and right for any causal model. Faster engines are in `decode_attention`; all are checked against
a plain full forward by `check_engine` before they are used.

Dimension letters in this file:
  P  prompts    A  rows now in the batch    L  tokens of one row    V  vocabulary    H  key/value heads    D  head width
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tutelage.errors import SamplerError


class Engine(Protocol):
    """The rows of a batch, and the next-token logits of each."""

    name: str

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[Any]]:
        """((P, V) logits after each prompt, one opaque state per prompt). The batch is not touched."""

    def recompose(self, leaving: Sequence[int], joining: Sequence[Any]) -> list[int]:
        """Take rows out and put prefilled states in (one state may join many times).

        Returns:
            For every new row, the index of the old row it was, or -1 - j for `joining[j]`.
        """

    def step(self, tokens_A: Sequence[int]) -> Tensor:
        """(A, V) logits after appending one token to every row."""

    def reset(self) -> None:
        """Forget every row."""

    def refresh(self, *, force: bool = False) -> None:
        """Take the model's weights as they are now, where the engine keeps its own form of them.

        Args:
            force: also where no change can be seen.
        """


def recompose_order(num_rows: int, leaving: Sequence[int], num_joining: int) -> list[int]:
    """Survivors in their old order, then the rows that join."""
    gone = set(leaving)
    return [r for r in range(num_rows) if r not in gone] + [-1 - j for j in range(num_joining)]


def accepted_arguments(model: Any) -> frozenset[str]:
    """Names that the model's forward takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def last_logits(model: Any, arguments: frozenset[str], **inputs: Any) -> tuple[Tensor, Any]:
    """((B, V) logits of the last position, the cache). Only that position goes through the output layer if possible."""
    if "logits_to_keep" in arguments:
        inputs["logits_to_keep"] = 1
    known = {k: v for k, v in inputs.items() if k in arguments}
    out = model(**known, return_dict=True)
    return out.logits[:, -1, :], getattr(out, "past_key_values", None)


# ------------------------------------------------------------------------------------------------ recompute


class RecomputeEngine:
    """Runs every prefix again at every step. For models without a cache that rows can share."""

    name = "recompute"

    def __init__(self, model: Any) -> None:
        self._model = model
        self._arguments = accepted_arguments(model)
        self._rows: list[list[int]] = []

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[Any]]:
        return self._logits(prompts), [list(p) for p in prompts]

    def recompose(self, leaving: Sequence[int], joining: Sequence[Any]) -> list[int]:
        order = recompose_order(len(self._rows), leaving, len(joining))
        self.follow(order, joining)
        return order

    def follow(self, order: Sequence[int], joining: Sequence[Any]) -> None:
        """Take over the order that another engine's `recompose` returned."""
        self._rows = [list(self._rows[i]) if i >= 0 else list(joining[-1 - i]) for i in order]

    def step(self, tokens_A: Sequence[int]) -> Tensor:
        for row, token in zip(self._rows, tokens_A, strict=True):
            row.append(token)
        return self._logits(self._rows)

    def reset(self) -> None:
        self._rows = []

    def refresh(self, *, force: bool = False) -> None:
        """The model's own weights are used: nothing to take."""

    def _logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        by_length: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            by_length.setdefault(len(row), []).append(i)
        found: dict[int, Tensor] = {}
        for members in by_length.values():
            ids = torch.tensor([list(rows[i]) for i in members], device=self._model.device)
            logits, _ = last_logits(self._model, self._arguments, input_ids=ids, use_cache=False)
            found.update(zip(members, logits, strict=True))
        return torch.stack([found[i] for i in range(len(rows))])


# ------------------------------------------------------------------------------------------------ dynamic cache


@dataclass
class RowState:
    """What one prompt left in every layer of the cache, without padding."""

    length: int
    """Tokens of the prompt."""
    layers: list["LayerState"]


@dataclass
class LayerState:
    """One row of one cache layer. Keys and values are right-aligned; other states have no length."""

    keys: Tensor | None = None
    """(1, H, L', D) with L' the newest tokens that the layer keeps."""
    values: Tensor | None = None
    states: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """Recurrent and convolution states by name and index, each (1, ...)."""


_STATE_DICTS = ("conv_states", "recurrent_states")


def can_share_cache(model: Any) -> str | None:
    """Why rows of different lengths cannot share this model's dynamic cache; None where they can."""
    from transformers import cache_utils

    known = {
        cache_utils.DynamicLayer,
        cache_utils.DynamicSlidingWindowLayer,
        getattr(cache_utils, "LinearAttentionLayer", None),
        getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", None),
        getattr(cache_utils, "LinearAttentionAndSlidingWindowAttentionLayer", None),
        getattr(cache_utils, "DummyLayer", None),
    }
    config = model.config.get_text_config(decoder=True)
    if "past_key_values" not in accepted_arguments(model):
        return "its forward takes no past_key_values"
    if "attention_mask" not in accepted_arguments(model):
        return "its forward takes no attention_mask"
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()) or getattr(
        config, "attention_chunk_size", None
    ):
        return "chunked attention counts positions from the start of the batch"
    try:
        layers = cache_utils.DynamicCache(config=model.config).layers
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"transformers has no dynamic cache for it ({error})"
    strange = sorted({type(layer).__name__ for layer in layers if type(layer) not in known})
    return f"its cache has layers of an unknown kind: {', '.join(strange)}" if strange else None


class PlainEngine:
    """The model's own forward over transformers' dynamic cache, rows aligned at their newest token.

    Rows are padded on the left: the mask hides the padding and position ids are given explicitly, so models with
    absolute positions see every row as if it were alone. Columns that are padding in every row are cut when rows leave.
    """

    name = "plain"

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        self._model = model
        self._arguments = accepted_arguments(model)
        self._new_cache = lambda: DynamicCache(config=model.config)
        self._pads_prompts = not any(hasattr(layer, "conv_states") for layer in self._new_cache().layers)
        self._template: Any = None
        self._cache: Any = None
        self._lengths: list[int] = []

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[Any]]:
        groups: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):  # padding would enter a recurrent state: equal lengths only
            groups.setdefault(0 if self._pads_prompts else len(prompt), []).append(i)
        logits: dict[int, Tensor] = {}
        states: dict[int, RowState] = {}
        for members in groups.values():
            rows = [list(prompts[i]) for i in members]
            logits_PV, cache = self._forward(rows, [0] * len(rows), self._new_cache())
            self._template = cache
            for r, i in enumerate(members):
                logits[i] = logits_PV[r]
                states[i] = RowState(len(rows[r]), [_take_row(layer, r, len(rows[r])) for layer in cache.layers])
        return torch.stack([logits[i] for i in range(len(prompts))]), [states[i] for i in range(len(prompts))]

    def recompose(self, leaving: Sequence[int], joining: Sequence[Any]) -> list[int]:
        order = recompose_order(len(self._lengths), leaving, len(joining))
        if order == list(range(len(self._lengths))):
            return order
        kept = [i for i in order if i >= 0]
        self._lengths = [self._lengths[i] if i >= 0 else joining[-1 - i].length for i in order]
        if not order:
            self._cache = None
            return order
        source = self._cache if self._cache is not None else self._template
        new = copy.copy(source)
        new.layers = [
            _merge_layer(layer, kept, [s.layers[index] for s in joining], max(self._lengths))
            for index, layer in enumerate(source.layers)
        ]
        self._cache = new
        return order

    def step(self, tokens_A: Sequence[int]) -> Tensor:
        logits_AV, self._cache = self._forward([[t] for t in tokens_A], self._lengths, self._cache)
        self._lengths = [n + 1 for n in self._lengths]
        return logits_AV

    def reset(self) -> None:
        self._cache = self._template = None
        self._lengths = []

    def refresh(self, *, force: bool = False) -> None:
        """The model's own weights are used: nothing to take."""

    def _forward(self, new_tokens: list[list[int]], seen: Sequence[int], cache: Any) -> tuple[Tensor, Any]:
        """Logits after appending `new_tokens[r]` to row r, of which `seen[r]` tokens are in the cache."""
        device = self._model.device
        width = max(len(t) for t in new_tokens)
        total = max(seen) + width
        ids, mask, positions = [], [], []
        for tokens, before in zip(new_tokens, seen, strict=True):
            padding = width - len(tokens)
            ids.append([0] * padding + tokens)
            positions.append([0] * padding + list(range(before, before + len(tokens))))
            real = before + len(tokens)
            mask.append([0] * (total - real) + [1] * real)
        logits, cache = last_logits(
            self._model,
            self._arguments,
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            position_ids=torch.tensor(positions, device=device),
            past_key_values=cache,
            use_cache=True,
        )
        if cache is None:
            raise SamplerError(f"{type(self._model).__name__} returned no cache although it was given one")
        return logits, cache


def _take_row(layer: Any, row: int, length: int) -> LayerState:
    """Row `row` of a prefilled layer, without its padding."""
    keys: Tensor | None = getattr(layer, "keys", None)
    values: Tensor | None = getattr(layer, "values", None)
    found = LayerState()
    if keys is not None and values is not None and keys.ndim == 4:
        real = min(length, keys.shape[2])
        found.keys = keys[row : row + 1, :, keys.shape[2] - real :].clone()
        found.values = values[row : row + 1, :, values.shape[2] - real :].clone()
    for name in _STATE_DICTS:
        for index, state in getattr(layer, name, {}).items():
            if state is not None:
                found.states[name, index] = state[row : row + 1].clone()
    return found


def _fit(state: Tensor, width: int) -> Tensor:
    """The newest `width` columns, padded on the left with zeros where there are fewer."""
    have = state.shape[2]
    if have >= width:
        return state[:, :, have - width :]
    return torch.nn.functional.pad(state, (0, 0, width - have, 0))


def _merge_layer(layer: Any, kept: Sequence[int], joining: Sequence[LayerState], total: int) -> Any:
    """A layer that holds the kept rows and then those that join, aligned at their newest token."""
    new = copy.copy(layer)
    rows = torch.tensor(list(kept), dtype=torch.long)

    def merged(old: Tensor | None, fresh: Sequence[Tensor]) -> Tensor:
        parts = [old.index_select(0, rows.to(old.device))] if old is not None and len(kept) else []
        return torch.cat([*parts, *fresh])

    if getattr(layer, "keys", None) is not None and layer.keys.ndim == 4:
        window = getattr(layer, "sliding_window", None)
        width = total if window is None else min(total, window - 1)
        for name in ("keys", "values"):
            old = getattr(layer, name)
            old = _fit(old, width) if len(kept) else None
            setattr(new, name, merged(old, [_fit(getattr(s, name), width) for s in joining]))
        if window is not None:
            new.cumulative_length = total
    for name in _STATE_DICTS:
        states: Mapping[int, Tensor | None] = getattr(layer, name, {})
        if states:
            fresh = {
                i: None if state is None else merged(state, [s.states[name, i] for s in joining])
                for i, state in states.items()
            }
            setattr(new, name, fresh)
    return new


# ------------------------------------------------------------------------------------------------ the check


def check_engine(engine: Engine, model: Any, *, tolerance: float) -> float:
    """How far an engine's logits are from a plain full forward, on ragged rows that join and leave.

    error = max over steps and rows of rms(engine - plain) / rms(plain - mean(plain))

    Args:
        engine: left empty afterwards.
        model: the plain reference, in evaluation mode.
        tolerance: the largest error that passes.

    Raises:
        SamplerError: the error is larger, or not a number.
    """
    reference = RecomputeEngine(model)
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or 4096
    window = getattr(config, "sliding_window", None) or 0
    long = max(4, min(limit - 6, window + 3 if window and window <= 64 else 21))
    # Token ids spread over the vocabulary without looking like any language.
    prompts = [[(37 * i + 11 * n) % config.vocab_size for i in range(n)] for n in (long, 1, max(2, long // 2))]
    worst = 0.0

    def compare(got: Tensor, expected: Tensor) -> None:
        nonlocal worst
        difference = (got.float() - expected.float()).pow(2).mean(-1).sqrt()
        centred = expected.float() - expected.float().mean(-1, keepdim=True)
        error = float((difference / centred.pow(2).mean(-1).sqrt().clamp_min(1e-12)).max())
        worst = max(worst, error if error == error else float("inf"))

    with torch.inference_mode():
        got, states = engine.prefill(prompts)
        expected, others = reference.prefill(prompts)
        compare(got, expected)
        for turn, (leaving, joining) in enumerate([([], [0, 1, 1]), ([], []), ([0], [2]), ([1], [0]), ([], [])]):
            order = engine.recompose(leaving, [states[j] for j in joining])
            reference.follow(order, [others[j] for j in joining])
            tokens = [(17 * r + 5 * turn) % config.vocab_size for r in range(len(order))]
            compare(engine.step(tokens), reference.step(tokens))
    engine.reset()
    if not worst <= tolerance:
        raise SamplerError(
            f"the {engine.name} engine differs from a plain forward of {type(model).__name__} by {worst:.2g} "
            f"(rms, relative), more than {tolerance:.2g}"
        )
    return worst


# ------------------------------------------------------------------------------------------------ preallocated rows


_WIDTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024)


def _width_for(tokens: int) -> int:
    """Columns of the narrowest pool that holds so many tokens."""
    for width in _WIDTHS:
        if tokens <= width:
            return width
    return -(-tokens // 512) * 512


class RowPool:
    """Keys and values of rows that fit in the same number of columns, contiguous for each layer."""

    def __init__(self, columns: int, num_layers: int, num_heads: int, width: int, dtype: Any, device: Any) -> None:
        self.columns = columns
        self.lengths: list[int] = []
        self._shape = (num_layers, num_heads, columns, width)
        self._data = torch.empty((2, num_layers, 0, num_heads, columns, width), dtype=dtype, device=device)

    def add(self, length: int, states: Tensor) -> None:
        """A new last row from (2, layers, heads, length, width)."""
        row = len(self.lengths)
        if row == self._data.shape[2]:
            shape = list(self._data.shape)
            shape[2] = max(8, 2 * row)
            bigger = self._data.new_zeros(shape)  # what the mask hides must be finite: 0 * nan is nan
            bigger[:, :, :row] = self._data
            self._data = bigger
        self._data[:, :, row, :, :length] = states
        self.lengths.append(length)

    def row(self, row: int) -> Tensor:
        """(2, layers, heads, length, width), a view."""
        return self._data[:, :, row, :, : self.lengths[row]]

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Take rows out; the last ones fill the holes. Returns, for every row now, which it was."""
        order = list(range(len(self.lengths)))
        for row in sorted(rows, reverse=True):
            last = len(order) - 1
            if row != last:
                self._data[:, :, row, :, : self.lengths[last]] = self._data[:, :, last, :, : self.lengths[last]]
                order[row], self.lengths[row] = order[last], self.lengths[last]
            order.pop()
            self.lengths.pop()
        return order

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(rows, heads, columns, width) keys and values of one layer: contiguous views."""
        rows = len(self.lengths)
        return self._data[0, index, :rows], self._data[1, index, :rows]


class PoolStep:
    """One decoding step of one pool: where its rows are in the batch, what each sees, where the new token goes."""

    def __init__(self, pool: RowPool, start: int, device: Any, dtype: torch.dtype) -> None:
        self.start = start
        self.stop = start + len(pool.lengths)
        self._pool = pool
        lengths_R = torch.tensor(pool.lengths, device=device)
        hidden_RC = torch.arange(pool.columns, device=device)[None] > lengths_R[:, None]
        self.mask = torch.zeros(hidden_RC.shape, dtype=dtype, device=device).masked_fill_(hidden_RC, float("-inf"))
        self.mask = self.mask[:, None, None]
        heads = pool.layer(0)[0].shape[1]
        rows = torch.arange(len(pool.lengths) * heads, device=device) * pool.columns
        self._places = rows + lengths_R.repeat_interleave(heads)

    def append(self, layer: int, keys_RND: Tensor, values_RND: Tensor) -> tuple[Tensor, Tensor]:
        """Write the newest token's keys and values; the layer's whole (R, N, C, D) keys and values."""
        keys, values = self._pool.layer(layer)
        width = keys.shape[-1]
        keys.view(-1, width).index_copy_(0, self._places, keys_RND.reshape(-1, width))
        values.view(-1, width).index_copy_(0, self._places, values_RND.reshape(-1, width))
        return keys, values


class RowPools:
    """Rows of a batch by how many columns they need, so that short rows do not pay for long ones.

    Rows are ordered by pool, narrowest first. A row that has filled its pool moves to the next when the batch is
    recomposed, which must happen before every step.
    """

    def __init__(self, num_layers: int, num_heads: int, width: int, dtype: Any, device: Any) -> None:
        self._new = lambda columns: RowPool(columns, num_layers, num_heads, width, dtype, device)
        self._dtype, self._device = dtype, device
        self._pools: dict[int, RowPool] = {}

    def lengths(self) -> list[int]:
        """Tokens of every row, in batch order."""
        return [n for columns in sorted(self._pools) for n in self._pools[columns].lengths]

    def recompose(self, leaving: Sequence[int], joining: Sequence[tuple[int, Tensor]]) -> list[int]:
        """As `Engine.recompose`; a joining row is its length and its (2, layers, heads, length, width) states."""
        gone = set(leaving)
        names: dict[int, list[int]] = {}
        moving: list[tuple[int, int, Tensor]] = []
        start = 0
        for columns in sorted(self._pools):
            pool = self._pools[columns]
            count = len(pool.lengths)
            full = [r for r in range(count) if start + r not in gone and pool.lengths[r] >= columns]
            moving += [(start + r, pool.lengths[r], pool.row(r).clone()) for r in full]
            dropped = [r for r in range(count) if start + r in gone] + full
            names[columns] = [start + r for r in pool.drop(dropped)]
            start += count
        moving += [(-1 - j, length, states) for j, (length, states) in enumerate(joining)]
        for name, length, states in moving:
            columns = _width_for(length + 1)
            if columns not in self._pools:
                self._pools[columns] = self._new(columns)
            self._pools[columns].add(length, states)
            names.setdefault(columns, []).append(name)
        return [name for columns in sorted(self._pools) for name in names.get(columns, [])]

    def open_step(self) -> list[PoolStep]:
        """The pools that have rows, ready for one token more in each."""
        steps, start = [], 0
        for columns in sorted(self._pools):
            pool = self._pools[columns]
            if pool.lengths:
                steps.append(PoolStep(pool, start, self._device, self._dtype))
                start += len(pool.lengths)
        return steps

    def close_step(self) -> None:
        """Every row is one token longer."""
        for pool in self._pools.values():
            pool.lengths = [n + 1 for n in pool.lengths]

    def reset(self) -> None:
        self._pools = {}
