"""Load a causal language model and its tokenizer by path or hub name; save them so that transformers loads them."""

import difflib
import hashlib
import logging
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tutelage.data.files import sync_tree, tensor_file_errors
from tutelage.errors import ConfigError, MissingExtra
from tutelage.policies import smollm2

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def resolve_model(name: str) -> tuple[str, str | None]:
    """`org/name@revision`, a folder, or the alias of the bundled small model -> (path or hub name, revision).

    Raises:
        ConfigError: it looks like a folder and there is none; the message names the nearest existing ones.
    """
    if name.lower() == smollm2.ALIAS:
        return str(smollm2.smollm2_path()), None
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ConfigError(f"model {name!r}: the folder has no config.json, so it is not a saved model")
        return str(path), None
    base, _, revision = name.partition("@")
    if HUB_NAME.fullmatch(base) is None or path.parent.is_dir():
        parent = next(p for p in path.parents if p.is_dir())
        names = [p.name for p in parent.iterdir() if p.is_dir() and not p.name.startswith(".")]
        near = difflib.get_close_matches(path.relative_to(parent).parts[0], names, n=3)
        hint = f"; did you mean {', '.join(str(parent / n) for n in near)}?" if near else ""
        raise ConfigError(
            f"model {name!r}: no such folder, and not a hub name of the form org/name@revision{hint} "
            f"(the small model that works offline is {smollm2.ALIAS!r})"
        )
    return base, revision or None


def load_tokenizer(name: str) -> Any:
    """The tokenizer with its chat template; padding never shares the end-of-turn token where another one exists."""
    from transformers import AutoTokenizer

    path, revision = resolve_model(name)
    tokenizer = _from_pretrained(AutoTokenizer, path, revision, name)
    separate_pad(tokenizer)
    return tokenizer


def separate_pad(tokenizer: Any) -> str | None:
    """Give padding a token of its own where it shares the end-of-turn token: a mask made from pad ids would hide the
    stop token and a model trained so never stops. Returns what was done, or None.

    Our own masks come from who wrote each token and never from pad ids; this protects whoever loads the model next.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return None
    vocabulary = tokenizer.get_vocab()
    for candidate in ("<|endoftext|>", "<pad>", "<|pad|>", "<|finetune_right_pad_id|>", "[PAD]", "<unk>"):
        if candidate in vocabulary and vocabulary[candidate] != tokenizer.eos_token_id:
            tokenizer.pad_token = candidate
            return f"padding used {tokenizer.eos_token!r}, the end-of-turn token; it now uses {candidate!r}"
    return None


def load_model(
    name: str, *, dtype: str = "float32", device: str = "cpu", attention: str | None = None, quantise: str | None = None
) -> Any:
    """A causal language model, safetensors only, without running code from the hub.

    Args:
        quantise: "8bit" (LLM.int8) or "4bit" (NF4, scales quantised too): the linear layers' weights through
            bitsandbytes; embeddings and output layer stay in `dtype`. Such a model is read, never trained.

    Raises:
        ConfigError: the model cannot be found or read; the message says what was tried.
        MissingExtra: `quantise` without bitsandbytes.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise ConfigError(f"model dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    path, revision = resolve_model(name)
    extra: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    if quantise is None:
        return _from_pretrained(AutoModelForCausalLM, path, revision, name, dtype=DTYPES[dtype], **extra).to(device)
    extra |= {"quantization_config": _quantisation(quantise, DTYPES[dtype]), "device_map": {"": device}}
    return _from_pretrained(AutoModelForCausalLM, path, revision, name, dtype=DTYPES[dtype], **extra)


def _quantisation(bits: str, dtype: torch.dtype) -> Any:
    if bits not in ("4bit", "8bit"):
        raise ConfigError(f'quantise must be "4bit", "8bit" or absent, got {bits!r}')
    if find_spec("bitsandbytes") is None:
        raise MissingExtra(f"{bits} weights need bitsandbytes, which is missing: pip install 'tutelage[quantised]'")
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_news)
    return BitsAndBytesConfig(
        load_in_4bit=bits == "4bit",
        load_in_8bit=bits == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _is_news(record: logging.LogRecord) -> bool:
    """Not that int8 products are of float16 inputs, which bitsandbytes says at every layer."""
    return "will be cast" not in record.getMessage()


def weights_digest(name: str) -> str | None:
    """32 hex digits of the weight files' bytes; None where the model is not on this machine.

    Reads every byte: about a second a gigabyte.
    """
    from transformers.utils.hub import try_to_load_from_cache

    try:
        path, revision = resolve_model(name)
    except ConfigError:
        return None
    folder = Path(path)
    if not folder.is_dir():
        found = try_to_load_from_cache(path, "config.json", revision=revision)
        if not isinstance(found, str):
            return None
        folder = Path(found).parent
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "blake2b").digest())
    return digest.hexdigest()


def stored_dtype(name: str) -> torch.dtype | None:
    """What the model's configuration says its weights are stored in; None where it says nothing."""
    from transformers import AutoConfig

    path, revision = resolve_model(name)
    dtype = getattr(_from_pretrained(AutoConfig, path, revision, name), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


def _from_pretrained(kind: Any, path: str, revision: str | None, name: str, **options: Any) -> Any:
    is_model = "dtype" in options
    if is_model:
        options["use_safetensors"] = True
    try:
        return kind.from_pretrained(path, revision=revision, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = "model" if is_model else "tokenizer"
        raise ConfigError(
            f"model {name!r}: the {what} could not be loaded from {path!r}: {first} "
            "(needed: a folder or hub model with config.json and safetensors weights; HF_TOKEN for gated models)"
        ) from error


def save_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write weights, generation config, tokenizer and chat template as transformers reads them.

    Args:
        state: name -> weight, where it is not the model's own (a sharded model holds parts only).

    The end-of-turn ids stay in the generation config, and a pad id equal to an end-of-turn id is not written: that
    mistake makes every generation of the saved model run on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    given = model.state_dict() if state is None else state
    state = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in given.items()}
    generation = model.generation_config
    if generation is not None:
        ends = generation.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        if generation.pad_token_id in ends:
            generation.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id not in ends else None
        # A sampler reads these; values tuned for one weight set would silently shape another's samples.
        generation.do_sample, generation.temperature, generation.top_p, generation.top_k = None, None, None, None
    saved_dtype = model.config.dtype
    if dtype is not None:
        model.config.dtype = dtype
    try:
        with tensor_file_errors(folder):
            model.save_pretrained(folder, state_dict=state, safe_serialization=True)
    finally:
        model.config.dtype = saved_dtype
    tokenizer.save_pretrained(folder)
    sync_tree(folder)
