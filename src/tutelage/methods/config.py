"""A config file and `key=value` settings to one checked, frozen `RunConfig`. All problems are reported together."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError

from tutelage.errors import ConfigError
from tutelage.methods import METHODS
from tutelage.methods.settings import (
    DistributedSettings,
    EvaluationSettings,
    ModelSettings,
    SavingSettings,
    Settings,
    SystemSettings,
    TaskSettings,
    VerifierSettings,
)

Made = TypeVar("Made", bound=Settings)

OTHER_NAMES = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "output_dir": "run_dir",
    "model_name_or_path": "name",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup",
    "num_generations": "n",
    "num_samples": "n",
    "max_completion_length": "max_new_tokens",
    "max_tokens_per_microbatch": "max_tokens",
    "dataset": "data",
}
"""What the same setting is called elsewhere."""


class Evaluation(EvaluationSettings):
    """What is measured before and after, and on which questions."""

    tasks: TaskSettings | None = None
    """Questions of the evaluation; None takes the held-out questions of the last stage that has any."""
    verifier: VerifierSettings | None = None
    """None takes that stage's verifier."""


class RunConfig(Settings):
    """A whole run: one method, or a plan of stages."""

    run_dir: str = "runs/run"
    """Folder of the run."""
    seed: int = 0
    """Fixes the run to the bit on one machine."""
    model: ModelSettings = Field(default_factory=ModelSettings)
    evaluation: Evaluation | None = Field(default_factory=Evaluation)
    """null measures nothing."""
    saving: SavingSettings = Field(default_factory=SavingSettings)
    system: SystemSettings = Field(default_factory=SystemSettings)
    match_budget: Literal["random"] | None = None
    """random: afterwards the same run again on as many random completions, as a control arm."""
    distributed: DistributedSettings = Field(default_factory=DistributedSettings)
    max_logprob_gap: float | None = 0.5
    """Largest mean difference (nats) between sampler's and trainer's log-probabilities before the run stops."""
    stages: tuple[Any, ...] = ()
    """The plan: one entry a stage, each with its `method`. A file with one method needs none."""


def load_config(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()
) -> tuple[RunConfig, Path]:
    """Read, override and check a configuration.

    Args:
        source: a YAML file, or a mapping of the same shape.
        overrides: `key=value` strings with dotted keys, or a mapping of dotted keys; they win over the file.

    Returns:
        The configuration and the folder that relative paths in it are relative to.

    Raises:
        ConfigError: every unknown key (with the nearest known one), missing key, wrong type and contradiction.
    """
    body, lines, folder, label = _read(source)
    for key, value in _parse_overrides(overrides).items():
        _set(body, key, value)
    return _checked(body, lines, label), folder


def load_settings(
    kind: type[Made],
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: body,
) -> Made:
    """Settings that are no run's, from a file or mapping and `key=value` strings that win.

    Args:
        change: applied to the file's content before the overrides.

    Raises:
        ConfigError: every problem at once, as for `load_config`.
    """
    body, lines, _, label = _read(source)
    body = change(body)
    for key, value in _parse_overrides(overrides).items():
        _set(body, key, value)
    try:
        return kind(**body)
    except ValidationError as error:
        raise ConfigError([_sentence(e, "", kind, lines, label) for e in error.errors()]) from error


def _read(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int], Path, str]:
    """The content, its keys' lines, the folder that its paths are relative to, and what to call it."""
    lines: dict[str, int] = {}
    if isinstance(source, Mapping):
        body, folder, label = _copy(source), Path.cwd(), "settings"
    else:
        path = Path(source)
        if not path.is_file():
            raise ConfigError(f"config {str(path)!r}: no such file{_near_file(path)}")
        text = path.read_text(encoding="utf-8")
        try:
            body = _copy(yaml.safe_load(text) or {})  # what YAML aliases share is two settings here
            lines = dict(_key_lines(yaml.compose(text)))
        except yaml.YAMLError as error:
            raise ConfigError(f"config {str(path)!r} is not YAML: {error}") from error
        folder, label = path.resolve().parent, path.name
        if not isinstance(body, dict):
            raise ConfigError(f"config {str(path)!r} must be a mapping of settings, got {type(body).__name__}")
    return body, lines, folder, label


def _checked(body: dict[str, Any], lines: Mapping[str, int], label: str) -> RunConfig:
    run_keys = set(RunConfig.model_fields)
    is_plan = "stages" in body
    stage_bodies: list[tuple[str, Any]]
    if is_plan:
        run_body = body
        stage_bodies = [(f"stages.{i}.", s) for i, s in enumerate(body["stages"] or [])]
        run_body = {k: v for k, v in body.items() if k != "stages"}
    else:
        run_body = {k: v for k, v in body.items() if k in run_keys}
        stage_bodies = [("", {k: v for k, v in body.items() if k not in run_keys})]
    problems: list[str] = []
    stages = []
    if not stage_bodies:
        problems.append("stages must name at least one stage, got none")
    for prefix, stage in stage_bodies:
        stages.append(_stage(stage, prefix, problems, lines, label, extra_keys=() if is_plan else run_keys))
    run: RunConfig | None = None
    try:
        run = RunConfig(**run_body)
    except ValidationError as error:
        problems += [_sentence(e, "", RunConfig, lines, label) for e in error.errors()]
    names = [s.name for s in stages if s is not None]
    for name in {n for n in names if names.count(n) > 1}:
        problems.append(f"stage names must differ: {name!r} is there {names.count(name)} times; set stages.N.name")
    if problems or run is None:
        raise ConfigError(problems)
    return run.model_copy(update={"stages": tuple(stages)})


def _stage(
    stage: Any, prefix: str, problems: list[str], lines: Mapping[str, int], label: str, *, extra_keys: Iterable[str]
) -> Any:
    known = ", ".join(METHODS)
    if not isinstance(stage, dict) or "method" not in stage:
        problems.append(f"{prefix}method is missing: which of {known}?")
        return None
    method = METHODS.get(stage["method"])
    if method is None:
        near = difflib.get_close_matches(str(stage["method"]), METHODS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        problems.append(f"{prefix}method {stage['method']!r} is unknown{hint}; known: {known}")
        return None
    try:
        return method.settings(**stage)
    except ValidationError as error:
        problems += [_sentence(e, prefix, method.settings, lines, label, extra_keys) for e in error.errors()]
        return None


def _sentence(
    error: Any,
    prefix: str,
    model: type[Settings],
    lines: Mapping[str, int],
    label: str,
    extra_keys: Iterable[str] = (),
) -> str:
    """One problem of pydantic's in our words: what was needed, got, where, and the nearest known key."""
    path = [str(p) for p in error["loc"]]
    key = prefix + ".".join(path)
    line = lines.get(key) or next((lines[k] for k in _parents(key) if k in lines), None)
    where = f"  in {label}:{line}" if line else ""
    if error["type"] == "extra_forbidden":
        known = [*_fields_at(model, path[:-1]), *(extra_keys if len(path) == 1 else ())]
        other = OTHER_NAMES.get(path[-1])
        near = [other] if other in known else difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        parent = prefix + "".join(f"{p}." for p in path[:-1])
        hint = f' (did you mean "{parent}{near[0]}"?)' if near else f"; known there: {', '.join(sorted(known))}"
        return f'unknown key "{key}"{hint}{where}'
    if error["type"] == "missing":
        return f'"{key}" is missing: {_help(model, path)}{where}'
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{message}{where}"
    return f'"{key}": {message[0].lower()}{message[1:]}, got {error["input"]!r}{where}'


def _parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]


def _fields_at(model: type[Settings], path: Sequence[str]) -> list[str]:
    found = _model_at(model, path)
    return list(found.model_fields) if found else []


def _model_at(model: type[Settings], path: Sequence[str]) -> type[Settings] | None:
    is_name = False
    for part in path:
        if is_name:  # a key of a mapping from names to settings
            is_name = False
            continue
        field = model.model_fields.get(part)
        if field is None:
            return None
        is_name = getattr(field.annotation, "__origin__", None) is dict
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, Settings)]
        if not inner:
            return None
        model = inner[0]
    return model


def _help(model: type[Settings], path: Sequence[str]) -> str:
    parent = _model_at(model, path[:-1])
    field = parent.model_fields.get(path[-1]) if parent else None
    if field is None:
        return "needed"
    inner = _model_at(model, path)
    return (field.description or (inner.__doc__ if inner else None) or "needed").strip().splitlines()[0]


def _key_lines(node: Any, prefix: str = "") -> Iterable[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _key_lines(value, name + ".")
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield f"{prefix}{i}", value.start_mark.line + 1
            yield from _key_lines(value, f"{prefix}{i}.")


def _parse_overrides(overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(overrides, Mapping):
        return dict(overrides)
    out: dict[str, Any] = {}
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"settings on the command line have the form key=value, e.g. train.lr=1e-5; got {item!r}")
        try:
            out[key] = _number(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise ConfigError(f"{item!r}: the value is not YAML: {error}") from error
    return out


def _number(value: Any) -> Any:
    """YAML reads 1e-5 as a word; a person means the number."""
    if isinstance(value, str):
        try:
            return float(value) if any(c.isdigit() for c in value) else value
        except ValueError:
            return value
    return value


def _set(body: dict[str, Any], key: str, value: Any) -> None:
    node: Any = body
    parts = key.split(".")
    for i, part in enumerate(parts):
        is_last = i == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"{key!r}: {'.'.join(parts[:i])} has {len(node)} entries; {part!r} is none of them")
            if is_last:
                node[int(part)] = value
            else:
                node = node[int(part)]
        elif isinstance(node, dict):
            if is_last:
                node[part] = value
            else:
                if node.get(part) is None:
                    node[part] = {}
                node = node[part]
        else:
            raise ConfigError(f"{key!r}: {'.'.join(parts[:i])} is {node!r}, which has no settings of its own")


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, (list, tuple)) else value


def _near_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path(".")
    names = [p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")]
    near = difflib.get_close_matches(path.name, names, n=2)
    return f"; did you mean {' or '.join(str(folder / n) for n in near)}?" if near else ""


def dump_config(config: RunConfig, more: Mapping[str, Any]) -> str:
    """The resolved settings as YAML, with versions and what was decided at the start beside them."""
    body = config.model_dump(mode="json", exclude={"stages"})
    body["stages"] = [s.model_dump(mode="json") for s in config.stages]
    return str(yaml.safe_dump({**body, "resolved": dict(more)}, sort_keys=False, allow_unicode=True))
