"""Clients of the servers that settings name."""

from collections.abc import Sequence
from pathlib import Path

from tutelage.methods.settings import ServerSettings
from tutelage.policies.http import RetryPolicy
from tutelage.policies.vllm_server import VLLMServer


def addresses(url: str | Sequence[str] | None) -> list[str]:
    return [] if url is None else [url] if isinstance(url, str) else list(url)


def servers_of(urls: Sequence[str], s: ServerSettings, *, weights_dir: Path | None = None) -> list[VLLMServer]:
    """Clients of servers that somebody else started."""
    retry = RetryPolicy(attempts=s.attempts)
    return [
        VLLMServer(
            url,
            api_key_env=s.api_key_env,
            timeout_s=s.timeout_s,
            retry=retry,
            revive_s=s.revive_s,
            weights_dir=weights_dir,
        )
        for url in urls
    ]
