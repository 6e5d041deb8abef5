"""JSON over HTTP with what a long run needs: connections kept open, bounded retries, rate limits, and errors that say
which server, how often, and what it answered. Standard library only.

A request is tried again after connection errors, unreadable answers, and the statuses 408, 409, 425, 429 and 5xx; never
after another 4xx, which would fail the same way. Waiting times come from a stream fixed by the seed and the request, so
they do not depend on which thread runs.
"""

import base64
import email.utils
import http.client
import json
import os
import queue
import random
import ssl
import threading
import time
import urllib.parse
import urllib.request
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from tutelage.errors import ConfigError, SamplerError
from tutelage.types import content_hash, seed_for

T = TypeVar("T")
R = TypeVar("R")

_RETRIED = frozenset({408, 409, 425, 429})
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Refused(SamplerError):
    """The server understood and said no: another try of the same request would fail the same way."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status, or 0."""

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (str(self), self.status)


class Unreachable(SamplerError):
    """Every try ended in a connection error, an unreadable answer or a server-side failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how patiently a request is tried."""

    attempts: int = 6
    """Tries in all, the first included."""
    first_wait_s: float = 0.5
    """Wait before the second try; doubled for each further one."""
    max_wait_s: float = 30.0
    """Longest wait of our own choosing."""
    max_retry_after_s: float = 600.0
    """A `Retry-After` above this ends the request instead of being waited for."""

    def __post_init__(self) -> None:
        problems = []
        if self.attempts < 1:
            problems.append(f"attempts must be at least 1, got {self.attempts}")
        if self.first_wait_s < 0 or self.max_wait_s < 0:
            problems.append(f"waits must not be negative, got {self.first_wait_s} s and {self.max_wait_s} s")
        if problems:
            raise ConfigError(problems)

    def wait_s(self, tries: int, stream: random.Random) -> float:
        """Seconds before the next try, after `tries` of them: doubling, cut at `max_wait_s`, then times [0.5, 1)."""
        return min(self.max_wait_s, self.first_wait_s * 2.0 ** (tries - 1)) * (0.5 + 0.5 * stream.random())


class RateLimit:
    """At most so many requests a second and tokens a minute, over all threads; each caller waits its turn.

    Tokens are charged as estimated before the request and corrected by `settle` with what the server counted.

    Args:
        requests_per_s, tokens_per_minute: None is no limit.
    """

    def __init__(
        self,
        *,
        requests_per_s: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        problems = [
            f"{name} must be positive, got {value}"
            for name, value in (("requests_per_s", requests_per_s), ("tokens_per_minute", tokens_per_minute))
            if value is not None and value <= 0
        ]
        if problems:
            raise ConfigError(problems)
        self._gap_s = 1 / requests_per_s if requests_per_s else 0.0
        self._token_s = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._next_request = self._next_token = clock()

    def acquire(self, tokens: int = 0) -> None:
        """Return when a request of about this many tokens may go out."""
        if not self._gap_s and not self._token_s:
            return
        with self._lock:
            now = self._clock()
            start = max(now, self._next_request, self._next_token)
            self._next_request = start + self._gap_s
            self._next_token = start + tokens * self._token_s
        if start > now:
            self._sleep(start - now)

    def settle(self, estimated: int, counted: int) -> None:
        """The request used `counted` tokens, not `estimated`."""
        with self._lock:
            self._next_token += (counted - estimated) * self._token_s


@dataclass(frozen=True)
class _Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpClient:
    """Asks one server for JSON. Safe to share between threads.

    Args:
        base_url: `http://host:port` or `https://host/prefix`; paths are appended to it.
        api_key_env: environment variable whose value goes out as `Authorization: Bearer ...`. It is read for each
            request, and cut out of every error message.
        timeout_s: longest silence of the server.
        retry: how often a request is tried.
        limit: shared rate limit.
        seed: of the stream that spreads the waiting times.

    Raises:
        ConfigError: the address is not an http(s) address, or the named environment variable is not set.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key_env: str | None = None,
        timeout_s: float = 600.0,
        retry: RetryPolicy | None = None,
        limit: RateLimit | None = None,
        seed: int = 0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"a server's address looks like http://127.0.0.1:8000, got {base_url!r}")
        if parts.username or parts.password:
            raise ConfigError(
                f"the address of {parts.hostname} holds a user or password, which would be logged: "
                "put the key into an environment variable and name it with api_key_env"
            )
        self.base_url = base_url.rstrip("/")
        self.retry = retry or RetryPolicy()
        self.limit = limit or RateLimit()
        self.num_retries = 0
        """Tries after the first, over all requests so far."""
        self._parts, self._prefix = parts, parts.path.rstrip("/")
        self._key_env, self._timeout_s, self._seed, self._sleep = api_key_env, timeout_s, seed, sleep
        self._idle: queue.LifoQueue[http.client.HTTPConnection] = queue.LifoQueue()
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._idle)
        self._key()

    def __repr__(self) -> str:
        return f"HttpClient({self.base_url!r})"

    def get(self, path: str, *, timeout_s: float | None = None, attempts: int | None = None) -> Any:
        return self.request("GET", path, None, timeout_s=timeout_s, attempts=attempts)

    def post(self, path: str, body: Any, *, timeout_s: float | None = None, attempts: int | None = None) -> Any:
        return self.request("POST", path, body, timeout_s=timeout_s, attempts=attempts)

    def request(
        self,
        method: str,
        path: str,
        body: Any,
        *,
        tokens: int = 0,
        timeout_s: float | None = None,
        attempts: int | None = None,
    ) -> Any:
        """The answer's JSON (None where its body is empty).

        Args:
            tokens: estimated size, for the rate limit.

        Raises:
            Refused: a 4xx that is not worth another try, a redirect, or a `Retry-After` that is too long.
            Unreachable: all tries failed; names the address, their number and the last failure.
        """
        payload = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        stream = random.Random(seed_for(self._seed, method, path, content_hash(body)))
        attempts = attempts or self.retry.attempts
        last = ""
        for tries in range(1, attempts + 1):
            self.limit.acquire(tokens)
            asked: float | None = None
            try:
                reply = self._once(method, path, payload, timeout_s or self._timeout_s)
                if 200 <= reply.status < 300:
                    return json.loads(reply.body) if reply.body.strip() else None
                last = f"status {reply.status}: {self._said(reply)}"
                self._check_retried(reply, method, path, last)
                asked = _retry_after_s(reply.headers)
            except (OSError, http.client.HTTPException) as e:
                last = f"{type(e).__name__}: {self._hide(str(e))}"
            except ValueError as e:
                last = f"status {reply.status} with a body that is not JSON ({e})"
            if asked is not None and asked > self.retry.max_retry_after_s:
                raise Refused(
                    f"{method} {self.base_url}{path}: the server asks to wait {asked:.0f} s, more than the "
                    f"{self.retry.max_retry_after_s:.0f} s that are waited for ({last}). Resume later.",
                    reply.status,
                )
            if tries < attempts:
                with self._lock:
                    self.num_retries += 1
                self._sleep(max(asked or 0.0, self.retry.wait_s(tries, stream)))
        raise Unreachable(
            f"{method} {self.base_url}{path} failed {attempts} times; the last: {last}. "
            "Check that the server runs and how busy it is, then resume."
        )

    def close(self) -> None:
        """Close the idle connections (also done when the client is no longer used)."""
        _close_all(self._idle)

    # -- one try

    def _once(self, method: str, path: str, payload: bytes | None, timeout_s: float) -> _Reply:
        headers = {"Accept": "application/json", "User-Agent": "tutelage"}
        if payload is not None:
            headers["Content-Type"] = "application/json"
        key = self._key()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection = self._idle.get_nowait()
            connection.timeout = timeout_s
            if connection.sock is not None:
                connection.sock.settimeout(timeout_s)
            return self._exchange(connection, method, path, payload, headers)
        except queue.Empty:
            pass
        except (ConnectionError, http.client.BadStatusLine):
            self.close()  # the server closed it while it lay idle, so probably the others too
        return self._exchange(self._connect(timeout_s), method, path, payload, headers)

    def _exchange(
        self, connection: http.client.HTTPConnection, method: str, path: str, payload: bytes | None, headers: Any
    ) -> _Reply:
        try:
            connection.request(method, self._prefix + path, payload, headers)
            response = connection.getresponse()
            reply = _Reply(response.status, dict(response.headers.items()), response.read())
        except BaseException:
            connection.close()
            raise
        if response.will_close:
            connection.close()
        else:
            self._idle.put(connection)
        return reply

    def _connect(self, timeout_s: float) -> http.client.HTTPConnection:
        host = str(self._parts.hostname)
        if self._parts.scheme == "http":
            return http.client.HTTPConnection(host, self._parts.port, timeout=timeout_s)
        context = ssl.create_default_context()
        proxy = urllib.request.getproxies().get("https")
        if not proxy or host in _LOOPBACK or urllib.request.proxy_bypass(host):
            return http.client.HTTPSConnection(host, self._parts.port, timeout=timeout_s, context=context)
        p = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
        through = http.client.HTTPSConnection(str(p.hostname), p.port, timeout=timeout_s, context=context)
        user = f"{urllib.parse.unquote(p.username)}:{urllib.parse.unquote(p.password or '')}" if p.username else ""
        secret = {"Proxy-Authorization": "Basic " + base64.b64encode(user.encode()).decode()} if user else {}
        through.set_tunnel(host, self._parts.port, headers=secret)
        return through

    # -- what it said

    def _check_retried(self, reply: _Reply, method: str, path: str, said: str) -> None:
        is_quota = reply.status == 429 and b"insufficient_quota" in reply.body
        if (reply.status in _RETRIED or reply.status >= 500) and not is_quota:
            return
        hints = {
            401: "check the API key" + (f" in ${self._key_env}" if self._key_env else " (name its variable)"),
            403: "the key may not use this",
            404: "check the address and the model's name",
            429: "the account has no quota left",
        }
        if 300 <= reply.status < 400:
            said += f" redirects to {self._hide(str(reply.headers.get('Location', '?')))}; give that address instead"
        hint = hints.get(reply.status, "the request has to change")
        raise Refused(f"{method} {self.base_url}{path} was refused with {said}. To do: {hint}.", reply.status)

    def _said(self, reply: _Reply) -> str:
        """The server's own message, shortened."""
        text = reply.body.decode(errors="replace")
        try:
            value = json.loads(text)
            error = value.get("error", value.get("message", value.get("detail", text)))
            text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
        except (json.JSONDecodeError, AttributeError):
            pass
        return self._hide(" ".join(text.split())[:800])

    def _key(self) -> str:
        if self._key_env is None:
            return ""
        key = os.environ.get(self._key_env, "").strip()
        if not key:
            raise ConfigError(
                f"the API key for {self.base_url} is read from ${self._key_env}, which is not set: export it first"
            )
        return key

    def _hide(self, text: str) -> str:
        key = os.environ.get(self._key_env, "").strip() if self._key_env else ""
        return text.replace(key, "<key>") if key else text


def _close_all(connections: "queue.LifoQueue[http.client.HTTPConnection]") -> None:
    while True:
        try:
            connections.get_nowait().close()
        except queue.Empty:
            return


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds of a `Retry-After` header (a number or a date); None where there is none that can be read."""
    text = next((v.strip() for k, v in headers.items() if k.lower() == "retry-after"), "")
    if not text:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def run_all(
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    workers: int,
    on_done: Callable[[int, R], None] = lambda index, result: None,
) -> tuple[list[R | None], SamplerError | None]:
    """`function` of every item, up to `workers` at a time, begun in order; stops handing out work at the first error.

    Args:
        on_done: called from this thread with each result as it arrives.

    Returns:
        Results in the order of the items, None where there is none; and the first SamplerError, or None. What was
        under way when it happened is waited for and kept.
    """
    results: list[R | None] = [None] * len(items)
    error: SamplerError | None = None
    left = iter(range(len(items)))
    running: dict[Future[R], int] = {}
    with ThreadPoolExecutor(max_workers=max(1, min(workers, len(items)))) as pool:
        while True:
            while error is None and len(running) < workers and (index := next(left, None)) is not None:
                running[pool.submit(function, items[index])] = index
            if not running:
                return results, error
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=running.__getitem__):
                index = running.pop(future)
                try:
                    result = future.result()
                except SamplerError as e:
                    error = error or e
                else:
                    results[index] = result
                    on_done(index, result)
