"""Every stage of a finished run on the same held-out questions: what each rung of a plan brought, and who ended it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.errors import ConfigError
from tutelage.evals import EvalResult, compare, evaluate
from tutelage.methods.config import RunConfig
from tutelage.methods.job import config_of, measuring_of
from tutelage.methods.workbench import Workbench
from tutelage.numerics.statistics import all_same_by_task, mean_over_tasks
from tutelage.train.run_directory import write_atomically
from tutelage.types import Progress

FILE = "stages.json"


def report_stages(run_dir: Path, *, progress: Progress | None = None, group: int = 8) -> dict[str, Any]:
    """Evaluate the weights at the end of each stage, unless that was done, and write RUN/stages.json.

    pass@k, entropy and shares of all-right and all-wrong groups come with 95% intervals; `gain` is pass@1 and pass@k
    over the stage before, paired by question. The final weights are the last stage's.

    Args:
        group: size of the groups whose shares are reported; unbiased from the evaluation's samples.

    Raises:
        ConfigError: the run is not finished, or has no held-out question.
    """
    config, folder = config_of(run_dir)
    if not (run_dir / "result.json").exists() or config.evaluation is None:
        raise ConfigError(f"{run_dir} is not a finished run with an evaluation: `tutelage resume {run_dir}` first")
    ends = _ends(run_dir)
    rows: list[dict[str, Any]] = []
    before: EvalResult | None = None
    for i, end in enumerate(ends):
        is_last = i == len(ends) - 1
        path = run_dir / "model" if is_last else run_dir / "stages" / end["name"]
        name = "after" if is_last else f"stage-{end['name']}"
        result = _evaluation(config, folder, run_dir, name, path, progress)
        rows.append({**end, **_numbers(result, group)})
        if before is not None:
            rows[-1]["gain"] = {m: compare(before, result, metric=m).to_json() for m in result.metrics}
        before = result
    report = {"run_dir": str(run_dir), "group": group, "stages": rows}
    report["questions"] = json.loads((run_dir / "result.json").read_text(encoding="utf-8")).get("questions", {})
    write_atomically(run_dir / FILE, json.dumps(report, indent=2))
    return report


def _ends(run_dir: Path) -> list[dict[str, Any]]:
    """Name, updates, rounds, ending, the verdict's sentence and the cost of probing, of each stage."""
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    verdicts = [e for e in events if e["event"] == "verdict"]
    out = []
    for end in (e for e in events if e["event"] == "stage_end"):
        own = [v for v in verdicts if v.get("stage") == end["stage"]]
        row = {k: end[k] for k in ("name", "rounds", "step", "ended_by")}
        if own:
            last = own[-1]
            row |= {"why": last.get("why", ""), "verdicts": [[v["step"], v["verdict"]] for v in own if "step" in v]}
            row["probing"] = last.get("cost")
        out.append(row)
    return out


def _evaluation(
    config: RunConfig, folder: Path, run_dir: Path, name: str, model: Path, progress: Progress | None
) -> EvalResult:
    path = run_dir / "evaluation" / f"{name}.json"
    if path.exists():
        return EvalResult.from_json(json.loads(path.read_text(encoding="utf-8")))
    own = config.model_copy(update={"model": config.model.model_copy(update={"name": str(model), "lora": None})})
    bench = Workbench(own, folder)
    try:
        measuring, settings = measuring_of(own, bench), config.evaluation
        if measuring is None or settings is None:
            raise ConfigError("a report by stages needs held-out questions and a verifier: set tasks.heldout")
        result = evaluate(
            bench.sampler("student", name),
            measuring.tasks,
            measuring.verifier,
            text=bench.text,
            n=settings.n,
            params=measuring.params,
            seed=settings.seed,
            ks=tuple(k for k in settings.ks if k <= settings.n),
            progress=progress,
        )
    finally:
        bench.close()
    write_atomically(path, json.dumps(result.to_json()))
    return result


def _numbers(result: EvalResult, group: int) -> dict[str, Any]:
    counts = [(c.n, c.c) for c in result.counts if c.n >= group]
    out: dict[str, Any] = {m: result.metric_json(m) for m in result.metrics}
    out["entropy_nats"] = result.entropy.to_json()["token_mean"]
    if counts:
        wrong, right = all_same_by_task([n for n, _ in counts], [c for _, c in counts], group)
        for name, values in (("all_wrong", wrong), ("all_right", right), ("all_same", wrong + right)):
            out[name] = mean_over_tasks(values, seed=result.seed).to_json()
    return out


def stage_rows(report: Mapping[str, Any]) -> list[tuple[str, Sequence[str]]]:
    """(stage, cells) for a text table: updates, pass@k, all-same share with intervals, entropy."""
    out: list[tuple[str, Sequence[str]]] = []
    for s in report["stages"]:
        cells = [str(s["step"])]
        metrics = [m for m in s if m.startswith("pass@")]
        for name in (*metrics, "all_same"):
            body = s.get(name)
            cells.append("" if body is None else f"{body['value']:.3f} [{body['ci95'][0]:.3f}, {body['ci95'][1]:.3f}]")
        cells.append(f"{s['entropy_nats']:.4f}" if s["entropy_nats"] is not None else "")
        out.append((str(s["name"]), cells))
    return out
