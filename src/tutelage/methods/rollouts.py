"""Who samples for a run: models in this process, or vLLM servers that get the student's weights after each round."""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tutelage.errors import SamplerError
from tutelage.methods.config import RunConfig
from tutelage.methods.servers import addresses, servers_of
from tutelage.methods.settings import RolloutSettings
from tutelage.methods.student import Student
from tutelage.policies.load import resolve_model
from tutelage.policies.sampler import InProcessSampler
from tutelage.policies.vllm_server import VLLMSampler, VLLMServer, launch_server
from tutelage.types import Sampler


class Rollouts:
    """The samplers of a run, by name, each made once.

    Args:
        load_base: the model the run began with.
        other: a sampler for every other name.
        weights_dir: where weights lie on their way to a server; on a disk that the servers read too.
    """

    def __init__(
        self,
        student: Student,
        settings: RolloutSettings,
        *,
        text: Any,
        load_base: Callable[[], Any],
        other: Callable[[str], Sampler],
        weights_dir: Path,
    ) -> None:
        self.student, self.settings, self.text = student, settings, text
        self._load_base, self._other, self._weights_dir = load_base, other, weights_dir
        self._samplers: dict[str, Sampler] = {}
        self._served: VLLMSampler | None = None
        self._served_changes = -1
        self._stack = ExitStack()

    @property
    def is_served(self) -> bool:
        return self.settings.engine == "vllm"

    def sync(self, version: str) -> None:
        """Give "student" the weights as they are now. Every process calls it, before any of them samples.

        Raises:
            SamplerError: a server takes no weights; every process raises it.
        """
        if not self.is_served:
            self.student.refresh()
        elif self._served_changes != self.student.num_changes:
            self._push(f"{self._weights_dir.parent.name}-{os.getpid()}-{version}-{self.student.num_changes}")

    def sampler(self, name: str, version: str) -> Sampler:
        """ "student" has the weights of the last `sync` (which one process alone need not call)."""
        if name == "student":
            if self.student.processes.count == 1:
                self.sync(version)
            sampler = self._student()
            sampler.version = version
            return sampler
        if name not in self._samplers:
            is_base = name == "base"
            self._samplers[name] = self.in_process(self._load_base(), "student") if is_base else self._other(name)
        return self._samplers[name]

    def forget(self, name: str) -> None:
        """Let go of the sampler of another model than the student."""
        self._samplers.pop(name, None)

    def _student(self) -> Sampler:
        if self.is_served:
            if self._served is None:
                raise SamplerError("the servers have no weights of this run yet: every process must call `sync` first")
            return self._served
        self.student.plain.use_plain_attention()
        if "student" not in self._samplers:
            self._samplers["student"] = self.in_process(self.student.plain.model, "student")
        return self._samplers["student"]

    def in_process(self, model: Any, author: str) -> InProcessSampler:
        return InProcessSampler(
            model,
            stop_ids=self.text.stop_ids,
            decode=self.text.completion_text,
            author=author,
            max_batch=self.settings.max_batch,
            engine=self.settings.decoding,
        )

    def served(self, servers: Sequence[VLLMServer], author: str) -> VLLMSampler:
        return VLLMSampler(
            servers,
            stop_ids=self.text.stop_ids,
            decode=self.text.completion_text,
            author=author,
            workers=self.settings.server.requests,
        )

    def close(self) -> None:
        """End the server if it is ours, and remove weights on their way."""
        self._stack.close()
        self._served = None

    # -- the servers ---------------------------------------------------------------------------

    def _push(self, version: str) -> None:
        """The first process gives the servers the weights; the others learn which they are, and their name."""
        processes = self.student.processes
        said: dict[str, Any] = {}
        if self.student.is_sharded and self.student.config.model.lora:
            self.student.refresh()
        with self.student.gathered():
            if processes.is_first:
                try:
                    if self._served is None:
                        shutil.rmtree(self._weights_dir, ignore_errors=True)  # what a killed process left
                    sampler = self._served or self._connect(addresses(self.settings.url))
                    sampler.push_weights(self.student.serving_weights(), version)
                    self._served = sampler
                    said = {"version": version, "servers": [(s.url, str(s.pushed)) for s in sampler.servers]}
                except SamplerError as error:
                    said = {"error": str(error)}
        said = processes.gather_dict({0: said} if processes.is_first else {})[0]
        if "error" in said:
            raise SamplerError(said["error"], is_everywhere=True)
        if not processes.is_first:
            self._served = self._served or self._connect([url for url, _ in said["servers"]])
            for server, (_, folder) in zip(self._served.servers, said["servers"], strict=True):
                server.adopt_weights(Path(folder), said["version"])
        self._served_changes = self.student.num_changes

    def _connect(self, urls: Sequence[str]) -> VLLMSampler:
        s = self.settings.server
        if not urls:
            launched = launch_server(
                resolve_model(self.student.path)[0],
                weights_dir=self._weights_dir,
                dtype=self.student.precision,
                max_model_len=s.max_model_len,
                args=s.args,
                env=s.env,
                start_s=s.start_s,
                log=self._weights_dir.parent / "vllm.log",
            )
            return self.served([self._stack.enter_context(launched)], "student")
        servers = servers_of(urls, s, weights_dir=self._weights_dir)
        for server in servers:
            self._stack.callback(server.close)
        return self.served(servers, "student")


def rollout_of(config: RunConfig) -> RolloutSettings:
    """The rollout settings of the last stage that has any: who samples is one choice for a run."""
    for stage in reversed(config.stages):
        if isinstance(found := getattr(stage, "rollout", None), RolloutSettings):
            return found
    return RolloutSettings()
