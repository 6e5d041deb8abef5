"""Are two tokenizers the same, and is the padding token one that never means anything?"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_PROBES = (
    "The quick brown fox jumps over 13 lazy dogs; 3.14159 != 2,718,281.",
    "def f(x):\n    return {k: v for k, v in x.items()}\n\n\t# 0xDEADBEEF",
    "Ünïcödé Привет 你好 こんにちは مرحبا 🙂 e\u0301",
    "  leading   blanks \r\n and \\frac{1}{2} \"quotes\" 'it's' a_b-c/d@e.com",
    '{"name": "call", "arguments": {"key": [1, 2, null, true]}}',
)


@dataclass(frozen=True)
class EosPad:
    """A padding token that a model also has to learn, and one to use in its place."""

    problem: str
    """What is wrong and what to do, in a sentence or two."""
    pad_token: str | None
    """A special token that ends nothing; None where the vocabulary has none to spare."""
    pad_id: int | None

    def fix(self, tokenizer: Any) -> None:
        """Make it the tokenizer's padding token."""
        if self.pad_token is not None:
            tokenizer.pad_token = self.pad_token


def check_eos_pad(tokenizer: Any, stop_ids: Sequence[int]) -> EosPad | None:
    """A padding token must not be a stop token: what masks padding would mask the stop token, and the model would never
    learn to stop. Returns None where all is well."""
    pad = tokenizer.pad_token_id
    if pad is not None and pad not in stop_ids:
        return None
    spare = _spare_special(tokenizer, stop_ids)
    if pad is None:
        what = "the tokenizer has no padding token"
    else:
        what = (
            f"the padding token {tokenizer.pad_token!r} (id {pad}) is also a stop token: saved with the model, it "
            "makes other programs mask the end of every answer"
        )
    what_to_do = (
        f"Use {spare[0]!r} (id {spare[1]}): tokenizer.pad_token = {spare[0]!r}."
        if spare
        else "Add one: tokenizer.add_special_tokens({'pad_token': '<|pad|>'}), and resize the model's embeddings."
    )
    return EosPad(f"{what}. {what_to_do}", spare[0] if spare else None, spare[1] if spare else None)


def _spare_special(tokenizer: Any, stop_ids: Sequence[int]) -> tuple[str, int] | None:
    """A special token that ends no turn and begins no text, preferably one made for padding."""
    taken = {*stop_ids, tokenizer.bos_token_id}
    specials = [(t.content, i) for i, t in sorted(tokenizer.added_tokens_decoder.items()) if t.special]
    free = [(s, i) for s, i in specials if i not in taken]

    def order(pair: tuple[str, int]) -> tuple[int, int]:
        s = pair[0].lower()
        for rank, word in enumerate(("pad", "endoftext", "unk", "reserved", "unused")):
            if word in s:
                return rank, pair[1]
        return 99, pair[1]

    found = min(free, key=order, default=None)
    return found if found is not None and order(found)[0] < 99 else None


def vocabulary_differences(ours: Any, theirs: Any) -> list[str]:
    """Where two tokenizers part, in sentences; empty where they give the same ids to the same text.

    The number of tokens may differ: a vocabulary may be padded, or have more added tokens than another.
    """
    found = []
    a, b = ours.get_vocab(), theirs.get_vocab()
    small, large = (a, b) if len(a) <= len(b) else (b, a)
    missing = [t for t in small if t not in large]
    moved = [t for t, i in small.items() if large.get(t, i) != i]
    plain_missing = [t for t in missing if not (t.startswith("<") and t.endswith(">"))]
    if moved:
        found.append(f"{len(moved)} tokens have other ids, e.g. {moved[0]!r} ({a[moved[0]]} and {b[moved[0]]})")
    if plain_missing:
        found.append(f"{len(plain_missing)} tokens are in one vocabulary only, e.g. {plain_missing[0]!r}")
    for text in _PROBES:
        x = ours(text, add_special_tokens=False)["input_ids"]
        y = theirs(text, add_special_tokens=False)["input_ids"]
        if x != y:
            at = next((i for i, (p, q) in enumerate(itertools.zip_longest(x, y)) if p != q), 0)
            found.append(
                f"{text[:30]!r} has other tokens from position {at} on ({x[at : at + 3]} and {y[at : at + 3]})"
            )
            break
    return found
