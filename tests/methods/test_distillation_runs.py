"""Distillation from config to result on tiny models: every signal, resumed to the same bits; the teacher is checked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.data.store import TrajectoryStore
from tutelage.errors import ConfigError, Interrupted
from tutelage.methods.config import load_config
from tutelage.methods.job import Job, config_of
from tutelage.methods.workbench import Workbench
from tutelage.policies.sampler import InProcessSampler
from tutelage.policies.teachers import load_teacher
from tutelage.testing.tiny import save_tiny
from tutelage.train.stop import StopRequest

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("teacher") / "teacher", seed=5)


def on_policy(folder: Path, student: Path, master: Path | str, run: str = "run", **more: Any) -> dict[str, Any]:
    questions = "".join(json.dumps({"question": f"What is {i}?", "answer": str(i)}) + "\n" for i in range(8))
    (folder / "q.jsonl").write_text(questions)
    return {
        "method": "distill_on_policy",
        "run_dir": str(folder / run),
        "model": {"name": str(student), "precision": "float32"},
        "teacher": {"name": str(master), "is_checked": False},
        "tasks": {"kind": "jsonl", "path": str(folder / "q.jsonl")},
        "rollout": {"n": 2, "max_new_tokens": 6, "prompts_per_round": 3},
        "train": {"lr": 3e-3, "batch_size": None, "schedule": "constant", "warmup": 0.0},
        "evaluation": None,
        "rounds": 5,
        **more,
    }


def run(settings: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    config, folder = load_config(settings)
    return Job(config, folder, **kwargs)()


def metrics(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if not k.startswith("time/")} for m in lines]


@pytest.mark.parametrize(
    "divergence",
    [
        {"kind": "reverse_kl"},
        {"kind": "forward_kl"},
        {"kind": "jsd", "beta": 0.9},
        {"kind": "skew_reverse_kl"},
        {"kind": "reverse_kl", "estimator": "top_k_tail", "top_k": 8},
        {"kind": "sampled_reverse_kl"},
        {"kind": "minillm"},
    ],
    ids=lambda d: "-".join(str(v) for v in d.values()),
)
def test_on_policy_distillation_with_every_signal(
    tmp_path: Path, tiny_folder: Path, teacher: Path, divergence: dict[str, Any]
) -> None:
    result = run(on_policy(tmp_path, tiny_folder, teacher, divergence=divergence))
    log = metrics(tmp_path / "run")
    assert len(log) == 5 == result["counts"]["steps"]
    assert all(torch.isfinite(torch.tensor(m["train/loss"])) for m in log)


def test_the_student_moves_towards_its_teacher(tmp_path: Path, tiny_folder: Path, teacher: Path) -> None:
    """The reverse KL on its own samples falls by half; with the student as its own average it is 0 at the start."""
    run(on_policy(tmp_path, tiny_folder, teacher, divergence={"kind": "reverse_kl"}, rounds=40))
    log = [m["train/loss"] for m in metrics(tmp_path / "run")]
    assert sum(log[-5:]) < 0.5 * sum(log[:5])
    run(on_policy(tmp_path, tiny_folder, "average", "own", divergence={"kind": "reverse_kl"}, rounds=2))
    assert abs(metrics(tmp_path / "own")[0]["train/loss"]) < 1e-5


@pytest.mark.parametrize("who", ["model", "average"])
def test_a_stopped_distillation_resumes_to_the_same_bits(
    tmp_path: Path, tiny_folder: Path, teacher: Path, who: str
) -> None:
    name = teacher if who == "model" else "average"
    more = {"divergence": {"kind": "reverse_kl"}, "saving": {"every_steps": 2}}
    if who == "average":
        more["teacher"] = {"name": "average", "decay": 0.5}
    run(on_policy(tmp_path, tiny_folder, name, "whole", **more))
    stop = StopRequest()
    config, folder = load_config(on_policy(tmp_path, tiny_folder, name, "cut", **more))
    cut = Job(config, folder, stop=stop)
    write = cut.run.log_metrics
    cut.run.log_metrics = lambda r: (write(r), stop.request("test") if r["step"] == 3 else None)  # type: ignore
    with pytest.raises(Interrupted):
        cut()
    config, folder = config_of(tmp_path / "cut")
    Job(config, folder, is_resume=True)()
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    "divergence", [None, {"kind": "forward_kl", "temperature": 2.0, "alpha": 0.5}], ids=["tokens", "logits"]
)
def test_off_policy_distillation_from_the_teachers_answers(
    tmp_path: Path, tiny_folder: Path, teacher: Path, divergence: dict[str, Any] | None
) -> None:
    settings = on_policy(tmp_path, tiny_folder, teacher) | {"method": "distill_off_policy", "divergence": divergence}
    del settings["rounds"]
    settings["rollout"] = {"n": 2, "max_new_tokens": 6}
    settings["train"] |= {"epochs": 10}
    run(settings)
    log = [m["train/loss"] for m in metrics(tmp_path / "run")]
    assert len(log) == 10 and log[-1] < log[0]


@pytest.mark.parametrize(("quantise", "most"), [("8bit", 0.08), ("4bit", 1e-3)])
def test_a_quantised_teacher_answers_and_grades_with_the_same_weights(
    tmp_path: Path, tiny_folder: Path, quantise: str, most: float
) -> None:
    """8 bits: which inputs are outliers, and so kept whole, is decided over the batch; scores move with it."""
    teacher = save_tiny(tmp_path / "teacher", seed=5, width=64)
    settings = on_policy(tmp_path, tiny_folder, teacher) | {"method": "distill_off_policy"}
    settings["teacher"] = {"name": str(teacher), "is_checked": False, "quantise": quantise}
    settings["divergence"] = {"kind": "reverse_kl", "alpha": 0.0}
    del settings["rounds"]
    settings["rollout"] = {"n": 2, "max_new_tokens": 6}
    run(settings)
    drawn = list(TrajectoryStore(tmp_path / "run" / "trajectories"))
    sampled = [lp for t in drawn for s in t.spans if s.is_sampled for lp in s.logprobs or ()]
    apart = {}
    for form in (quantise, None):
        scores = load_teacher(str(teacher), dtype="float32", quantise=form).score(drawn)
        apart[form] = max(abs(a - b) for a, b in zip(sampled, (x for row in scores for x in row), strict=True))
    assert apart[quantise] < most < 3 * most < apart[None], apart


def test_a_teacher_that_is_not_better_stops_the_run_with_the_numbers(
    tmp_path: Path, tiny_folder: Path, teacher: Path
) -> None:
    (tmp_path / "judge.py").write_text("def judge(task, completion, trajectory):\n    return False\n")
    more = {
        "teacher": {"name": str(teacher)},
        "tasks": {"kind": "jsonl", "path": str(tmp_path / "q.jsonl"), "heldout": 3},
        "verifier": {
            "kind": "python",
            "function": f"{tmp_path}/judge.py:judge",
            "allow_code_outside": True,
            "workers": 1,
        },
        "evaluation": {"n": 2, "ks": [1], "controls": False},
        "rounds": 1,
    }
    with pytest.raises(ConfigError, match=r"allow_worse=true"):
        run(on_policy(tmp_path, tiny_folder, teacher, **more))
    more["teacher"]["allow_worse"] = True
    run(on_policy(tmp_path, tiny_folder, teacher, "allowed", **more))
    events = [json.loads(x) for x in (tmp_path / "allowed" / "events.jsonl").read_text().splitlines()]
    check = next(e for e in events if e["event"] == "teacher_check")
    assert check["pass@1"]["student"]["value"] == 0.0 and check["on_student_prefixes"]["forward_kl"] > 0


def test_another_tokenizer_is_refused(
    tmp_path: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tutelage.testing.tiny import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("other") / "other"
    tiny_model(seed=5).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    swapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    swapped.chat_template = tokenizer.chat_template
    swapped.save_pretrained(folder)
    with pytest.raises(ConfigError, match="tokenizer"):
        run(on_policy(tmp_path, tiny_folder, folder, divergence={"kind": "reverse_kl"}))


def test_operations_are_counted_by_part(tmp_path: Path, tiny_folder: Path, teacher: Path) -> None:
    """Equal after a stop and resume; the teacher's forward is a third of a training step's at equal size."""
    more: dict[str, Any] = {"divergence": {"kind": "reverse_kl"}, "saving": {"every_steps": 2}}
    whole = run(on_policy(tmp_path, tiny_folder, teacher, "whole", **more))["ledger"]
    assert whole["flops"]["total"] == sum(v for k, v in whole["flops"].items() if k != "total")
    assert whole["tokens"]["sampling"] == whole["tokens"]["training"]
    assert whole["tokens"]["teacher"] == whole["tokens"]["training"] > 0
    assert whole["flops"]["training"] / whole["flops"]["teacher"] == pytest.approx(3, rel=0.05)
    stop = StopRequest()
    config, folder = load_config(on_policy(tmp_path, tiny_folder, teacher, "cut", **more))
    cut = Job(config, folder, stop=stop)
    write = cut.run.log_metrics
    cut.run.log_metrics = lambda r: (write(r), stop.request("test") if r["step"] == 3 else None)  # type: ignore
    with pytest.raises(Interrupted):
        cut()
    config, folder = config_of(tmp_path / "cut")
    assert Job(config, folder, is_resume=True)()["ledger"]["flops"] == pytest.approx(whole["flops"])


def recorded(folder: Path, count: int = 12) -> dict[str, Any]:
    path = folder / "demos.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"What is {i}?", "answer": f"it is {i}"}) + "\n" for i in range(count))
    )
    return {"path": str(path)}


def cut_and_resumed(folder: Path, settings: Any, *, at: int = 3) -> None:
    """The same run whole, and stopped and resumed: metrics equal to the bit."""
    run(settings("whole"))
    stop = StopRequest()
    config, where = load_config(settings("cut"))
    cut = Job(config, where, stop=stop)
    write = cut.run.log_metrics
    cut.run.log_metrics = lambda r: (write(r), stop.request("test") if r["step"] == at else None)  # type: ignore
    with pytest.raises(Interrupted):
        cut()
    config, where = config_of(folder / "cut")
    Job(config, where, is_resume=True)()
    assert metrics(folder / "cut") == metrics(folder / "whole")


def test_an_adaptive_share_listens_to_the_validation_loss(tmp_path: Path, tiny_folder: Path, teacher: Path) -> None:
    """DistiLLM: every validation that is worse by the tolerance (here: any) adds a step; the rest is recorded."""
    adaptive = {"start": 0.0, "step": 0.5, "tolerance": 0.0, "validation": 4, "every_rounds": 2}

    def settings(name: str) -> dict[str, Any]:
        more = {"divergence": {"kind": "skew_kl"}, "data": recorded(tmp_path), "adaptive": adaptive, "rounds": 8}
        # A rate that makes validation worse at once.
        train = {"lr": 0.3, "batch_size": None, "schedule": "constant", "warmup": 0.0}
        return on_policy(tmp_path, tiny_folder, teacher, name, **more, train=train, saving={"every_steps": 2})

    cut_and_resumed(tmp_path, settings)
    events = [json.loads(x) for x in (tmp_path / "whole" / "events.jsonl").read_text().splitlines()]
    losses = [
        e["loss_nats_per_target"]["value"]
        for e in events
        if e["event"] == "verdict" and e["monitor"] == "ValidationLoss"
    ]
    fresh = [e["data/frac_prompts_fresh"] for e in events if e["event"] == "draw"]
    assert len(losses) == 5 and losses[1] > losses[0]
    assert fresh[:2] == [0.0, 0.0] and max(fresh[2:]) > 0
    kept_out = {e["num_trajectories"] for e in events if e["event"] == "verdict"}
    assert kept_out == {4}
    drawn = {t.task_id for t in TrajectoryStore(tmp_path / "whole" / "trajectories")}
    assert len(drawn) == 8  # of 12 recorded prompts: none of those validated on
    by = {t.marks for t in TrajectoryStore(tmp_path / "whole" / "trajectories")}
    assert by >= {(), ("recorded",)}
    sampled = sum(
        t.num_sampled
        for t in TrajectoryStore(tmp_path / "whole" / "trajectories")
        if not {"recorded", "replayed"} & {*t.marks}
    )
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["counts"]["tokens_sampled"] == result["ledger"]["tokens"]["sampling"] == sampled > 0
    checkpoints = list((tmp_path / "whole" / "checkpoints").iterdir())
    assert len(checkpoints) <= 2  # a validation is no reason to keep every round


def test_text_is_learned_beside_the_distillation(tmp_path: Path, tiny_folder: Path, teacher: Path) -> None:
    (tmp_path / "corpus.txt").write_text("\n\n".join("the same words again and again" for _ in range(6)))
    text = {"path": str(tmp_path / "corpus.txt"), "per_round": 4, "max_length": 16}

    def settings(name: str) -> dict[str, Any]:
        more = {"divergence": {"kind": "minillm"}, "pretraining": text, "rounds": 6, "saving": {"every_steps": 2}}
        return on_policy(tmp_path, tiny_folder, teacher, name, **more)

    cut_and_resumed(tmp_path, settings)
    log = [m["distill/pretraining_nats_per_target"] for m in metrics(tmp_path / "whole")]
    assert len(log) == 6 and log[-1] < log[0]


def test_tokens_drawn_from_teacher_and_student_together(tmp_path: Path, tiny_folder: Path, teacher: Path) -> None:
    """MiniLLM's mixture: spans are the mixture's, with its log-probabilities, and its sampling is in the ledger."""
    more: dict[str, Any] = {"divergence": {"kind": "minillm"}, "teacher_mix": 0.2}
    mixed = run(on_policy(tmp_path, tiny_folder, teacher, "mixed", **more))
    plain = run(on_policy(tmp_path, tiny_folder, teacher, "plain", divergence={"kind": "minillm"}))
    per_token = [r["ledger"]["flops"]["sampling"] / r["ledger"]["tokens"]["sampling"] for r in (mixed, plain)]
    assert per_token[0] == pytest.approx(2 * per_token[1], rel=0.1)  # two models of one size
    spans = [s for t in TrajectoryStore(tmp_path / "mixed" / "trajectories") for s in t.spans if s.is_sampled]
    assert spans and {s.author for s in spans} == {"teacher-mixed"} and all(s.logprobs for s in spans)
    with pytest.raises(ConfigError, match="teacher_mix"):
        run(on_policy(tmp_path, tiny_folder, "average", "no", **more))


@pytest.mark.parametrize("kind", ["minillm", "sampled_reverse_kl"])
def test_a_large_share_of_the_teacher_has_its_weights_whole(
    tmp_path: Path, tiny_folder: Path, teacher: Path, kind: str
) -> None:
    """The weight p_student / p_mixture reaches 1 / (1 - share), 2.5 here, and is not cut at the usual 2."""
    run(on_policy(tmp_path, tiny_folder, teacher, divergence={"kind": kind}, teacher_mix=0.6))
    events = [json.loads(x) for x in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert {e["policy/frac_sampler_weights_cut"] for e in events if e["event"] == "targets"} == {0.0}


def test_each_task_family_has_its_own_teacher(
    tmp_path: Path, tiny_folder: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Per-teacher divergence is reported, and every teacher is checked on its own questions."""
    second = save_tiny(tmp_path_factory.mktemp("second") / "second", seed=6)
    (tmp_path / "judge.py").write_text("def judge(task, completion, trajectory):\n    return True\n")
    both = {
        "name": str(teacher),
        "by_task": {"algebra": {"name": str(second), "system_prompt": "Be exact."}},
        "allow_worse": True,
    }
    settings = on_policy(tmp_path, tiny_folder, teacher, divergence={"kind": "reverse_kl"}) | {
        "teacher": both | {"by_task": {"algebra": both["by_task"]["algebra"] | {"allow_worse": True}}},
        "verifier": {
            "kind": "python",
            "function": f"{tmp_path}/judge.py:judge",
            "allow_code_outside": True,
            "workers": 1,
        },
        "evaluation": {"n": 2, "ks": [1], "controls": False},
    }
    settings["tasks"] |= {"heldout": 4}
    (tmp_path / "q.jsonl").write_text(
        "".join(
            json.dumps({"question": f"What is {i}?", "answer": str(i), **({"name": "algebra"} if i % 2 else {})}) + "\n"
            for i in range(12)
        )
    )
    run(settings)
    last = metrics(tmp_path / "run")[-1]
    named = [k for k in last if k.startswith("distill/divergence_nats_per_target/") and "targets_" not in k]
    assert len(named) == 2
    events = [json.loads(x) for x in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    checks = [e for e in events if e["event"] == "teacher_check"]
    assert [c.get("task") for c in checks] == [None, "algebra"]
    assert sum(c["gain"]["tasks"] for c in checks) == 4


def test_only_the_familys_own_teacher_reads_its_system_prompt(tmp_path: Path, tiny_folder: Path) -> None:
    """Both teachers are the student itself: graded without the prompt there is nothing to learn, with it there is."""
    own = {"name": str(tiny_folder), "system_prompt": "Be exact, and answer in as few words as possible."}
    settings = on_policy(tmp_path, tiny_folder, tiny_folder, divergence={"kind": "reverse_kl"}, rounds=2)
    settings["teacher"] |= {"by_task": {"algebra": own}}
    questions = [
        {"question": f"What is {i}?", "answer": "", **({"name": "algebra"} if i % 2 else {})} for i in range(6)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    run(settings | {"rollout": {"n": 2, "max_new_tokens": 6}})
    first = metrics(tmp_path / "run")[0]
    told, plain = (first[f"distill/divergence_nats_per_target/{tiny_folder}#{i}"] for i in (0, 1))
    assert told > 1e-2 and abs(plain) < 1e-5


def test_published_recipes_are_the_defaults(tmp_path: Path, tiny_folder: Path, teacher: Path) -> None:
    """GKD has no T squared and no division by beta (1 - beta); Hinton has T squared."""
    hot = {"n": 2, "max_new_tokens": 6, "prompts_per_round": 3, "temperature": 2.0}
    log = {}
    for name, d in {
        "gkd": {"kind": "jsd", "beta": 0.1},
        "normalised": {"kind": "jsd", "beta": 0.1, "is_normalised": True},
        "squared": {"kind": "jsd", "beta": 0.1, "t_squared": True},
    }.items():
        run(on_policy(tmp_path, tiny_folder, teacher, name, divergence=d, rollout=hot, rounds=1))
        log[name] = metrics(tmp_path / name)[0]["train/loss"]
    assert log["normalised"] == pytest.approx(log["gkd"] / 0.09, rel=1e-4)
    assert log["squared"] == pytest.approx(4 * log["gkd"], rel=1e-4)
    common = {"data": recorded(tmp_path, 4), "evaluation": None}
    for name, d in {"hinton": {}, "plain": {"t_squared": False}}.items():
        settings = on_policy(tmp_path, tiny_folder, teacher, name) | common | {"method": "distill_off_policy"}
        settings = {k: v for k, v in settings.items() if k not in ("rounds", "rollout", "tasks")}
        run(settings | {"divergence": {"kind": "forward_kl", "temperature": 2.0, **d}, "tasks": None})
        log[name] = metrics(tmp_path / name)[0]["train/loss"]
    assert log["hinton"] == pytest.approx(4 * log["plain"], rel=1e-4)


def test_two_teachers_of_one_name_are_sampled_as_each_is_to_run(
    tmp_path: Path, tiny_folder: Path, teacher: Path
) -> None:
    wide, narrow = ({"name": str(teacher), "precision": p} for p in ("float32", "bfloat16"))
    config, folder = load_config(
        on_policy(tmp_path, tiny_folder, teacher) | {"teacher": wide | {"by_task": {"a": narrow}}}
    )
    bench = Workbench(config, folder)
    settings = config.stages[0].teacher
    both = [settings, settings.by_task["a"]]
    assert [bench.author_of(t) for t in both] == [f"{teacher} (float32)", f"{teacher} (bfloat16)"]
    for each, dtype in zip(both, (torch.float32, torch.bfloat16), strict=True):
        sampler: Any = bench.sampler(bench.author_of(each), "teacher")
        assert next(sampler._model.parameters()).dtype == dtype
    alone, folder = load_config(on_policy(tmp_path, tiny_folder, teacher))
    assert Workbench(alone, folder).author_of(alone.stages[0].teacher) == str(teacher)


@pytest.mark.parametrize("own", [False, True])
def test_a_teacher_answers_with_what_only_it_is_told(
    tmp_path: Path, tiny_folder: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    seen: list[tuple[int, ...]] = []
    plain = InProcessSampler.sample

    def spied(self: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(r.prompt_ids for r in requests)
        return plain(self, requests, *args, **kwargs)

    monkeypatch.setattr(InProcessSampler, "sample", spied)
    settings = on_policy(tmp_path, tiny_folder, teacher) | {"method": "distill_off_policy"}
    settings["rollout"] |= {"n": 1, "prompts_per_round": None}
    settings["train"] = {"lr": 1e-3, "batch_size": 4, "epochs": 1}
    settings["teacher"] |= {"name": "self" if own else str(teacher), "hint": "psst: {answer}"}
    del settings["rounds"]
    run(settings)
    text = Workbench(*load_config(settings)).text
    stored = list(TrajectoryStore(tmp_path / "run" / "trajectories"))
    assert len(stored) == 8 == len(seen) and all("psst: " in text.decode(ids) for ids in seen)
    assert not any("psst" in text.decode(t.token_ids) for t in stored)


def test_a_student_that_ends_its_turn_with_another_token_is_refused(tmp_path: Path, teacher: Path) -> None:
    student = save_tiny(tmp_path / "student")
    template = (student / "chat_template.jinja").read_text()
    (student / "chat_template.jinja").write_text(template.replace("<|im_end|>", "<|endoftext|>"))
    with pytest.raises(ConfigError, match="end a turn with the same token"):
        run(on_policy(tmp_path, student, teacher))
