"""`tutelage COMMAND`. Exit codes: 0 done, 1 failed, 2 bad input or settings, 130 interrupted and resumable."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tutelage.errors import TutelageError

app = typer.Typer(
    name="tutelage",
    help="Post-train language models by imitation: SFT, distillation and rejection sampling.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes in the help would cost 0.15 s of imports
)
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Answer yes: run verifier code outside the config's folder.")]


def console(is_json: bool = False) -> Console:
    """Messages go to stderr where stdout carries JSON. In a file or pipe lines are not folded at 80 columns.

    Of several processes only the first speaks.
    """
    out = Console(stderr=is_json, highlight=False, quiet=not is_first_process())
    return out if out.is_terminal else Console(stderr=is_json, highlight=False, width=120, quiet=out.quiet)


def is_first_process() -> bool:
    """False in all but one of the processes that a launcher started together."""
    return os.environ.get("RANK", "0") == "0"


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file: a method, or a plan of stages.")],
    settings: Settings = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show settings, data, tokens and time; train nothing.")
    ] = False,
    match_budget: Annotated[
        str | None, typer.Option(help="random: also train a control arm on as many random completions.")
    ] = None,
    as_json: Json = False,
    yes: Yes = False,
) -> None:
    """Train by a config: `tutelage train examples/sft_chat.yaml train.lr=1e-5`."""
    from tutelage.cli import runs

    more = [] if match_budget is None else [f"match_budget={match_budget}"]
    run_config, folder = runs.load(config, [*(settings or []), *more])
    out = console(as_json)
    if dry_run:
        runs.dry_run(run_config, folder, out, as_json=as_json, yes=yes)
    else:
        runs.show(runs.train(run_config, folder, out, yes=yes), out, as_json=as_json)


@app.command()
def resume(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run that was stopped or killed.")],
    as_json: Json = False,
    yes: Yes = False,
) -> None:
    """Go on with a run from its last checkpoint."""
    from tutelage.cli import runs

    out = console(as_json)
    runs.show(runs.resume(run_dir, out, yes=yes), out, as_json=as_json)


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or run folder.")],
    config: Annotated[Path, typer.Argument(help="A config with tasks and a verifier.")],
    settings: Settings = None,
    against: Annotated[str | None, typer.Option(help="Another model: paired gain and drift.")] = None,
    as_json: Json = False,
    yes: Yes = False,
) -> None:
    """Measure a model: pass@k with intervals and chance level; with --against, the paired difference."""
    from tutelage.cli import evaluation

    evaluation.run(model, config, settings or [], against=against, as_json=as_json, yes=yes)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method.")] = None,
    as_json: Json = False,
) -> None:
    """The methods, one card each: what, data, on/off-policy, when, gotcha, source."""
    from tutelage.cli import cards

    cards.show(name, console(), as_json=as_json)


@app.command()
def claims(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Which claims; none runs all.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds; fewer than 4 decide nothing.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for one JSON file a claim; its page goes beside it as FOLDER.md.")
    ] = None,
    as_list: Annotated[bool, typer.Option("--list", help="List the claims; run nothing.")] = False,
    as_json: Json = False,
) -> None:
    """What is said of imitation learning, as experiments: each holds here, does not, or cannot be said."""
    from tutelage.cli import claims as claims_cli

    if as_list:
        claims_cli.listing(console(as_json), as_json=as_json)
    else:
        claims_cli.run(names or [], console(as_json), seeds=seeds, into=out, as_json=as_json)


@app.command()
def demo(
    run_dir: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[ladder] [KEY=VALUE]...", help="Which demo, and settings that win.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Rejection-sampling fine-tuning of a real 135M model on one-digit sums, measured before and after. `demo ladder`:
    SFT, rejection sampling until the graduation monitor ends it, then RL, on a small model made from nothing."""
    from tutelage.cli import runs

    out = console(as_json)
    if settings and settings[0] == "ladder":
        from tutelage.cli import ladder

        own = Path("runs/ladder") if run_dir == Path("runs/demo") else run_dir
        ladder.run(own, settings[1:], out, as_json=as_json)
        return
    runs.show(runs.demo(run_dir, settings or [], out), out, as_json=as_json)


def main() -> None:
    """Run a command and turn what it raises into a message and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except TutelageError as error:
        _say(type(error).__name__, str(error))
        sys.exit(error.exit_code)
    except (typer.Exit, SystemExit) as error:
        sys.exit(getattr(error, "exit_code", getattr(error, "code", 0)))
    except (KeyboardInterrupt, typer.Abort):
        _say("Interrupted", "stopped at once; `tutelage resume RUN_DIR` goes on from the last checkpoint")
        sys.exit(130)
    except OSError as error:
        _say(type(error).__name__, str(error))
        sys.exit(1)
    except Exception as error:
        format_message = getattr(error, "format_message", None)  # the parser's own: a wrong option or argument
        if format_message is None:
            raise
        _say("Usage", format_message())
        sys.exit(2)


def _say(kind: str, message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]{kind}[/]: ", end="")
    print(message, file=sys.stderr)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    if is_first_process():
        print(json.dumps(value, indent=2, default=str))


from tutelage.cli.teacher import app as teacher_app  # noqa: E402  (needs what is defined above)

app.add_typer(teacher_app, name="teacher")
