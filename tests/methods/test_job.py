"""Whole runs on a tiny model: from a config to `result.json`, stopped and resumed, and given bad input."""

import json
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tutelage.data.files import DiskError
from tutelage.data.store import TrajectoryStore
from tutelage.errors import CheckpointError, ConfigError, DataError, Interrupted, NumericsError
from tutelage.methods.config import load_config
from tutelage.methods.job import Job, config_of
from tutelage.policies import packed_attention
from tutelage.train.stop import Quiet, StopRequest

torch.set_num_threads(1)


def write_questions(path: Path, count: int = 12) -> Path:
    path.write_text("".join(json.dumps({"question": f"What is {i}?", "answer": str(i)}) + "\n" for i in range(count)))
    return path


def write_verifier(folder: Path, rule: str = "sum(map(ord, completion)) % 3 == 0") -> None:
    (folder / "judge.py").write_text(
        "def judge(task, completion, trajectory):\n"
        f"    return {{'accepted': {rule}, 'score': len(completion) % 7 / 7, 'reason': 'by rule'}}\n"
    )


def rejection(folder: Path, model: Path, run: str = "run", **more: Any) -> dict[str, Any]:
    if not (folder / "judge.py").exists():
        write_verifier(folder)
    return {
        "method": "rejection_sampling",
        "run_dir": str(folder / run),
        "model": {"name": str(model), "precision": "float32"},
        "tasks": {"kind": "jsonl", "path": str(write_questions(folder / "q.jsonl")), "heldout": 3},
        "verifier": {
            "kind": "python",
            "function": f"{folder / 'judge.py'}:judge",
            "allow_code_outside": True,
            "accept_truncated": True,
            "options": {"isolate": False},
            "workers": 1,
        },
        "rollout": {"n": 4, "max_new_tokens": 6, "chunk_rows": 8},
        "keep": {"distinct": None, "cap": None, "drop_truncated": False},
        "train": {"lr": 1e-3, "batch_size": 4, "epochs": 1},
        "rounds": 2,
        "evaluation": {"n": 2, "ks": [1, 2], "controls": False},
        **more,
    }


def demonstrations(folder: Path, model: Path, run: str = "run", **more: Any) -> dict[str, Any]:
    path = folder / "chat.jsonl"
    if not path.exists():
        records = [{"prompt": f"say {i}", "completion": f"{i} it is"} for i in range(10)]
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return {
        "method": "sft",
        "run_dir": str(folder / run),
        "model": {"name": str(model), "precision": "float32"},
        "data": {"path": str(path)},
        "train": {"lr": 1e-2, "batch_size": 4, "epochs": 8},
        **more,
    }


def job(settings: dict[str, Any], **kwargs: Any) -> Job:
    config, folder = load_config(settings)
    return Job(config, folder, **kwargs)


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_run(a: Path, b: Path) -> None:
    """Bit-identical weights, trajectories and metrics, times apart."""
    wa, wb = weights(a / "model"), weights(b / "model")
    assert wa.keys() == wb.keys()
    assert all(torch.equal(wa[k], wb[k]) for k in wa)
    assert metrics(a) == metrics(b)
    assert list(TrajectoryStore(a / "trajectories")) == list(TrajectoryStore(b / "trajectories"))


class StopAfter(Quiet):
    """A stop request after so many reports of progress."""

    def __init__(self, stop: StopRequest, count: int) -> None:
        self.stop, self.left = stop, count

    def advance(self, amount: int = 1, **numbers: float) -> None:
        self.left -= 1
        if self.left == 0:
            self.stop.request("test")


def test_rejection_sampling_from_config_to_result(tmp_path: Path, tiny_folder: Path) -> None:
    result = job(rejection(tmp_path, tiny_folder))()
    run = tmp_path / "run"
    assert json.loads((run / "result.json").read_text())["status"] == "done"
    for side in ("before", "after"):
        assert set(result[side]["pass@1"]) >= {"value", "ci95", "chance"}
        assert set(result[side]) >= {"pass@2", "greedy", "entropy_nats"}
    assert len(result["gain"]["ci95"]) == 2
    assert result["controls"]["base, greedy"]["gain"]["ci95"]
    assert {"config.yaml", "metrics.jsonl", "events.jsonl", "trajectories", "checkpoints", "model"} <= {
        p.name for p in run.iterdir()
    }
    stored = list(TrajectoryStore(run / "trajectories"))
    assert len(stored) == 2 * 9 * 4  # two rounds of nine questions, four samples each; rejected ones are kept too
    assert {t.verdict.status for t in stored if t.verdict} == {"accept", "reject"}
    assert all((t.weight != 0) == (t.verdict is not None and t.verdict.is_accepted) for t in stored)
    base, trained = weights(tiny_folder), weights(run / "model")
    assert max(float((base[k] - trained[k]).abs().max()) for k in base) > 1e-4


def test_training_questions_are_not_evaluated_on(tmp_path: Path, tiny_folder: Path) -> None:
    run = tmp_path / "run"
    job(rejection(tmp_path, tiny_folder, rounds=1))()
    trained = {t.task_hash for t in TrajectoryStore(run / "trajectories")}
    measured = {t.task_hash for t in TrajectoryStore(run / "evaluation" / "trajectories")}
    assert len(trained) == 9 and len(measured) == 3 and not trained & measured


def test_sft_lowers_the_loss_and_the_model_loads_and_speaks(tmp_path: Path, tiny_folder: Path) -> None:
    result = job(demonstrations(tmp_path, tiny_folder))()
    log = metrics(tmp_path / "run")
    assert log[-1]["train/loss"] < 0.5 * log[0]["train/loss"]
    assert result["counts"]["steps"] == len(log) == 8 * 3
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.chat_template and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.generation_config.pad_token_id != tokenizer.eos_token_id


def test_lora_trains_adapters_and_saves_a_merged_model(tmp_path: Path, tiny_folder: Path) -> None:
    settings = demonstrations(tmp_path, tiny_folder)
    settings["model"] |= {"lora": {"r": 4, "alpha": 8}}
    job(settings)()
    base, merged = weights(tiny_folder), weights(tmp_path / "run" / "model")
    assert base.keys() == merged.keys()
    moved = {k for k in base if not torch.equal(base[k], merged[k])}
    assert moved and all("proj" in k for k in moved)


@pytest.mark.parametrize("restart", [False, True])
def test_masters_start_from_the_stored_weights_and_not_from_their_roundings(
    tmp_path: Path, tiny_folder: Path, restart: bool
) -> None:
    settings = demonstrations(tmp_path, tiny_folder)
    if restart:  # the second round begins anew from the base
        settings = rejection(tmp_path, tiny_folder, start_from="base")
    settings["model"]["precision"] = "bfloat16"
    settings["train"] |= {"lr": 1e-12, "epochs": 1, "optimizer": "sgd"}
    job(settings)()
    base, trained = weights(tiny_folder), weights(tmp_path / "run" / "model")
    assert any(not torch.equal(w, w.bfloat16().float()) for w in base.values())
    assert all(torch.allclose(trained[k], base[k], rtol=0, atol=1e-9) for k in base)


@pytest.mark.parametrize("stop_at", [1, 9, 21, 37, 60])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path: Path, tiny_folder: Path, stop_at: int) -> None:
    job(rejection(tmp_path, tiny_folder, "whole", saving={"every_steps": 2}))()
    stop = StopRequest()
    settings = rejection(tmp_path, tiny_folder, "cut", saving={"every_steps": 2})
    with pytest.raises(Interrupted):
        job(settings, stop=stop, progress=StopAfter(stop, stop_at))()
    config, folder = config_of(tmp_path / "cut")
    Job(config, folder, is_resume=True)()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_run_stopped_while_training_saves_at_once(tmp_path: Path, tiny_folder: Path) -> None:
    job(demonstrations(tmp_path, tiny_folder, "whole"))()
    stop = StopRequest()
    cut = job(demonstrations(tmp_path, tiny_folder, "cut"), stop=stop)
    write = cut.run.log_metrics

    def stop_after_five(record: dict[str, Any]) -> None:
        write(record)
        if record["step"] == 5:
            signal.raise_signal(signal.SIGTERM)

    cut.run.log_metrics = stop_after_five  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="SIGTERM after step 5"):
        cut()
    assert len(metrics(tmp_path / "cut")) == 5
    config, folder = config_of(tmp_path / "cut")
    Job(config, folder, is_resume=True)()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_dropout_resumes_to_the_same_bits_and_is_noted(tmp_path: Path, tiny_folder: Path) -> None:
    def made(run: str, **kwargs: Any) -> Job:
        settings = demonstrations(tmp_path, tiny_folder, run)
        settings["model"] |= {"lora": {"r": 4, "alpha": 8, "dropout": 0.2}}
        return job(settings | {"train": {"lr": 1e-2, "batch_size": 4, "epochs": 3}}, **kwargs)

    made("whole")()
    stop = StopRequest()
    cut = made("cut", stop=stop)
    write = cut.run.log_metrics
    cut.run.log_metrics = lambda r: (write(r), stop.request("test") if r["step"] == 4 else None)  # type: ignore
    with pytest.raises(Interrupted):
        cut()
    config, folder = config_of(tmp_path / "cut")
    Job(config, folder, is_resume=True)()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    events = [json.loads(x) for x in (tmp_path / "whole" / "events.jsonl").read_text().splitlines()]
    assert ["dropout of up to 0.2" in e["note"] for e in events if e["event"] == "note"].count(True) == 1


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, tiny_folder: Path) -> None:
    job(demonstrations(tmp_path, tiny_folder, "whole"))()
    settings = demonstrations(tmp_path, tiny_folder, "cut", saving={"every_steps": 3, "keep": 3})
    stop = StopRequest()
    cut = job(settings, stop=stop)
    write = cut.run.log_metrics
    cut.run.log_metrics = lambda r: (write(r), stop.request("test") if r["step"] == 10 else None)  # type: ignore
    with pytest.raises(Interrupted):
        cut()
    newest = sorted((tmp_path / "cut" / "checkpoints").glob("step-*"))[-1]
    blob = newest / "model" / "model.safetensors"
    blob.write_bytes(blob.read_bytes()[:-5] + b"wrong")
    config, folder = config_of(tmp_path / "cut")
    Job(config, folder, is_resume=True)()
    events = [json.loads(x) for x in (tmp_path / "cut" / "events.jsonl").read_text().splitlines()]
    assert [e["checkpoint"] for e in events if e["event"] == "damaged_checkpoint"] == [newest.name]
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_damaged_start_of_a_round_falls_back_into_the_round_before(tmp_path: Path, tiny_folder: Path) -> None:
    """Killed in the second round: the checkpoint before the newest was made while the first was trained on."""
    settings = {name: rejection(tmp_path, tiny_folder, name, saving={"every_steps": 2}) for name in ("whole", "cut")}
    job(settings["whole"])()
    cut = job(settings["cut"])
    write = cut.run.log_metrics

    def killed_in_round_1(record: dict[str, Any]) -> None:
        write(record)
        if record["round"] == 1:
            raise KeyboardInterrupt

    cut.run.log_metrics = killed_in_round_1  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        cut()
    before, newest = sorted((tmp_path / "cut" / "checkpoints").glob("step-*"))
    assert "-00-00000-" in before.name and newest.name.endswith("-00-00001-00000")
    blob = newest / "optimizer.safetensors"
    blob.write_bytes(blob.read_bytes()[:-5] + b"wrong")
    config, folder = config_of(tmp_path / "cut")
    Job(config, folder, is_resume=True)()
    events = [json.loads(x) for x in (tmp_path / "cut" / "events.jsonl").read_text().splitlines()]
    assert [e["from_checkpoint"] for e in events if e["event"] == "resumed"] == [True]
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_run_is_resumed_with_its_threads_and_says_what_is_other_than_before(
    tmp_path: Path, tiny_folder: Path
) -> None:
    def stopped(run: str, **more: Any) -> Path:
        stop = StopRequest()
        torch.set_num_threads(2)
        cut = job(demonstrations(tmp_path, tiny_folder, run, train={"epochs": 2, "batch_size": 4}, **more), stop=stop)
        write = cut.run.log_metrics
        cut.run.log_metrics = lambda r: (write(r), stop.request("test"))  # type: ignore[method-assign,assignment]
        with pytest.raises(Interrupted):
            cut()
        torch.set_num_threads(1)  # as OMP_NUM_THREADS would
        return tmp_path / run

    def resumed(run: Path, **more: Any) -> tuple[int, dict[str, str]]:
        config, folder = config_of(run)
        again = Job(config, folder, is_resume=True, **more)
        threads = torch.get_num_threads()
        again()
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        (event,) = [e for e in events if e["event"] == "resumed"]
        return threads, event["changed"]

    try:
        assert resumed(stopped("same")) == (2, {})
        assert resumed(stopped("given", system={"threads": 1})) == (1, {})
        run = stopped("moved")
        text = (run / "config.yaml").read_text()
        text = text.replace(f"torch: {torch.__version__}", "torch: 1.0").replace("processes: 1", "processes: 3")
        (run / "config.yaml").write_text(text)
        changed = {"torch": f"1.0 -> {torch.__version__}", "processes": "3 -> 1", "threads": "2 -> 1"}
        assert resumed(run) == (1, changed)
    finally:
        torch.set_num_threads(1)


def test_all_checkpoints_damaged_is_an_error_that_says_so(tmp_path: Path, tiny_folder: Path) -> None:
    settings = demonstrations(tmp_path, tiny_folder, "cut", saving={"every_steps": 3})
    stop = StopRequest()
    cut = job(settings, stop=stop)
    write = cut.run.log_metrics
    cut.run.log_metrics = lambda r: (write(r), stop.request("test") if r["step"] == 7 else None)  # type: ignore
    with pytest.raises(Interrupted):
        cut()
    for folder in (tmp_path / "cut" / "checkpoints").glob("step-*"):
        (folder / "state.json").write_text("{")
    config, folder = config_of(tmp_path / "cut")
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints .* are damaged, the newest because state.json"):
        Job(config, folder, is_resume=True)()


def test_restarting_from_base_trains_each_round_from_the_first_weights(tmp_path: Path, tiny_folder: Path) -> None:
    """All arms draw the same from the base model; the second round's first loss tells whose weights it began with."""
    losses = {}
    for arm, start, lr in (("base", "base", 1e-3), ("previous", "previous", 1e-3), ("still", "previous", 1e-30)):
        settings = rejection(tmp_path, tiny_folder, arm, start_from=start, draw_from="base", rounds=2)
        settings["train"] |= {"lr": lr, "batch_size": None, "epochs": 4, "schedule": "constant", "warmup": 0.0}
        job(settings)()
        losses[arm] = [m["train/loss"] for m in metrics(tmp_path / arm)]
    assert losses["base"][:4] == losses["previous"][:4]
    assert losses["base"][4] == losses["still"][4]  # the untrained model's loss on the second round's data
    assert abs(losses["previous"][4] - losses["still"][4]) > 0.005


@pytest.mark.parametrize("planted", [False, True], ids=["right", "wrong"])
def test_a_long_document_is_checked_at_the_start_of_a_run(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, planted: bool
) -> None:
    """What goes wrong in long documents only is found before anything is trained."""
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 1024}
    (model / "config.json").write_text(json.dumps(config))
    right = packed_attention._one_document

    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: Any) -> torch.Tensor:
        return right(q, k.flip(2) if k.shape[2] > 512 else k, v, *more)

    if planted:
        monkeypatch.setattr(packed_attention, "_one_document", wrong)
    settings = demonstrations(tmp_path, model, train={"epochs": 1, "batch_size": 4})
    with pytest.raises(NumericsError, match="in the packed layout they differ") if planted else nullcontext():
        job(settings)()
    if not planted:
        events = [json.loads(x) for x in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
        assert [e["longest_tokens"] for e in events if e["event"] == "check_forward"] == [520]


# -- bad input ----------------------------------------------------------------------------------


def test_nothing_accepted_stops_the_run_with_the_reasons(tmp_path: Path, tiny_folder: Path) -> None:
    write_verifier(tmp_path, "False")
    with pytest.raises(DataError, match=r"nothing to train on. Of 36 trajectories 0 were accepted.*36 x 'by rule'"):
        job(rejection(tmp_path, tiny_folder))()


def test_an_existing_run_is_not_overwritten(tmp_path: Path, tiny_folder: Path) -> None:
    job(demonstrations(tmp_path, tiny_folder, train={"epochs": 1}))()
    with pytest.raises(ConfigError, match=r"already holds a run\. Continue it with `tutelage resume"):
        job(demonstrations(tmp_path, tiny_folder))


def test_bad_records_are_quarantined_and_counted(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(
        '{"prompt": "a", "completion": "b"}\n{"prompt": "c"\n{"messages": []}\n{"prompt": "d", "completion": "e"}\n'
    )
    result = job(demonstrations(tmp_path, tiny_folder, train={"epochs": 1}))()
    assert result["counts"]["quarantined"] == 2
    bad = [json.loads(x) for x in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [b["line"] for b in bad] == [2, 3] and all(b["reason"] for b in bad)


def test_a_conversation_too_long_is_an_error_with_its_place_unless_told_otherwise(
    tmp_path: Path, tiny_folder: Path
) -> None:
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"prompt": "a", "completion": "b"}) + "\n" + json.dumps({"prompt": "c", "completion": "d" * 300})
    )
    data = {"path": str(tmp_path / "chat.jsonl"), "max_length": 100}
    with pytest.raises(DataError, match=r"chat.jsonl:2: a sample must have at most 100 tokens, got 3\d\d"):
        job(demonstrations(tmp_path, tiny_folder, data=data))()
    result = job(demonstrations(tmp_path, tiny_folder, "drop", data=data | {"overlong": "drop"}, train={"epochs": 1}))()
    assert result["counts"]["quarantined"] == 1


def test_a_wrong_model_path_names_what_there_is(tmp_path: Path, tiny_folder: Path) -> None:
    settings = demonstrations(tmp_path, tiny_folder)
    settings["model"]["name"] = str(tiny_folder.parent / "tinny")
    with pytest.raises(ConfigError, match=r"no such folder.*did you mean .*tiny\?"):
        job(settings)()


def test_verifier_code_outside_the_folder_is_named_and_asked_for(tmp_path: Path, tiny_folder: Path) -> None:
    settings = rejection(tmp_path, tiny_folder)
    del settings["verifier"]["allow_code_outside"]
    with pytest.raises(ConfigError, match=r"judge.py"):
        job(settings)()
    asked: list[str] = []
    job(settings | {"run_dir": str(tmp_path / "asked")}, confirm=lambda message: bool(asked.append(message)) or True)()
    assert len(asked) == 1 and "judge.py" in asked[0]


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The system refuses to write longer files, as it refuses to write to a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("part", ["model", "adapter", "optimiser"])
def test_a_full_disk_while_saving_leaves_the_checkpoint_before(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    from tutelage.methods.student import Student
    from tutelage.train.optim import Optimizer

    def made(run: str, **more: Any) -> Job:
        settings = demonstrations(tmp_path, tiny_folder, run, **more)
        settings["model"] |= {"lora": {"r": 8, "alpha": 8}} if part == "adapter" else {}
        return job(settings | {"train": {"lr": 1e-2, "batch_size": 4, "epochs": 4}})

    made("whole")()
    owner, name = (Optimizer, "save") if part == "optimiser" else (Student, "save_weights")
    save, calls = getattr(owner, name), []

    def full(self: Any, path: Path) -> None:
        calls.append(path)
        with files_of_at_most(9_000) if len(calls) == 3 else nullcontext():
            save(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(CheckpointError, match=r"File too large.* The 2 made before it are intact"):
            made("cut", saving={"every_steps": 3})()
    assert not list((tmp_path / "cut" / "checkpoints").glob(".*"))
    config, folder = config_of(tmp_path / "cut")
    Job(config, folder, is_resume=True)()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("where", ["the weights of a stage", "the final weights"])
def test_a_full_disk_between_checkpoints_is_named_and_the_run_goes_on(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from tutelage.methods.student import Student

    one = demonstrations(tmp_path, tiny_folder, train={"epochs": 1, "batch_size": 4})
    shared = {k: one.pop(k) for k in ("run_dir", "model")}
    settings = shared | {"stages": [one, one | {"name": "again"}]}
    name = "save_weights" if where == "the weights of a stage" else "save_final"
    save = getattr(Student, name)

    def full(self: Any, folder: Path) -> None:
        with files_of_at_most(9_000) if folder.parent.name in ("stages", "run") else nullcontext():
            save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Student, name, full)
        with pytest.raises(DiskError, match=r"could not be written: File too large\. The checkpoints"):
            job(settings)()
    config, folder = config_of(tmp_path / "run")
    assert Job(config, folder, is_resume=True)()["status"] == "done"


def test_at_most_keep_checkpoints_are_left(tmp_path: Path, tiny_folder: Path) -> None:
    from tutelage.train.checkpoint import drop_old

    names = ["step-0000004-00-00001-00000", *(f"step-000000{i}-00-00001-0000{i - 4}" for i in range(5, 9))]
    for keep, expected in ((1, names[-1:]), (2, [names[0], names[-1]]), (3, [names[0], *names[-2:]]), (9, names)):
        folder = tmp_path / str(keep)
        for name in names:
            (folder / name).mkdir(parents=True)
        drop_old(folder, keep)
        assert sorted(p.name for p in folder.iterdir()) == expected
