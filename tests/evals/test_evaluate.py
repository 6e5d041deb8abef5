"""`evaluate` end to end on a sampler whose answers are known, and the comparisons made from its results."""

import json
import math

import pytest

from tutelage.errors import ConfigError, DataError, SamplerError, VerifierError
from tutelage.evals import (
    EvalResult,
    TaskCounts,
    chance_level,
    compare,
    compare_controls,
    comparison_rows,
    evaluate,
    pass_at_k_by_family,
    pass_at_k_over,
)
from tutelage.numerics.statistics import wilson
from tutelage.types import (
    Completion,
    SamplingParams,
    Span,
    Status,
    Task,
    Trajectory,
    Verdict,
    seed_for,
)

PARAMS = SamplingParams(temperature=1.0, max_new_tokens=8)


def make_tasks(answers, name="sums"):
    return [
        Task(id=f"{name}-{i}", messages=({"role": "user", "content": f"{name} {i}?"},), answer=a, name=name)
        for i, a in enumerate(answers)
    ]


class Text:
    """Renders a task to the bytes of its id."""

    fingerprint = "bytes"

    def render_prompt(self, task):
        ids = task.id.encode()
        return [
            Span(token_ids=(0,), role="template", author="template"),
            Span(token_ids=tuple(ids), role="user", author="user"),
        ]


class Scripted:
    """Answers by a function of (task id, sample index); greedy asks sample -1."""

    author, version = "student", "v0"

    def __init__(self, answer, finish="stop", num_tokens=2):
        self.answer, self.finish, self.num_tokens, self.calls = answer, finish, num_tokens, []

    def sample(self, requests, params, *, progress=None):
        self.calls.append((list(requests), params))
        out = []
        for r in requests:
            task_id = bytes(r.prompt_ids[1:]).decode()
            texts = [self.answer(task_id, -1 if params.is_greedy else j) for j in range(r.n)]
            out.append(
                [
                    Completion(
                        token_ids=tuple(range(self.num_tokens)),
                        logprobs=(-0.5,) * self.num_tokens,
                        entropies=(0.75,) * self.num_tokens,
                        finish=self.finish,
                        text=t,
                    )
                    for t in texts
                ]
            )
        return out


def make_trajectory(task, prompt_index, sample_index, completion):
    return Trajectory(
        id=f"{task.id}/{sample_index}",
        task_id=task.id,
        task_hash=task.hash,
        spans=(completion.as_span("student", "v0", PARAMS),),
        completion=completion.text,
        task_name=task.name,
        sample_index=sample_index,
    )


class Exact:
    """Accepts the task's answer; "?" cannot be judged. Remembers what it was asked, and takes its own cache by id."""

    name, version = "exact", "1"

    def __init__(self):
        self.asked, self.cache = [], {}

    def judge(self, task, trajectories):
        out = []
        for t in trajectories:
            assert (t.task_id, t.task_hash) == (task.id, task.hash)
            self.asked.append((task.id, t.id))
            if t.completion == "?":
                v = Verdict(status=Status.ERROR)
            else:
                v = Verdict(status=Status.ACCEPT if t.completion == task.answer else Status.REJECT, score=0.0)
            out.append(self.cache.setdefault(t.id, v))
        return out


def run(sampler, tasks, verifier=None, **overrides):
    settings = dict(text=Text(), n=8, params=PARAMS, seed=3, ks=(1, 8)) | overrides
    return evaluate(sampler, tasks, verifier or Exact(), **settings)


def half_right(task_id, j):
    """Task i's answer is str(i): the first i of 8 samples are right; greedy is right from task 4 on."""
    i = int(task_id.rsplit("-", 1)[1])
    return str(i) if j < i and (j >= 0 or i >= 4) else "x"


def test_values_are_those_of_the_script():
    result = run(Scripted(half_right), make_tasks([str(i) for i in range(8)]))
    assert [c.c for c in result.counts] == list(range(8))
    assert result.pass_at(1).estimate.value == pytest.approx(sum(range(8)) / 64)
    assert result.pass_at(8).estimate.value == pytest.approx(7 / 8)
    assert result.greedy == wilson(4, 8)
    assert result.mean_tokens == 2 and result.num_tokens == 8 * 8 * 2 + 8 * 2
    assert result.truncated_share == 0 and result.error_share == 0
    assert result.entropy.token_mean == pytest.approx(0.75) and result.entropy.sequence_mean == pytest.approx(0.75)
    assert result.entropy.monte_carlo == pytest.approx(0.5)
    assert len(result.trajectories) == 64 and all(t.verdict is not None for t in result.trajectories)
    assert len(result.greedy_trajectories) == 8


def test_errors_leave_n_and_tasks_with_too_few_samples_are_named():
    def answer(task_id, j):
        i = int(task_id.rsplit("-", 1)[1])
        return "?" if i == 1 and j < 4 else "?" if i == 2 else str(i)

    result = run(Scripted(answer), make_tasks(["0", "1", "2"]))
    assert [(c.n, c.c, c.errors) for c in result.counts] == [(8, 8, 0), (4, 4, 4), (0, 0, 8)]
    assert result.pass_at(1).by_task == {"sums-0": 1.0, "sums-1": 1.0}
    assert result.pass_at(8).left_out == ("sums-1", "sums-2")
    assert result.error_share == pytest.approx(12 / 24)
    body = result.to_json()
    assert body["pass@8"]["tasks"] == 1 and body["pass@8"]["tasks_left_out"] == 2
    assert body["greedy"]["tasks_left_out"] == 2


def test_nothing_judged_gives_no_value_instead_of_zero():
    result = run(Scripted(lambda task_id, j: "?"), make_tasks(["0", "1"]))
    body = result.to_json()
    assert body["pass@1"]["value"] is None and body["greedy"]["value"] is None and body["pass@1"]["chance"] is None
    assert json.loads(json.dumps(body)) == body
    with pytest.raises(DataError, match="no task has a value of pass@1"):
        compare(result, result)


# -- chance -------------------------------------------------------------------------------------


def test_chance_is_the_share_of_other_answers_that_the_samples_hit():
    """Every sample says "7"; 3 of 12 tasks have that answer. Judged against others: 3 * 2 + 9 * 3 of 12 * 11 pairs."""
    tasks = make_tasks(["7"] * 3 + [str(100 + i) for i in range(9)])
    result = run(Scripted(lambda task_id, j: "7"), tasks, chance_draws=11)
    expected = (3 * 2 + 9 * 3) / (12 * 11)
    assert result.pass_at(1).estimate.value == pytest.approx(3 / 12)
    assert result.chance["pass@1"] == pytest.approx(expected)
    assert result.chance["greedy"] == pytest.approx(expected)
    assert result.to_json()["pass@8"]["chance"] == pytest.approx(expected)


def test_chance_of_answers_nobody_else_has_is_zero_even_where_the_model_is_perfect():
    tasks = make_tasks([str(i) for i in range(9)])
    result = run(Scripted(lambda task_id, j: task_id.rsplit("-", 1)[1]), tasks)
    assert result.pass_at(1).estimate.value == 1
    assert result.chance == {"pass@1": 0.0, "pass@8": 0.0, "greedy": 0.0}


def test_no_task_meets_itself_no_pair_repeats_and_families_stay_apart():
    tasks = make_tasks(["1"] * 5) + make_tasks(["1"] * 3, name="words") + make_tasks(["1"], name="lonely")
    verifier = Exact()
    samples = [[make_trajectory(t, i, 0, _completion("1"))] for i, t in enumerate(tasks)]
    values, alone = chance_level(verifier, tasks, samples, ks=(1,), seed=0, draws=2)
    pairs = [(asked, sample.split("/")[0]) for asked, sample in verifier.asked]
    assert len(pairs) == len(set(pairs)) == 2 * 8
    assert all(a != b and a.split("-")[0] == b.split("-")[0] for a, b in pairs)
    assert values == {"pass@1": 1.0} and alone == ("lonely-0",)


def test_chance_takes_no_verdict_from_a_cache_of_the_real_ones():
    tasks = make_tasks(["0", "1"])
    result = run(Scripted(lambda task_id, j: task_id[-1]), tasks, verifier=Exact())
    assert result.pass_at(1).estimate.value == 1 and result.chance["pass@1"] == 0


def test_chance_with_one_task_is_unknown_and_said():
    result = run(Scripted(half_right), make_tasks(["0"]))
    assert result.chance["pass@1"] is None and result.chance_left_out == ("sums-0",)
    assert result.to_json()["chance_left_out"] == 1


def _completion(text):
    return Completion(token_ids=(5,), logprobs=(-0.1,), entropies=(0.1,), finish="stop", text=text)


# -- seeds and order ----------------------------------------------------------------------------


def test_samples_of_a_task_do_not_depend_on_the_others():
    tasks = make_tasks([str(i) for i in range(6)])
    whole, part = Scripted(half_right), Scripted(half_right)
    run(whole, tasks)
    run(part, tasks[3:])
    assert whole.calls[0][0][3:] == part.calls[0][0]
    assert whole.calls[0][0][0].seed == seed_for(3, "evaluate", "sums-0")
    assert len({r.seed for r in whole.calls[0][0]}) == 6


def test_greedy_is_one_unshaped_sample_with_the_same_limits():
    sampler = Scripted(half_right)
    params = SamplingParams(temperature=0.7, top_p=0.9, max_new_tokens=5, stop=("\n",))
    run(sampler, make_tasks(["0", "1"]), params=params)
    requests, likely = sampler.calls[1]
    assert [r.n for r in requests] == [1, 1]
    assert likely == SamplingParams(temperature=0.0, top_p=1.0, max_new_tokens=5, stop=("\n",))


def test_greedy_answers_say_so_and_share_no_id_with_samples():
    result = run(Scripted(half_right), make_tasks(["0", "1"]))
    ids = [t.id for t in (*result.trajectories, *result.greedy_trajectories)]
    assert len(set(ids)) == len(ids)
    assert {t.spans[-1].sampling.temperature for t in result.trajectories} == {1.0}
    assert {t.spans[-1].sampling.temperature for t in result.greedy_trajectories} == {0.0}
    assert result.greedy_trajectories[0].spans[0].sampling is None


def test_trajectories_are_token_exact_and_say_who_wrote_what():
    tasks = make_tasks(["0", "1"])
    t = run(Scripted(half_right), tasks).trajectories[9]
    assert (t.id, t.task_id, t.task_hash, t.task_name) == ("evaluate/v0/sums-1/1", "sums-1", tasks[1].hash, "sums")
    assert (t.prompt_index, t.sample_index, t.finish, t.tokenizer) == (1, 1, "stop", "bytes")
    assert t.token_ids == (0, *b"sums-1", 0, 1)
    assert [s.author for s in t.spans] == ["template", "user", "student"] and t.spans[-1].policy_version == "v0"
    assert t.messages == (*tasks[1].messages, {"role": "assistant", "content": t.completion})


def test_trajectories_can_be_made_by_the_caller():
    result = run(Scripted(half_right), make_tasks(["0", "1"]), make_trajectory=make_trajectory)
    assert [t.id for t in result.trajectories[:2]] == ["sums-0/0", "sums-0/1"]


def test_same_seed_same_result():
    tasks = make_tasks([str(i) for i in range(8)])
    first, second = (run(Scripted(half_right), tasks).to_json() for _ in range(2))
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in second.items() if k != "seconds"}


# -- results ------------------------------------------------------------------------------------


def test_result_json_has_the_contracts_form_and_reads_back():
    result = run(Scripted(half_right, finish="length"), make_tasks([str(i) for i in range(8)]))
    body = json.loads(json.dumps(result.to_json()))
    assert {"value", "ci95", "chance"} <= body["pass@1"].keys() and len(body["pass@1"]["ci95"]) == 2
    assert body["truncated_share"] == 1
    back = EvalResult.from_json(body)
    assert back.to_json() == result.to_json()
    assert compare(back, result).gain.value == 0
    assert [r[0] for r in back.rows()] == ["pass@1", "pass@8", "greedy"]
    with pytest.raises(DataError, match="without counts by task"):
        EvalResult.from_json(result.to_json(tasks=False))


def test_families_are_reported_apart():
    tasks = make_tasks(["0", "1"]) + make_tasks(["9", "9"], name="words")
    result = run(Scripted(lambda task_id, j: task_id[-1]), tasks)
    assert {k: v["pass@1"]["value"] for k, v in result.to_json()["by_family"].items()} == {"sums": 1.0, "words": 0.0}
    assert list(pass_at_k_by_family(result.counts, 1)) == ["sums", "words"]


def test_compare_is_paired_and_has_the_direction_after_minus_before():
    tasks = make_tasks([str(i) for i in range(8)])
    before = run(Scripted(half_right), tasks)
    after = run(Scripted(lambda task_id, j: task_id[-1]), tasks)
    c = compare(before, after)
    assert c.gain.value == pytest.approx(1 - 28 / 64) and c.gain.low > 0
    assert (c.before, c.after) == (pytest.approx(28 / 64), 1.0)
    assert compare(after, before).gain.value == pytest.approx(-c.gain.value)
    assert c.to_json()["ci95"] == [c.gain.low, c.gain.high]
    assert comparison_rows([c]) == [("pass@1", c.before, c.after, c.gain.value, (c.gain.low, c.gain.high))]


def test_compare_refuses_other_tasks_and_counts_tasks_without_a_value():
    tasks = make_tasks(["0", "1", "2"])
    good = run(Scripted(half_right), tasks)
    with pytest.raises(DataError, match="1 are only before, 0 only after"):
        compare(good, run(Scripted(half_right), tasks[:2]))
    errors = run(Scripted(lambda task_id, j: "?" if task_id.endswith("1") else "x"), tasks)
    c = compare(good, errors)
    assert c.left_out == ("sums-1",) and c.gain.count == 2


def test_controls_carry_their_own_value_and_the_gain_over_each():
    tasks = make_tasks([str(i) for i in range(8)])
    base = run(Scripted(half_right), tasks)
    trained = run(Scripted(lambda task_id, j: task_id[-1] if j >= 0 else "x"), tasks)  # samples right, greedy wrong
    table = compare_controls(trained, {"base": (base, "pass@1"), "base greedy": (base, "greedy")})
    assert table["base greedy"]["value"] == pytest.approx(0.5)
    assert table["base greedy"]["gain"]["value"] == pytest.approx(0.5)
    assert table["base"]["gain"]["value"] == pytest.approx(1 - 28 / 64)
    assert table["base"]["gain"]["ci95"][0] > 0 and "chance" in table["base"]


@pytest.mark.parametrize("metric", ["pass@", "pass@0", "accuracy", "pass@x"])
def test_unknown_metrics_are_named(metric):
    result = run(Scripted(half_right), make_tasks(["0", "1"]), greedy=False)
    with pytest.raises(DataError, match=metric):
        result.by_task(metric)
    with pytest.raises(DataError, match="greedy=True"):
        result.by_task("greedy")


# -- refusals -----------------------------------------------------------------------------------


def test_bad_settings_are_listed_together():
    tasks = make_tasks(["0"]) * 2
    with pytest.raises(ConfigError) as caught:
        run(Scripted(half_right), tasks, n=4, ks=(1, 8))
    assert len(caught.value.problems) == 2
    assert "repeated: ['sums-0']" in str(caught.value) and "between 1 and n=4, got (1, 8)" in str(caught.value)
    with pytest.raises(ConfigError, match="at least one task"):
        run(Scripted(half_right), [])


def test_a_sampler_or_verifier_that_answers_too_little_is_named():
    class Short(Scripted):
        def sample(self, requests, params, *, progress=None):
            return [c[:-1] for c in super().sample(requests, params)]

    class Silent(Exact):
        def judge(self, task, trajectories):
            return super().judge(task, trajectories)[1:]

    with pytest.raises(SamplerError, match=r"2 prompts with 8 samples each were asked of 'student'.*\[7\]"):
        run(Short(half_right), make_tasks(["0", "1"]))
    with pytest.raises(VerifierError, match=r"'exact' must give one verdict for each of 8 .*'sums-0', gave 7"):
        run(Scripted(half_right), make_tasks(["0", "1"]), verifier=Silent())


def test_a_verifier_that_takes_many_tasks_gets_them_together():
    class Many(Exact):
        def judge_many(self, groups):
            groups = list(groups)
            self.sizes = [*getattr(self, "sizes", []), len(groups)]
            return [self.judge(task, trajectories) for task, trajectories in groups]

    tasks, verifier = make_tasks([str(i) for i in range(40)]), Many()
    together = run(Scripted(half_right), tasks, verifier=verifier, greedy=False, chance=False)
    assert verifier.sizes == [32, 8]
    assert together.counts == run(Scripted(half_right), tasks, greedy=False, chance=False).counts


def test_counts_refuse_more_accepted_than_judged_and_repeated_tasks():
    with pytest.raises(DataError, match="accepted 3, judged 2"):
        TaskCounts(task_id="a", name="x", n=2, c=3)
    one = TaskCounts(task_id="a", name="x", n=2, c=1)
    with pytest.raises(DataError, match="1 are repeated"):
        pass_at_k_over([one, one], 1)


def test_progress_says_what_is_done():
    class Recorder:
        def __init__(self):
            self.events = []

        def start(self, what, total, unit):
            self.events.append((what, total))

        def advance(self, amount=1, **numbers):
            self.events.append(amount)

        def finish(self):
            self.events.append("done")

    progress = Recorder()
    run(Scripted(half_right), make_tasks(["0", "1"]), greedy=False, chance=False, progress=progress)
    assert progress.events == [("judge", 16), 8, 8, "done"]


def test_no_number_is_nan():
    body = json.dumps(run(Scripted(half_right), make_tasks(["0", "1"])).to_json(), allow_nan=False)
    assert not math.isnan(len(body))
