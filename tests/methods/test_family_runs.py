"""Whole runs of the rejection-sampling family and of policy gradients on a tiny model, and what makes each itself."""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_job import StopAfter, assert_same_run, demonstrations, job, metrics, rejection, weights, write_verifier

from tutelage.data.rounds import RoundStore
from tutelage.data.store import Manifest, TrajectoryStore
from tutelage.errors import CheckpointError, ConfigError, DataError, Interrupted
from tutelage.methods import METHODS
from tutelage.methods.config import load_config
from tutelage.methods.job import Job, config_of
from tutelage.monitors import GraduationMonitor
from tutelage.monitors.probe import Probe
from tutelage.train.session import Session
from tutelage.train.stop import StopRequest
from tutelage.types import MonitorReport, Trajectory

torch.set_num_threads(1)
QUICK: dict[str, Any] = {"gate": False, "evaluation": None}


def family(method: str, folder: Path, model: Path, run: str = "run", **more: Any) -> dict[str, Any]:
    settings = rejection(folder, model, run, **{**QUICK, "method": method, **more})
    if method in ("reinforce", "reinforce_rej", "rloo", "grpo", "raft_pp"):
        del settings["keep"]
        settings["train"] = {"lr": 1e-3, "batch_size": None, "schedule": "constant", **more.get("train", {})}
        settings.setdefault("truncated", "keep")
    return settings


def stored(run: Path) -> list[list[Trajectory]]:
    """Every round's draw."""
    shards = sorted(Manifest.load(run / "trajectories").shards, key=lambda s: s.name)
    everything = iter(TrajectoryStore(run / "trajectories"))
    return [list(itertools.islice(everything, s.rows)) for s in shards]


def authors(t: Trajectory) -> set[str]:
    return {s.author for s in t.spans}


def events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(x) for x in (run / "events.jsonl").read_text().splitlines()]
    return [e for e in lines if e["event"] == name]


@pytest.mark.parametrize("method", ["reinforce", "reinforce_rej", "rloo", "grpo", "raft_pp"])
def test_a_policy_gradient_run(method: str, tmp_path: Path, tiny_folder: Path) -> None:
    job(family(method, tmp_path, tiny_folder))()
    run = tmp_path / "run"
    assert len(metrics(run)) == 2  # one update a draw
    base, trained = weights(tiny_folder), weights(run / "model")
    assert max(float((base[k] - trained[k]).abs().max()) for k in base) > 1e-4
    targets = events(run, "targets")
    assert all(0 < t["policy/frac_groups_mixed"] <= 1 for t in targets)
    assert all(t["policy/mean_abs_sampler_gap_nats"] < 1e-4 for t in targets)
    assert {e["round"] for e in events(run, "sampler_gap")} == {0, 1}


@pytest.mark.parametrize("stop_at", [15, 26, 40])
def test_a_stopped_rl_run_with_refilling_and_several_updates_resumes_to_the_same_bits(
    tmp_path: Path, tiny_folder: Path, stop_at: int
) -> None:
    more = {"rollout": {"n": 2, "max_new_tokens": 6, "prompts_per_round": 3, "chunk_rows": 2}}
    more |= {"refill_draws": 3, "train": {"batch_size": 2, "epochs": 2}, "saving": {"every_steps": 1}, "rounds": 3}
    more |= {"kl_to_base": 0.1}
    job(family("grpo", tmp_path, tiny_folder, "whole", **more))()
    stop = StopRequest()
    with pytest.raises(Interrupted):
        settings = family("grpo", tmp_path, tiny_folder, "cut", **more)
        job(settings, stop=stop, progress=StopAfter(stop, stop_at))()
    config, folder = config_of(tmp_path / "cut")
    Job(config, folder, is_resume=True)()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert any(e["data/num_refill_draws"] > 0 for e in events(tmp_path / "whole", "draw"))


def test_refilling_counts_groups_as_the_signal_does_where_truncated_ones_are_dropped(
    tmp_path: Path, tiny_folder: Path
) -> None:
    more = {"rollout": {"n": 3, "max_new_tokens": 24, "prompts_per_round": 3}, "truncated": "drop"}
    job(family("grpo", tmp_path, tiny_folder, refill_draws=3, rounds=1, **more))()
    groups: dict[int, list[Trajectory]] = {}
    for t in stored(tmp_path / "run")[0]:
        groups.setdefault(t.prompt_index, []).append(t)
    rewards = {i: {t.verdict.is_accepted for t in ts if not t.is_truncated} for i, ts in groups.items()}
    hidden = [i for i, ts in groups.items() if len({t.verdict.is_accepted for t in ts}) == 2 and len(rewards[i]) < 2]
    assert hidden  # mixed only by completions that were cut
    assert all((len(rewards[i]) == 2) == all(t.weight for t in ts) for i, ts in groups.items())


@pytest.mark.parametrize("method", ["grpo", "rloo", "reinforce_rej"])
def test_rl_on_what_is_solved_ends_its_stage_and_has_a_result(method: str, tmp_path: Path, tiny_folder: Path) -> None:
    write_verifier(tmp_path, "True")
    job(family(method, tmp_path, tiny_folder, rounds=9))()
    run = tmp_path / "run"
    end = events(run, "stage_end")[0]
    assert (end["ended_by"], end["rounds"], end["step"]) == ("NOTHING_LEFT", 3, 0)
    assert len(events(run, "empty_round")) == 3 and json.loads((run / "result.json").read_text())["status"] == "done"


def test_prompts_that_are_left_out_once_solved_end_the_stage(tmp_path: Path, tiny_folder: Path) -> None:
    write_verifier(tmp_path, "True")
    keep = {"distinct": None, "cap": None, "drop_truncated": False, "drop_all_correct": True}
    job(family("rejection_sampling", tmp_path, tiny_folder, rounds=9, keep=keep))()
    end = events(tmp_path / "run", "stage_end")[0]
    assert (end["ended_by"], end["rounds"]) == ("NOTHING_LEFT", 4) and end["step"] > 0


def test_a_round_with_nothing_to_train_on_leaves_the_weights_of_the_round_before(
    tmp_path: Path, tiny_folder: Path
) -> None:
    write_verifier(tmp_path, "True")
    keep = {"distinct": None, "cap": None, "drop_truncated": False, "drop_all_correct": True}
    job(family("rejection_sampling", tmp_path, tiny_folder, rounds=9, keep=keep, start_from="base"))()
    run = tmp_path / "run"
    assert len(events(run, "empty_round")) == 3
    job(family("rejection_sampling", tmp_path, tiny_folder, "once", rounds=1, keep=keep, start_from="base"))()
    trained, base = weights(run / "model"), weights(tiny_folder)
    assert all(torch.equal(v, trained[n]) for n, v in weights(tmp_path / "once" / "model").items())
    assert not all(torch.equal(v, base[n]) for n, v in trained.items())


def test_rules_that_never_keep_what_was_accepted_stop_the_run(tmp_path: Path, tiny_folder: Path) -> None:
    keep = {"distinct": None, "cap": None, "drop_truncated": False, "min_score": 2.0}
    with pytest.raises(
        DataError, match=r"round 2: nothing to train on. Of 36 trajectories \d+ were accepted and 0 kept"
    ):
        job(family("rejection_sampling", tmp_path, tiny_folder, rounds=9, keep=keep))()


def test_star_hides_the_hint_and_restarts_from_base(tmp_path: Path, tiny_folder: Path) -> None:
    more = {"rollout": {"n": 1, "temperature": 1.0, "max_new_tokens": 6}, "keep": {"drop_truncated": False}}
    job(family("star", tmp_path, tiny_folder, hint_n=3, **more))()
    run = tmp_path / "run"
    everything = list(TrajectoryStore(run / "trajectories"))
    hinted = [t for t in everything if "hinted" in t.marks]
    plain = {t.task_hash: t for t in everything if "hinted" not in t.marks}
    assert hinted and any(t.weight for t in hinted) and any(not t.weight for t in hinted)
    for t in hinted:
        assert not t.spans[-1].is_context_exact and t.behaviour_logprobs is None
        assert t.spans[:-1] == plain[t.task_hash].spans[:-1]
        assert "Hint" not in json.dumps([dict(m) for m in t.messages])
    solved = {
        (t.task_hash, t.id.split("p")[0]) for t in everything if "hinted" not in t.marks and t.verdict.is_accepted
    }
    assert not any((t.task_hash, t.id.split("p")[0]) in solved for t in hinted)  # only what nobody solved
    assert events(run, "draw")[0]["data/num_prompts_hinted"] > 0


def test_rest_draws_once_and_improves_on_a_stricter_part_each_time(tmp_path: Path, tiny_folder: Path) -> None:
    keep = {"distinct": None, "cap": None, "drop_truncated": False}
    (tmp_path / "judge.py").write_text(
        "def judge(task, completion, trajectory):\n"
        "    return {'accepted': True, 'score': sum(map(ord, completion)) % 10 / 10, 'reason': 'by rule'}\n"
    )
    settings = family("rest", tmp_path, tiny_folder, thresholds=[0.0, 0.4, 0.8], rounds=4, keep=keep)
    settings["saving"] = {"every_steps": 1}
    stop = StopRequest()
    cut = job({**settings, "run_dir": str(tmp_path / "cut")}, stop=stop)
    write = cut.run.log_metrics
    cut.run.log_metrics = lambda r: (write(r), stop.request("test") if r["step"] == 11 else None)  # type: ignore
    with pytest.raises(Interrupted):
        cut()
    job(settings)()
    rounds = stored(tmp_path / "run")
    names = [[t.id for t in r] for r in rounds]
    assert names[0] == names[1] == names[2] != names[3]
    kept = [{t.id for t in r if t.weight} for r in rounds[:3]]
    assert kept[0] > kept[1] > kept[2] and kept[2]
    for r, threshold in zip(rounds, (0.0, 0.4, 0.8), strict=False):
        assert all((t.weight != 0) == (t.verdict.score > threshold) for t in r)
    config, folder = config_of(tmp_path / "cut")
    assert 0 < len(metrics(tmp_path / "cut")) < len(metrics(tmp_path / "run"))
    Job(config, folder, is_resume=True)()
    assert_same_run(tmp_path / "run", tmp_path / "cut")


def test_rest_em_and_data_stage_keep_at_most_their_cap(tmp_path: Path, tiny_folder: Path) -> None:
    for method, cap in (("rest_em", 2), ("data_stage", 1)):
        keep = {"distinct": None, "cap": cap, "drop_truncated": False}
        more = {"data": demonstrations(tmp_path, tiny_folder)["data"]} if method == "data_stage" else {}
        job(family(method, tmp_path, tiny_folder, method, keep=keep, **more))()
        draws = list(TrajectoryStore(tmp_path / method / "trajectories"))
        counts: dict[tuple[str, str], int] = {}
        for t in draws:
            if t.weight and "human" not in authors(t):
                name = (t.task_hash, t.id.split("p")[0])
                counts[name] = counts.get(name, 0) + 1
        assert max(counts.values()) == cap
        assert any("human" in authors(t) for t in draws) == (method == "data_stage")
        assert config_of(tmp_path / method)[0].stages[0].start_from == "base"


def test_raft_keeps_the_best_of_each_prompt_by_score(tmp_path: Path, tiny_folder: Path) -> None:
    keep = {"distinct": None, "cap": None, "best_of": 1, "drop_truncated": False}
    job(family("raft", tmp_path, tiny_folder, keep=keep, is_accepted_only=False))()
    for draws in stored(tmp_path / "run"):
        by_task: dict[str, list[Trajectory]] = {}
        for t in draws:
            by_task.setdefault(t.task_hash, []).append(t)
        for ts in by_task.values():
            best = max(t.verdict.score for t in ts)
            assert [t.verdict.score for t in ts if t.weight] == [best]


@pytest.mark.parametrize("distinct", ["key", "text"])
def test_rft_pools_distinct_paths_over_rounds_with_gold(tmp_path: Path, tiny_folder: Path, distinct: str) -> None:
    """The tiny model writes no equations: all its answers to a question are one path, which the first round has."""
    write_verifier(tmp_path, "True")
    gold = demonstrations(tmp_path, tiny_folder)["data"]
    keep = {"distinct": distinct, "cap": None, "drop_truncated": False, "order": "farthest"}
    job(family("rft", tmp_path, tiny_folder, keep=keep, gold=gold))()
    first, second = stored(tmp_path / "run")
    assert [sum("human" in authors(t) for t in r) for r in (first, second)] == [10, 10]
    first = [t for t in first if "human" not in authors(t)]
    for name in {t.task_hash for t in first}:
        kept = [t for t in first if t.task_hash == name and t.weight]
        same = [t.verdict.key if distinct == "key" else t.completion.strip() for t in kept]
        assert len(same) == len(set(same)) >= 1 and (distinct == "text" or same == [""])
    replayed = events(tmp_path / "run", "draw")[1]["data/num_replayed/samples"]
    assert (replayed > 0) == (distinct == "text")
    assert sum("replayed" in t.marks for t in second) == replayed


def test_rft_pools_samplers_by_prompt_before_it_compares_paths(tmp_path: Path, tiny_folder: Path) -> None:
    write_verifier(tmp_path, "True")
    keep = {"distinct": "key", "cap": None, "drop_truncated": False}
    samplers = ["student", str(tiny_folder)]
    job(family("rft", tmp_path, tiny_folder, keep=keep, samplers=samplers, rounds=1))()
    draws = list(TrajectoryStore(tmp_path / "run" / "trajectories"))
    by_task: dict[str, list[Trajectory]] = {}
    for t in draws:
        by_task.setdefault(t.task_hash, []).append(t)
    assert {len(ts) for ts in by_task.values()} == {8}  # n = 4 by each
    assert {sum(t.weight != 0 for t in ts) for ts in by_task.values()} == {1}  # one path among both


def test_rest_em_keeps_ten_of_a_question_and_star_grows_by_a_fifth() -> None:
    em, star = METHODS["rest_em"].settings, METHODS["star"].settings
    shared = {"tasks": {"kind": "jsonl", "path": "q"}, "verifier": {"kind": "exact"}}
    made = em(method="rest_em", **shared)
    assert (made.keep.cap, made.rollout.n, made.rollout.temperature, made.start_from) == (10, 32, 0.7, "base")
    train = star(method="star", **shared).train
    assert (train.updates, train.updates_growth) == (40, 1.2)


def test_star_shows_worked_examples_in_the_first_loop_only_and_its_loops_grow(
    tmp_path: Path, tiny_folder: Path
) -> None:
    examples = demonstrations(tmp_path, tiny_folder)["data"] | {"limit": 2}
    more = {"rollout": {"n": 2, "temperature": 1.0, "max_new_tokens": 6}, "keep": {"drop_truncated": False}}
    more |= {"train": {"lr": 1e-3, "batch_size": 4, "updates": 5, "updates_growth": 1.2}, "hint": None}
    job(family("star", tmp_path, tiny_folder, examples=examples, **more))()
    run = tmp_path / "run"
    first, second = stored(run)
    assert all(t.behaviour_logprobs is None and not t.spans[-1].is_context_exact for t in first)
    assert all(t.behaviour_logprobs is not None for t in second)
    assert {len(t.messages) for t in first} == {2}  # question and answer, no examples
    assert [sum(m["round"] == r for m in metrics(run)) for r in (0, 1)] == [5, 6]


def test_the_random_budget_keeps_as_many_but_others(tmp_path: Path, tiny_folder: Path) -> None:
    kept = {}
    for arm in (False, True):
        keep = {"distinct": None, "cap": None, "drop_truncated": False, "random_budget": arm}
        job(family("rejection_sampling", tmp_path, tiny_folder, f"arm{arm}", keep=keep, rounds=1))()
        draws = list(TrajectoryStore(tmp_path / f"arm{arm}" / "trajectories"))
        kept[arm] = {t.id for t in draws if t.weight}
        by_rule = {t.id for t in draws if t.verdict.is_accepted}
        assert (kept[arm] == by_rule) != arm
    assert len(kept[True]) == len(kept[False])


# -- the gate and graduation --------------------------------------------------------------------


def ruinous(folder: Path, model: Path, **more: Any) -> dict[str, Any]:
    """A verifier that accepts early rounds' habits only: trained with a far too high rate, the model breaks."""
    write_verifier(folder, "len(set(completion)) >= 4")
    settings = family("rejection_sampling", folder, model, gate=True, rounds=4, **more)
    settings["probe"] = {"questions": 9, "n": 16}
    settings["train"] |= {"lr": 3.0, "optimizer": "adamw", "schedule": "constant", "warmup": 0.0, "epochs": 2}
    settings["tasks"] |= {"heldout": 0}
    return settings


@pytest.mark.parametrize("saving", [{}, {"keep": 1, "every_steps": 1}], ids=["by rounds", "one, by steps"])
def test_the_gate_takes_a_ruinous_round_back_and_two_end_the_stage(
    tmp_path: Path, tiny_folder: Path, saving: dict[str, Any]
) -> None:
    job(ruinous(tmp_path, tiny_folder, saving=saving))()
    run = tmp_path / "run"
    verdicts = [(e["round"], e["verdict"], e["stop"]) for e in events(run, "verdict")]
    assert verdicts == [(0, "CONTINUE", False), (0, "REGRESSED", False), (1, "REGRESSED", True)]
    assert len(events(run, "revert")) == 2
    named = [{span.policy_version for t in r for span in t.spans if span.is_sampled} for r in stored(run)]
    steps = events(run, "verdict")[1]["step"]
    assert named == [{"stage0-step0"}, {f"stage0-step{steps}-revert1"}]  # not what the round taken back was called
    base, after = weights(tiny_folder), weights(run / "model")
    assert all(torch.equal(base[k], after[k]) for k in base)


def graduating(folder: Path, model: Path, run: str, **more: Any) -> dict[str, Any]:
    """Thresholds that a tiny model meets: what is tested is what follows from the verdict, not the verdict."""
    write_verifier(folder)
    settings = family("rejection_sampling", folder, model, run, until="graduation", rounds=6, **more)
    settings["probe"] = {"questions": 9, "n": 8, "every_steps": 2}
    settings["graduation"] = {"min_tasks": 3, "min_samples": 4, "entropy_ratio": 5.0, "entropy_slope": 5.0}
    settings["graduation"] |= {"slope_probes": 2, "plateau_probes": 2, "min_gain": 0.9, "headroom": -1.0}
    settings["graduation"] |= {"min_mixed": 0.0, "max_same": 1.0, "agree": 1, "of": 1, "group": 2, "coverage_k": 4}
    settings["tasks"] |= {"heldout": 0}
    return settings


def test_graduation_ends_the_stage_and_rl_goes_on_from_its_checkpoint(tmp_path: Path, tiny_folder: Path) -> None:
    rl = {"rounds": 2, "train": {"lr": 1e-4, "batch_size": None}, "truncated": "keep"}
    settings = graduating(tmp_path, tiny_folder, "whole", then="rl", rl=rl, saving={"every_steps": 1})
    job(settings)()
    run = tmp_path / "whole"
    assert [e["name"] for e in events(run, "stage")] == ["rejection_sampling", "rejection_sampling_rl"]
    last = [e for e in events(run, "verdict") if e["stop"]][-1]
    assert last["verdict"] == "GRADUATE" and last["round"] < 5
    chosen = events(run, "hand_over")[0]
    assert chosen["checkpoint"] == last["hand_over"]["checkpoint"]
    assert {m["stage"] for m in metrics(run)} == {0, 1}
    steps = [e["step"] for e in events(run, "verdict")]
    assert any(b - a == 2 for a, b in itertools.pairwise(steps))  # probed within rounds too
    stop = StopRequest()
    with pytest.raises(Interrupted):
        job({**settings, "run_dir": str(tmp_path / "cut")}, stop=stop, progress=StopAfter(stop, 60))()
    config, folder = config_of(tmp_path / "cut")
    Job(config, folder, is_resume=True)()
    assert_same_run(run, tmp_path / "cut")


def test_practised_questions_are_compared_with_the_probe_of_the_weights_that_answered(
    tmp_path: Path, tiny_folder: Path
) -> None:
    settings = graduating(tmp_path, tiny_folder, "run")
    settings["probe"]["every_steps"] = 0
    settings["rollout"]["n"] = 8
    job(settings)()
    seen = [e for e in events(tmp_path / "run", "verdict") if "practised" in e]
    assert len(seen) > 1 and seen[0]["practised"] is None  # the reference, before the first draw
    rounds = stored(tmp_path / "run")
    for before, e, draw in zip(seen, seen[1:], rounds, strict=False):
        assert e["practised"]["tasks"] == 12
        assert e["practised"]["pass@1_of_probe"] == pytest.approx(before["pass@1"]["value"])
        right = [t.verdict.is_accepted for t in draw if t.verdict]
        assert e["practised"]["pass@1"] == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("stop_at", [20, 45])
def test_a_verdict_between_two_updates_ends_the_stage_there(tmp_path: Path, tiny_folder: Path, stop_at: int) -> None:
    rl = {"rounds": 1, "train": {"lr": 1e-4, "batch_size": None}, "truncated": "keep"}
    more = {"then": "rl", "rl": rl, "saving": {"every_steps": 1}, "rollout": {"n": 4, "max_new_tokens": 6}}
    settings = graduating(tmp_path, tiny_folder, "whole", **more)
    settings["probe"]["every_steps"] = 1
    settings["train"] = {**settings.get("train", {}), "lr": 1e-3, "batch_size": 2, "epochs": 4}
    job(settings)()
    run = tmp_path / "whole"
    ends = [e for e in events(run, "verdict") if e["stop"]]
    assert [e["verdict"] for e in ends] == ["GRADUATE"]
    cut = events(run, "round_cut")[0]
    updates = [m["step"] for m in metrics(run) if m["stage"] == 0]
    assert len(updates) == ends[0]["step"] and cut["round"] == ends[0]["round"]
    done = [m for m in metrics(run) if m["stage"] == 0 and m["round"] == cut["round"]]
    kept = events(run, "draw")[cut["round"]]["data/num_kept"]
    assert len(done) == cut["steps_done"] < 4 * math.ceil(kept / 2)  # updates of the round were left out
    assert events(run, "stage_end")[0]["ended_by"] == "GRADUATE"
    assert (run / "trajectories" / f"stage0-round{cut['round']:05d}.parquet").exists()
    stop = StopRequest()
    with pytest.raises(Interrupted):
        job({**settings, "run_dir": str(tmp_path / "cut")}, stop=stop, progress=StopAfter(stop, stop_at))()
    config, folder = config_of(tmp_path / "cut")
    Job(config, folder, is_resume=True)()
    assert_same_run(run, tmp_path / "cut")


def test_what_may_be_handed_over_is_still_there_after_a_round_was_taken_back(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six probes within the round that is taken back; then the first probe of all is the one to go on from."""
    run, update, seen = tmp_path / "run", GraduationMonitor.update, []

    def watched(self: GraduationMonitor, probe: Probe, **more: Any) -> MonitorReport:
        report = update(self, probe, **more)
        wanted = {p.checkpoint for p in self.history[-3:]}
        seen.append((len(self.history), wanted - {p.name for p in (run / "probes").iterdir()}))
        return report

    monkeypatch.setattr(GraduationMonitor, "update", watched)
    settings = graduating(tmp_path, tiny_folder, "run", gate=True)
    write_verifier(tmp_path, "len(set(completion)) >= 4")
    settings["graduation"] |= {"agree": 99, "of": 99}  # never settled: only the gate acts
    settings["probe"] |= {"n": 16, "every_steps": 3, "kl": False}
    settings["train"] |= {"lr": 3.0, "optimizer": "adamw", "schedule": "constant", "warmup": 0.0, "epochs": 2}
    job(settings)()
    assert events(run, "revert")
    counts = [n for n, _ in seen]
    assert any(a > 4 and b == 2 for a, b in itertools.pairwise(counts))  # went back to the first probe and on
    assert [missing for _, missing in seen if missing] == []


def test_weights_to_hand_over_that_are_gone_stop_the_run(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_over = Session._hand_over

    def robbed(self: Session, reports: Any) -> None:
        shutil.rmtree(self.run.root / "probes")
        hand_over(self, reports)

    monkeypatch.setattr(Session, "_hand_over", robbed)
    with pytest.raises(CheckpointError, match=r"were chosen to go on from and are not in"):
        job(graduating(tmp_path, tiny_folder, "run"))()


def test_drift_retention_and_heldout_demonstrations_reach_the_monitor(tmp_path: Path, tiny_folder: Path) -> None:
    settings = graduating(tmp_path, tiny_folder, "whole", saving={"every_steps": 1})
    settings["rounds"], settings["graduation"]["min_tasks"] = 2, 1000
    shown = demonstrations(tmp_path, tiny_folder)["data"]
    other = {"name": "other", "tasks": settings["tasks"], "verifier": settings["verifier"], "questions": 5, "n": 4}
    settings["probe"] |= {"every_steps": 0, "retention": [other], "heldout": shown, "kl_n": 2}
    job(settings)()
    run = tmp_path / "whole"
    verdicts = events(run, "verdict")
    drift = [v["criteria"]["G9"]["details"] for v in verdicts]
    assert abs(drift[0]["kl_forward"]["value"]) < 1e-5 and abs(drift[0]["kl_reverse"]["value"]) < 1e-5
    assert drift[0]["retention"]["other"]["value"] == 0
    assert all(abs(d[kl]["value"]) > 1e-4 for d in drift[1:] for kl in ("kl_forward", "kl_reverse"))
    assert verdicts[-1]["criteria"]["G9"]["verdict"] != "INSUFFICIENT"
    assert verdicts[-1]["criteria"]["G8"]["details"]["by"] == "lowest held-out NLL"
    samples = RoundStore(run / "probes" / "reference-rejection_sampling").load(0)
    assert samples is not None and len(samples) == 2 * 12
    cost = verdicts[-1]["cost"]
    assert cost["all_tokens"] >= cost["probe_tokens"] > 12 * 8  # retention's samples are counted too
    stop = StopRequest()
    with pytest.raises(Interrupted):
        job({**settings, "run_dir": str(tmp_path / "cut")}, stop=stop, progress=StopAfter(stop, 45))()
    config, folder = config_of(tmp_path / "cut")
    Job(config, folder, is_resume=True)()
    assert_same_run(run, tmp_path / "cut")
    again = RoundStore(tmp_path / "cut" / "probes" / "reference-rejection_sampling").load(0)
    assert [t.token_ids for t in again or ()] == [t.token_ids for t in samples]


@pytest.mark.parametrize(
    ("temperature", "probe", "verdicts"),
    [(1.0, {}, {"pass", "fail"}), (0.7, {}, {"fail"}), (1.0, {"temperature_cap": None}, {"insufficient"})],
)
def test_g7_is_decided_in_a_run_that_says_how_hot_it_may_sample(
    tmp_path: Path, tiny_folder: Path, temperature: float, probe: dict[str, Any], verdicts: set[str]
) -> None:
    rollout = {"n": 4, "max_new_tokens": 6, "temperature": temperature}
    settings = graduating(tmp_path, tiny_folder, "run", rollout=rollout)
    settings["rounds"], settings["graduation"]["min_tasks"] = 1, 1000
    settings["probe"] |= {"every_steps": 0, "kl": False, **probe}
    job(settings)()
    first, last = (e["criteria"]["G7"] for e in events(tmp_path / "run", "verdict"))
    assert first["verdict"] == "insufficient" and last["verdict"] in verdicts  # a window of two probes
    assert last["threshold"] == 0.0 and last["ci95"][0] <= last["value"] <= last["ci95"][1]
    if temperature < 1:
        assert "raise it before giving up" in last["why"]


def test_drift_may_be_measured_from_an_earlier_stage(tmp_path: Path, tiny_folder: Path) -> None:
    practice = graduating(tmp_path, tiny_folder, "run")
    shared = {k: practice.pop(k) for k in ("run_dir", "model", "evaluation", "system") if k in practice}
    practice |= {"rounds": 1, "name": "practice"}
    practice["graduation"]["min_tasks"] = 1000
    practice["probe"] |= {"every_steps": 0, "reference": "stage:cold_start", "questions": 4}
    cold = {"method": "sft", "name": "cold_start", "data": demonstrations(tmp_path, tiny_folder)["data"]}
    cold["train"] = {"lr": 1e-2, "epochs": 1}
    job({**shared, "stages": [cold, practice]})()
    first, last = (v["criteria"]["G9"]["details"] for v in events(tmp_path / "run", "verdict"))
    assert abs(first["kl_forward"]["value"]) < 1e-5 and abs(first["kl_reverse"]["value"]) < 1e-5
    assert abs(last["kl_forward"]["value"]) > 1e-4


def test_heldout_demonstrations_that_are_trained_on_are_refused(tmp_path: Path, tiny_folder: Path) -> None:
    settings = graduating(tmp_path, tiny_folder, "run")
    data = demonstrations(tmp_path, tiny_folder)["data"]
    settings["probe"]["heldout"] = data
    shared = {k: settings.pop(k) for k in ("run_dir", "model", "evaluation", "system") if k in settings}
    with pytest.raises(ConfigError, match=r"trained on by stage 'cold_start'"):
        job({**shared, "stages": [{"method": "sft", "name": "cold_start", "data": data}, settings]})()


def test_rl_is_skipped_where_the_monitor_did_not_say_so(tmp_path: Path, tiny_folder: Path) -> None:
    settings = graduating(tmp_path, tiny_folder, "run", then="rl", rl={"rounds": 1})
    settings["rounds"], settings["graduation"]["min_tasks"] = 1, 1000
    job(settings)()
    assert [e["name"] for e in events(tmp_path / "run", "stage")] == ["rejection_sampling"]
    assert "ended with ROUNDS" in events(tmp_path / "run", "stage_skipped")[0]["why"]
    assert all(e["verdict"] == "INSUFFICIENT" for e in events(tmp_path / "run", "verdict"))


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("grpo", {"rollout": {"n": 1}}, r"rollout\.n must be at least 2"),
        ("grpo", {"train": {"divisor": "sampled"}}, "here normalise says it"),
        ("raft", {"then": "rl"}, "then=rl needs until=graduation"),
        ("raft", {"rl": {"rounds": 1}}, "set then=rl"),
        ("rejection_sampling", {"until": "graduation", "then": "rl", "rl": {"rolout": {}}}, "rl.rolout"),
        ("rest", {"thresholds": [0.5, 0.1]}, "thresholds must rise"),
    ],
)
def test_settings_that_contradict_each_other(
    method: str, change: dict[str, Any], message: str, tmp_path: Path, tiny_folder: Path
) -> None:
    settings = family(method, tmp_path, tiny_folder, **change)
    with pytest.raises(ConfigError, match=message):
        config, folder = load_config(settings)
        Job(config, folder)()
