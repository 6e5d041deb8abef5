"""`match_budget: random`: the same run again on as many random completions, so that the gain of choosing is seen.

The control arm has the same seed, prompts and stages. Where the run kept c samples of a prompt in a round, the arm
keeps c of its own of that prompt in that round, drawn by lot whatever the verifier said of them; none in a round that
the run took back. The run's gain minus
the arm's is due to choosing: format, length and mere training on one's own samples are in both.
"""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

from tutelage.errors import ConfigError
from tutelage.evals import EvalResult, compare, compare_controls
from tutelage.methods.config import RunConfig
from tutelage.methods.job import CONFIG, Job
from tutelage.methods.keeping import taken_back
from tutelage.train.run_directory import write_atomically

ARM = "control-random"
NAME = "as many random completions"


def run_job(config: RunConfig, folder: Path, *, is_resume: bool = False, **options: Any) -> dict[str, Any]:
    """A run, and its control arm where `match_budget` asks for one. Options are those of `Job`.

    Raises:
        ConfigError: there is nothing to match, or nothing to compare on.
    """
    _check(config)
    result = Job(config, folder, is_resume=is_resume, **options)()
    if config.match_budget is None:
        return result
    gc.collect()  # the first arm's model
    root = Path(config.run_dir)
    arm = _arm(config, root, left_out=result.get("questions", {}).get("left_out", 0))
    arm_root = Path(arm.run_dir)
    is_begun = (arm_root / CONFIG).exists()
    if not is_begun:
        (arm_root / "evaluation").mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "evaluation" / "before.json", arm_root / "evaluation" / "before.json")
    control = Job(arm, folder, is_resume=is_begun, **options)()
    return _with_control(config, result, control, root, arm_root)


def _check(config: RunConfig) -> None:
    if config.match_budget is None:
        return
    problems = []
    if not any(hasattr(s, "keep") for s in config.stages):
        problems.append("match_budget=random needs a stage that keeps some of its samples (keep); this run has none")
    if config.evaluation is None:
        problems.append("match_budget=random compares two arms on held-out questions: evaluation must not be null")
    if any(getattr(s, "then", None) == "rl" for s in config.stages):
        problems.append("match_budget=random compares what imitation gains: leave out then=rl, or run it afterwards")
    if problems:
        raise ConfigError(problems)


def _arm(config: RunConfig, root: Path, *, left_out: int) -> RunConfig:
    """The control's settings: random budgets, as many rounds as the run had, nothing that stops or takes back; measured
    on the same questions."""
    rounds = _rounds(root)
    stages = []
    for i, stage in enumerate(config.stages):
        changes: dict[str, Any] = {}
        if hasattr(stage, "keep"):
            changes["keep"] = stage.keep.model_copy(update={"random_budget": str(root.resolve())})
        if hasattr(stage, "gate"):
            changes |= {"gate": False, "until": "rounds", "rounds": rounds.get(i, stage.rounds)}
        if hasattr(stage, "then"):
            changes["then"] = None
        if hasattr(stage, "is_streamed"):
            changes["is_streamed"] = False  # lots are drawn within whole groups
        stages.append(stage.model_copy(update=changes))
    assert config.evaluation is not None
    evaluation = config.evaluation.model_copy(update={"controls": False, "leave_out": left_out})
    more = {"run_dir": str(root / ARM), "stages": tuple(stages), "evaluation": evaluation, "match_budget": None}
    return config.model_copy(update=more)


def _rounds(root: Path) -> dict[int, int]:
    """Stage -> rounds that it took, from the event log."""
    lines = (root / "events.jsonl").read_text(encoding="utf-8").splitlines()
    ends = [e for e in map(json.loads, lines) if e["event"] == "stage_end"]
    return {e["stage"]: e["rounds"] for e in ends}


def _with_control(
    config: RunConfig, result: dict[str, Any], control: dict[str, Any], root: Path, arm_root: Path
) -> dict[str, Any]:
    """The result with the arm beside the other controls, and what each kept."""
    if "after" not in result or "after" not in control:
        raise ConfigError("match_budget=random found no held-out question to compare on: set tasks.heldout")
    trained, random = (_evaluation(folder) for folder in (root, arm_root))
    result["controls"] = {**result["controls"], **compare_controls(trained, {NAME: (random, "pass@1")})}
    gone = taken_back(root)
    result["match_budget"] = {
        "run_dir": str(arm_root),
        "kept": [0.0 if (r["stage"], r["round"]) in gone else r.get("data/num_kept") for r in result["rounds"]],
        "control_kept": [r.get("data/num_kept") for r in control["rounds"]],
        "control": control["after"],
        "control_gain": control["gain"],
        "gains": {m: compare(random, trained, metric=m).to_json() for m in trained.metrics},
    }
    write_atomically(root / "result.json", json.dumps(result, indent=2, default=str))
    return result


def _evaluation(root: Path) -> EvalResult:
    return EvalResult.from_json(json.loads((root / "evaluation" / "after.json").read_text(encoding="utf-8")))
