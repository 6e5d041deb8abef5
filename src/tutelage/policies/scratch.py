"""A small causal model with a tokenizer of single characters, made from nothing: for tasks that are learned from zero.

Saved as transformers saves any model, so that everything else treats it like one. Weights are fixed by the seed.
"""

from pathlib import Path
from typing import Any

import torch

from tutelage.data.files import tensor_file_errors
from tutelage.errors import ConfigError

PAD, END = "<pad>", "<end>"
ROLES = ("system", "user", "assistant")
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + (message['content'] or '') + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def character_tokenizer(characters: str) -> Any:
    """One token a character, one for each role, `<end>` and `<pad>`; other characters have no token.

    Raises:
        ConfigError: a character twice, or none.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if not characters or len(set(characters)) != len(characters):
        raise ConfigError(f"a tokenizer of characters needs each of them once, got {characters!r}")
    special = [PAD, END, *(f"<{role}>" for role in ROLES)]
    core = Tokenizer(models.WordLevel(vocab={c: i for i, c in enumerate([*special, *characters])}, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")  # type: ignore[assignment]
    core.decoder = decoders.Fuse()  # type: ignore[assignment]
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_scratch_model(
    folder: Path,
    *,
    characters: str,
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    length: int = 256,
    seed: int = 0,
) -> int:
    """A Llama of random weights and its tokenizer as a model folder. Returns the number of its weights.

    Args:
        length: most positions, prompt and answer together.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = character_tokenizer(characters)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        initializer_range=0.02,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    with tensor_file_errors(folder):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(sum(p.numel() for p in model.parameters()))
