"""Small trajectories for the tests of this folder; light to import, so that subprocesses start fast."""

from tutelage.types import SamplingParams, Span, Status, Trajectory, Verdict


def simple(i: int, **changes) -> Trajectory:
    spans = (
        Span(token_ids=(1, 2, i), role="user", author="user"),
        Span(
            token_ids=(7, 8, 9),
            role="assistant",
            author="student",
            is_sampled=True,
            is_trainable=True,
            logprobs=(-0.1 * i, -1e-300, -0.0),
            policy_version="v1",
            sampling=SamplingParams(temperature=0.7),
        ),
    )
    fields = {
        "id": f"t{i}",
        "task_id": f"q{i // 2}",
        "task_hash": f"h{i // 2}",
        "spans": spans,
        "messages": ({"role": "user", "content": "hé\ud800"}, {"role": "assistant", "content": f"answer {i}"}),
        "completion": f"answer {i}",
        "extra": {"nested": {"list": [None, 1, 2.5, True], "empty": {}}},
        "verdict": Verdict(status=Status.REJECT if i % 2 else Status.ACCEPT, score=0.5),
    }
    return Trajectory(**{**fields, **changes})


def drawn(i: int) -> Trajectory:
    spans = (
        Span(token_ids=(1, i), role="user", author="user"),
        Span(
            token_ids=(5,),
            role="assistant",
            author="student",
            is_sampled=True,
            is_trainable=True,
            logprobs=(-0.1 / (i + 3),),
            entropies=(float("nan") if i == 99 else 0.3,),
        ),
    )
    extra = {"a": {"b": [i, None]}}
    return Trajectory(id=f"t{i}", task_id="q", task_hash="h", spans=spans, parent=None, extra=extra)
