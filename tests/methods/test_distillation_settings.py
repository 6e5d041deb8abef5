"""Distillation settings that can only fail later, or would be ignored, are refused when they are read."""

from typing import Any

import pytest

from tutelage.errors import ConfigError
from tutelage.methods.config import load_config
from tutelage.policies.table import TablePolicy
from tutelage.policies.teachers import InProcessTeacher
from tutelage.signals.distribution import TeacherDistribution


def load(divergence: dict[str, Any], teacher: dict[str, Any] | None = None, **more: Any) -> Any:
    body = {
        "method": "distill_on_policy",
        "run_dir": "runs/x",
        "teacher": {"name": "big", **(teacher or {})},
        "tasks": {"path": "q.jsonl"},
        "divergence": divergence,
        **more,
    }
    return load_config({k: v for k, v in body.items() if v is not None})[0].stages[0]


@pytest.mark.parametrize(
    "divergence,right",
    [
        ({"kind": "reverse_kl", "estimator": "k1"}, "expected gradient of 0.*kind: sampled_reverse_kl"),
        ({"kind": "reverse_kl", "estimator": "k3"}, "the forward KL's gradient.*kind: sampled_reverse_kl"),
        ({"kind": "reverse_kl", "estimator": "policy_gradient_k3"}, "kind: sampled_reverse_kl"),
        ({"kind": "forward_kl", "estimator": "policy_gradient"}, "only the reverse KL.*kind: sampled_reverse_kl"),
        ({"kind": "reverse_kl", "estimator": "policy_gradient"}, "set kind: sampled_reverse_kl"),
        ({"kind": "reverse_kl", "estimator": "k2"}, "set kind: sampled_reverse_kl"),
        ({"kind": "forward_kl", "estimator": "top_k", "top_k": 8}, 'use estimator="top_k_tail"'),
        ({"kind": "forward_kl", "estimator": "most"}, "estimator must be one of full, top_k_tail"),
        ({"kind": "jsd", "estimator": "top_k_tail", "top_k": 8}, 'use one of these, or estimator="full"'),
        ({"kind": "reverse_kl", "estimator": "top_k_tail", "top_k": 1}, "top_k of 16 or more"),
    ],
    ids=lambda d: "-".join(str(v) for v in d.values()) if isinstance(d, dict) else "",
)
def test_a_pair_that_fails_is_refused_with_the_right_pair(divergence: dict[str, Any], right: str) -> None:
    with pytest.raises(ConfigError, match=right):
        load(divergence)


@pytest.mark.parametrize(
    "kind,idle,reader",
    [
        ("sampled_reverse_kl", {"alpha": 0.5}, "reverse_kl"),
        ("sampled_reverse_kl", {"temperature": 2.0}, "reverse_kl"),
        ("sampled_reverse_kl", {"estimator": "top_k_tail"}, "reverse_kl"),
        ("sampled_reverse_kl", {"t_squared": True}, "reverse_kl"),
        ("sampled_reverse_kl", {"length_norm": False}, "minillm"),
        ("minillm", {"alpha": 0.5}, "reverse_kl"),
        ("minillm", {"temperature": 2.0}, "reverse_kl"),
        ("minillm", {"discount": 0.5}, "sampled_reverse_kl"),
        ("reverse_kl", {"discount": 0.5}, "sampled_reverse_kl"),
        ("reverse_kl", {"clip": 0.2}, "sampled_reverse_kl, minillm"),
        ("reverse_kl", {"length_norm": False}, "minillm"),
        ("reverse_kl", {"beta": 0.1}, "jsd"),
        ("jsd", {"skew": 0.2}, "skew_kl, skew_reverse_kl"),
        ("skew_kl", {"is_normalised": True}, "jsd"),
    ],
)
def test_a_setting_that_its_kind_does_not_read_is_refused(kind: str, idle: dict[str, Any], reader: str) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(idle))} is not read by kind {kind}, but by .*{reader}"):
        load({"kind": kind, **idle})
    default = {"alpha": 0.0, "temperature": None, "beta": 0.5, "skew": 0.1, "discount": 0.0, "clip": None}
    assert load({"kind": kind, **default}).divergence.kind == kind  # said, and as it is anyway


@pytest.mark.parametrize(
    "divergence,match",
    [
        ({"kind": "reverse_kl", "top_k": 8}, "read by estimator top_k_tail only"),
        ({"kind": "reverse_kl", "estimator": "top_k_tail"}, "needs divergence.top_k"),
        ({"kind": "reverse_kl", "alpha": 1.0}, "leaves nothing of the teacher"),
        ({"kind": "jsd", "beta": 1.0}, "is 0 for any two models: use reverse_kl"),
        ({"kind": "skew_kl", "skew": 1.0}, "compares a model with itself"),
    ],
)
def test_numbers_that_leave_nothing_to_learn_are_refused(divergence: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load(divergence)


CACHE = {"cache": "c"}
SERVED = {"url": "http://x"}
TOP_K = {"kind": "reverse_kl", "estimator": "top_k_tail", "top_k": 8}


@pytest.mark.parametrize(
    "teacher,more,match",
    [
        (CACHE, {}, "none to what the student samples"),
        (CACHE, {"student_share": 0.5, "data": {"path": "d"}}, "none to what the student samples"),
        (CACHE, {"adaptive": {}, "data": {"path": "d"}}, "none to what the student samples"),
        (CACHE | {"hint": "It is {answer}."}, {}, "without a hint"),
        (CACHE | {"system_prompt": "Be exact."}, {}, "without a hint or a system prompt"),
        (CACHE | {"name": "average"}, {}, "follows the student"),
        (CACHE, {"divergence": {"kind": "sampled_reverse_kl"}}, "cannot score given tokens"),
        ({"name": "average", "decay": 1.0}, {}, "less than 1"),
        (SERVED, {}, "use estimator top_k_tail"),
        (SERVED, {"divergence": {"kind": "minillm"}}, "minillm needs teachers in this process"),
        (SERVED, {"divergence": TOP_K, "rollout": {"temperature": 0.5}}, "a served teacher answers at temperature 1"),
        ({"by_task": {"a": {"name": "b", **SERVED}}}, {"divergence": TOP_K}, "all be in this process, or all"),
        ({"name": "average"}, {"divergence": {"kind": "minillm"}}, "do not change"),
        ({"name": "average"}, {"divergence": {"kind": "sampled_reverse_kl", "clip": 0.2}}, "change with it"),
        ({}, {"teacher_mix": 0.2, "rollout": {"temperature": 0.5}}, "must be 1 and rollout.engine inprocess, got 0.5"),
        ({}, {"teacher_mix": 0.2, "rollout": {"top_p": 0.5}}, "must be 1 and rollout.engine inprocess, got 1, 0.5"),
        ({}, {"teacher_mix": 0.2, "rollout": {"engine": "vllm"}}, "must be 1 and rollout.engine inprocess"),
        ({}, {"rollout": {"temperature": 0, "n": 1}}, "no sample of what is graded"),
        ({}, {"divergence": {"kind": "reverse_kl", "temperature": 2.0}}, "temperature 1 and top_p 1, and .* is 2"),
        (
            {},
            {
                "student_share": 0.5,
                "data": {"path": "d"},
                "rollout": {"temperature": 0.5},
                "divergence": {"kind": "jsd", "temperature": 1.0},
            },
            "temperature 0.5 and top_p 1, and divergence.temperature is 1",
        ),
        ({}, {"divergence": {"kind": "forward_kl"}, "rollout": {"top_p": 0.9}}, "is infinite"),
    ],
)
def test_what_can_only_fail_later_is_refused(teacher: dict[str, Any], more: dict[str, Any], match: str) -> None:
    given = {"divergence": {"kind": "reverse_kl"}, "teacher": teacher, **more}
    with pytest.raises(ConfigError, match=match):
        load(**given)


@pytest.mark.parametrize(
    "teacher,more",
    [
        (CACHE, {"student_share": 0.0, "data": {"path": "d"}}),
        (SERVED, {"divergence": TOP_K}),
        (SERVED, {"divergence": {"kind": "sampled_reverse_kl", "clip": 0.2, "discount": 0.5}}),
        ({"name": "average"}, {"divergence": {"kind": "sampled_reverse_kl"}}),
        ({}, {"student_share": 0.0, "data": {"path": "d"}, "rollout": {"temperature": 0, "n": 1}}),
        ({}, {"rollout": {"temperature": 2.0}, "divergence": {"kind": "jsd", "temperature": 2.0}}),
        ({}, {"rollout": {"temperature": 2.0, "top_p": 0.9}}),
        ({}, {"teacher_mix": 0.6, "divergence": {"kind": "minillm", "clip": 0.2}}),
    ],
)
def test_what_works_is_taken(teacher: dict[str, Any], more: dict[str, Any]) -> None:
    load(**{"divergence": {"kind": "reverse_kl"}, "teacher": teacher, **more})


def test_off_policy_a_cache_needs_the_data_that_it_is_of() -> None:
    off: dict[str, Any] = {"method": "distill_off_policy", "teacher": CACHE}
    with pytest.raises(ConfigError, match=r"answers to recorded data: set data\.path"):
        load({"kind": "forward_kl"}, **off)
    with pytest.raises(ConfigError, match="use estimator top_k_tail"):
        load({"kind": "forward_kl"}, **{**off, "teacher": SERVED})
    load({"kind": "forward_kl", "temperature": 2.0}, **off, data={"path": "d"}, tasks=None)


@pytest.mark.parametrize("estimator", ["policy_gradient", "k2"])
def test_estimators_of_sampled_tokens_are_no_teachers_distribution(estimator: str) -> None:
    with pytest.raises(ConfigError, match="use SampledLogRatio"):
        TeacherDistribution(InProcessTeacher(TablePolicy(4)), "reverse_kl", estimator=estimator)
