"""`tutelage train`, `resume` and `demo`: run a job at the terminal and show what came of it."""

import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tutelage.cli.main import print_json
from tutelage.cli.progress import TerminalProgress, is_interactive
from tutelage.errors import ConfigError
from tutelage.methods.config import RunConfig, load_config

load = load_config


def train(config: RunConfig, folder: Path, out: Console, *, yes: bool) -> dict[str, Any]:
    """Run a new job."""
    out.print(f"run [bold]{config.run_dir}[/]: {', '.join(s.name for s in config.stages)} on {config.model.name}")
    _say_provenance(config, out)
    return _run(config, folder, out, yes=yes, is_resume=False)


def resume(run_dir: Path, out: Console, *, yes: bool) -> dict[str, Any]:
    """Go on with the run in a folder, by the settings it was started with."""
    from tutelage.methods.job import config_of

    config, folder = config_of(run_dir)
    out.print(f"resuming [bold]{run_dir}[/]")
    return _run(config, folder, out, yes=yes, is_resume=True)


def demo(run_dir: Path, settings: Sequence[str], out: Console) -> dict[str, Any]:
    """The main job on the bundled small model; an unfinished demo is resumed."""
    if (run_dir / "config.yaml").exists():
        if (run_dir / "result.json").exists():
            raise ConfigError(
                f"{run_dir} holds a finished demo (result.json). Remove the folder, or choose another with --run-dir."
            )
        return resume(run_dir, out, yes=False)
    config, folder = load_config(demo_settings(), [*settings, f"run_dir={run_dir}"])
    return train(config, folder, out, yes=False)


def demo_settings() -> dict[str, Any]:
    """The demo's config file, as it is shipped with the package."""
    return shipped_settings("demo.yaml")


def shipped_settings(name: str) -> dict[str, Any]:
    """A config file that is shipped with the package."""
    return dict(yaml.safe_load((files("tutelage.methods") / "configs" / name).read_text(encoding="utf-8")))


def _run(config: RunConfig, folder: Path, out: Console, *, yes: bool, is_resume: bool) -> dict[str, Any]:
    from tutelage.methods.control_arm import run_job
    from tutelage.train.distributed import Processes

    accelerator = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=config.system.device in ("auto", "cpu") and not _has_cuda())
    processes = Processes(accelerator)
    progress = TerminalProgress(out) if processes.is_first else None
    confirm = (lambda _: True) if yes else (_ask if is_interactive() else None)
    return run_job(config, folder, progress=progress, is_resume=is_resume, processes=processes, confirm=confirm)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _ask(message: str) -> bool:
    import typer

    return typer.confirm(f"{message}\nRun it all the same?")


def _say_provenance(config: RunConfig, out: Console) -> None:
    from tutelage.policies import smollm2

    if config.model.name.lower() == smollm2.ALIAS:
        out.print(f"  base weights: {smollm2.PROVENANCE}; gains are over those weights")


# -- dry run ------------------------------------------------------------------------------------


def dry_run(config: RunConfig, folder: Path, out: Console, *, as_json: bool, yes: bool) -> None:
    """Resolved settings, memory, tokens, and three samples with their tokens coloured; trains and writes nothing."""
    from tutelage.methods.config import dump_config
    from tutelage.methods.estimate import estimate
    from tutelage.methods.handover import plan_of
    from tutelage.methods.workbench import Workbench
    from tutelage.train.loop import describe

    bench = Workbench(config, folder, confirm=(lambda _: True) if yes else None)
    plan = plan_of(config, bench)
    stages = [stage for _, stage in plan]
    facts = estimate(bench, plan)
    if as_json:
        print_json({"config": yaml.safe_load(dump_config(config, {})), "plan": describe(stages), **facts.to_json()})
        bench.close()
        return
    out.print(dump_config(config, {"plan": describe(stages)}), markup=False)
    for name, value in facts.lines():
        out.print(f"  {name}: {value}")
    for note in bench.notes:
        out.print(f"  note: {note}")
    out.print("\nthree samples ([green]trained[/], [cyan]user or tool[/], [dim]template[/]):")
    for trajectory in facts.samples:
        out.print(coloured(trajectory, bench.text.decode))
        share = trajectory.num_targets / max(1, trajectory.num_tokens)
        out.print(f"  [{trajectory.num_tokens} tokens, {trajectory.num_targets} trained, {share:.0%}]\n", markup=False)
    bench.close()


def coloured(trajectory: Any, decode: Any) -> Text:
    """A trajectory's text, its spans coloured by who wrote them and whether they are trained."""
    text = Text()
    for span in trajectory.spans:
        style = "green" if span.is_trainable else "dim" if span.author == "template" else "cyan"
        text.append(decode(span.token_ids), style=style)
    return text


# -- what came of it ----------------------------------------------------------------------------


def show(result: Mapping[str, Any], out: Console, *, as_json: bool) -> None:
    """The result as a table, or as JSON."""
    if as_json:
        print_json(result)
        return
    if "before" in result:
        out.print(_before_after(result))
        out.print(_controls(result))
        gain = result["gain"]
        out.print(
            f"gain in pass@1 on held-out questions: [bold]{gain['value']:+.3f}[/] "
            f"(95% paired bootstrap {_interval(gain['ci95'])})"
        )
    if note := result.get("questions", {}).get("note"):
        out.print(f"note: {note}", markup=False)
    if arm := result.get("match_budget"):
        kept = [f"{int(a or 0)} and {int(b or 0)}" for a, b in zip(arm["kept"], arm["control_kept"], strict=False)]
        out.print(f"control arm on as many random completions, kept by round (run and arm): {', '.join(kept)}")
    _print_counts(result, out)
    provenance = result["base"].get("provenance")
    if provenance:
        out.print(f"base weights: {provenance}. Gains are over those weights, not over the original model's.")
    out.print(f"run:   {result['run_dir']}\nmodel: {result['model']}", markup=False)


def _before_after(result: Mapping[str, Any]) -> Table:
    before, after = result["before"], result["after"]
    table = Table(
        "held-out questions",
        "before",
        "95%",
        "after",
        "95%",
        "chance",
        title=f"{before['num_tasks']} held-out questions",
    )
    for metric in [m for m in before if m.startswith("pass@") or m == "greedy"]:
        b, a = before[metric], after[metric]
        chance = "" if a.get("chance") is None else f"{a['chance']:.3f}"
        table.add_row(
            metric, f"{b['value']:.3f}", _interval(b["ci95"]), f"{a['value']:.3f}", _interval(a["ci95"]), chance
        )
    for name, key in (("entropy, nats/token", "token_mean"), ("answer tokens", None), ("truncated", None)):
        if key:
            b, a = before["entropy_nats"].get(key), after["entropy_nats"].get(key)
        else:
            field = "mean_tokens" if name == "answer tokens" else "truncated_share"
            b, a = before[field], after[field]
        if b is not None and a is not None:
            table.add_row(name, f"{b:.3f}", "", f"{a:.3f}", "", "")
    return table


def _controls(result: Mapping[str, Any]) -> Table:
    columns = ("control", "value", "95%", "chance", "trained ahead by", "95%")
    table = Table(*columns, title="Controls: what else could explain it (trained pass@1 minus control)")
    for name, c in result["controls"].items():
        gain = c["gain"]
        chance = "" if c.get("chance") is None else f"{c['chance']:.3f}"
        table.add_row(
            name, f"{c['value']:.3f}", _interval(c["ci95"]), chance, f"{gain['value']:+.3f}", _interval(gain["ci95"])
        )
    return table


def _print_counts(result: Mapping[str, Any], out: Console) -> None:
    for r in result["rounds"]:
        if "data/num_accepted" in r:
            out.print(
                f"round {r['round']}: {r['data/num_sampled_tokens']:.0f} tokens sampled, "
                f"{r['data/frac_accept']:.1%} accepted ({r['data/num_distinct_accepted']:.0f} distinct), "
                f"{r['data/num_prompts_solved']:.0f} of {r['data/num_prompts']:.0f} prompts solved, "
                f"{r['data/num_kept']:.0f} kept, "
                f"entropy {r.get('policy/entropy_nats_per_token', float('nan')):.3f} nats/token"
            )
    counts = result["counts"]
    out.print(
        f"{counts['steps']} updates, {counts['tokens_sampled']} tokens sampled, {counts['tokens_trained']} trained"
        + (f", {counts['quarantined']} records quarantined" if counts["quarantined"] else "")
    )
    if (ledger := result.get("ledger")) and ledger["shares"]:
        shares = ", ".join(f"{k} {v:.0%}" for k, v in ledger["shares"].items() if v)
        out.print(f"operations: {ledger['flops']['total']:.2e} ({shares}), evaluations not counted")
    shown = {k: v for k, v in result["times_s"].items() if v >= 0.5}
    out.print("seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in shown.items()))


def _interval(ci: Sequence[float] | None) -> str:
    return "" if ci is None else f"{ci[0]:.3f} to {ci[1]:.3f}"
