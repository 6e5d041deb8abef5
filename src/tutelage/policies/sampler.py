"""Sampling in this process, from any transformers causal model: exact, repeatable, and with its log-probabilities.

`InProcessSampler` computes each prompt once for its n samples, decodes up to `max_batch` rows together, lets finished
rows leave and waiting ones join, and draws every token from a stream of its own (`drawing.uniform`), so an answer
depends on the weights, the requests, the parameters and `max_batch`, and on nothing else: never on time or global
random state. The model's own `generation_config` is not read.

Dimension letters in this file:
  A  rows now in the batch    V  vocabulary entries    P  prompts
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tutelage.errors import ConfigError, SamplerError
from tutelage.policies.drawing import draw_tokens, uniform
from tutelage.policies.fused_decode import FusedEngine, fused_refusal
from tutelage.policies.kvcache import (
    Engine,
    PlainEngine,
    RecomputeEngine,
    can_share_cache,
    check_engine,
)
from tutelage.types import Completion, Progress, SampleRequest, SamplingParams, seed_for


@dataclass
class _Sequence:
    """One completion being written."""

    request: int
    sample: int
    prompt: tuple[int, ...]
    seed: int
    limit: int
    """Longest completion: max_new_tokens, or less where the model's positions end."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    finish: str = ""


class InProcessSampler:
    """Continues prompts with a transformers causal model in this process. Implements `types.Sampler`.

    The model is used as it is (its dtype, its device, its adapters), in evaluation mode and without gradients; training
    mode is put back afterwards. On the first use the engine is checked against a plain full forward; one that differs
    is replaced by a slower one and the reason is kept in `engine_notes`. The fast engine keeps a second copy of the
    weights, laid out for decoding.

    Args:
        model: a transformers causal model, or a peft model around one.
        stop_ids: tokens that end a turn. The stop token belongs to the completion, with its log-probability.
        decode: token ids -> text, for `Completion.text` and stop strings; special tokens it skips stay out of both.
        author: goes into the spans.
        version: which weights answer; set it whenever they change.
        max_batch: rows decoded together. More is faster until memory runs out; in bf16 it changes rounding, so it
            is part of what fixes a draw.
        engine: "auto" takes the fastest that agrees with the plain forward; or the name of one.
        prefill_tokens: prompts are run together up to this many padded tokens.

    Raises:
        ConfigError: `max_batch` or `engine` make no sense.
    """

    def __init__(
        self,
        model: Any,
        *,
        stop_ids: Sequence[int],
        decode: Callable[[Sequence[int]], str],
        author: str = "student",
        version: str = "base",
        max_batch: int = 64,
        engine: str = "auto",
        prefill_tokens: int = 2048,
    ) -> None:
        problems = []
        if max_batch < 1:
            problems.append(f"max_batch must be at least 1, got {max_batch}")
        if engine not in ("auto", *_ENGINES):
            problems.append(f"engine must be one of {', '.join(('auto', *_ENGINES))}; got {engine!r}")
        if prefill_tokens < 1:
            problems.append(f"prefill_tokens must be at least 1, got {prefill_tokens}")
        if problems:
            raise ConfigError(problems)
        self.author = author
        self.version = version
        self.engine_notes: list[str] = []
        """Why faster engines were not used, one line each."""
        self._model = _inner_model(model)
        self._stop_ids = frozenset(int(i) for i in stop_ids)
        self._decode = decode
        self._max_batch = max_batch
        self._engine_choice = engine
        self._prefill_tokens = prefill_tokens
        self._engine: Engine | None = None
        self._is_stale = False

    def refresh(self) -> None:
        """Take the weights anew at the next draw, whether or not a change can be seen from here.

        Changes by an optimiser, `load_state_dict` or `parameter.data` are seen without it; writes from another process
        to shared memory may not be.
        """
        self._is_stale = True

    @property
    def engine_name(self) -> str | None:
        """Which engine answers; None before the first use."""
        return self._engine.name if self._engine is not None else None

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, progress: Progress | None = None
    ) -> list[list[Completion]]:
        """`n` completions for each request, in order. Equal requests, weights and `max_batch` give equal answers.

        A completion ends with finish "stop" (a stop token was drawn), "stop_string" (its text contains one of
        `params.stop`; tokens and text are kept up to and including the token that completed it) or "length"
        (`max_new_tokens`, or the model's last position).

        Raises:
            ConfigError: temperature, top-p or max_new_tokens are out of range.
            SamplerError: a prompt is empty, too long for the model, or has ids outside its vocabulary.
            NumericsError: the model's logits are not finite.
        """
        _check_params(params)
        sequences = self._sequences(requests, params)
        with _evaluation(self._model), torch.inference_mode():
            engine = self._ready_engine()
            try:
                run = _Run(engine, sequences, params, self._stop_ids, self._decode)
                run.all(progress, max_batch=self._max_batch, prefill_tokens=self._prefill_tokens)
            finally:
                engine.reset()
        answers: list[list[Completion]] = [[] for _ in requests]
        for s in sequences:
            answers[s.request].append(self._completion(s))
        return answers

    def _completion(self, s: _Sequence) -> Completion:
        text_ids = s.tokens[:-1] if s.finish == "stop" else s.tokens
        return Completion(
            token_ids=tuple(s.tokens),
            logprobs=tuple(s.logprobs),
            entropies=tuple(s.entropies),
            finish=s.finish,
            text=self._decode(text_ids) if text_ids else "",
        )

    def _sequences(self, requests: Sequence[SampleRequest], params: SamplingParams) -> list[_Sequence]:
        config = self._model.config.get_text_config(decoder=True)
        positions = getattr(config, "max_position_embeddings", None) or -1
        found = []
        for r, request in enumerate(requests):
            ids = tuple(int(i) for i in request.prompt_ids)
            where = f"request {r} of {len(requests)}"
            if not ids:
                raise SamplerError(f"a prompt needs at least one token, got none ({where}): render it with a template")
            if not 0 <= min(ids) <= max(ids) < config.vocab_size:
                raise SamplerError(
                    f"prompt ids must be below the model's vocabulary of {config.vocab_size}, got {min(ids)} to "
                    f"{max(ids)} ({where}): the tokenizer belongs to another model"
                )
            room = params.max_new_tokens if positions < 0 else min(params.max_new_tokens, positions - len(ids))
            if room < 1:
                raise SamplerError(
                    f"a prompt must be shorter than the model's {positions} positions, got {len(ids)} tokens "
                    f"({where}): drop or shorten it"
                )
            found += [
                _Sequence(request=r, sample=j, prompt=ids, seed=seed_for(request.seed, j), limit=room)
                for j in range(request.n)
            ]
        return found

    def _ready_engine(self) -> Engine:
        if self._engine is None:
            self._engine = self._choose_engine()
        else:
            self._engine.refresh(force=self._is_stale)
        self._is_stale = False
        return self._engine

    def _choose_engine(self) -> Engine:
        names = list(_ENGINES) if self._engine_choice == "auto" else [self._engine_choice]
        exact = next(self._model.parameters()).dtype in (torch.float32, torch.float64)
        tolerance = 1e-3 if exact else 0.25
        for name in names:
            reason = _ENGINES[name].refusal(self._model)
            if reason is None:
                engine = _ENGINES[name].build(self._model)
                if isinstance(engine, RecomputeEngine):
                    return engine
                try:
                    check_engine(engine, self._model, tolerance=tolerance)
                    return engine
                except SamplerError as error:
                    reason = str(error)
            self.engine_notes.append(f"{name}: {reason}")
        raise SamplerError(
            f"engine {self._engine_choice!r} cannot be used for {type(self._model).__name__}: "
            f'{"; ".join(self.engine_notes)}. Use engine="auto"'
        )


class _EngineKind(NamedTuple):
    refusal: Callable[[Any], str | None]
    """Why it does not fit a model; None where it does."""
    build: Callable[[Any], Engine]


_ENGINES = {
    "fused": _EngineKind(fused_refusal, FusedEngine),
    "plain": _EngineKind(can_share_cache, PlainEngine),
    "recompute": _EngineKind(lambda model: None, RecomputeEngine),
}
"""Fastest first."""


def _inner_model(model: Any) -> Any:
    """The transformers model inside a peft wrapper, whose layers carry the adapters; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_params(params: SamplingParams) -> None:
    problems = []
    if params.temperature < 0:
        problems.append(f"temperature must be 0 (greedy) or positive, got {params.temperature}")
    if not 0 < params.top_p <= 1:
        problems.append(f"top_p must be above 0 and at most 1, got {params.top_p}")
    if params.max_new_tokens < 1:
        problems.append(f"max_new_tokens must be at least 1, got {params.max_new_tokens}")
    if any(not s for s in params.stop):
        problems.append("a stop string must not be empty")
    if problems:
        raise ConfigError(problems)


@contextmanager
def _evaluation(model: Any) -> Iterator[None]:
    """Evaluation mode inside, each module's own mode put back after."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Run:
    """One call of `sample`: which rows are in the batch, and what they have written."""

    def __init__(
        self,
        engine: Engine,
        sequences: Sequence[_Sequence],
        params: SamplingParams,
        stop_ids: frozenset[int],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self._engine = engine
        self._params = params
        self._stop_ids = stop_ids
        self._decode = decode
        self._waiting = deque(sequences)
        self._total = len(sequences)
        self._active: list[_Sequence] = []
        self._uses = Counter(s.prompt for s in sequences)
        self._prefilled: dict[tuple[int, ...], tuple[Tensor, Any]] = {}

    def all(self, progress: Progress | None, *, max_batch: int, prefill_tokens: int) -> None:
        if progress is not None:
            progress.start("sampling", self._total, "completions")
        while self._waiting or self._active:
            leaving: list[int] = []
            if self._active:
                logits_AV = self._engine.step([s.tokens[-1] for s in self._active])
                self._draw(self._active, logits_AV)
                leaving = [i for i, s in enumerate(self._active) if s.finish]
            joining, ended_at_once = self._admit(max_batch - len(self._active) + len(leaving), prefill_tokens)
            order = self._engine.recompose(leaving, [self._prefilled[s.prompt][1] for s in joining])
            self._active = [self._active[i] if i >= 0 else joining[-1 - i] for i in order]
            self._release(joining)
            if progress is not None and (leaving or ended_at_once):
                progress.advance(len(leaving) + ended_at_once)
        if progress is not None:
            progress.finish()

    def _admit(self, room: int, prefill_tokens: int) -> tuple[list[_Sequence], int]:
        """Waiting sequences, by index, with their first token drawn; and how many of them ended with it."""
        joining: list[_Sequence] = []
        ended = 0
        while room > len(joining) and self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(room - len(joining), len(self._waiting)))]
            self._prefill(batch, prefill_tokens)
            self._draw(batch, torch.stack([self._prefilled[s.prompt][0] for s in batch]))
            finished = [s for s in batch if s.finish]
            joining += [s for s in batch if not s.finish]
            ended += len(finished)
            self._release(finished)
        return joining, ended

    def _prefill(self, batch: Sequence[_Sequence], most_tokens: int) -> None:
        """Compute the prompts that the batch needs, and with them the next few waiting ones while there is room."""
        while True:
            missing = [p for p in dict.fromkeys(s.prompt for s in batch) if p not in self._prefilled]
            if not missing:
                return
            ahead = (s.prompt for s in islice(self._waiting, 64) if s.prompt not in self._prefilled)
            chosen: list[tuple[int, ...]] = []
            for prompt in dict.fromkeys([*missing, *ahead]):
                if chosen and max(map(len, [*chosen, prompt])) * (len(chosen) + 1) > most_tokens:
                    break
                chosen.append(prompt)
            logits_PV, states = self._engine.prefill(chosen)
            for prompt, logits_V, state in zip(chosen, logits_PV, states, strict=True):
                self._prefilled[prompt] = (logits_V, state)

    def _release(self, used: Sequence[_Sequence]) -> None:
        """Drop prompts whose every sample has started."""
        for s in used:
            self._uses[s.prompt] -= 1
            if not self._uses[s.prompt]:
                del self._prefilled[s.prompt]

    def _draw(self, rows: Sequence[_Sequence], logits_AV: Tensor) -> None:
        """Append one token to every row and mark those that it ends."""
        seeds = np.array([s.seed for s in rows], dtype=np.uint64)
        steps = np.array([len(s.tokens) for s in rows], dtype=np.uint64)
        drawn = draw_tokens(
            logits_AV,
            uniform(seeds, steps).tolist(),
            temperature=self._params.temperature,
            top_p=self._params.top_p,
        )
        for s, token, logprob, entropy in zip(rows, *drawn, strict=True):
            s.tokens.append(token)
            s.logprobs.append(logprob)
            s.entropies.append(entropy)
            if token in self._stop_ids:
                s.finish = "stop"
            elif self._params.stop and ends_with_stop(s.tokens, self._params.stop, self._decode):
                s.finish = "stop_string"
            elif len(s.tokens) >= s.limit:
                s.finish = "length"


def ends_with_stop(tokens: Sequence[int], stops: Sequence[str], decode: Callable[[Sequence[int]], str]) -> bool:
    """True where the newest token completes one of the stop strings.

    Only a tail is decoded: enough tokens that the tail is longer than any stop string, whatever a character costs
    in tokens (up to 4 in a byte-level vocabulary), and special tokens that leave no text are made up for.
    """
    longest = max(map(len, stops))
    width = 4 * longest + 32
    while True:
        text = decode(tokens[-width:])
        if width >= len(tokens) or len(text) >= longest + 32:
            break
        width *= 2
    if not any(stop in text for stop in stops):
        return False
    return width >= len(tokens) or any(stop in decode(tokens) for stop in stops)
