"""Task sets: what is read, what is left out and why, and splits that no question crosses."""

import json
import os
from pathlib import Path

import pytest

from tutelage.data.tasks import (
    CANONICAL,
    commutative_terms,
    gsm8k,
    jsonl,
    math500,
    reasoning_gym_tasks,
    same_question,
    without_overlap,
)
from tutelage.errors import ConfigError, DataError

SHARED = Path(os.environ.get("TUTELAGE_SHARED_DATA", "../shared/data"))
ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
TWO_DIGITS = {**ONE_DIGIT, "min_digits": 2, "max_digits": 2}


def write(path, *records):
    path.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in records))
    return path


# -- files ------------------------------------------------------------------------------------------------------------


def test_gsm8k_reads_gold_and_solution(tmp_path):
    write(
        tmp_path / "train.jsonl",
        {"question": "How many?", "answer": "It is 1000+234=<<1000+234=1234>>1234.\n#### 1,234"},
        {"question": "And {now}?", "answer": "#### -5"},
    )
    tasks, problems = gsm8k(tmp_path, system="Be brief.", prompt="Q: {question}\nEnd with #### {number}")
    assert problems == []
    assert [t.answer for t in tasks] == ["1234", "-5"]
    assert tasks[0].metadata["solution"] == "It is 1000+234=1234."
    assert [m["content"] for m in tasks[1].messages] == ["Be brief.", "Q: And {now}?\nEnd with #### {number}"]
    assert tasks[0].id == "gsm8k-train-1" and tasks[0].name == "gsm8k"
    assert tasks[0].metadata["origin"] == "train.jsonl:1"


def test_what_cannot_be_read_is_listed_with_line_and_reason(tmp_path):
    good = {"question": "a?", "answer": "#### 1"}
    path = write(
        tmp_path / "train.jsonl",
        good,
        b"",
        b'{"question": "b?", "answer"',
        b'{"question": "c\xff"}',
        b"[1]",
        {"question": "d?"},
        {"question": " ", "answer": "#### 1"},
        {"question": "e?", "answer": "1"},
        {"question": "f?", "answer": 3},
        good,
        b'{"question": "g?", "answer": NaN}',
        b"[" * 100_000,
        {"question": "z?", "answer": "#### 2"},
    )
    tasks, problems = gsm8k(path)
    assert [t.answer for t in tasks] == ["1", "2"]
    assert [p.origin for p in problems] == [f"train.jsonl:{i}" for i in (3, 4, 5, 6, 7, 8, 9, 10, 11, 12)]
    expected = [
        "is not JSON",
        "is not UTF-8",
        "must be a JSON object, got list",
        'field "answer" must be a text, got nothing',
        'field "question" must be a text, got an empty text',
        "must end with",
        'field "answer" must be a text, got int',
        "asks the same as line 1",
        "NaN is no JSON number",
        "is not JSON",
    ]
    assert [e in p.reason for e, p in zip(expected, problems, strict=True)] == [True] * len(expected)


def test_an_unusable_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"a task file is needed at .*nothing\.jsonl"):
        gsm8k(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="a task file is needed"):
        gsm8k(tmp_path)
    with pytest.raises(DataError, match="holds no usable task: it is empty"):
        jsonl(write(tmp_path / "empty.jsonl", b""))
    with pytest.raises(DataError, match=r"the first of 2 problems: bad\.jsonl:1: is not JSON"):
        jsonl(write(tmp_path / "bad.jsonl", b"x", b"y"))
    with pytest.raises(ConfigError, match=r"prompt must hold .*, got 'Q'"):
        jsonl(write(tmp_path / "a.jsonl", {"prompt": "a"}), prompt="Q")


def test_jsonl_takes_prompts_and_messages(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = write(
        tmp_path / "a.jsonl",
        {"id": "one", "prompt": "p", "answer": 7, "level": 3, "name": "sums"},
        {"messages": chat, "answer": "x", "tools": [{"type": "function"}]},
        {"prompt": "q"},
        {"messages": [*chat, {"role": "assistant", "content": "a"}]},
        {"messages": []},
        {"messages": ["u"]},
        {"prompt": "r", "answer": True},
        {"prompt": "s", "answer": [1]},
        {"id": "one", "prompt": "t"},
    )
    tasks, problems = jsonl(path, system="S", prompt="<{question}>", name="mine")
    assert [t.id for t in tasks] == ["one", "a-2", "a-3"]
    assert [t.name for t in tasks] == ["sums", "mine", "mine"]
    assert [t.answer for t in tasks] == ["7", "x", None]
    assert tasks[0].messages == ({"role": "system", "content": "S"}, {"role": "user", "content": "<p>"})
    assert tasks[0].metadata == {"level": 3, "origin": "a.jsonl:1"}
    assert tasks[1].messages == tuple(chat) and tasks[1].tools == ({"type": "function"},)
    reasons = ["must end before", "must be a list", "message 0", "got bool", "got list", "same id 'one' as line 1"]
    assert [r in p.reason for r, p in zip(reasons, problems, strict=True)] == [True] * len(reasons)


def test_overlap_is_taken_out_of_training(tmp_path):
    train = jsonl(write(tmp_path / "a.jsonl", {"prompt": "What is  2?"}, {"prompt": "What is 3?"})).tasks
    heldout = jsonl(write(tmp_path / "b.jsonl", {"prompt": "what is 2?", "id": "h"})).tasks
    kept, problems = without_overlap(train, heldout)
    assert [t.id for t in kept] == ["a-2"]
    assert problems[0].origin == "a-1" and "held-out task 'h'" in problems[0].reason


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")
def test_the_real_files_are_read_whole():
    train, test = gsm8k(SHARED / "gsm8k"), gsm8k(SHARED / "gsm8k", split="test")
    assert (len(train.tasks), len(test.tasks)) == (7473, 1319)
    assert train.problems == test.problems == []
    assert without_overlap(train.tasks, test.tasks).problems == []
    assert all(t.answer.lstrip("-").replace(".", "").isdigit() for t in train.tasks + test.tasks)
    hard = math500(SHARED / "math500")
    assert len(hard.tasks) == 500 and hard.problems == []
    assert set(hard.tasks[0].metadata) >= {"subject", "level", "solution"}


# -- reasoning-gym ----------------------------------------------------------------------------------------------------


def questions(tasks):
    return {t.messages[-1]["content"] for t in tasks}


def swapped(task):
    return task.metadata["canonical"]


def gym(name, size, **settings):
    tasks, problems = reasoning_gym_tasks(name, size, **settings)
    assert problems == []
    return tasks


def test_canonical_forms():
    def record(expression):
        return {"question": f"{expression} =", "metadata": {"expression": expression}}

    forms = [commutative_terms(record(e)) for e in ("3 + 4", "4 + 3", "3 - 4", "4 - 3", "3 + 5", "13 + 4")]
    assert forms[0] == forms[1] and forms[2] == forms[3]
    assert len(set(forms)) == 4
    assert commutative_terms(record("1 + 2 - 3")) == commutative_terms(record("3 + 1 - 2"))
    assert same_question({"question": " What\n is 2? "}) == same_question({"question": "what is 2?"})
    with pytest.raises(DataError, match="expression"):
        commutative_terms({"question": "x", "metadata": {}})


def test_chain_sum_is_split_whole_with_swapped_terms_on_one_side():
    settings = {"config": ONE_DIGIT, "heldout": 77, "canonical": "commutative_terms"}
    train, heldout = gym("chain_sum", 123, **settings), gym("chain_sum", None, split="heldout", **settings)
    assert (len(train), len(heldout)) == (123, 77)
    assert len(questions(train) | questions(heldout)) == 200
    assert not {swapped(t) for t in train} & {swapped(t) for t in heldout}
    for task in train + heldout:
        a, op, b = task.metadata["reasoning_gym"]["entry"]["metadata"]["expression"].split()
        assert int(task.answer) == (int(a) + int(b) if op == "+" else int(a) - int(b))
    assert gym("chain_sum", None, **settings) == train
    with pytest.raises(
        DataError, match=r"200 distinct questions; with 77 held out there are 123 for train, and size=124"
    ):
        gym("chain_sum", 124, **settings)
    with pytest.raises(DataError, match="of which 200 can be held out, and heldout=201"):
        gym("chain_sum", 1, config=ONE_DIGIT, heldout=201)


def test_without_the_canonical_form_swapped_terms_do_cross():
    settings = {"config": ONE_DIGIT, "heldout": 77}
    train, heldout = gym("chain_sum", 123, **settings), gym("chain_sum", 77, split="heldout", **settings)
    assert not questions(train) & questions(heldout)
    crossing = {commutative_terms(t.metadata["reasoning_gym"]["entry"]) for t in train}
    assert crossing & {commutative_terms(t.metadata["reasoning_gym"]["entry"]) for t in heldout}


@pytest.mark.parametrize("name", ["chain_sum", "letter_counting", "acre"])
def test_sides_are_disjoint_distinct_and_fit_together_whatever_the_size(name):
    settings = {"config": TWO_DIGITS if name == "chain_sum" else {}, "heldout": 40}
    heldout = gym(name, None, split="heldout", **settings)
    small, large = gym(name, 10, **settings), gym(name, 120, **settings)
    assert large[:10] == small
    assert gym(name, 15, split="heldout", **settings) == heldout[:15]
    assert len(questions(heldout)) == 40 and len(questions(large)) == 120
    assert not questions(heldout) & questions(large)
    assert len({t.id for t in heldout + large}) == 160


def test_in_a_large_set_the_swapped_form_of_a_held_out_question_is_left_out():
    settings = {"config": TWO_DIGITS, "heldout": 40}
    train, heldout = (
        gym("chain_sum", size, split=split, canonical="commutative_terms", **settings)
        for size, split in ((4000, "train"), (40, "heldout"))
    )
    assert not {swapped(t) for t in train} & {swapped(t) for t in heldout}
    careless = gym("chain_sum", 4000, **settings)
    forms = {commutative_terms(t.metadata["reasoning_gym"]["entry"]) for t in careless}
    assert forms & {swapped(t) for t in heldout}


def test_equal_seeds_give_equal_tasks_and_neighbouring_seeds_share_few():
    first = gym("chain_sum", 800, config=TWO_DIGITS, seed=1)
    assert gym("chain_sum", 800, config=TWO_DIGITS, seed=1) == first
    import reasoning_gym

    def plain(seed):
        return {x["question"] for x in reasoning_gym.create_dataset("chain_sum", seed=seed, size=100, **TWO_DIGITS)}

    assert len(plain(1) & plain(2)) >= 95  # what the package does
    assert len(questions(first) & questions(gym("chain_sum", 800, config=TWO_DIGITS, seed=2))) < 100  # of 16,200


def test_tasks_hold_what_the_grader_needs():
    (task,) = gym("chain_sum", 1, config=ONE_DIGIT, prompt="Q: {question}", system="S")
    made_from = task.metadata["reasoning_gym"]
    assert made_from["name"] == "chain_sum" and made_from["config"] == ONE_DIGIT
    assert json.loads(json.dumps(made_from)) == made_from
    assert made_from["entry"]["answer"] == task.answer
    assert task.messages[0]["content"] == "S" and task.messages[1]["content"] == f"Q: {made_from['entry']['question']}"
    (tuples,) = gym("string_synthesis", 1)
    assert set(tuples.metadata["reasoning_gym"]) == {"name", "config", "seed", "size", "index"}
    (several,) = gym("rush_hour", 1)
    assert several.answer is None


def test_a_canonical_function_is_the_users_hook():
    def by_answer(record):
        return record["answer"]

    settings = {"config": ONE_DIGIT, "heldout": 30, "canonical": by_answer}
    train, heldout = gym("chain_sum", None, **settings), gym("chain_sum", None, split="heldout", **settings)
    assert len(heldout) == 30 and len(train) == 170
    assert not {t.answer for t in train} & {t.answer for t in heldout}
    assert set(CANONICAL) == {"question", "commutative_terms"}


def test_wrong_settings_are_named():
    for settings, message in [
        ({"name": "chain_sun"}, "no task 'chain_sun' \\(did you mean 'chain_sum'\\?\\)"),
        ({"split": "test"}, '"train" or "heldout", got \'test\''),
        ({"split": "heldout"}, "heldout >= 0, got size=5, heldout=0"),
        ({"size": 0}, "size >= 1"),
        ({"config": {"seed": 3}}, "seed must not be in config"),
        ({"config": {"terms": 3}}, "does not take the settings"),
        ({"config": {"min_terms": 5, "max_terms": 2}}, "max_terms must be >= min_terms"),
        ({"canonical": "x"}, "question, commutative_terms or a function, got 'x'"),
        ({"prompt": "x"}, "prompt must hold"),
    ]:
        with pytest.raises(ConfigError, match=message):
            reasoning_gym_tasks(**{"name": "chain_sum", "size": 5, **settings})
