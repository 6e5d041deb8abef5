"""Rules for the texts of answers, as used for DeepSeek-R1's 800K set. They mark; they never remove."""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from tutelage.errors import ConfigError
from tutelage.types import Draw, DrawContext, Group, Source, Trajectory

NO_ANSWER = "no answer"
"""Mark of what was asked for in vain."""
_ASKS_FOR_CODE = re.compile(r"```|\b(code|program|function|script|python|java|javascript|c\+\+|sql|html|bash)\b", re.I)
_TOGETHER = ("HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC")
_SCRIPTS = {**dict.fromkeys(_TOGETHER, "CJK"), "GREEK": "", "MATHEMATICAL": "", "MODIFIER": ""}
"""Scripts written together count as one; Greek letters and those of formulas (double-struck, script, raised, lowered)
count nowhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRules:
    """Which answers are left out, in this order; the first reason is the mark."""

    rejected: bool = True
    """Leave out what a verifier rejected or could not judge; what nobody judged stays."""
    truncated: bool = True
    """Leave out what ran into the length limit."""
    max_other_script: float | None = 0.05
    """Largest share of an answer's letters in scripts other than its own main one and the question's (mixed language).
    Languages that share a script are not told apart. None allows all."""
    max_paragraph_words: int | None = 300
    """Longest paragraph, in words; a character of an unspaced script counts as a word."""
    stray_code: bool = True
    """Leave out fenced code where the question does not ask for any, and fences that are never closed."""
    duplicates: bool = True
    """Keep one of a question's equal answers."""

    def __post_init__(self) -> None:
        if self.max_other_script is not None and not 0 <= self.max_other_script <= 1:
            raise ConfigError(f"max_other_script is a share of letters in [0, 1], got {self.max_other_script}")
        if self.max_paragraph_words is not None and self.max_paragraph_words < 1:
            raise ConfigError(f"max_paragraph_words must be at least 1 or None, got {self.max_paragraph_words}")


class Cleaned:
    """What the inner source draws, with weight 0 and a mark on every answer that a rule leaves out.

    Around it, `Accepted` applies its rules to what is left.
    """

    def __init__(self, source: Source, rules: TextRules | None = None) -> None:
        self.source, self.rules = source, rules or TextRules()

    def draw(self, ctx: DrawContext) -> Draw:
        draw = self.source.draw(ctx)
        out = draw.with_trajectories([t for g in draw.groups for t in cleaned(g, self.rules)])
        return replace(out, stats={**out.stats, **{f"data/num_left_out/{k}": v for k, v in left_out(out).items()}})

    def state(self) -> Mapping[str, Any]:
        return self.source.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.source.restore(state)


def cleaned(group: Group, rules: TextRules) -> list[Trajectory]:
    """A question's answers with the marks of the rules."""
    question = "\n".join(str(m.get("content") or "") for m in group.task.messages)
    seen: set[str] = set()
    out = []
    for t in group.trajectories:
        reason = _reason(t, question, rules)
        text = " ".join(_said(t).split())
        if reason is None and rules.duplicates and text in seen:
            reason = "duplicate"
        if reason is None:
            seen.add(text)
        out.append(t if reason is None else t.marked(reason))
    return out


def left_out(trajectories: Sequence[Trajectory] | Draw) -> dict[str, int]:
    """How many trajectories of weight 0 each last mark has."""
    return dict(Counter(t.marks[-1] for t in trajectories if t.weight == 0 and t.marks))


def _reason(t: Trajectory, question: str, rules: TextRules) -> str | None:
    text = _said(t)
    if t.finish == "error":
        return NO_ANSWER
    if rules.rejected and t.verdict is not None and not t.verdict.is_accepted:
        return "error" if t.verdict.status == "error" else "rejected"
    if rules.truncated and t.is_truncated:
        return "truncated"
    if not text.strip():
        return "empty"
    if rules.max_other_script is not None and other_script_share(text, question) > rules.max_other_script:
        return "mixed language"
    if rules.max_paragraph_words is not None and longest_paragraph(text) > rules.max_paragraph_words:
        return "long paragraph"
    if rules.stray_code and has_stray_code(text, question):
        return "stray code"
    return None


def _said(t: Trajectory) -> str:
    """All that the author wrote: reasoning too, where it came apart from the answer."""
    last = t.messages[-1] if t.messages else {}
    return "\n\n".join(x for x in (str(last.get("reasoning_content") or ""), t.completion) if x)


def other_script_share(text: str, question: str) -> float:
    """Share of the text's letters in scripts that are neither its most frequent one nor in the question.

    >>> other_script_share("The answer is 四.", "What is 2 + 2?"), other_script_share("Это four", "Translate: это")
    (0.08333333333333333, 0.0)
    """
    counts = Counter(s for c in text if c.isalpha() and (s := _script(c)))
    if not counts:
        return 0.0
    allowed = {counts.most_common(1)[0][0], *(_script(c) for c in question if c.isalpha())}
    return sum(n for s, n in counts.items() if s not in allowed) / counts.total()


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    """The first word of its name, or "" for a letter of formulas."""
    is_letterlike = "\u2100" <= letter <= "\u214f"
    if is_letterlike or unicodedata.decomposition(letter).startswith(("<font>", "<super>", "<sub>")):
        return ""
    plain = next((c for c in unicodedata.normalize("NFKC", letter) if c.isalpha()), letter)
    name = re.split("[ -]", unicodedata.name(plain, ""))[0]
    return _SCRIPTS.get(name, name)


def longest_paragraph(text: str) -> int:
    """Words of the longest paragraph outside fenced code."""
    prose = re.sub(r"```.*?(```|\Z)", "", text, flags=re.S)
    return max((_words(p) for p in re.split(r"\n\s*\n", prose)), default=0)


def _words(paragraph: str) -> int:
    unspaced = sum(_script(c) in ("CJK", "THAI", "LAO", "KHMER") for c in paragraph if c.isalpha())
    return unspaced + len(paragraph.split())


def has_stray_code(text: str, question: str) -> bool:
    """True for fenced code that nobody asked for, and for a fence that is never closed."""
    fences = text.count("```")
    return fences % 2 == 1 or (fences > 0 and not _ASKS_FOR_CODE.search(question))
