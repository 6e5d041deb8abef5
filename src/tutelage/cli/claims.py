"""`tutelage claims`: run the chapter's claims and say which hold."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tutelage.cli.main import print_json
from tutelage.cli.progress import TerminalProgress
from tutelage.errors import ConfigError


def listing(out: Console, *, as_json: bool) -> None:
    """Every claim: number, name, what is claimed, source, minutes."""
    from tutelage.claims.registry import load_all

    claims = load_all()
    if as_json:
        keys = ("number", "name", "line", "source", "design", "minutes")
        print_json([{key: getattr(c, key) for key in keys} for c in claims])
        return
    table = Table("", "name", "claim", "source", "minutes")
    for c in claims:
        table.add_row(str(c.number), c.name, c.line, c.source, f"{c.minutes:g}")
    out.print(table)


def run(names: list[str], out: Console, *, seeds: int | None, into: Path | None, as_json: bool) -> None:
    """Run the named claims (none: all), print each, and store results and their page where asked.

    Raises:
        ConfigError: an unknown claim, or no seeds.
    """
    from tutelage.claims.registry import CLAIMS, load
    from tutelage.claims.results import run_claim, save, write_page

    if seeds is not None and seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {seeds}")
    claims = [load(name) for name in names or CLAIMS]
    results = []
    for claim in claims:
        if not as_json:
            _introduce(claim, out)
        progress = TerminalProgress(out)
        result = run_claim(claim, seeds=None if seeds is None else range(seeds), progress=progress)
        results.append(result)
        if into is not None:
            save(result, into)
        if not as_json:
            _show(result, out)
    if into is not None:
        out.print(f"results in {into}, page in {write_page(into)}")
    if as_json:
        print_json(results)


def _introduce(claim: Any, out: Console) -> None:
    out.print(f"\n[bold]{claim.number}. {claim.name}[/]  {claim.line}")
    for label, text in (("source", claim.source), ("design", claim.design)):
        out.print(f"  [dim]{label}[/]  ", end="")
        out.print(text, markup=False)


def _show(result: dict[str, Any], out: Console) -> None:
    table = Table("number", "mean over seeds", "95%")
    for name, e in result["measured"].items():
        table.add_row(name, f"{e['value']:.4g}", "{:.4g} to {:.4g}".format(*e["ci95"]))
    out.print(table)
    for s in result["statements"]:
        out.print(f"  {s['text']}", markup=False)
    out.print(f"  [bold]{result['verdict']}[/] ({len(result['seeds'])} seeds, {result['cpu_s']:.0f} CPU seconds)")
