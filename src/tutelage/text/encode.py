"""Text to token ids with places: which character each token ends on, with control tokens only where a template wrote
them."""

import bisect
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.errors import TemplateError
from tutelage.text.render import ControlPatterns, Rendered, clean_text

_NEVER = re.compile(r"(?!)")


@dataclass(frozen=True)
class Encoded:
    """Token ids, and for each the index of the last character it covers."""

    ids: list[int]
    last: list[int]


class Encoder:
    """A fast tokenizer, and copies of it that read control tokens as plain text."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise TemplateError(
                f"a fast tokenizer is needed (one with tokenizer.json), got {type(tokenizer).__name__}: only these say "
                "which characters each token covers. Load it with AutoTokenizer, which converts most tokenizers."
            )
        self.tokenizer = tokenizer
        added = {token.content: (i, token) for i, token in tokenizer.added_tokens_decoder.items()}
        self.control_ids: dict[str, int] = {
            s: i for s, (i, token) in added.items() if token.special or _is_written(s, template)
        }
        self._added = {s: added[s][1] for s in self.control_ids}
        self.written = self._pattern(self.control_ids, with_blanks=True)

    def patterns(self, spoken: Iterable[str] = ()) -> ControlPatterns:
        """The patterns of rendering, where `spoken` are control tokens that the assistant itself may write."""
        strings = list(self.control_ids)
        return ControlPatterns(
            written=self.written,
            untrusted=self._pattern(strings),
            assistant=self._pattern(set(strings) - set(spoken)),
            prefixes=frozenset(s[:n] for s in strings for n in range(1, len(s))),
            suffixes=frozenset(s[n:] for s in strings for n in range(1, len(s))),
        )

    def _pattern(self, strings: Iterable[str], *, with_blanks: bool = False) -> re.Pattern[str]:
        def one(s: str) -> str:
            blanks = self._added[s] if with_blanks else None
            left = r"\s*" if blanks is not None and blanks.lstrip else ""
            right = r"\s*" if blanks is not None and blanks.rstrip else ""
            return left + re.escape(s) + right

        ordered = sorted(strings, key=lambda s: (-len(s), s))
        return re.compile("|".join(one(s) for s in ordered)) if ordered else _NEVER

    @functools.cached_property
    def definition(self) -> dict[str, Any]:
        """What makes the tokenizer this tokenizer: its vocabulary, merges, added tokens, and how text is cut."""
        loaded: dict[str, Any] = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return loaded

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the SHA-256 of the tokenizer's content: equal where text gives equal ids."""
        d = self.definition
        added = sorted((t["id"], t["content"], t["special"]) for t in d["added_tokens"])
        parts = {"model": d["model"], "added": added, "normalizer": d["normalizer"], "pre": d["pre_tokenizer"]}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @functools.cached_property
    def _middle(self) -> Any:
        """The backend for text that does not stand at the beginning: it adds no blank of its own."""
        return self._copy(self.definition["added_tokens"])

    @functools.cached_property
    def _literal(self) -> Any:
        """The backend that knows no control tokens: their strings are split as any other text."""
        return self._copy([t for t in self.definition["added_tokens"] if t["content"] not in self.control_ids])

    def _copy(self, added: list[Any]) -> Any:
        from tokenizers import Tokenizer

        definition = {**self.definition, "added_tokens": added, "truncation": None, "padding": None}
        definition["pre_tokenizer"] = _without_prefix(definition["pre_tokenizer"])
        definition["normalizer"] = _without_prefix(definition["normalizer"])
        return Tokenizer.from_str(json.dumps(definition))

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of whole texts whose control tokens are all meant as such."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
        )["input_ids"]
        return ids

    def encode(
        self, rendered: Rendered, start: int = 0, stop: int | None = None, cuts: Iterable[int] = ()
    ) -> tuple[Encoded, dict[int, int]]:
        """Ids of `rendered.text[start:stop]`, with a token border at each cut.

        Where tokenising in one go has no border at a cut, the text is tokenised in pieces there. A cut inside the
        blanks that a control token eats moves to that token's end.

        Returns:
            The tokens (`last` counts in `rendered.text`), and where each cut ended up.
        """
        stop = len(rendered.text) if stop is None else stop
        controls = [(max(a, start), min(b, stop)) for a, b in rendered.controls if a < stop and b > start]
        moved = {c: next((b for a, b in controls if a < c < b), c) for c in cuts}
        inside = sorted({c for c in moved.values() if start < c < stop})
        if rendered.is_whole and not rendered.escapes:
            whole = self._one_go(rendered.text[start:stop], start)
            ends = {e + 1 for e in whole.last}
            inside = [c for c in inside if c not in ends]
            if not inside:
                return whole, moved
            borders = [start, *inside, stop]
            pieces = [self._one_go(rendered.text[a:b], a) for a, b in itertools.pairwise(borders)]
        else:
            borders = sorted({start, stop, *inside, *(x for span in controls for x in span)})
            meant = {a: b for a, b in controls}
            pieces = [
                self._control(rendered, a, b) if meant.get(a) == b else self._as_text(rendered, a, b)
                for a, b in itertools.pairwise(borders)
            ]
        return Encoded([i for p in pieces for i in p.ids], [x for p in pieces for x in p.last]), moved

    def _one_go(self, text: str, start: int) -> Encoded:
        if start == 0 or not self._adds_prefix:
            out = self.tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
            )
            return Encoded(list(out["input_ids"]), _last(out["offset_mapping"], start))
        out = self._middle.encode(text, add_special_tokens=False)
        return Encoded(list(out.ids), _last(out.offsets, start))

    @functools.cached_property
    def _adds_prefix(self) -> bool:
        d = self.definition
        return any(_without_prefix(d[k]) != d[k] for k in ("normalizer", "pre_tokenizer"))

    def _control(self, rendered: Rendered, start: int, stop: int) -> Encoded:
        string = rendered.text[start:stop]
        token = self.control_ids.get(string, self.control_ids.get(string.strip()))
        if token is None:  # a cut or the end of the text fell inside it
            return self._as_text(rendered, start, stop)
        return Encoded([token], [stop - 1])

    def _as_text(self, rendered: Rendered, start: int, stop: int) -> Encoded:
        """Ids of a stretch in which every control string is plain text, placed in the escaped text."""
        expanded = [rendered.escapes.get(c, c) for c in rendered.text[start:stop]]
        ends = list(itertools.accumulate(map(len, expanded)))
        ids, last = self._split_control("".join(expanded))
        return Encoded(ids, [start + bisect.bisect_right(ends, x) for x in last])

    def _split_control(self, text: str) -> tuple[list[int], list[int]]:
        """Ids without any control token among them, even where the model's own vocabulary has the string whole."""
        text = clean_text(text)
        out = self._literal.encode(text, add_special_tokens=False)
        last = _last(out.offsets, 0)
        for i, token in enumerate(out.ids):
            start, stop = out.offsets[i]
            if token in self._control_id_set and stop - start > 1:
                head, tail = self._split_control(text[: start + 1]), self._split_control(text[start + 1 :])
                return head[0] + tail[0], head[1] + [start + 1 + x for x in tail[1]]
        return list(out.ids), last

    @functools.cached_property
    def _control_id_set(self) -> frozenset[int]:
        return frozenset(self.control_ids.values())

    def literal_ids(self, text: str) -> list[int]:
        """Ids of text in which control tokens are plain text."""
        return self._split_control(text)[0]


def _last(offsets: Sequence[tuple[int, int]], start: int) -> list[int]:
    """Index of the last character of each token; never goes back, also where a tokenizer trims its offsets."""
    out: list[int] = []
    high = start
    for _, end in offsets:
        high = max(high, start + end - 1)
        out.append(high)
    return out


def _is_written(string: str, template: str) -> bool:
    """True for an added token that looks like markup and that the chat template writes, e.g. `<tool_response>`."""
    return any(c in string for c in "<>[]|") and string.strip() != "" and string in template


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no blank before the text."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return {"type": "Replace", "pattern": {"String": "\u0000\u0000"}, "content": "\u0000\u0000"}
    out = {k: [_without_prefix(x) for x in v] if isinstance(v, list) else v for k, v in part.items()}
    if out.get("type") == "Metaspace" and "prepend_scheme" in out:
        out["prepend_scheme"] = "never"
    if out.get("type") == "ByteLevel" and "add_prefix_space" in out:
        out["add_prefix_space"] = False
    return out
