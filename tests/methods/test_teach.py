"""A teacher's answers into a store, filtered and resumed; SFT on it; its logit cache; and the check before a run."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.data.store import TrajectoryStore, TrajectoryWriter
from tutelage.errors import ConfigError, DataError, SamplerError
from tutelage.methods import teach
from tutelage.methods.config import load_config
from tutelage.methods.job import Job
from tutelage.methods.settings import DataSettings
from tutelage.methods.stored import stored_groups
from tutelage.sources.cleaned import TextRules, cleaned, left_out, longest_paragraph
from tutelage.testing.tiny import save_tiny
from tutelage.text import ChatText
from tutelage.types import Group, Span, Status, Task, Trajectory, Verdict

torch.set_num_threads(1)


def settings(folder: Path, teacher: str, **more: Any) -> dict[str, Any]:
    path = folder / "q.jsonl"
    path.write_text("".join(json.dumps({"question": f"What is {i}?", "answer": str(i)}) + "\n" for i in range(6)))
    return {
        "teacher": {"name": teacher, "precision": "float32"},
        "tasks": {"kind": "jsonl", "path": str(path)},
        "rollout": {"n": 3, "max_new_tokens": 5, "chunk_rows": 6},
        "filters": {"truncated": False, "max_other_script": None},
        "out": str(folder / "answers"),
        **more,
    }


def generate(body: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    return teach.generate(teach.generate_settings(body), Path.cwd(), **kwargs)


class Stopping:
    """Progress that stops the work after some answers."""

    def __init__(self, after: int) -> None:
        self.left = after

    def start(self, what: str, total: int, unit: str) -> None: ...
    def finish(self) -> None: ...

    def advance(self, amount: int = 1, **numbers: float) -> None:
        self.left -= amount
        if self.left < 0:
            raise KeyboardInterrupt


def test_a_stopped_generation_goes_on_to_the_same_answers(tmp_path: Path, tiny_folder: Path) -> None:
    whole = generate(settings(tmp_path, str(tiny_folder), out=str(tmp_path / "whole")))
    body = settings(tmp_path, str(tiny_folder))
    with pytest.raises(KeyboardInterrupt):
        generate(body, progress=Stopping(8))
    chunks = list((tmp_path / "answers" / ".work").glob("*/drawn/chunk-*"))
    assert 0 < len(chunks) < 3
    report = generate(body)
    assert report["num_answers"] == 18 == whole["num_answers"]
    assert report["tokens"] == whole["tokens"]
    assert list(TrajectoryStore(tmp_path / "answers")) == list(TrajectoryStore(tmp_path / "whole"))
    assert generate(body)["was_done"]
    with pytest.raises(ConfigError, match="other settings"):
        generate(body | {"seed": 1})


def test_verdicts_and_filters_mark_and_nothing_is_lost(tmp_path: Path, tiny_folder: Path) -> None:
    verifier = {"kind": "regex", "pattern": "(?s).*[a-m].*", "accept_truncated": True, "workers": 1}
    report = generate(settings(tmp_path, str(tiny_folder), verifier=verifier, licence="Apache-2.0"))
    stored = list(TrajectoryStore(tmp_path / "answers"))
    assert {t.licence for t in stored} == {"Apache-2.0"}
    assert len(stored) == 18 and report["num_kept"] == sum(t.weight != 0 for t in stored)
    assert report["left_out"]["rejected"] == sum(t.verdict.status is Status.REJECT for t in stored if t.verdict) > 0
    assert all(t.weight == 0 for t in stored if t.verdict and not t.verdict.is_accepted)


def answer(text: str, finish: str = "stop", **more: Any) -> Trajectory:
    messages = ({"role": "user", "content": "?"}, {"role": "assistant", "content": text})
    fields: dict[str, Any] = {"id": text[:9], "task_id": "q", "task_hash": "q", "spans": ()}
    return Trajectory(**{**fields, "completion": text, "messages": messages, "finish": finish, **more})


@pytest.mark.parametrize(
    ("question", "text", "mark"),
    [
        ("What is 2 + 2?", "It is 4.", None),
        ("What is 2 + 2?", "First we add. 我们先把两个数相加。 So 4.", "mixed language"),
        ("Translate 我们先把 into English", "我们先把 means: first we", None),
        ("What is the angle?", "The angle α is β + 𝛾, in total π.", None),
        ("二加二?", "答案是四。", None),
        ("Is f continuous?", "So x ∈ ℝ, f: ℝ → ℝ, and ℓ ≤ ℵ₀ with 2ⁿ steps of 3 µm; xᵢ ∈ ℂ.", None),
        ("コーヒーは?", "コーヒーとケーキのセットです。人々ｶﾌｪ", None),
        ("What is 2 + 2?", "ＡＢＣ are wide letters of one script.", None),
        ("What is 2 + 2?", "word " * 301, "long paragraph"),
        ("What is 2 + 2?", ("word " * 200 + "\n\n") * 3, None),
        ("What is 2 + 2?", "```python\nprint(2 + 2)\n```\nIt is 4.", "stray code"),
        ("Write a Python function.", "```python\nprint(2 + 2)\n```", None),
        ("Write a Python function.", "```python\nprint(2 + 2)", "stray code"),
        ("What is 2 + 2?", "  \n", "empty"),
    ],
)
def test_each_filter(question: str, text: str, mark: str | None) -> None:
    task = Task(id="q", messages=({"role": "user", "content": question},))
    (found,) = cleaned(Group(task=task, trajectories=(answer(text),)), TextRules())
    assert (found.marks[-1] if found.marks else None) == mark and found.weight == (mark is None)


def test_truncated_rejected_and_duplicate_answers_are_told_apart() -> None:
    task = Task(id="q", messages=({"role": "user", "content": "?"},))
    no = Verdict(status=Status.REJECT, score=0.0)
    broken = Verdict(status=Status.ERROR)
    answers = (answer("a b"), answer("a  b\n"), answer("c", "length"), answer("a b", verdict=no), answer("", "error"))
    marked = cleaned(Group(task=task, trajectories=(*answers, answer("d", verdict=broken))), TextRules())
    assert left_out(marked) == {"duplicate": 1, "truncated": 1, "rejected": 1, "no answer": 1, "error": 1}
    assert marked[0].weight == 1 and longest_paragraph("这是一个很长的段落") == 9 + 1


class Endpoint(http.server.BaseHTTPRequestHandler):
    asked = 0
    fails_after = 10**9
    refused: tuple[str, ...] = ()
    """Fields and questions that are answered with status 400."""

    def do_POST(self) -> None:
        kind = type(self)
        kind.asked += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        is_refused = any(r in body or r == question for r in kind.refused)
        status = 401 if kind.asked > kind.fails_after else 400 if is_refused else 200
        said = f"The answer is {question[8:-1]}, seed {body.get('seed', 0)}."
        reply = {
            "model": "big-1",
            "choices": [{"message": {"content": said}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 5},
        }
        text = json.dumps(reply if status == 200 else {"error": "no credit"}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def endpoint() -> Iterator[tuple[str, type[Endpoint]]]:
    kind = type("Fresh", (Endpoint,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", kind
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_endpoint_is_asked_only_for_what_is_missing_and_sft_reads_its_answers(
    tmp_path: Path, tiny_folder: Path, endpoint: tuple[str, type[Endpoint]]
) -> None:
    url, server = endpoint
    body = settings(tmp_path, "big") | {"teacher": {"name": "big", "url": url, "workers": 1}}
    server.fails_after = 10
    with pytest.raises(SamplerError, match="journal"):
        generate(body)
    server.fails_after, server.asked = 10**9, 0
    report = generate(body)
    assert server.asked == 8 and report["num_answers"] == 18
    assert report["tokens"]["completion_tokens"] == 5 * 8 and report["tokens"]["completion_tokens_cached"] == 5 * 10
    config, folder = load_config(sft(tmp_path, tiny_folder))
    result = Job(config, folder)()
    assert result["counts"]["steps"] == 2
    notes = [e["note"] for e in map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
             if e["event"] == "note"]  # fmt: skip
    assert any("18 were rendered anew" in n for n in notes)


def asking_endpoint(folder: Path, url: str, **more: Any) -> dict[str, Any]:
    return settings(folder, "") | {"teacher": {"name": "big", "url": url, "workers": 1, **more}}


@pytest.mark.parametrize(
    "own",
    [
        {"max_tokens_field": "max_completion_tokens", "sends_seed": False},
        {"extra": {"max_tokens": None, "max_completion_tokens": 9, "seed": None}},
    ],
)
def test_an_endpoint_that_refuses_a_field_is_asked_without_it(
    tmp_path: Path, endpoint: tuple[str, type[Endpoint]], own: dict[str, Any]
) -> None:
    url, server = endpoint
    server.refused = ("max_tokens", "seed")
    with pytest.raises(SamplerError, match=r"first 5 questions were all refused.*max_tokens_field.*status 400"):
        generate(asking_endpoint(tmp_path, url))
    assert server.asked == 13  # three samples of four questions, and the fifth question's first
    few = asking_endpoint(tmp_path, url)
    few["tasks"] |= {"size": 2}
    with pytest.raises(SamplerError, match="none of 6 requests was answered"):
        generate(few)
    assert generate(asking_endpoint(tmp_path, url, **own))["left_out"] == {"duplicate": 12}


def test_requests_that_failed_are_sent_again_by_the_same_command(
    tmp_path: Path, endpoint: tuple[str, type[Endpoint]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, server = endpoint
    server.refused = ("What is 4?",)
    verifier = {"kind": "regex", "pattern": r"is (\d)", "workers": 1}
    body = asking_endpoint(tmp_path, url) | {"verifier": verifier}
    assert generate(body)["left_out"] == {"no answer": 3}
    server.asked = 0
    with monkeypatch.context() as patch:  # answered with the failure again, judged, then killed
        patch.setattr(teach, "remove_store", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            generate(body)
    server.refused = ()
    report = generate(body)
    assert server.asked == 6 and report["num_kept"] == 18 and not report["was_done"]
    assert len(list(TrajectoryStore(tmp_path / "answers"))) == 18
    assert generate(body)["was_done"] and server.asked == 6


def test_a_generation_killed_before_its_report_is_finished(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = settings(tmp_path, str(tiny_folder))
    with monkeypatch.context() as patch:
        patch.setattr(teach, "write_json", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            generate(body)
    with pytest.raises(ConfigError, match="other settings"):
        generate(body | {"seed": 1})
    assert generate(body)["num_answers"] == 18 == len(list(TrajectoryStore(tmp_path / "answers")))
    assert generate(body)["was_done"]


def test_one_journal_serves_several_folders(tmp_path: Path, endpoint: tuple[str, type[Endpoint]]) -> None:
    url, server = endpoint
    body = asking_endpoint(tmp_path, url, journal=str(tmp_path / "asked.jsonl"))
    generate(body)
    assert server.asked == 18
    assert generate(body | {"teacher": body["teacher"] | {"workers": 2}})["was_done"]
    with pytest.raises(ConfigError, match=r"teacher\.journal"):
        generate(body | {"filters": {"max_paragraph_words": 2}})
    report = generate(body | {"filters": {"max_paragraph_words": 2}, "out": str(tmp_path / "strict")})
    assert report["left_out"] == {"long paragraph": 18} and server.asked == 18
    generate(body | {"rollout": body["rollout"] | {"n": 4}, "out": str(tmp_path / "more")})
    assert server.asked == 18 + 6


def test_what_only_the_teacher_is_told_is_not_stored(tmp_path: Path, tiny_folder: Path) -> None:
    def body(out: str, **teacher: Any) -> dict[str, Any]:
        given = settings(tmp_path, str(tiny_folder), out=str(tmp_path / out))
        return given | {"teacher": given["teacher"] | teacher, "system_prompt": "Be brief."}

    generate(body("told", system_prompt="Be right."))
    generate(body("plain") | {"system_prompt": "Be right."})
    told, plain = (list(TrajectoryStore(tmp_path / name)) for name in ("told", "plain"))
    assert [t.completion for t in told] == [t.completion for t in plain]
    text = ChatText.from_pretrained(tiny_folder)
    assert {t.messages[0]["content"] for t in told} == {"Be brief."}
    assert all("Be brief." in text.decode(t.token_ids) and "right" not in text.decode(t.token_ids) for t in told)


def sft(folder: Path, model: Path) -> dict[str, Any]:
    return {
        "method": "sft",
        "run_dir": str(folder / "run"),
        "model": {"name": str(model), "precision": "float32"},
        "data": {"path": str(folder / "answers")},
        "train": {"batch_size": 9, "epochs": 1},
    }


def test_kept_answers_of_the_same_tokenizer_are_trained_as_they_were_sampled(tmp_path: Path, tiny_folder: Path) -> None:
    generate(settings(tmp_path, str(tiny_folder)))
    text = ChatText.from_pretrained(tiny_folder)
    stored = [t for t in TrajectoryStore(tmp_path / "answers") if t.weight]
    groups, notes = stored_groups(tmp_path / "answers", DataSettings(path="x"), text, lambda *a: pytest.fail(str(a)))
    assert [t.token_ids for g in groups for t in g.trajectories] == [t.token_ids for t in stored]
    assert f"{len(stored)} token-exact" in notes[0] and len(notes) == 1
    config, folder = load_config(sft(tmp_path, tiny_folder))
    assert Job(config, folder)()["counts"]["steps"] == -(-len(stored) // 9)


def test_other_tokenizers_are_rendered_anew_and_long_ones_reported(tmp_path: Path, tiny_folder: Path) -> None:
    text = ChatText.from_pretrained(tiny_folder)
    with TrajectoryWriter(tmp_path / "s") as writer:
        theirs = Span(token_ids=(1, 2), role="assistant", author="big", is_sampled=True, is_trainable=True)
        writer.write(answer("yes", tokenizer="other", spans=(theirs,)))
        writer.write(answer("no " * 100, task_hash="p", id="long"))
        writer.write(answer("left out", weight=0.0, marks=("rejected",)))
    reported: list[tuple[str, str]] = []
    given = DataSettings(path="x", max_length=60, overlong="drop")
    groups, notes = stored_groups(tmp_path / "s", given, text, lambda *a: reported.append(a))
    (only,) = (t for g in groups for t in g.trajectories)
    assert text.decode([i for s in only.spans if s.is_sampled for i in s.token_ids]).startswith("yes")
    assert [where for where, _ in reported] == ["s/long"] and only.tokenizer == text.fingerprint
    assert "2 of 3 trajectories are kept, 0 token-exact" in notes[0] and "2 were rendered anew" in notes[1]
    with pytest.raises(DataError, match=r"data\.max_length is 60"):
        stored_groups(tmp_path / "s", DataSettings(path="x", max_length=60), text, lambda *a: None)


def cached_run(folder: Path, student: Path, teacher: Path, **more: Any) -> dict[str, Any]:
    teaching = {"method": "distill_off_policy", "divergence": {"kind": "forward_kl"}}
    cached = {"name": str(teacher), "cache": str(folder / "cache"), "is_checked": False}
    return sft(folder, student) | teaching | {"teacher": cached} | more


def test_a_cache_of_the_stored_answers_teaches(tmp_path: Path, tiny_folder: Path) -> None:
    generate(settings(tmp_path, str(tiny_folder)))
    written = teach.cache(teach.cache_config(str(tiny_folder), str(tmp_path / "answers")), tmp_path / "cache")
    kept = [t for t in TrajectoryStore(tmp_path / "answers") if t.weight]
    assert written["num_tokens"] == sum(t.num_targets for t in {t.token_ids: t for t in kept}.values())
    config, folder = load_config(cached_run(tmp_path, tiny_folder, tiny_folder))
    assert Job(config, folder)()["counts"]["steps"] == -(-len(kept) // 9)


@pytest.mark.parametrize(("student_width", "teacher_width"), [(272, 259), (259, 272)])
def test_a_cache_holds_what_two_padded_vocabularies_share(
    tmp_path: Path, student_width: int, teacher_width: int
) -> None:
    student = save_tiny(tmp_path / "student", vocab_size=student_width)
    teacher = save_tiny(tmp_path / "teacher", vocab_size=teacher_width, seed=5)
    demonstrations(tmp_path / "demos.jsonl")
    config = cached_run(tmp_path, student, teacher, data={"path": str(tmp_path / "demos.jsonl")})
    teach.cache(config, tmp_path / "cache", options=teach.CacheOptions(k=259, precision="float32"))
    losses = {}
    for cached in (str(tmp_path / "cache"), None):
        own = {"teacher": config["teacher"] | {"cache": cached}, "run_dir": str(tmp_path / f"run-{cached is None}")}
        made, folder = load_config(config | own)
        Job(made, folder)()
        lines = (Path(made.run_dir) / "metrics.jsonl").read_text().splitlines()
        losses[cached] = [json.loads(line)["train/loss"] for line in lines if "train/loss" in line]
    assert losses[None] and losses[None] == pytest.approx(losses[str(tmp_path / "cache")], rel=1e-5)
    if teacher_width > student_width:
        data = str(tmp_path / "demos.jsonl")
        teach.cache(teach.cache_config(str(teacher), data), tmp_path / "own")
        made, folder = load_config(config | {"teacher": config["teacher"] | {"cache": str(tmp_path / "own")}})
        with pytest.raises(DataError, match="--student STUDENT"):
            Job(made, folder)()


def demonstrations(path: Path) -> None:
    turns = [[{"role": r, "content": f"{r} {i}{j}"} for j in (0, 1) for r in ("user", "assistant")] for i in range(6)]
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in turns))


def test_a_cache_is_rendered_as_the_run_renders_its_data(tmp_path: Path, tiny_folder: Path) -> None:
    demonstrations(tmp_path / "demos.jsonl")
    own = {"data": {"path": str(tmp_path / "demos.jsonl"), "train_on": "last"}}
    config = cached_run(tmp_path, tiny_folder, tiny_folder, **own)
    config["model"] |= {"system_prompt": "Show the steps."}
    config["divergence"] |= {"temperature": 2.0}
    teach.cache(config, tmp_path / "cache")
    made, folder = load_config(config)
    assert Job(made, folder)()["counts"]["steps"] == 1
    with pytest.raises(ConfigError, match=r"data\.path"):
        teach.cache({k: v for k, v in config.items() if k not in ("data", "divergence")} | asking(tmp_path), tmp_path)
    with pytest.raises(ConfigError, match=r"teacher\.hint needs the live teacher"):
        teach.cache(config | {"teacher": {"name": str(tiny_folder), "hint": "{answer}"}}, tmp_path / "hinted")


def asking(folder: Path) -> dict[str, Any]:
    return {"tasks": settings(folder, "")["tasks"]}


def test_a_cache_is_its_teachers(tmp_path: Path, tiny_folder: Path) -> None:
    demonstrations(tmp_path / "demos.jsonl")
    teacher = save_tiny(tmp_path / "teacher", seed=5)
    config = cached_run(tmp_path, tiny_folder, teacher, data={"path": str(tmp_path / "demos.jsonl")})
    teach.cache(config, tmp_path / "cache")

    def run(name: Path | str) -> dict[str, Any]:
        own = {
            "run_dir": str(tmp_path / f"run-of-{Path(name).name}"),
            "teacher": config["teacher"] | {"name": str(name)},
        }
        made, folder = load_config(config | own)
        return Job(made, folder)()

    with pytest.raises(DataError, match="holds the answers of"):
        run("no/such-teacher")
    with pytest.raises(DataError, match="other weights"):
        run(tiny_folder)
    moved = teacher.rename(tmp_path / "moved")
    run(moved)  # the same weights elsewhere
    save_tiny(teacher, seed=6)
    with pytest.raises(ConfigError, match="weights"):
        teach.cache(config, tmp_path / "cache")
    with pytest.raises(DataError, match="other weights"):
        run(teacher)


def test_settings_from_a_methods_config_and_unknown_keys(tmp_path: Path) -> None:
    method = {
        "method": "distill_off_policy",
        "run_dir": "runs/x",
        "teacher": {"name": "big", "is_checked": False},
        "tasks": {"path": "q.jsonl"},
        "train": {"lr": 1e-5},
    }
    made = teach.generate_settings(method, ["out=a", "rollout.n=4"])
    assert (made.teacher.name, made.out, made.rollout.n) == ("big", "a", 4)
    served = {"name": "big", "url": ["http://a/v1", "http://b/v1"], "server": {"requests": 3}, "by_task": {}}
    method["teacher"] = served | {"system_prompt": "Be right.", "hint": "{answer}", "quantise": "4bit"}
    method["model"] = {"name": "small", "system_prompt": "Be brief."}
    made = teach.generate_settings(method, ["out=a"])
    assert (made.teacher.kind, made.teacher.url, made.teacher.workers) == ("vllm", ("http://a/v1", "http://b/v1"), 3)
    assert (made.teacher.quantise, made.teacher.hint) == ("4bit", "{answer}")
    assert (made.teacher.system_prompt, made.system_prompt) == ("Be right.", "Be brief.")
    method["teacher"] = {"name": "self", "hint": "{answer}"}
    assert teach.generate_settings(method, ["out=a"]).teacher.name == "small"
    with pytest.raises(ConfigError, match=r'unknown key "teacher.ur" \(did you mean "teacher.url"\?\)'):
        teach.generate_settings(method, ["out=a", "teacher.ur=x"])
