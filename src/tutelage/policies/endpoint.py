"""Answers from any OpenAI-compatible endpoint, as text: a teacher behind an API.

Such endpoints take messages and give text; token ids are not known. Completions from here therefore have no token ids
and no log-probabilities. The student's `ChatText` tokenises them, which cannot recover how the teacher's own tokens
were cut: good for imitating whole answers, never for log-probabilities. `retokenisation` measures what that changed.

Every answer is written to a journal before it is counted, under a hash of its request: a run that is stopped asks only
for what is missing, and the same question costs nothing the second time.
"""

import fcntl
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tutelage.errors import ConfigError, DataError, SamplerError
from tutelage.policies.http import HttpClient, RateLimit, Refused, RetryPolicy, Unreachable, run_all
from tutelage.types import Completion, Message, Progress, SamplingParams, Task, content_hash, seed_for

_FATAL = frozenset({0, 301, 302, 307, 308, 401, 402, 403, 404, 405, 429})
"""Statuses that would meet every request alike."""

CHARS_PER_TOKEN = 4
"""For the rate limit alone, until the endpoint has counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What an endpoint said to one request, or why it said nothing."""

    key: str
    """Hash of the request; the journal's line has it too."""
    text: str = ""
    """The answer, without its reasoning."""
    reasoning: str | None = None
    """What a reasoning model wrote before, where the endpoint hands it over apart."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    finish: str = "stop"
    """"stop", "stop_string", "length", "error", or the endpoint's own word ("tool_calls", "content_filter")."""
    error: str = ""
    """Why there is no answer. Such a request is asked again in the next run."""
    prompt_tokens: int = 0
    """As counted by the endpoint."""
    completion_tokens: int = 0
    """As counted by the endpoint, reasoning included."""
    model: str = ""
    """Which model the endpoint says has answered."""
    is_cached: bool = False
    """True where the journal had it."""

    @property
    def message(self) -> Message:
        """The answer as a chat message."""
        out: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            out["reasoning_content"] = self.reasoning
        if self.tool_calls:
            out["tool_calls"] = [dict(c) for c in self.tool_calls]
        return out


class RequestJournal:
    """Requests and their replies in a JSONL file, found by key; every line is on disk before `put` returns.

    A line cut off by a crash is finished with a line end and counted in `num_damaged`; its request is asked again.

    Raises:
        ConfigError: another process writes to the same file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.num_damaged = 0
        """Lines that could not be read."""
        self._places: dict[str, int] = {}
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ConfigError(
                f"{self.path} is being written by another process: wait for it, or give this run another cache"
            ) from None
        self._index()

    def _index(self) -> None:
        self._file.seek(0)
        place, line = 0, b"\n"
        for line in self._file:
            try:
                record = json.loads(line)
                if "reply" in record:
                    self._places[record["key"]] = place
            except (ValueError, TypeError, KeyError):
                self.num_damaged += 1
            place += len(line)
        if not line.endswith(b"\n"):
            self._file.write(b"\n")
            self._file.flush()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        """Whether there is a reply to a request."""
        return key in self._places

    def get(self, key: str) -> Mapping[str, Any] | None:
        """The reply to a request, or None where there is none yet."""
        with self._lock:
            place = self._places.get(key)
            if place is None:
                return None
            self._file.seek(place)
            reply: Mapping[str, Any] = json.loads(self._file.readline())["reply"]
        return reply

    def put(self, key: str, request: Mapping[str, Any], **outcome: Any) -> None:
        """Keep `reply=...` or `error=...`. An error is for people to read; it does not answer the request."""
        record = {"key": key, "at": round(time.time(), 3), "request": request, **outcome}
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._file.seek(0, os.SEEK_END)
            place = self._file.tell()
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            if "reply" in outcome:
                self._places[key] = place

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "RequestJournal":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Question:
    task: Task
    body: Mapping[str, Any]
    key: str
    estimate: int
    """Tokens, for the rate limit."""


class EndpointSampler:
    """Asks an OpenAI-compatible endpoint, `n` times a task, by its messages.

    Each sample is a request of its own with a seed of its own (fixed by the question and the sample's index), so an
    endpoint that ignores `n` or `seed` serves too.

    Args:
        base_url: as OpenAI's clients take it, for example `https://host/v1` or `http://127.0.0.1:8000/v1`.
        model: the name the endpoint knows.
        author: goes into the spans; the model's name by default.
        api_key_env: environment variable with the key.
        journal: where answers are kept; None keeps none.
        workers: requests under way at a time.
        extra: further fields of every request, for example `{"top_k": -1}` for a vLLM server, whose model's own
            sampling defaults would shape the answers otherwise. None leaves a field out.
        sends_seed: False for endpoints that refuse the field.
        max_tokens_field: "max_tokens", or "max_completion_tokens" where that is asked for.
        render: task -> prompt text. Given, the text route (`/completions`) is asked instead of the chat route.
        max_failures: this many requests in a row without an answer end the run; so do this many questions refused
            before anything was answered, since what every request has is then what is refused.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        author: str | None = None,
        api_key_env: str | None = None,
        journal: RequestJournal | None = None,
        workers: int = 8,
        retry: RetryPolicy | None = None,
        limit: RateLimit | None = None,
        timeout_s: float = 600.0,
        extra: Mapping[str, Any] | None = None,
        sends_seed: bool = True,
        max_tokens_field: str = "max_tokens",
        render: Callable[[Task], str] | None = None,
        max_failures: int = 5,
    ) -> None:
        if workers < 1 or max_failures < 1:
            raise ConfigError(f"workers and max_failures must be at least 1, got {workers} and {max_failures}")
        self.client = HttpClient(base_url, api_key_env=api_key_env, timeout_s=timeout_s, retry=retry, limit=limit)
        self.author = author or model
        self.version = model
        self.counts: Counter[str] = Counter()
        """Requests, tokens and errors so far: `requests`, `cached`, `errors`, and with `_cached` for those that cost
        nothing this time `prompt_tokens`, `completion_tokens`."""
        self._model, self._journal, self._workers = model, journal, workers
        self._extra, self._sends_seed, self._max_tokens_field = dict(extra or {}), sends_seed, max_tokens_field
        self._render, self._max_failures = render, max_failures
        self._path = "/chat/completions" if render is None else "/completions"
        self._lock = threading.Lock()
        self._failures_in_a_row = 0
        self._has_answered = False
        self._refused: set[str] = set()
        """Questions that it said no to."""

    def complete(
        self, tasks: Sequence[Task], n: int, params: SamplingParams, *, progress: Progress | None = None
    ) -> list[list[Completion]]:
        """`ask`, as completions without token ids. One that failed has finish "error" and no text."""
        return [
            [Completion(token_ids=(), logprobs=None, entropies=None, finish=a.finish, text=a.text) for a in answers]
            for answers in self.ask(tasks, n, params, progress=progress)
        ]

    def ask(
        self, tasks: Sequence[Task], n: int, params: SamplingParams, *, progress: Progress | None = None
    ) -> list[list[Answer]]:
        """`n` answers to each task, in order. A request that fails for itself alone is an `Answer` with an error.

        Equal questions among the tasks get answers of their own.

        Raises:
            SamplerError: the endpoint refuses every request (key, address, model, quota, a field it does not take), or
                `max_failures` in a row had no answer. What was answered is in the journal.
        """
        questions = self._questions(tasks, n, params)
        self._failures_in_a_row, self._refused = 0, set()
        self._has_answered = self._journal is not None and any(q.key in self._journal for q in questions)

        def done(_: int, answer: Answer) -> None:
            if progress is not None:
                progress.advance(1, prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens)

        found, error = run_all(self._answer, questions, workers=self._workers, on_done=done)
        if error is not None:
            have = sum(a is not None for a in found)
            kept = "are in the journal" if self._journal is not None else "are lost, for want of a journal"
            raise SamplerError(f"{have} of {len(questions)} answers came and {kept}; then: {error}") from error
        flat = iter([a for a in found if a is not None])
        return [[next(flat) for _ in range(n)] for _ in tasks]

    def _questions(self, tasks: Sequence[Task], n: int, params: SamplingParams) -> list[_Question]:
        seen: Counter[str] = Counter()
        out = []
        for task in tasks:
            first = seen[task.hash]
            seen[task.hash] += n
            for sample in range(first, first + n):
                body = self._body(task, sample, params)
                key = content_hash(self.client.base_url, self._path, body, sample)
                estimate = len(json.dumps(body)) // CHARS_PER_TOKEN + params.max_new_tokens
                out.append(_Question(task, body, key, estimate))
        return out

    def _body(self, task: Task, sample: int, params: SamplingParams) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model, "temperature": params.temperature, "top_p": params.top_p, "n": 1}
        body[self._max_tokens_field] = params.max_new_tokens
        if self._render is None:
            body["messages"] = [dict(m) for m in task.messages]
        else:
            body["prompt"] = self._render(task)
        if task.tools:
            body["tools"] = [dict(t) for t in task.tools]
        if params.stop:
            body["stop"] = list(params.stop)
        if self._sends_seed:
            body["seed"] = seed_for(task.hash, sample) % (1 << 31)
        return {k: v for k, v in {**body, **self._extra}.items() if v is not None}

    def _answer(self, question: _Question) -> Answer:
        kept = self._journal.get(question.key) if self._journal is not None else None
        if kept is not None:
            return self._counted(replace(_parse(question.key, kept), is_cached=True))
        try:
            reply = self.client.request("POST", self._path, question.body, tokens=question.estimate)
            answer = _parse(question.key, reply)
        except Refused as e:
            if e.status in _FATAL:
                raise
            return self._failed(question, str(e), is_alone=True)
        except (Unreachable, DataError) as e:
            return self._failed(question, str(e), is_alone=False)
        self.client.limit.settle(question.estimate, answer.prompt_tokens + answer.completion_tokens)
        if self._journal is not None:
            self._journal.put(question.key, question.body, reply=reply)
        with self._lock:
            self._failures_in_a_row, self._has_answered = 0, True
        return self._counted(answer)

    def _failed(self, question: _Question, why: str, *, is_alone: bool) -> Answer:
        if self._journal is not None:
            self._journal.put(question.key, question.body, error=why)
        with self._lock:
            if is_alone:
                self._refused.add(question.task.hash)
                if not self._has_answered and len(self._refused) >= self._max_failures:
                    raise SamplerError(
                        f"the first {len(self._refused)} questions were all refused, so it is what every request has "
                        f"(max_tokens_field, sends_seed and extra shape it); the last: {why}"
                    )
            else:
                self._failures_in_a_row += 1
                if self._failures_in_a_row >= self._max_failures:
                    raise SamplerError(f"{self._failures_in_a_row} requests in a row had no answer; the last: {why}")
        return self._counted(Answer(key=question.key, finish="error", error=f"task {question.task.id}: {why}"))

    def _counted(self, answer: Answer) -> Answer:
        suffix = "_cached" if answer.is_cached else ""
        with self._lock:
            self.counts["cached" if answer.is_cached else "requests"] += 1
            self.counts["errors"] += bool(answer.error)
            self.counts["prompt_tokens" + suffix] += answer.prompt_tokens
            self.counts["completion_tokens" + suffix] += answer.completion_tokens
        return answer


def _parse(key: str, reply: Any) -> Answer:
    """The answer in a chat or text completion.

    Raises:
        DataError: there is none in it.
    """
    try:
        choice = reply["choices"][0]
        message = choice.get("message") or {"content": choice["text"]}
    except (KeyError, IndexError, TypeError):
        raise DataError(f"an answer needs choices[0].message or .text, got {str(reply)[:300]}") from None
    content = message.get("content")
    if isinstance(content, list):  # content parts
        content = "".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
    finish = choice.get("finish_reason") or "stop"
    if finish == "stop" and isinstance(choice.get("stop_reason"), str):
        finish = "stop_string"
    usage = reply.get("usage") or {}
    return Answer(
        key=key,
        text=content or "",
        reasoning=message.get("reasoning_content") or message.get("reasoning") or None,
        tool_calls=tuple(message.get("tool_calls") or ()),
        finish=finish,
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        completion_tokens=int(usage.get("completion_tokens") or 0),
        model=str(reply.get("model") or ""),
    )


def retokenisation(
    answers: Sequence[Answer], token_ids: Sequence[Sequence[int]], decode: Callable[[Sequence[int]], str]
) -> dict[str, float]:
    """What tokenising the answers with the student's tokenizer changed.

    Args:
        answers: the text as it came.
        token_ids: for each answer, the student's ids of that text (no stop token, no template).
        decode: token ids -> text.

    Returns:
        `data/frac_text_changed`: share of answers whose ids decode to another text. `data/tokens_per_counted_token`:
        the student's tokens per token that the endpoint counted (reasoning and stop tokens count there); far from 1
        means another tokenizer.
    """
    pairs = [(a, ids) for a, ids in zip(answers, token_ids, strict=True) if not a.error]
    counted = [(len(ids), a.completion_tokens) for a, ids in pairs if a.completion_tokens and not a.reasoning]
    out = {"data/frac_text_changed": sum(decode(ids) != a.text for a, ids in pairs) / max(1, len(pairs))}
    if counted:
        out["data/tokens_per_counted_token"] = sum(c[0] for c in counted) / sum(c[1] for c in counted)
    return out
