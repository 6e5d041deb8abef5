"""Judges that compare text: exact, regex, last number, flag. They run no code that a model wrote."""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from . import Payload, Result, accept, error, reject, shown

_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"))

# One pass, no nested repetition: linear in the text.
_NUMBER = re.compile(
    r"(?=[-+\u2212$€£.]{0,3}[0-9])"
    r"(?<![\w.])"  # not inside a word, a version or another number
    r"(?P<sign>(?<![\w)\]}])[-+\u2212])?"  # 5-3 holds 5 and 3; (-3) and = -3 hold -3
    r"[$€£]?"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?"
    r"(?P<frac>\.[0-9]+)?"
    r"(?P<exp>[eE][+-]?[0-9]{1,3}(?!\w|\.[0-9]))?"
    r"(?:[ ]?/[ ]?(?P<den>[0-9]+)(?!\.?[0-9]))?"
)
_EQUATION = re.compile(r"[0-9(][0-9(). ,$*/+×÷−-]{0,200}=[ $]*-?[0-9][0-9.,]*")


def normalise(text: str, *, casefold: bool = False) -> str:
    """NFC, zero-width characters removed, line ends and outer whitespace stripped; optionally without case."""
    text = unicodedata.normalize("NFC", text.translate(_INVISIBLE)).strip()
    return text.casefold() if casefold else text


def unwrap(text: str, wrapper: Sequence[str] | None) -> str:
    """The text inside one layer of `(prefix, suffix)`, or the text itself where it is not wrapped."""
    if wrapper is None:
        return text
    prefix, suffix = wrapper
    if len(text) >= len(prefix) + len(suffix) and text.startswith(prefix) and text.endswith(suffix):
        return text[len(prefix) : len(text) - len(suffix)].strip()
    return text


def last_number(text: str) -> str | None:
    """The last number of the text in canonical form, or None.

    `1,234.50` -> `1234.5`, `+07` -> `7`, `-0` -> `0`, `7.` -> `7`, `2.5e3` -> `2500`, `4/6` -> `2/3`.
    Currency signs, units and `%` around a number are ignored: `50%` is `50`.
    """
    found = None
    for match in _NUMBER.finditer(text):
        if match["whole"] or match["frac"]:
            found = match
    return None if found is None else _canonical(found)


def _canonical(match: re.Match[str]) -> str | None:
    """The value of a match as text, exact at any length: digits are moved, never converted."""
    whole, frac = (match["whole"] or "").replace(",", ""), (match["frac"] or ".")[1:]
    shift = int(match["exp"][1:]) if match["exp"] else 0
    if shift > 0:
        frac = frac.ljust(shift, "0")
        whole, frac = whole + frac[:shift], frac[shift:]
    elif shift < 0:
        whole = whole.rjust(-shift, "0")
        whole, frac = whole[:shift], whole[shift:] + frac
    whole, frac = whole.lstrip("0") or "0", frac.rstrip("0")
    value = f"{whole}.{frac}" if frac else whole
    if match["den"] is not None:
        reduced = _reduce(value, match["den"])
        if reduced is None:
            return None
        value = reduced
    sign = "-" if match["sign"] in ("-", "\u2212") and value != "0" else ""
    return sign + value


def _reduce(numerator: str, denominator: str) -> str | None:
    """`numerator/denominator` in lowest terms; None where it is no number or beyond 1000 digits."""
    from fractions import Fraction

    if len(numerator) > 1000 or len(denominator) > 1000 or not denominator.strip("0"):
        return None
    value = Fraction(numerator) / int(denominator)
    return str(value.numerator) if value.denominator == 1 else _as_decimal(value)


def _as_decimal(value: Any) -> str:
    """A fraction as an exact decimal where it has one (1/2 is 0.5), else as `n/d`."""
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    places = max(twos, fives)
    if rest != 1 or places > 300:
        return str(value)
    digits = str(value.numerator * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{digits[:-places]}.{digits[-places:].rstrip('0')}"


def equations_key(text: str) -> str | None:
    """The calculations written in the text (`3+4=7`), in order, as one hash; None where there are none.

    Two solutions with the same calculations are one solution (RFT, arXiv:2308.01825, section 3.3, which compares the
    same list).
    """
    found = [re.sub(r"[\s$,]", "", m.group()).rstrip(".") for m in _EQUATION.finditer(text)]
    return hashlib.sha256("|".join(found).encode()).hexdigest()[:16] if found else None


def answer_tag(text: str) -> str | None:
    """What stands in the last `<answer>…</answer>`, or None."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return None if start < 0 else text[start + len("<answer>") : end].strip()


def last_line(text: str) -> str | None:
    """The last line that is not blank."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else None


def whole(text: str) -> str | None:
    return text.strip() or None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "whole": whole,
    "last_line": last_line,
    "last_number": last_number,
    "answer_tag": answer_tag,
}


def after_thinking(text: str) -> str | None:
    """The text after the last `</think>`; None where thinking was opened and never closed."""
    end = text.rfind("</think>")
    if end >= 0:
        text = text[end + len("</think>") :]
    return None if "<think>" in text else text


class _TextJudge:
    def isolates(self, payload: Payload) -> bool:
        return False

    def prepare(self, payload: Payload) -> None:
        return None


class ExactJudge(_TextJudge):
    """Accepts where the extracted answer is the gold answer, character by character after `normalise`."""

    def __init__(self, *, casefold: bool = False, wrapper: Sequence[str] | None = None, extract: str = "whole") -> None:
        self.casefold, self.wrapper, self.extract = casefold, wrapper, EXTRACTORS[extract]

    def judge(self, payload: Payload) -> Result:
        if payload["gold"] is None:
            return error("the task has no gold answer to compare with")
        found = self.extract(payload["completion"])
        if found is None:
            return reject("no answer found")
        got, gold = (unwrap(normalise(t), self.wrapper) for t in (found, payload["gold"]))
        is_same = normalise(got, casefold=self.casefold) == normalise(gold, casefold=self.casefold)
        return accept(f"answer {shown(got)}") if is_same else reject(f"answer {shown(got)}, gold {shown(gold)}")


class RegexJudge(_TextJudge):
    """Takes the last match of the pattern and compares its group with the gold answer as `ExactJudge` does.

    The group is the one named `answer`, else the first, else the whole match. A task without a gold answer accepts any
    match.
    """

    def __init__(self, *, pattern: str, casefold: bool = False, numeric: bool = False) -> None:
        self.pattern, self.casefold, self.numeric = re.compile(pattern), casefold, numeric
        self.group: str | int = "answer" if "answer" in self.pattern.groupindex else min(1, self.pattern.groups)

    def judge(self, payload: Payload) -> Result:
        match = None
        for found in self.pattern.finditer(payload["completion"]):
            match = found
        if match is None or match[self.group] is None:
            return reject("the pattern matches nothing")
        got, gold = match[self.group], payload["gold"]
        if gold is None:
            return accept(f"matched {shown(got)}")
        if self.numeric:
            is_same = last_number(got) is not None and last_number(got) == last_number(gold)
        else:
            is_same = normalise(got, casefold=self.casefold) == normalise(gold, casefold=self.casefold)
        return accept(f"matched {shown(got)}") if is_same else reject(f"matched {shown(got)}, gold {shown(gold)}")


class LastNumberJudge(_TextJudge):
    """Accepts where the last number of the text equals the last number of the gold answer, exactly."""

    def judge(self, payload: Payload) -> Result:
        gold = None if payload["gold"] is None else last_number(payload["gold"])
        if gold is None:
            return error(f"the gold answer {shown(str(payload['gold']))} holds no number")
        got = last_number(payload["completion"])
        key = equations_key(payload["completion"])
        if got is None:
            return reject("no number in the answer", key)
        return (
            accept(f"last number {got[:60]}", key)
            if got == gold
            else reject(f"last number {got[:60]}, gold {gold[:60]}", key)
        )


_PLACEHOLDER_WORDS = {
    "this", "is", "a", "the", "my", "your", "fake", "dummy", "sample", "example", "test", "placeholder", "redacted",
    "insert", "flag", "goes", "here", "todo", "",
}  # fmt: skip


class FlagJudge(_TextJudge):
    """Accepts where the submitted answer is the flag. A mention anywhere else does not count.

    The gold answer is the flag itself or `sha256:<64 hex digits>` of it.
    """

    def __init__(self, *, wrapper: Sequence[str] | None = None, casefold: bool = False, extract: str = "whole") -> None:
        self.wrapper, self.casefold, self.extract = wrapper, casefold, EXTRACTORS[extract]

    def judge(self, payload: Payload) -> Result:
        gold = payload["gold"]
        if (problem := flag_problem(gold, self.wrapper)) is not None:
            return error(problem)
        digest = _digest(gold)
        if self._is_in_prompt(payload["prompt"], gold, digest):
            return reject("the flag stands in the prompt: submitting it shows nothing")
        submission = payload["submission"]
        if submission is None:
            submission = self.extract(payload["completion"])
        if submission is None:
            return reject("nothing was submitted")
        return self._compare(submission, gold, digest)

    def _compare(self, submission: str, gold: str, digest: str | None) -> Result:
        forms = self._forms(submission)
        is_same = bool(forms & self._forms(gold)) if digest is None else digest in map(_sha256, forms)
        key = _sha256(min(forms, key=lambda f: (len(f), f)))[:16]
        return (
            accept(f"submitted {shown(submission)}", key)
            if is_same
            else reject(f"submitted {shown(submission)}, which is not the flag", key)
        )

    def _forms(self, text: str) -> set[str]:
        """The text with and without its wrapper, normalised: equal flags share both."""
        inner = normalise(unwrap(normalise(text), self.wrapper), casefold=self.casefold)
        if self.wrapper is None:
            return {inner}
        wrapped = normalise(f"{self.wrapper[0]}{inner}{self.wrapper[1]}", casefold=self.casefold)
        is_double = unwrap(inner, self.wrapper) != inner  # one layer is taken off, not two
        return {wrapped} if is_double else {inner, wrapped}

    def _is_in_prompt(self, prompt: str, gold: str, digest: str | None) -> bool:
        prompt = normalise(prompt, casefold=self.casefold)
        if digest is not None:
            words = {w for t in prompt.split() for w in (t, t.strip(".,;:!?\"'`()"))}
            return any(digest in {_sha256(f) for f in self._forms(w)} for w in words)
        return any(len(form) >= 6 and form in prompt for form in self._forms(gold))


def _digest(gold: str) -> str | None:
    """The hash that a hashed flag is given as, or None for a flag given as it is."""
    gold = gold.strip().lower()
    return gold.removeprefix("sha256:").strip() if gold.startswith("sha256:") else None


def flag_problem(gold: str | None, wrapper: Sequence[str] | None) -> str | None:
    """Why this gold answer is no flag, or None."""
    if gold is None or not gold.strip():
        return "the task has no flag"
    if (digest := _digest(gold)) is not None:
        is_hash = re.fullmatch(r"[0-9a-f]{64}", digest) is not None
        return None if is_hash else "the gold answer starts with sha256: and is not followed by 64 hex digits"
    inner = re.fullmatch(r"[\w-]*\{(.*)\}", normalise(gold), re.DOTALL)
    secret = unwrap(normalise(gold), wrapper) if inner is None else inner[1]
    words = re.split(r"[\s_-]+", secret.strip(".…*?<>[] ").casefold())
    is_placeholder = all(w in _PLACEHOLDER_WORDS or not w.strip("x") for w in words)
    return f"the gold answer {shown(gold)} is a placeholder, not a flag" if is_placeholder else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


TEXT_JUDGES: dict[str, Callable[..., Any]] = {
    "exact": ExactJudge,
    "regex": RegexJudge,
    "last_number": LastNumberJudge,
    "flag": FlagJudge,
}
