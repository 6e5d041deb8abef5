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
