"""`tutelage demo ladder`: every rung of imitation on one small model, and who decided when to climb."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tutelage.cli import runs
from tutelage.cli.main import print_json
from tutelage.cli.progress import TerminalProgress
from tutelage.methods.config import load_config

TASK = "task"
"""Folder of the run with the model, demonstrations and questions."""


def run(run_dir: Path, settings: Sequence[str], out: Console, *, as_json: bool) -> None:
    """Make the task, carry out the plan (or go on with it), and report it stage by stage."""
    from tutelage.methods.stages_report import report_stages

    if (run_dir / "config.yaml").exists():
        if not (run_dir / "result.json").exists():
            runs.resume(run_dir, out, yes=False)
    else:
        from tutelage.methods.ladder import write_ladder

        weights = write_ladder(run_dir / TASK)
        out.print(f"made from nothing in {run_dir / TASK}: a model of {weights:,} weights, and chained sums to learn")
        config, _ = load_config(runs.shipped_settings("ladder.yaml"), [*settings, f"run_dir={run_dir}"])
        runs.train(config, run_dir / TASK, out, yes=False)
    report = report_stages(run_dir, progress=TerminalProgress(out))
    if as_json:
        print_json(report)
    else:
        show(report, out)


def show(report: dict[str, Any], out: Console) -> None:
    """The table of stages, the monitor's probes, and what it said."""
    from tutelage.methods.stages_report import stage_rows

    metrics = [m for m in report["stages"][0] if m.startswith("pass@")]
    table = Table("after stage", "updates", *metrics, f"all-same groups of {report['group']}", "entropy, nats/token")
    for name, cells in stage_rows(report):
        table.add_row(name, *cells)
    out.print(table)
    for stage in report["stages"]:
        if stage.get("verdicts"):
            said = ", ".join(f"{step}: {verdict}" for step, verdict in stage["verdicts"])
            out.print(f"{stage['name']}, ended by {stage['ended_by']} after {stage['rounds']} rounds. Probes: {said}")
            out.print(f"  {stage['why']}", markup=False)
            cost = stage["probing"]
            spent = f"{cost['all_seconds']:.0f} s and {cost['all_tokens']:,} tokens"
            out.print(f"  probing cost {spent} in {cost['probes']} probes")
        for metric, gain in stage.get("gain", {}).items():
            if metric.startswith("pass@"):
                low, high = gain["ci95"]
                out.print(
                    f"  {stage['name']}: {metric} {gain['value']:+.3f} [{low:+.3f}, {high:+.3f}] over the stage before"
                )
    if note := report["questions"].get("note"):
        out.print(f"note: {note}", markup=False)
    out.print(f"run:   {report['run_dir']}", markup=False)
