"""`tutelage teacher generate|cache|check`: use a teacher before, or instead of, a run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tutelage.cli.main import Json, Settings, Yes, console, print_json
from tutelage.errors import ConfigError

app = typer.Typer(
    name="teacher",
    help="A teacher's answers, its cached distributions, and whether it is good enough.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _confirm(yes: bool) -> Any:
    from tutelage.cli.progress import is_interactive
    from tutelage.cli.runs import _ask

    return (lambda _: True) if yes else (_ask if is_interactive() else None)


@app.command()
def generate(
    config: Annotated[
        Path | None, typer.Argument(help="YAML: teacher, tasks, verifier, rollout, filters, out; or a method's config.")
    ] = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the trajectory store.")] = None,
    as_json: Json = False,
    yes: Yes = False,
) -> None:
    """A teacher answers a task set n times, into a trajectory store that SFT reads: resumable, filtered, counted.

    `tutelage teacher generate teacher.name=big teacher.url=https://host/v1 tasks.path=q.jsonl --out answers`
    """
    from tutelage.cli.progress import TerminalProgress
    from tutelage.methods.teach import generate as work
    from tutelage.methods.teach import generate_settings

    given = list(settings or [])
    if config is not None and "=" in str(config) and not config.exists():  # no file, settings only
        given, config = [str(config), *given], None
    if out is not None:
        given.append(f"out={out}")
    wanted = generate_settings(config, given)
    folder = config.resolve().parent if config is not None else Path.cwd()
    screen = console(as_json)
    result = work(wanted, folder, progress=TerminalProgress(screen), confirm=_confirm(yes))
    if as_json:
        print_json(result)
        return
    done = " (already done)" if result["was_done"] else ""
    screen.print(f"{result['num_answers']} answers to {result['num_tasks']} tasks by {result['teacher']}{done}")
    for reason, count in sorted(result["left_out"].items(), key=lambda kv: -kv[1]):
        screen.print(f"  left out, {reason}: {count}")
    screen.print(f"kept {result['num_kept']}, for {result['num_tasks_with_kept']} tasks")
    screen.print("tokens: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in result["tokens"].items()))
    screen.print(f"store: {result['store']}  (data.path of method sft reads it)", markup=False)


@app.command()
def cache(
    teacher: Annotated[
        str, typer.Argument(help="Folder, hub name, or run folder of the teacher; or a distillation config with data.")
    ],
    data: Annotated[
        str | None, typer.Argument(help="Trajectory store, or a file of demonstrations; a config names its own.")
    ] = None,
    settings: Settings = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the logit cache.")],
    student: Annotated[str | None, typer.Option(help="Whose template renders demonstrations; the teacher's.")] = None,
    k: Annotated[int | None, typer.Option(help="Entries kept; as many as fit in 220 bytes a token.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Divides the teacher's logits; the config's, or 1.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Fail above this mean KL on peaked tokens, in nats.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longer trajectories are left out.")] = None,
    as_json: Json = False,
) -> None:
    """Write a teacher's next-token distributions at every target: exact top-k and the mass of the rest. Resumable.

    `tutelage teacher cache CONFIG --out cache`: for the run of that config, then with `teacher.cache=cache`.
    `tutelage teacher cache TEACHER DATA --student STUDENT model.system_prompt="..." --out cache`: without a config.
    """
    from tutelage.cli.progress import TerminalProgress
    from tutelage.methods import teach

    given = list(settings or [])
    config: Any = Path(teacher)
    if config.is_file() or config.suffix in (".yaml", ".yml"):
        given = [data, *given] if data is not None else given
        given += [f"model.name={student}"] if student is not None else []
    elif data is None or "=" in data:
        raise ConfigError("tutelage teacher cache needs TEACHER and DATA, or a distillation config that names both")
    else:
        config = teach.cache_config(teacher, data, student=student)
    given += [f"divergence.temperature={temperature}"] if temperature is not None else []
    given += [f"data.max_length={max_length}", "data.overlong=drop"] if max_length is not None else []
    screen = console(as_json)
    options = teach.CacheOptions(k=k, max_kl=max_kl)
    result = teach.cache(config, out, given, options=options, progress=TerminalProgress(screen))
    if as_json:
        print_json(result)
        return
    screen.print(
        f"{result['num_tokens']} tokens of {result['num_trajectories']} trajectories, top {result['k']}, "
        f"{result['bytes_per_token']} bytes a token"
    )
    for part, found in result["fidelity"].items():
        if found["num_tokens"]:
            screen.print(
                f"  KL from the teacher, {part.replace('_', ' ')}: mean {found['mean_kl_nats']:.2g}, "
                f"largest {found['max_kl_nats']:.2g} nats ({found['num_tokens']} tokens checked)"
            )
    screen.print(f"cache: {result['cache']}  (teacher.cache of the distillation methods reads it)", markup=False)


@app.command()
def check(
    config: Annotated[Path, typer.Argument(help="A distillation config with held-out tasks and a verifier.")],
    settings: Settings = None,
    as_json: Json = False,
    yes: Yes = False,
) -> None:
    """Is the teacher better at the task, and near enough to grade the student? Exit code 1 where it is not better."""
    from tutelage.cli.progress import TerminalProgress
    from tutelage.methods import teach

    screen = console(as_json)
    reports = teach.check(config, settings or [], progress=TerminalProgress(screen), confirm=_confirm(yes))
    bodies = {name: report.to_json() for name, report in reports.items()}
    if as_json:
        print_json(bodies["*"] if set(bodies) == {"*"} else {"by_task": bodies})
    else:
        for name, body in bodies.items():
            if len(bodies) > 1:
                screen.print("all other tasks" if name == "*" else name, style="bold", markup=False)
            _show(body, screen)
    if not all(r.is_exempt or (r.gain is not None and r.gain.gain.value > 0) for r in reports.values()):
        raise typer.Exit(1)


def _show(body: Any, screen: Any) -> None:
    screen.print(body["verdict"], markup=False)
    for name in ("on_teacher_prefixes", "on_student_prefixes"):
        if found := body[name]:
            screen.print(
                f"  {name.replace('_', ' ')}, {found['num_tokens']} tokens: "
                f"KL(teacher ‖ student) {found['forward_kl']:.3f}, "
                f"KL(student ‖ teacher) {found['reverse_kl']:.3f} nats a token; of the top {found['top_k']} "
                f"{found['frac_top_k_shared']:.0%} shared, teacher's mass on the student's "
                f"{found['teacher_mass_on_student_top_k']:.1%}",
                markup=False,
            )
    if body["excess_error_percent"]:
        shown = ", ".join(f"{length}: {value:+.0f}%" for length, value in body["excess_error_percent"])
        screen.print(f"  excess error by length: {shown}", markup=False)
