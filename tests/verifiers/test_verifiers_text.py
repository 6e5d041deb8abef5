"""Exact, regex, last number and flag: what counts as the same answer, and what never does."""

import hashlib
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.errors import ConfigError, VerifierError
from tutelage.types import Status, Task, Trajectory
from tutelage.verifiers import ExactVerifier, FlagVerifier, LastNumberVerifier, RegexVerifier, judges
from tutelage.verifiers.judges.text import equations_key, last_number


def task(answer, prompt="What?", **metadata):
    return Task(id="t", messages=({"role": "user", "content": prompt},), answer=answer, metadata=metadata)


def said(completion, **fields):
    return Trajectory(id="x", task_id="t", task_hash="h", spans=(), completion=completion, **fields)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 7.", "7"),
        ("7", "7"),
        ("**7**", "7"),
        ("costs $1,234.50 in all", "1234.5"),
        ("-$5", "-5"),
        ("it is -3", "-3"),
        ("x = -3", "-3"),
        ("x = \u22123", "-3"),
        ("5-3", "3"),
        ("f(2)-3", "3"),
        ("+07", "7"),
        ("-0", "0"),
        ("0.50", "0.5"),
        (".5", "0.5"),
        ("50%", "50"),
        ("7kg", "7"),
        ("2.5e3", "2500"),
        ("25e-4.", "0.0025"),
        ("1/2", "0.5"),
        ("The answer is 3/4.", "0.75"),
        ("-4/6", "-2/3"),
        ("8 / 4", "2"),
        ("1/0", None),
        ("3, 4 and 5", "5"),
        ("1,2", "2"),
        ("12,345,678", "12345678"),
        ("1,2345", "2345"),
        ("gpt4 says H2O", None),
        ("v1.2.3", None),
        ("seven", None),
        ("", None),
        ("\uff17", None),  # full-width seven
        ("7 \ud800", "7"),
        ("7\x00", "7"),
    ],
)
def test_last_number_reads(text, value):
    assert last_number(text) == value


@given(
    st.integers(-(10**12), 10**12),
    st.integers(0, 6),
    st.sampled_from(["", "$", "about "]),
    st.sampled_from(["", ".", " apples", "%", ")"]),
)
@settings(max_examples=100, deadline=None)
def test_last_number_is_the_value_however_it_is_written(n, places, before, after):
    value = Fraction(n, 10**places)
    sign = "-" if n < 0 else ""
    digits = str(abs(n)).rjust(places + 1, "0")
    whole, frac = digits[: len(digits) - places], digits[len(digits) - places :]
    plain = f"{sign}{whole}{'.' + frac if places else ''}"
    grouped = f"{sign}{int(whole):,}{'.' + frac if places else ''}"
    for written in (plain, grouped):
        assert Fraction(last_number(f"so 1 and 2 make {before}{written}{after}")) == value


def test_last_number_is_exact_at_any_length():
    long = "7" * 6000
    assert last_number(f"{long}.0") == long
    assert last_number(long[:-1] + "8") != last_number(long)
    assert last_number(f"{long}/{long}") is None


def test_last_number_is_linear_in_the_text():
    start = time.perf_counter()
    for text in ("1" * 200_000, "1," * 100_000, "-" * 200_000, "$" * 200_000, "1/" * 100_000, "1 = " * 50_000):
        last_number(text)
        equations_key(text)
    assert time.perf_counter() - start < 5


def test_solutions_with_the_same_calculations_are_one_solution():
    first = equations_key("3 + 4 = 7, and 7*2=14. So 14")
    assert first == equations_key("We add: 3+4=7. Then 7 * 2 = 14")
    assert first != equations_key("7*2=14 after 3+4=7")
    assert first != equations_key("3 + 4 = 8, and 7*2=14")
    assert equations_key("It is seven.") is None


def test_last_number_verdicts():
    with LastNumberVerifier(workers=1) as v:
        got = v.judge(task("#### 1,007"), [said("3 + 4 = 7, so 1007.0"), said("1008"), said("no idea")])
        assert [g.status for g in got] == [Status.ACCEPT, Status.REJECT, Status.REJECT]
        assert [g.score for g in got] == [1.0, 0.0, 0.0]
        assert got[1].reason == "last number 1008, gold 1007"
        assert got[0].key and got[0].verifier == "last_number" and got[0].version
        for gold in (None, "none"):
            (verdict,) = v.judge(task(gold), [said("7")])
            assert verdict.status is Status.ERROR and verdict.score is None


@pytest.mark.parametrize("make", [ExactVerifier, LastNumberVerifier])
def test_in_process_and_worker_give_the_same_verdicts(make):
    answers = ["7", " 7 ", "8", "x", "", "7\ud800", "\x00", "<think>7</think>8", "7" * 5000]
    with make(workers=1) as worker, make(workers=1, in_process=True) as here:
        assert worker.judge(task("7"), list(map(said, answers))) == here.judge(task("7"), list(map(said, answers)))
        assert here.pool.pids() == []


def test_truncated_empty_and_unfinished_are_rejected_even_with_the_answer_in_them():
    with LastNumberVerifier(in_process=True) as v:
        got = v.judge(
            task("7"),
            [said("7", finish="length"), said(""), said(" \u200b\n"), said("<think>7"), said("<think>7</think>  ")],
        )
        assert [g.status for g in got] == [Status.REJECT] * 5
        assert [g.reason for g in got] == [
            "truncated",
            "empty",
            "empty",
            "thinking that never ends",
            "nothing after the thinking",
        ]
        assert v.judge(task("7"), [said("<think>it is 7</think> 8")])[0].reason == "last number 8, gold 7"
    with LastNumberVerifier(in_process=True, reject_truncated=False, strip_thinking=False) as v:
        got = v.judge(task("7"), [said("7", finish="length"), said("<think>7")])
        assert [g.status for g in got] == [Status.ACCEPT] * 2


def test_settings_change_the_version():
    versions = {
        LastNumberVerifier().version,
        LastNumberVerifier(reject_truncated=False).version,
        ExactVerifier().version,
        ExactVerifier(casefold=True).version,
    }
    assert len(versions) == 4


def test_exact_compares_characters():
    with ExactVerifier(in_process=True) as v:
        same = ["caf\u00e9", "cafe\u0301", " caf\u00e9\r\n", "caf\u200b\u00e9", "\ufeffcaf\u00e9"]
        assert all(g.is_accepted for g in v.judge(task("caf\u00e9"), list(map(said, same))))
        other = ["cafe", "Caf\u00e9", "caf\u00e9 caf\u00e9", "c\u0430f\u00e9", "the caf\u00e9"]
        assert not any(g.is_accepted for g in v.judge(task("caf\u00e9"), list(map(said, other))))
        assert v.judge(task(None), [said("x")])[0].status is Status.ERROR
    with ExactVerifier(in_process=True, casefold=True, wrapper=["\\boxed{", "}"], extract="last_line") as v:
        got = v.judge(task("Yes"), [said("so\n\\boxed{yes}"), said("YES"), said("\\boxed{\\boxed{yes}}")])
        assert [g.is_accepted for g in got] == [True, True, False]


def test_extract_takes_the_part_that_was_asked_for():
    text = "first 3\n<answer> 5 </answer> then\n<answer>7</answer>\nbye"
    for extract, answer in [("whole", text), ("last_line", "bye"), ("last_number", "7"), ("answer_tag", "7")]:
        with ExactVerifier(in_process=True, extract=extract) as v:
            assert v.judge(task(answer), [said(text)])[0].is_accepted, extract
    with ExactVerifier(in_process=True, extract="answer_tag") as v:
        assert v.judge(task("7"), [said("7</answer>")])[0].reason == "no answer found"


def test_regex_takes_the_last_match():
    with RegexVerifier(pattern=r"answer is (?P<unit>\$)?(?P<answer>\S+?)\.?$", workers=1) as v:
        assert v.judge(task("8"), [said("the answer is $8.")])[0].is_accepted
    with RegexVerifier(pattern=r"= *(\S+)", workers=1) as v:
        got = v.judge(task("7"), [said("x = 5 = 7"), said("x = 7 = 5"), said("7"), said("= 7.0")])
        assert [g.is_accepted for g in got] == [True, False, False, False]
        assert v.judge(task(None), [said("= 3")])[0].is_accepted
    with RegexVerifier(pattern=r"= *(\S+)", numeric=True, workers=1) as v:
        assert v.judge(task("7"), [said("= 7.0")])[0].is_accepted


def test_a_pattern_that_never_ends_costs_its_own_verdict():
    with RegexVerifier(pattern=r"(a+)+b", workers=1, limits={"time_s": 0.3}) as v:
        got = v.judge(task("aab"), [said("aab"), said("a" * 40), said("aab")])
    assert [g.status for g in got] == [Status.REJECT, Status.ERROR, Status.REJECT]
    assert got[1].reason == "no verdict within 0.3 s"


FLAG = "picoCTF{s0me_th1ng}"


@pytest.mark.parametrize(
    ("submitted", "is_right"),
    [
        (FLAG, True),
        (f"  {FLAG}\n", True),
        ("s0me_th1ng", True),
        ("picoCTF{s0me\u200b_th1ng}", True),
        (f"the flag is {FLAG}", False),
        (f"{FLAG} {FLAG}", False),
        (f"picoCTF{{a}}\n{FLAG}", False),
        ("picoCTF{S0me_th1ng}", False),
        ("picoCTF{s0me_th\u0456ng}", False),
        ("picoCTF{picoCTF{s0me_th1ng}}", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("gold", [FLAG, "sha256:" + hashlib.sha256(FLAG.encode()).hexdigest()])
def test_flag_is_what_was_submitted(gold, submitted, is_right):
    judge = judges.build("flag", {"wrapper": ["picoCTF{", "}"]})
    payload = {"gold": gold, "completion": f"I think {FLAG}", "prompt": "Find it.", "submission": submitted}
    assert (judge.judge(payload)["status"] == "accept") is is_right


def test_flag_verdicts():
    with FlagVerifier(wrapper=["picoCTF{", "}"], max_attempts=2, workers=1) as v:
        got = v.judge(
            task(FLAG, prompt="Find it."),
            [
                said(FLAG),
                said(f"It is {FLAG}"),
                said("", extra={"submission": FLAG}),
                said(FLAG, extra={"submission": "picoCTF{no}"}),
                said("", extra={"submission": ["a", FLAG]}),
                said("", extra={"submission": [FLAG, "a"]}),
                said("", extra={"submission": ["a", "b", FLAG]}),
            ],
        )
        assert [g.is_accepted for g in got] == [True, False, True, False, True, False, False]
        assert got[6].reason == "3 submissions where 2 are allowed"
        assert got[0].key == got[2].key != got[3].key
        hashed = "sha256:" + hashlib.sha256(FLAG.encode()).hexdigest()
        for gold in (FLAG, hashed):
            (shown,) = v.judge(task(gold, prompt=f"For example {FLAG}, or so."), [said(FLAG)])
            assert shown.status is Status.REJECT and "prompt" in shown.reason
        tool = Task(id="t", messages=({"role": "user", "content": [{"type": "text", "text": FLAG}]},), answer=FLAG)
        assert "prompt" in v.judge(tool, [said(FLAG)])[0].reason
        short = v.judge(task("picoCTF{p}", prompt="p is a letter"), [said("picoCTF{p}"), said("picoCTF{q}")])
        assert [g.is_accepted for g in short] == [True, False]


@pytest.mark.parametrize(
    "gold", [None, " ", "flag{...}", "flag{fake_flag}", "picoCTF{}", "flag{xxxx}", "FLAG{your_flag_here}", "sha256:abc"]
)
def test_a_placeholder_is_no_flag(gold):
    with FlagVerifier(workers=1) as v:
        with pytest.raises(VerifierError, match="cannot judge 1 of the tasks; the first is 't'"):
            v.check([task(gold)])
        (verdict,) = v.judge(task(gold), [said(gold or "x")]) if gold != " " else v.judge(task(gold), [said("x")])
        assert verdict.status is Status.ERROR
        v.check([task("flag{not_a_fake_one}")])


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match="whole, last_line, last_number, answer_tag, got 'last'"):
        ExactVerifier(extract="last")
    with pytest.raises(ConfigError, match="prefix and a suffix"):
        ExactVerifier(wrapper="boxed")
    with pytest.raises(ConfigError, match=r"'\(' is no regular expression"):
        RegexVerifier(pattern="(")
    with pytest.raises(ConfigError, match="in_process"):
        RegexVerifier(pattern="a", in_process=True)
    with pytest.raises(ConfigError, match="time_s must be positive, got 0"):
        ExactVerifier(limits={"time_s": 0})
