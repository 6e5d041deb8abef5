"""Sampling and scoring by vLLM servers over HTTP: token ids in, token ids out, with log-probabilities of what was
sampled, and new weights pushed between rounds.

Each sample is a request of its own with its own seed. A server's answers depend on what else is in its batch (its
kernels round differently), so equal requests give equal answers only nearly: runs with a server resume without losing
or repeating a prompt, but not bit for bit.

Dimension letters:  C  targets of a trajectory    K  most likely entries kept
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tutelage.errors import ConfigError, SamplerError
from tutelage.policies.http import Unreachable
from tutelage.policies.vllm_client import NEVER, Fleet, VLLMServer, token_logprobs
from tutelage.policies.vllm_launch import vllm_process
from tutelage.types import Completion, Progress, SampleRequest, SamplingParams, Trajectory, seed_for

__all__ = ["TopK", "VLLMSampler", "VLLMScorer", "VLLMServer", "launch_server"]


@contextmanager
def launch_server(model: str | Path, *, weights_dir: str | Path | None = None, **options: Any) -> Iterator[VLLMServer]:
    """A running server for the length of the block; ended with everything it started, whatever happens.

    Args:
        model: folder, or `org/name`.
        options: of `vllm_process`: dtype, max_model_len, max_logprobs, cpu_threads, args, env, log, start_s, python.

    Raises:
        MissingExtra: vLLM's environment is not there.
        SamplerError: the server does not start; the message has the end of its log.
    """
    process = vllm_process(model, **options)
    server = VLLMServer(process.url, process=process, weights_dir=weights_dir)
    try:
        process.start()
        yield server
    finally:
        server.close()
        process.stop()


# ------------------------------------------------------------------------------------------------ the sampler


class VLLMSampler:
    """Continues prompts on vLLM servers. Implements `types.Sampler`.

    Args:
        servers: one, or several that requests are spread over.
        stop_ids: tokens that end a turn. The model's own end tokens are not used unless they are among these.
        decode: token ids -> text, for `Completion.text`.
        author, version: go into the spans.
        workers: requests under way at a time, for each server.
    """

    def __init__(
        self,
        servers: VLLMServer | Sequence[VLLMServer],
        *,
        stop_ids: Sequence[int],
        decode: Callable[[Sequence[int]], str],
        author: str = "student",
        version: str = "base",
        workers: int = 32,
    ) -> None:
        if not stop_ids:
            raise ConfigError("VLLMSampler needs the tokens that end a turn (stop_ids), got none")
        self.author = author
        self.version = version
        self._fleet: Fleet[Completion] = Fleet(servers, workers)
        self._stop_ids = sorted({int(i) for i in stop_ids})
        self._decode = decode

    @property
    def servers(self) -> Sequence[VLLMServer]:
        return self._fleet.servers

    def push_weights(self, state_dict: Mapping[str, Any], version: str) -> None:
        """Give all servers new weights; `version` goes into the spans from now on."""
        for server in self.servers:
            server.push_weights(state_dict, version)
        self.version = version

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, progress: Progress | None = None
    ) -> list[list[Completion]]:
        """`n` completions for each request, in order. Entropies are not known (None).

        Raises:
            ConfigError: the parameters shape the distribution and the server reports log-probabilities of another one.
            SamplerError: no answer after retries and one revival, or an answer that is not what was asked for.
        """
        items = [(r.prompt_ids, seed_for(r.seed, j)) for r in requests for j in range(r.n)]
        if not items:
            return [[] for _ in requests]
        if not params.samples_own_distribution and not params.is_greedy:
            self._check_shaped(requests[0].prompt_ids, params)

        def ask(server: VLLMServer, item: tuple[tuple[int, ...], int]) -> Completion:
            return self._ask(server, item[0], item[1], params)

        def done(completion: Completion) -> None:
            if progress is not None:
                progress.advance(1, tokens=len(completion.token_ids))

        flat = iter(self._fleet.run(items, ask, done))
        return [[next(flat) for _ in range(r.n)] for r in requests]

    def _check_shaped(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        for server in self.servers:
            try:
                is_shaped = server.stores_shaped_logprobs(prompt_ids)
            except Unreachable:
                server.revive()
                is_shaped = server.stores_shaped_logprobs(prompt_ids)
            if not is_shaped:
                raise ConfigError(
                    f"temperature {params.temperature} and top_p {params.top_p} shape what is sampled, but "
                    f"{server.url} reports log-probabilities of the unshaped distribution, so what is stored would "
                    "not be what was sampled. Start it with --logprobs-mode processed_logprobs, or sample at "
                    "temperature 1 and top_p 1."
                )

    def _ask(self, server: VLLMServer, prompt: tuple[int, ...], seed: int, params: SamplingParams) -> Completion:
        room = server.room(prompt)
        limit = params.max_new_tokens if room is None else min(params.max_new_tokens, room)
        choice = server.ask(
            server.body(
                prompt,
                seed=seed,
                temperature=float(params.temperature),
                top_p=float(params.top_p),
                max_tokens=limit,
                stop=list(params.stop),
                stop_token_ids=self._stop_ids,
                ignore_eos=True,
                logprobs=0,
            )
        )
        ids = tuple(int(i) for i in choice.get("token_ids") or ())
        logprobs = token_logprobs(choice)
        where = f"{server.url}, prompt of {len(prompt)} tokens, seed {seed}"
        if not ids or len(ids) != len(logprobs) or len(ids) > limit:
            raise SamplerError(
                f"1 to {limit} sampled tokens with as many log-probabilities are needed, got {len(ids)} and "
                f"{len(logprobs)} ({where})"
            )
        finish = self._finish(choice, ids, where)
        return Completion(
            token_ids=ids,
            logprobs=tuple(logprobs),
            entropies=None,
            finish=finish,
            text=self._decode(ids[:-1] if finish == "stop" else ids),
        )

    def _finish(self, choice: Mapping[str, Any], ids: tuple[int, ...], where: str) -> str:
        reason, stopped_by = choice.get("finish_reason"), choice.get("stop_reason")
        if reason == "abort":
            raise Unreachable(f"the request was aborted by the server ({where}): it was paused or is shutting down")
        if reason == "length":
            return "length"
        if reason == "stop" and isinstance(stopped_by, str):
            return "stop_string"
        if reason == "stop" and ids[-1] in self._stop_ids:
            return "stop"
        raise SamplerError(
            f"a completion must end by length, a stop string or one of the stop tokens {self._stop_ids}; this one ends "
            f"with {reason!r} ({stopped_by!r}) on token {ids[-1]} ({where})"
        )


# ------------------------------------------------------------------------------------------------ the scorer


@dataclass(frozen=True)
class TopK:
    """A model's most likely tokens at each target of one trajectory, most likely first."""

    ids_CK: NDArray[np.int32]
    """Token ids."""
    logprobs_CK: NDArray[np.float32]
    """Nats at temperature 1. -inf where the server reports none."""
    target_logprobs_C: NDArray[np.float32]
    """Nats of the target token itself, whether it is among the K or not."""


class VLLMScorer:
    """Scores given tokens with a model on vLLM servers, by prompt log-probabilities. Implements `types.Scorer`.

    The distribution is the model's own: temperature 1, unshaped.

    Args:
        servers: one, or several that trajectories are spread over.
        workers: requests under way at a time, for each server. Scoring holds (tokens, V) on the server: keep it small.
    """

    def __init__(self, servers: VLLMServer | Sequence[VLLMServer], *, workers: int = 4) -> None:
        self._fleet: Fleet[TopK] = Fleet(servers, workers)

    @property
    def servers(self) -> Sequence[VLLMServer]:
        return self._fleet.servers

    def score(self, trajectories: Sequence[Trajectory], *, progress: Progress | None = None) -> list[Sequence[float]]:
        """For each trajectory, nats per target token in target order (float32 on the server)."""
        return [row.target_logprobs_C.tolist() for row in self._rows(trajectories, 0, progress)]

    def top_k(self, trajectories: Sequence[Trajectory], k: int, *, progress: Progress | None = None) -> list[TopK]:
        """For each trajectory, the `k` most likely tokens at every target, and the target's own log-probability.

        Raises:
            ConfigError: k is below 1.
            SamplerError: the server's --max-logprobs is below k, among others; its message says so.
        """
        if k < 1:
            raise ConfigError(f"top_k needs k of at least 1, got {k}")
        return self._rows(trajectories, k, progress)

    def _rows(self, trajectories: Sequence[Trajectory], k: int, progress: Progress | None) -> list[TopK]:
        def done(row: TopK) -> None:
            if progress is not None:
                progress.advance(1, tokens=len(row.target_logprobs_C))

        return self._fleet.run(trajectories, lambda server, t: _score_one(server, t, k), done)


def _score_one(server: VLLMServer, trajectory: Trajectory, k: int) -> TopK:
    """Everything after the last target stays home: it changes no target's context."""
    targets = [i for i, is_target in enumerate(trajectory.is_target) if is_target]
    if not targets:
        return TopK(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32), np.zeros(0, np.float32))
    ids = trajectory.token_ids[: targets[-1] + 1]
    server.room(ids)
    choice = server.ask(server.body(ids, max_tokens=1, prompt_logprobs=k, ignore_eos=True))
    entries = choice.get("prompt_logprobs")
    if not entries or len(entries) != len(ids):
        raise SamplerError(
            f"{server.url} must score all {len(ids)} tokens of trajectory {trajectory.id}, it scored "
            f"{len(entries or [])}"
        )
    ids_CK = np.zeros((len(targets), k), np.int32)
    logprobs_CK = np.full((len(targets), k), -np.inf, np.float32)
    target_logprobs_C = np.zeros(len(targets), np.float32)
    for row, place in enumerate(targets):
        entry = {int(token): value for token, value in (entries[place] or {}).items()}
        if ids[place] not in entry or len(entry) < k:
            raise SamplerError(
                f"{server.url} must give token {ids[place]} at place {place} of trajectory {trajectory.id} and the {k} "
                f"most likely ones; it gave {sorted(entry)[:5]}"
            )
        target_logprobs_C[row] = _logprob(entry[ids[place]])
        best = sorted(entry.items(), key=lambda e: (-e[1]["logprob"], e[1]["rank"]))[:k]
        ids_CK[row] = [token for token, _ in best]
        logprobs_CK[row] = [_logprob(value) for _, value in best]
    return TopK(ids_CK, logprobs_CK, target_logprobs_C)


def _logprob(entry: Mapping[str, Any]) -> float:
    value = float(entry["logprob"])
    return value if value > NEVER else -math.inf
