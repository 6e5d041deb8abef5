"""`tutelage eval`: one model on a config's questions, or two of them paired."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tutelage.cli.main import console, print_json
from tutelage.cli.progress import TerminalProgress, is_interactive
from tutelage.cli.runs import _ask, load
from tutelage.errors import ConfigError


def run(model: str, config: Path, settings: list[str], *, against: str | None, as_json: bool, yes: bool) -> None:
    """Measure `model` (and `against`) on the held-out questions; without any, on all of them."""
    from tutelage.methods.measure import measure

    out = console(as_json)
    run_config, folder = load(config, settings)
    if run_config.evaluation is None:
        raise ConfigError("evaluation is null in this config: there is nothing to measure")
    confirm = (lambda _: True) if yes else (_ask if is_interactive() else None)
    names = [model, *([against] if against else [])]
    result = measure(run_config, folder, names, progress=TerminalProgress(out), confirm=confirm)
    if as_json:
        print_json(result)
        return
    show(result, names, out)


def show(result: dict[str, Any], names: list[str], out: Console) -> None:
    """A table of every metric, and the paired difference of two models."""
    table = Table("model", "metric", "value", "95%", "chance", title=f"{result['num_tasks']} questions")
    for name in names:
        body = result["models"][name]
        for metric in [m for m in body if m.startswith("pass@") or m == "greedy"]:
            m = body[metric]
            chance = "" if m.get("chance") is None else f"{m['chance']:.3f}"
            table.add_row(name, metric, _number(m["value"]), _interval(m["ci95"]), chance)
            name = ""
    out.print(table)
    if note := result["questions"].get("note"):
        out.print(f"note: {note}", markup=False)
    if "gain" in result:
        pairs = Table("difference", "value", "95% (paired bootstrap)", title=f"{names[0]} minus {names[1]}")
        for metric, gain in result["gain"].items():
            pairs.add_row(metric, f"{gain['value']:+.3f}", _interval(gain["ci95"]))
        for task_name, gain in result.get("by_family", {}).items():
            pairs.add_row(f"pass@1, {task_name}", f"{gain['value']:+.3f}", _interval(gain["ci95"]))
        for direction, value in result.get("drift", {}).items():
            pairs.add_row(direction, _number(value), "")
        out.print(pairs)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _interval(ci: list[float] | None) -> str:
    return "" if ci is None else f"{ci[0]:.3f} to {ci[1]:.3f}"
