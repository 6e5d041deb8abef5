"""Running claims, and their results on disk: one JSON file a claim, and a page made from all of them."""

import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tutelage import __version__
from tutelage.claims.base import HOLDS, Claim, Judgement
from tutelage.claims.registry import CLAIMS, load
from tutelage.data.files import atomic_file, write_json
from tutelage.errors import DataError
from tutelage.types import Progress


def run_claim(claim: Claim, *, seeds: Sequence[int] | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Measure seed after seed and judge. The result is JSON-able and says where and how long it ran."""
    chosen = tuple(claim.seeds if seeds is None else seeds)
    started, cpu = time.perf_counter(), time.process_time()
    if progress:
        progress.start(f"{claim.number}. {claim.name}", len(chosen), "seeds")
    results = []
    for seed in chosen:
        results.append({name: float(value) for name, value in claim.measure(seed).items()})
        if progress:
            progress.advance()
    if progress:
        progress.finish()
    return {
        "name": claim.name,
        "number": claim.number,
        "seeds": list(chosen),
        "results": results,
        **claim.judge(results).to_json(),
        "wall_s": round(time.perf_counter() - started, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        **where(),
    }


def where() -> dict[str, str]:
    """Date, processor and versions behind a result."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "versions": f"tutelage {__version__}, torch {torch.__version__}, numpy {np.__version__}, "
        f"Python {platform.python_version()}",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def judge_again(stored: dict[str, Any]) -> Judgement:
    """What the claim as it is now says of stored numbers."""
    return load(stored["name"]).judge(stored["results"])


def save(result: dict[str, Any], folder: Path) -> None:
    """`folder/NAME.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{result['name']}.json", result, kept="the result before it, if there was one")


def stored_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Claim name -> stored result, in the chapter's order.

    Raises:
        DataError: a file in the folder is of no known claim.
    """
    found = {path.stem: path for path in folder.glob("*.json")}
    if unknown := sorted(set(found) - set(CLAIMS)):
        raise DataError(f"{folder}: results of unknown claims {unknown}; known: {', '.join(CLAIMS)}")
    return {name: json.loads(found[name].read_text()) for name in CLAIMS if name in found}


def page(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown: a table of verdicts, then each claim with its design and every number."""
    out = [
        "# Claims",
        "",
        "What is said of imitation learning, each line as an experiment on small models and tables that can fail.",
        "Predictions and their bounds are part of each claim's code; none was moved to fit the stored numbers, and",
        "those of 10 were set after trial runs. So were sizes and the designs of 2, 4 and 13 (of 2: after a look",
        "at one of its stored seeds); 3 and the tables of 6 got more seeds after their first four decided nothing, and",
        "4, 6 (tables), 7, 9, 11, 12 and 13, undecided with 4 to 8, were run once more with 8 to 16, those among them",
        "(7 then again with 6, to take minutes; the verdict was the same): looking twice makes an interval that barely",
        "clears its bound somewhat weaker than its 95%.",
        "This page is made by `tutelage claims --out docs/claims` from the results in `docs/claims/`; nothing in",
        "it is typed by hand. `tutelage claims NAME` runs one again.",
        "",
        "*holds*: the 95% interval over seeds lies wholly on the predicted side, for every prediction. *does not hold",
        "at this scale*: for at least one it lies wholly on the other side. *inconclusive*: otherwise. Small models",
        "decide small questions: a verdict is evidence about a mechanism, not about a model of billions of weights.",
        "",
        "| | claim | verdict | seeds | CPU seconds | predictions that hold |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        line, said = load(name).line, [s["verdict"] for s in r["statements"]]
        out.append(
            f"| {r['number']} | [{line}](#{r['number']}-{name}) | **{r['verdict']}** "
            f"| {len(r['seeds'])} | {r['cpu_s']:.0f} | {said.count(HOLDS)} of {len(said)} |"
        )
    for name, r in results.items():
        out += ["", *_section(load(name), r)]
    return "\n".join(out) + "\n"


def _section(claim: Claim, r: dict[str, Any]) -> list[str]:
    out = [
        f"## {claim.number} {claim.name}",
        "",
        f"**Claim.** {claim.line}",
        "",
        f"**Source.** {claim.source}",
        "",
        f"**Design.** {claim.design}",
        "",
        f"**Verdict: {r['verdict']}.**",
        "",
        *[f"- {s['text']}" for s in r["statements"]],
        "",
        "| number | mean over seeds | 95% |",
        "|---|---|---|",
    ]
    for name, e in r["measured"].items():
        low, high = e["ci95"]
        out.append(f"| `{name}` | {e['value']:.4g} | {low:.4g} to {high:.4g} |")
    out += ["", f"Seeds {r['seeds']}, {r['wall_s']:.0f} s, {r['processor']}, {r['date']}; {r['versions']}."]
    return out


def write_page(folder: Path) -> Path:
    """`folder.md` beside the folder of results."""
    path = folder.with_name(folder.name + ".md")
    with atomic_file(path, kept="the results themselves") as file:
        file.write(page(stored_results(folder)).encode())
    return path
