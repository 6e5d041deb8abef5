"""A data stage through the disk gives the run that one in memory gives, and holds one chunk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_family_runs import events, family
from test_job import StopAfter, assert_same_run, demonstrations, job, metrics, weights

from tutelage.data.select import SelectionRules
from tutelage.data.store import TrajectoryStore
from tutelage.errors import ConfigError, DataError, Interrupted
from tutelage.methods.job import Job, config_of
from tutelage.signals import HardTargets
from tutelage.sources import Drawn, Streamed
from tutelage.train.stop import StopRequest
from tutelage.types import Completion, DrawContext, Span, Status, Task, Trajectory, Verdict

torch.set_num_threads(1)
KEEP = {"distinct": "text", "cap": 2, "drop_truncated": False, "order": "shortest"}


def stage(folder: Path, model: Path, run: str, **more: Any) -> dict[str, Any]:
    data = demonstrations(folder, model)["data"]
    return family("data_stage", folder, model, run, keep=KEEP, data=data, rounds=1, **more)


@pytest.mark.parametrize("filters", [None, {"max_other_script": 0.0, "max_paragraph_words": 2}])
def test_a_streamed_stage_trains_the_same_weights_as_one_in_memory(
    filters: dict[str, Any] | None, tmp_path: Path, tiny_folder: Path
) -> None:
    for run, is_streamed in (("disk", True), ("memory", False)):
        job(stage(tmp_path, tiny_folder, run, is_streamed=is_streamed, filters=filters))()
    disk, memory = tmp_path / "disk", tmp_path / "memory"
    a, b = weights(disk / "model"), weights(memory / "model")
    assert all(torch.equal(a[k], b[k]) for k in b)
    assert metrics(disk) == metrics(memory)
    kept = [{t.id for t in TrajectoryStore(r / "trajectories") if t.weight} for r in (disk, memory)]
    assert kept[0] == kept[1] and len(kept[0]) > 10
    drawn = [events(r, "draw")[0] for r in (disk, memory)]
    for rule in ("mixed language", "long paragraph"):
        marked = [{t.id for t in TrajectoryStore(r / "trajectories") if t.marks == (rule,)} for r in (disk, memory)]
        assert marked[0] == marked[1] and bool(marked[0]) == bool(filters)
        counts = [d.get(f"data/num_left_out/{rule}{end}", 0) for d, end in zip(drawn, ("", "/sampled"), strict=True)]
        assert counts == [len(marked[0])] * 2
    recorded = [{t.id for t in TrajectoryStore(r / "trajectories") if "recorded" in t.marks} for r in (disk, memory)]
    assert recorded[0] == recorded[1] and len(recorded[0]) == 10
    num_sampled = drawn[0]["data/num_sampled_tokens"]
    assert drawn[0]["data/mean_sampled_tokens"] == num_sampled / (drawn[0]["trajectories"] - 10)
    counts = [json.loads((r / "result.json").read_text())["counts"]["tokens_sampled"] for r in (disk, memory)]
    assert counts == [num_sampled, num_sampled]
    assert drawn[0]["data/num_kept"] + 10 == len(kept[0]) and drawn[0]["trajectories"] == drawn[1]["trajectories"]
    assert (disk / "model").exists() and not list((disk / "work").glob("*/tokens"))  # cleared with its round


@pytest.mark.parametrize("stop_at", [3, 9])
def test_a_stopped_streamed_stage_resumes_to_the_same_bits(tmp_path: Path, tiny_folder: Path, stop_at: int) -> None:
    job(stage(tmp_path, tiny_folder, "whole", saving={"every_steps": 1}))()
    stop = StopRequest()
    with pytest.raises(Interrupted):
        made = job(
            stage(tmp_path, tiny_folder, "cut", saving={"every_steps": 1}), stop=stop, progress=StopAfter(stop, stop_at)
        )
        made()
    config, folder = config_of(tmp_path / "cut")
    Job(config, folder, is_resume=True)()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": {"best_of": 1}}, "best_of=1 compares"),
        ({"keep": {"drop_all_correct": True}}, "whole groups"),
        ({"keep": {"random_budget": True}}, "draws lots"),
        ({"train": {"divisor": "sampled"}}, "rejected too"),
    ],
)
def test_what_needs_whole_groups_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path, tiny_folder: Path
) -> None:
    settings = stage(tmp_path, tiny_folder, "run")
    for key, value in change.items():
        settings[key] = {**settings[key], **value}
    with pytest.raises(ConfigError, match=f"{message}.*is_streamed=false"):
        job(settings)


# -- memory -------------------------------------------------------------------------------------


class Text:
    fingerprint = "t"

    def render_prompt(self, task: Task) -> list[Span]:
        return [Span(token_ids=(1, 2, 3), role="user", author="user")]


class Counting:
    """A sampler and verifier that count how many trajectories are alive."""

    author, version, name = "student", "v", "v"

    def __init__(self) -> None:
        self.rows: list[int] = []

    def sample(self, requests: Any, params: Any, *, progress: Any = None) -> list[list[Completion]]:
        self.rows.append(sum(r.n for r in requests))
        return [
            [
                Completion(
                    token_ids=(4, 5 + (r.seed + j) % 50),
                    logprobs=(-1.0, -1.0),
                    entropies=(0.5, 0.5),
                    text=str((r.seed + j) % 50),
                    finish="stop",
                )
                for j in range(r.n)
            ]
            for r in requests
        ]

    def judge(self, task: Task, ts: list[Trajectory]) -> list[Verdict]:
        kinds = [Status.ACCEPT if int(t.completion) % 2 else Status.REJECT for t in ts]
        return [Verdict(status=k, verifier="v", reason="r", score=float(k == "accept")) for k in kinds]


def test_no_more_than_a_chunk_is_sampled_at_once_and_rows_are_read_by_number(tmp_path: Path) -> None:
    tasks = [Task(id=f"q{i}", messages=({"role": "user", "content": f"{i}"},), answer="1") for i in range(40)]
    who = Counting()
    source = Streamed(Drawn(tasks, n=8, chunk_rows=32), who, SelectionRules(distinct="text", max_per_prompt=3))
    ctx = DrawContext(seed=0, stage=0, round=0, sampler=lambda name: who, text=Text(), store=tmp_path / "work")
    draw = source.draw(ctx)
    assert who.rows == [32] * 10 and len(draw) == 320 and len(list(draw)) == 320
    targets = HardTargets().prepare(draw, score_student=lambda ts: [])
    kept = [t for t in draw if t.weight]
    assert len(targets.rows) == len(kept) == draw.stats["data/num_kept"]
    for i in (5, 0, len(kept) - 1):
        row = targets.rows[i]
        assert row.trajectory.token_ids == kept[i].token_ids and row.count == 2 and row.is_trained
    by_prompt: dict[int, set[str]] = {}
    for t in kept:
        assert t.verdict.is_accepted
        by_prompt.setdefault(t.prompt_index, set()).add(t.completion)
    assert max(map(len, by_prompt.values())) == 3 and sum(map(len, by_prompt.values())) == len(kept)
    again = Streamed(Drawn(tasks, n=8, chunk_rows=32), who, SelectionRules(distinct="text", max_per_prompt=3)).draw(ctx)
    assert len(who.rows) == 10 and [t.id for t in again] == [t.id for t in draw]  # nothing is sampled twice
    with pytest.raises(DataError, match="sampled"):
        HardTargets(divisor="sampled").prepare(draw, score_student=lambda ts: [])
