"""One vLLM server, or several: what it serves, asking it by token ids, giving it new weights, bringing it back.

The prompt goes out as ids and its echo is compared, so nothing is ever tokenised again. Every sampling setting is sent,
so the served model's `generation_config` shapes nothing.
"""

import math
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from tutelage.data.files import tensor_file_errors
from tutelage.errors import ConfigError, SamplerError
from tutelage.policies.http import HttpClient, Refused, RetryPolicy, Unreachable, run_all
from tutelage.policies.vllm_launch import PLUGIN, ServerProcess

T = TypeVar("T")
R = TypeVar("R")

UNSHAPED: Mapping[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Every setting that could shape a distribution, at the value that does not."""

NEVER = -9000.0
"""The server writes -9999 for the log-probability of what cannot be sampled."""


class VLLMServer:
    """One server: what it serves, whether it lives, and which weights it has.

    Args:
        url: for example `http://127.0.0.1:8000`.
        model: the served model's name; None takes the only one there is.
        process: set where the server is ours (`launch_server`), so that a dead one can be restarted.
        revive_s: how long a dead server that is not ours is waited for.
        weights_dir: folder for weights on their way to the server, on a disk both can read.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key_env: str | None = None,
        timeout_s: float = 600.0,
        retry: RetryPolicy | None = None,
        process: ServerProcess | None = None,
        revive_s: float = 60.0,
        weights_dir: str | Path | None = None,
    ) -> None:
        retry = retry or RetryPolicy(attempts=4)
        self.client = HttpClient(url, api_key_env=api_key_env, timeout_s=timeout_s, retry=retry)
        self.url = self.client.base_url
        self.process = process
        self.weights_version: str | None = None
        """Version of the weights pushed last; None where the server still has those it started with."""
        self._wanted, self._revive_s = model, revive_s
        self._weights_dir = Path(weights_dir) if weights_dir else None
        self._pushed: Path | None = None
        self._is_ours = True
        self._card: Mapping[str, Any] | None = None
        self._stores_shaped: bool | None = None

    # -- what it is

    def check(self) -> None:
        """Raise SamplerError unless it answers and serves the model; asks once, then remembers."""
        self._model_card()

    @property
    def model(self) -> str:
        return str(self._model_card()["id"])

    @property
    def max_model_len(self) -> int | None:
        """Longest prompt plus completion, in tokens."""
        value = self._model_card().get("max_model_len")
        return None if value is None else int(value)

    def vllm_version(self) -> str:
        return str((self.client.get("/version") or {}).get("version", "unknown"))

    def is_healthy(self) -> bool:
        try:
            self.client.get("/health", timeout_s=10, attempts=1)
        except SamplerError:
            return False
        return True

    def _model_card(self) -> Mapping[str, Any]:
        if self._card is None:
            cards = (self.client.get("/v1/models") or {}).get("data", [])
            named = [c for c in cards if self._wanted in (None, c.get("id"), c.get("root"))]
            if not named or (self._wanted is None and len(named) > 1):
                raise SamplerError(
                    f"{self.url} must serve {self._wanted or 'one model'}; it serves "
                    f"{', '.join(str(c.get('id')) for c in cards) or 'none'}. Name one of these as the model."
                )
            self._card = named[0]
        return self._card

    def stores_shaped_logprobs(self, prompt_ids: Sequence[int]) -> bool:
        """True where its log-probabilities are those of the sampled distribution (temperature and top-p included).

        Found by asking: with a nucleus of one token, such a server says log 1 = 0 and any other log p.
        """
        if self._stores_shaped is None:
            for prompt in (list(prompt_ids)[:64], list(prompt_ids)[:1]):
                body = self.body(prompt, temperature=0.0, max_tokens=8, logprobs=0)
                plain = token_logprobs(self.ask(body))
                narrow = token_logprobs(self.ask({**body, "temperature": 1.0, "top_p": 1e-6}))
                if min(plain) < -0.01:
                    self._stores_shaped = max(map(abs, narrow)) < 1e-6
                    return self._stores_shaped
            return False  # a model this sure of itself cannot be told apart here; asked again next time
        return self._stores_shaped

    # -- asking

    def body(self, prompt_ids: Sequence[int], **more: Any) -> dict[str, Any]:
        """A completion request with every setting that could shape the answer."""
        fixed = {"model": self.model, "prompt": list(prompt_ids), "n": 1, "return_token_ids": True, "stream": False}
        return {**fixed, **UNSHAPED, **more}

    def ask(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The one choice of a completion request, after checking that the prompt arrived as it was sent.

        Raises:
            SamplerError: no answer after the retries, or the server read other prompt ids than were sent.
        """
        reply = self.client.request("POST", "/v1/completions", body, tokens=len(body["prompt"]) + body["max_tokens"])
        choices = reply.get("choices") if isinstance(reply, dict) else None
        if not choices or len(choices) != 1:
            raise SamplerError(f"{self.url} must answer with one choice, got {str(reply)[:200]}")
        choice: Mapping[str, Any] = choices[0]
        echoed = choice.get("prompt_token_ids")
        if echoed is None:
            raise SamplerError(
                f"{self.url} does not return the prompt's token ids (return_token_ids): vLLM 0.10.2 or later is needed"
            )
        if list(echoed) != body["prompt"]:
            sent = body["prompt"]
            place = next((i for i, (a, b) in enumerate(zip(echoed, sent, strict=False)) if a != b), len(sent))
            place = min(place, len(echoed))
            raise SamplerError(
                f"{self.url} must read the prompt's ids as sent; it read {len(echoed)} for {len(sent)}, first "
                f"different at {place}: {list(echoed[place : place + 3])} for {sent[place : place + 3]}. "
                "Something between here and the server tokenises again."
            )
        return choice

    def room(self, prompt_ids: Sequence[int]) -> int | None:
        """Tokens that still fit after the prompt; None where the server names no limit.

        Raises:
            SamplerError: none.
        """
        limit = self.max_model_len
        if limit is not None and len(prompt_ids) >= limit:
            raise SamplerError(
                f"a prompt of {len(prompt_ids)} tokens leaves no room at {self.url}, which takes {limit} in all: "
                "shorten it, or start the server with a larger --max-model-len"
            )
        return None if limit is None else limit - len(prompt_ids)

    # -- weights

    def push_weights(self, state_dict: Mapping[str, Any], version: str) -> None:
        """Give the server new weights and wait until it answers with them.

        They go through a folder of safetensors; requests under way finish first, and the prefix cache is emptied. The
        folder is kept until the next push, for a server that has to be restarted.

        Args:
            state_dict: of the whole model, by the names of its checkpoint (adapters merged).
            version: what the server calls them from now on.

        Raises:
            SamplerError: the server cannot take weights, or took only some of them.
        """
        folder = save_weights(state_dict, self._weights_dir)
        old, self._pushed, self.weights_version = self._pushed, folder, version
        try:
            self._load(version)
        finally:
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)

    @property
    def pushed(self) -> Path | None:
        """Folder of the weights it should have; None where it has those it started with."""
        return self._pushed

    def adopt_weights(self, folder: Path, version: str) -> None:
        """Another process pushed these weights: expect them, and push them again should the server lose them."""
        self._pushed, self.weights_version, self._is_ours = folder, version, False

    def weights_name(self) -> str | None:
        """What the server calls its weights now; None where it does not answer, or nothing was pushed.

        A load after a loss has a name of its own (`again`), so that answers from before and after can be told apart
        by every process that asks the server.
        """
        if self.weights_version is None:
            return None
        try:
            name = self.client.get("/weight_info", timeout_s=30).get("weight_version")
        except SamplerError:
            return None
        return None if name is None else str(name)

    def has_weights(self) -> bool:
        """Whether it still has the weights pushed last: a server restarted by others quietly has its first ones."""
        if self.weights_version is None:
            return True
        name = self.weights_name()
        return name is not None and name.partition(AGAIN)[0] == self.weights_version

    def ensure_weights(self) -> None:
        """Push again what a restarted server has lost."""
        if not self.has_weights():
            self._load(f"{self.weights_version}{AGAIN}{secrets.token_hex(4)}")

    def _load(self, name: str | None) -> None:
        try:
            self.client.post("/pause?mode=wait", {})
        except Refused as e:
            raise SamplerError(f"{self.url} takes no weights: {_NO_ROUTES} ({e})") from e
        try:
            self._load_paused(name)
        except BaseException:
            with suppress(SamplerError):
                self.client.post("/resume", {})
            raise
        self.client.post("/resume", {})

    def _load_paused(self, name: str | None) -> None:
        what = f"{self.url} could not load the weights {self.weights_version}"
        try:
            order = {"method": "tutelage_load", "args": [str(self._pushed)]}
            reply = self.client.post("/collective_rpc", order, attempts=1)
        except Unreachable as e:
            hint = _NO_ROUTES if "no attribute" in str(e) else "restart it, its weights may be half replaced."
            raise SamplerError(f"{what}: {e} To do: {hint}") from e
        for result in reply["results"]:
            if result.get("error"):
                raise SamplerError(f"{what}: {result['error']}")
            if result["missing"]:
                raise SamplerError(
                    f"{what}: it needs every weight, and {len(result['missing'])} are not in the state dict "
                    f"({', '.join(result['missing'][:5])}). Push the whole model under the names of its checkpoint, "
                    "adapters merged."
                )
        self.client.post("/reset_prefix_cache", {})
        self.client.post("/update_weight_version", {"new_version": name})

    # -- life

    def revive(self) -> None:
        """Bring a dead server back, with its weights: restart it where it is ours, otherwise wait for it.

        Raises:
            SamplerError: it stays dead.
        """
        if not self.is_healthy():
            if self.process is not None:
                self.process.restart()
            else:
                deadline = time.monotonic() + self._revive_s
                while not self.is_healthy():
                    if time.monotonic() > deadline:
                        raise Unreachable(
                            f"{self.url} was not healthy again within {self._revive_s:.0f} s. Start it, then resume."
                        )
                    time.sleep(min(1.0, self._revive_s / 10))
        self.ensure_weights()

    def close(self) -> None:
        """Close connections, and remove weights on disk."""
        self.client.close()
        if self._pushed is not None and self._is_ours:
            shutil.rmtree(self._pushed, ignore_errors=True)
        self._pushed = None


AGAIN = "+again-"
"""Between the name of pushed weights and what tells one load of them from another."""
MOST_RELOADS = 8
"""Times that other processes may load lost weights again while one asks for its answers."""
_NO_ROUTES = (
    "start it with VLLM_SERVER_DEV_MODE=1, PYTHONPATH="
    f"{PLUGIN} and --worker-extension-cls tutelage_vllm_worker.Extension (`launch_server` does all three)."
)


def save_weights(state_dict: Mapping[str, Any], parent: Path | None = None) -> Path:
    """A new folder with every tensor as safetensors, under its own name; tied ones are written out for each name."""
    from safetensors.torch import save_file

    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="tutelage-weights-", dir=parent)).absolute()
    kept: dict[str, Any] = {}
    storages: set[int] = set()
    for name, tensor in state_dict.items():
        own = tensor.detach().to("cpu").contiguous()
        storage = own.untyped_storage().data_ptr()
        kept[name] = own.clone() if storage in storages else own
        storages.add(storage)
    with tensor_file_errors(folder):
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def token_logprobs(choice: Mapping[str, Any]) -> list[float]:
    """Nats of the sampled tokens of one answer, checked."""
    values = (choice.get("logprobs") or {}).get("token_logprobs") or []
    found = [math.nan if v is None else float(v) for v in values]
    bad = [v for v in found if not NEVER < v <= 1e-6]
    if bad:
        raise SamplerError(
            f"log-probabilities of sampled tokens must be finite and at most 0, the server sent {bad[:3]}: is it "
            "started with --logprobs-mode processed_logprobs or raw_logprobs?"
        )
    return [min(v, 0.0) for v in found]


# ------------------------------------------------------------------------------------------------ many servers


class Fleet(Generic[R]):
    """Requests spread over servers by index; what a dying server leaves is asked once more."""

    def __init__(self, servers: VLLMServer | Sequence[VLLMServer], workers: int) -> None:
        self.servers = [servers] if isinstance(servers, VLLMServer) else list(servers)
        if not self.servers or workers < 1:
            raise ConfigError(f"at least one server and one worker are needed, got {len(self.servers)} and {workers}")
        self.workers = workers
        self.num_second_tries = 0
        """Requests asked again after their server died or lost its weights."""

    def run(self, items: Sequence[T], ask: Callable[[VLLMServer, T], R], on_done: Callable[[R], None]) -> list[R]:
        """The answers in the order of the items.

        A server that cannot be reached gets one revival; if it fails again, the others take over.

        Raises:
            SamplerError: a request was refused, or no server is left.
        """
        results: list[R | None] = [None] * len(items)
        failures: dict[int, int] = {}  # place of a server -> rounds in which it failed
        error: SamplerError | None = None
        num_reloads = 0
        while pending := [i for i, r in enumerate(results) if r is None]:
            self.num_second_tries += len(pending) if failures or num_reloads else 0
            places = self._ready(failures, error)
            names = {place: self.servers[place].weights_name() for place in places}
            jobs = [(i, places[place % len(places)]) for place, i in enumerate(pending)]
            failed: set[int] = set()

            def one(job: tuple[int, int], failed: set[int] = failed) -> R:
                try:
                    return ask(self.servers[job[1]], items[job[0]])
                except Unreachable:
                    failed.add(job[1])
                    raise

            workers = self.workers * len(places)
            found, error = run_all(one, jobs, workers=workers, on_done=lambda _, result: on_done(result))
            if error is not None and not isinstance(error, Unreachable):
                raise error
            for (i, _), result in zip(jobs, found, strict=True):
                results[i] = result
            for place in places:
                server = self.servers[place]
                if server.weights_version is None:
                    continue
                if (now := server.weights_name()) is None or now != names[place]:
                    for i, asked in jobs:
                        results[i] = None if asked == place else results[i]
                    num_reloads += 1
                    if num_reloads > MOST_RELOADS or not server.has_weights():
                        error = error or Unreachable(
                            f"{server.url} lost the weights {server.weights_version} meanwhile"
                        )
                        failed.add(place)  # else another process loaded them again: these answers may be from before
            for place in failed:
                failures[place] = failures.get(place, 0) + 1
        return [r for r in results if r is not None]

    def _ready(self, failures: dict[int, int], error: SamplerError | None) -> list[int]:
        """Places of the servers to ask now, with the weights they should have."""
        ready = []
        for place, server in enumerate(self.servers):
            try:
                if failures.get(place, 0) == 1:
                    server.revive()
                elif place not in failures:
                    server.check()
                    server.ensure_weights()
                if failures.get(place, 0) < 2:
                    ready.append(place)
            except Unreachable as e:
                error = error or e
                failures[place] = failures.get(place, 0) + 1
        if ready:
            return ready
        if any(n < 2 for n in failures.values()):
            return self._ready(failures, error)
        raise SamplerError(f"none of {len(self.servers)} servers answers after a revival: {error}") from error
