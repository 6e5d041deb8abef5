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

_PREFIXING = ("normalizer", "pre_tokenizer")
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
        self._literals: dict[str, Any] = {}
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

    def _literal(self, place: str) -> Any:
        """The backend without control tokens: their strings are split as any other text.

        Args:
            place: where the text stands: at the "beginning", "after a control" token, or "inside" a text that is cut
                there. Some tokenizers put a blank before a text in the first places; none may in the last.
        """
        if place not in self._literals:
            from tokenizers import Tokenizer

            d = self.definition
            added = [t for t in d["added_tokens"] if t["content"] not in self.control_ids]
            parts = {k: d[k] if place == "beginning" else _without_prefix(d[k], place) for k in _PREFIXING}
            text = json.dumps({**d, **parts, "added_tokens": added, "truncation": None, "padding": None})
            self._literals[place] = Tokenizer.from_str(text)
        return self._literals[place]

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
        """Ids of `rendered.text[start:stop]`, tokenised in pieces at each cut.

        A token border at the place would not be enough: some tokenizers look ahead, and split the end of a prompt in
        another way when they see the answer. A cut inside the blanks that a control token eats moves to that token's
        end.

        Returns:
            The tokens (`last` counts in `rendered.text`), and where each cut ended up.
        """
        stop = len(rendered.text) if stop is None else stop
        controls = [(max(a, start), min(b, stop)) for a, b in rendered.controls if a < stop and b > start]
        moved = {c: next((b for a, b in controls if a < c < b), c) for c in cuts}
        inside = sorted({c for c in moved.values() if start < c < stop})
        in_one_go = rendered.is_whole and not rendered.escapes
        if in_one_go and (not self._adds_prefix or (start == 0 and not inside)):
            borders = [start, *inside, stop]
            out = self.tokenizer(
                [rendered.text[a:b] for a, b in itertools.pairwise(borders)],
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
            )
            found = zip(borders[:-1], out["input_ids"], out["offset_mapping"], strict=True)
            pieces = [Encoded(list(ids), _last(offsets, a)) for a, ids, offsets in found]
        else:
            borders = sorted({start, stop, *inside, *(x for span in controls for x in span)})
            meant = dict(controls)
            after = {b for _, b in rendered.controls}
            pieces = [
                self._control(rendered, a, b) if meant.get(a) == b else self._as_text(rendered, a, b, _place(a, after))
                for a, b in itertools.pairwise(borders)
            ]
        return Encoded([i for p in pieces for i in p.ids], [x for p in pieces for x in p.last]), moved

    @functools.cached_property
    def _adds_prefix(self) -> bool:
        d = self.definition
        return any(_without_prefix(d[k], "inside") != d[k] for k in _PREFIXING)

    def _control(self, rendered: Rendered, start: int, stop: int) -> Encoded:
        string = rendered.text[start:stop]
        token = self.control_ids.get(string, self.control_ids.get(string.strip()))
        if token is None:  # a cut or the end of the text fell inside it
            return self._as_text(rendered, start, stop, "inside")
        return Encoded([token], [stop - 1])

    def _as_text(self, rendered: Rendered, start: int, stop: int, place: str) -> Encoded:
        """Ids of a stretch in which every control string is plain text, placed in the escaped text."""
        expanded = [rendered.escapes.get(c, c) for c in rendered.text[start:stop]]
        ends = list(itertools.accumulate(map(len, expanded)))
        ids, last = self._split_control("".join(expanded), place)
        return Encoded(ids, [start + bisect.bisect_right(ends, x) for x in last])

    def _split_control(self, text: str, place: str) -> tuple[list[int], list[int]]:
        """Ids without any control token among them, even where the model's own vocabulary has the string whole."""
        text = clean_text(text)
        out = self._literal(place).encode(text, add_special_tokens=False)
        last = _last(out.offsets, 0)
        for i, token in enumerate(out.ids):
            start, stop = out.offsets[i]
            if token in self._control_id_set and stop - start > 1:
                head = self._split_control(text[: start + 1], place)
                tail = self._split_control(text[start + 1 :], "inside")
                return head[0] + tail[0], head[1] + [start + 1 + x for x in tail[1]]
        return list(out.ids), last

    @functools.cached_property
    def _control_id_set(self) -> frozenset[int]:
        return frozenset(self.control_ids.values())

    def literal_ids(self, text: str) -> list[int]:
        """Ids of text in which control tokens are plain text."""
        return self._split_control(text, "inside")[0]


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


def _place(start: int, control_ends: set[int]) -> str:
    return "beginning" if start == 0 else "after a control" if start in control_ends else "inside"


def _without_prefix(part: Any, place: str) -> Any:
    """A normalizer or pre-tokenizer that puts no blank before text in this place."""
    if not isinstance(part, dict):
        return part
    out = {k: [_without_prefix(x, place) for x in v] if isinstance(v, list) else v for k, v in part.items()}
    if out.get("type") == "Metaspace" and (place == "inside" or out.get("prepend_scheme") == "first"):
        out["prepend_scheme"] = "never"
    if out.get("type") == "Prepend" and place == "inside":
        return {"type": "Sequence", "normalizers": []}
    if out.get("type") == "ByteLevel" and place == "inside":
        out["add_prefix_space"] = False
    return out
