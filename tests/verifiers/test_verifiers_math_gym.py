"""math-verify and reasoning-gym as verifiers: what they accept, and what their packages would let through."""

import threading

import pytest

from tutelage.data.tasks import reasoning_gym_tasks
from tutelage.errors import ConfigError, VerifierError
from tutelage.types import Status, Task, Trajectory
from tutelage.verifiers import GymVerifier, MathVerifier, judges
from tutelage.verifiers.judges.gym import EVALUATING, REFUSED, is_plain
from tutelage.verifiers.judges.mathematics import last_boxed

ACCEPT, REJECT, ERROR = Status.ACCEPT, Status.REJECT, Status.ERROR


def said(completion, **fields):
    return Trajectory(id="x", task_id="t", task_hash="h", spans=(), completion=completion, **fields)


def asked(answer):
    return Task(id="t", messages=({"role": "user", "content": "?"},), answer=answer)


@pytest.fixture(scope="module")
def mathematics():
    with MathVerifier(workers=1, limits={"time_s": 8.0}) as v:
        yield v


@pytest.fixture(scope="module")
def gym():
    with GymVerifier(workers=1, limits={"time_s": 8.0}) as v:
        yield v


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed {3}", "3"),
        ("\\boxed{3} and \\boxed{4", "3"),
        ("\\boxed", None),
        ("no box", None),
        ("\\boxed{}", ""),
    ],
)
def test_the_last_whole_box_is_the_answer(text, box):
    assert last_boxed(text) == box


def test_math_verdicts(mathematics):
    table = [
        ("7", "The answer is 7.", ACCEPT),
        ("7", "\\boxed{7}", ACCEPT),
        ("7", "\\boxed{5} wait, \\boxed{7}", ACCEPT),
        ("7", "\\boxed{7} wait, \\boxed{5}", REJECT),
        ("7", "7, but \\boxed{8}", REJECT),
        ("\\frac{1}{2}", "\\boxed{0.5}", ACCEPT),
        ("\\frac{1}{2}", "$\\frac{2}{4}$", ACCEPT),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\boxed{(3, \\pi/2)}", ACCEPT),
        ("\\$36", "\\boxed{36}", ACCEPT),
        ("x^2+2x+1", "\\boxed{(x+1)^2}", ACCEPT),
        ("7", "I do not know", REJECT),
        ("7", "\\boxed{}", REJECT),
        ("7", "\x00\ud800 \\boxed{7}", ACCEPT),
        ("7", "1" * 5000, REJECT),
        (None, "7", ERROR),
        ("", "7", ERROR),
    ]
    verdicts = mathematics.judge_many([(asked(gold), [said(text)]) for gold, text, _ in table])
    assert [(g, t[:40], v[0].status) for (g, t, _), v in zip(table, verdicts, strict=True)] == [
        (g, t[:40], s) for g, t, s in table
    ]


def test_math_works_from_a_thread(mathematics):
    got = []
    thread = threading.Thread(target=lambda: got.extend(mathematics.judge(asked("7"), [said("\\boxed{7}")])))
    thread.start()
    thread.join()
    assert got[0].is_accepted


def test_a_power_tower_costs_its_own_verdict_and_not_the_import():
    with MathVerifier(workers=1, limits={"time_s": 1.5, "cpu_s": 30}) as v:
        tower = "\\boxed{9^{9^{9^{9^9}}}+1}"
        got = v.judge(asked("\\boxed{8^{8^{8^{8^8}}}}"), [said(tower)]) + v.judge(asked("7"), [said("7")])
        (pid,) = v.pool.pids()
        assert v.judge(asked("7"), [said("7")])[0].is_accepted
        assert v.pool.pids() == [pid]
    assert got[0].status is not ACCEPT
    assert got[1].is_accepted


def test_math_box_may_be_required():
    judge = judges.build("math_verify", {"require_box": True})
    for text, status in [("7", "reject"), ("\\boxed{7}", "accept")]:
        assert judge.judge({"gold": "7", "completion": text})["status"] == status


ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_chain_sum_verdicts(gym):
    tasks = reasoning_gym_tasks("chain_sum", 4, config=ONE_DIGIT).tasks
    gym.check(tasks)
    for task in tasks:
        gold = task.answer
        texts = [gold, f" {gold}.0 ", f"+0{gold}", f"The answer is {gold}.", f"{gold} {gold}", "x", "nan", "\ud800"]
        got = gym.judge(task, [said(t) for t in texts])
        right = [True, True, not gold.startswith("-"), False, False, False, False, False]
        assert [v.is_accepted for v in got] == right, task
        assert all(v.status is not ERROR for v in got)
        assert got[0].key is None
    extracting = judges.build("reasoning_gym", {"extract": "last_number"})
    for text, status in [(f"The answer is {gold}.", "accept"), ("none", "reject"), (f"{int(gold) + 1}", "reject")]:
        payload = {"completion": text, "gym": task.metadata["reasoning_gym"]}
        assert extracting.judge(payload)["status"] == status


def test_another_tasks_gold_can_be_used_for_the_chance_level(gym):
    first, second = reasoning_gym_tasks("chain_sum", 2, config=ONE_DIGIT).tasks
    assert first.answer != second.answer
    assert gym.judge(second, [said(first.answer)])[0].status is REJECT


def test_containing_the_answer_is_not_giving_it(gym):
    (task,) = reasoning_gym_tasks("letter_counting", 1).tasks
    got = gym.judge(task, [said(task.answer), said(f"It is {task.answer}")])
    assert [v.status for v in got] == [ACCEPT, REJECT]
    (task,) = reasoning_gym_tasks("caesar_cipher", 1).tasks
    (verdict,) = gym.judge(task, [said(f"{task.answer}!")])
    assert verdict.status is REJECT and 0.5 < verdict.score < 1
    lenient = judges.build("reasoning_gym", {"threshold": 0.5})
    payload = {"completion": f"{task.answer}!", "gym": task.metadata["reasoning_gym"]}
    assert lenient.judge(payload)["status"] == "accept"


def test_entries_that_json_would_change_are_made_again(gym):
    for name in ("arc_agi", "string_synthesis"):
        (task,) = reasoning_gym_tasks(name, 1).tasks
        assert "entry" not in task.metadata["reasoning_gym"]
        got = gym.judge(task, [said(task.answer), said("1")])
        assert [v.status for v in got] == [ACCEPT, REJECT]


def test_a_malformed_answer_is_rejected_and_a_broken_entry_is_an_error(gym):
    (task,) = reasoning_gym_tasks("prime_factorization", 1).tasks
    got = gym.judge(task, [said(task.answer), said("a b")])
    assert [v.status for v in got] == [ACCEPT, REJECT]
    assert "malformed: ValueError" in got[1].reason
    broken = {**task.metadata["reasoning_gym"]["entry"], "answer": "not a number"}
    metadata = {"reasoning_gym": {**task.metadata["reasoning_gym"], "entry": broken}}
    spoilt = Task(id="t", messages=task.messages, answer="x", metadata=metadata)
    assert [v.status for v in gym.judge(spoilt, [said("2 x 3")])] == [ERROR]


def test_refused_tasks_are_named_before_anything_is_sampled(gym):
    for name in ("game_of_life_halting", "puzzle24"):
        (task,) = reasoning_gym_tasks(name, 1).tasks
        with pytest.raises(VerifierError, match=f"{name} is refused: its grader"):
            gym.check([task])
        got = gym.judge(task, [said("zzz"), said("6*4*1*1")])
        assert [v.status for v in got] == [ERROR, ERROR] and REFUSED[name] in got[0].reason
    plain = asked("7")
    with pytest.raises(VerifierError, match="reasoning_gym_tasks"):
        gym.check([plain])
    assert gym.judge(plain, [said("7")])[0].status is ERROR
    unknown = Task(id="t", messages=(), metadata={"reasoning_gym": {"name": "nope", "entry": {}}})
    (verdict,) = gym.judge(unknown, [said("7")])
    assert verdict.status is ERROR and "set up for this task" in verdict.reason


PAYLOAD = "__import__('pathlib').Path('{path}').write_text('x')"


@pytest.mark.parametrize("name", sorted(EVALUATING))
def test_graders_that_evaluate_the_answer_never_run_it(gym, tmp_path, name):
    (task,) = reasoning_gym_tasks(name, 1).tasks
    mark = tmp_path / "ran"
    payload = PAYLOAD.format(path=mark)
    texts = [payload, f"[{payload}]", f"({payload} and 0) or 24", f"'a'+{payload}", payload.replace("_", "\uff3f")]
    got = gym.judge(task, [said(t) for t in texts])
    assert [v.status for v in got] == [REJECT] * len(texts)
    assert not mark.exists()


def test_the_same_payload_does_run_without_the_closed_list(tmp_path):
    """The attack is a real one: the grader itself runs it."""
    gym_judge = judges.build("reasoning_gym", {})
    (task,) = reasoning_gym_tasks("n_queens", 1).tasks
    made_from = task.metadata["reasoning_gym"]
    mark = tmp_path / "ran"
    gym_judge._scorer(made_from).score_answer(PAYLOAD.format(path=mark), gym_judge._entry(made_from))
    assert mark.exists()


@pytest.mark.parametrize(
    ("name", "answer", "plain"),
    [
        ("countdown", "(3 + 4) * 2 - 1", True),
        ("countdown", "9**9**9", False),
        ("countdown", "9* *9", False),
        ("countdown", "x", False),
        ("n_queens", "[['_', 'Q'], ['Q', '_']]", True),
        ("n_queens", "print(1)", False),
        ("n_queens", "a.b", False),
        ("n_queens", "[x for x in y]", True),
        ("n_queens", "'a.b'", True),
        ("binary_matrix", "0 1\n1 0", True),
        ("simple_integration", "x**3/3 + sin(x) + C", True),
        ("simple_integration", "Integral(x, x)", False),
        ("simple_integration", "x.__class__", False),
        ("simple_integration", "x. real", False),
        ("simple_integration", "1.5*x", True),
        ("polynomial_multiplication", "lambda: 1", False),
        ("spiral_matrix", "1 " * 20_000, False),
    ],
)
def test_closed_lists(name, answer, plain):
    assert is_plain(name, answer) is plain


def test_an_unevaluated_integral_is_no_integral(gym):
    (task,) = reasoning_gym_tasks("simple_integration", 1).tasks
    entry = task.metadata["reasoning_gym"]["entry"]
    integrand, variable = entry["metadata"]["integrand"], entry["metadata"]["variable"]
    got = gym.judge(task, [said(task.answer), said(f"Integral({integrand}, {variable})")])
    assert [v.status for v in got] == [ACCEPT, REJECT]


def test_tasks_with_several_answers_have_the_answer_as_key(gym):
    (task,) = reasoning_gym_tasks("countdown", 1).tasks
    got = gym.judge(task, [said(task.answer), said(f"({task.answer})")])
    assert [v.status for v in got] == [ACCEPT, ACCEPT]
    assert got[0].key and got[0].key != got[1].key


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match=r"threshold must be in \(0, 1\], got 0"):
        GymVerifier(threshold=0)
    with pytest.raises(ConfigError, match="auto, text or answer, got 'x'"):
        GymVerifier(key="x")
    with pytest.raises(ConfigError, match="extract must be one of"):
        GymVerifier(extract="x")
    for make in (MathVerifier, GymVerifier):
        with pytest.raises(ConfigError, match="in_process"):
            make(in_process=True)
