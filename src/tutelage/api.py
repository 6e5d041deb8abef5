"""The same as the command line, from Python."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def train(config: str | Path | Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """Run a method or a plan and return what `result.json` holds.

    Args:
        config: a YAML file, or its content as a mapping.
        settings: dotted keys that win over it, with `__` for the dot: `train__lr=1e-5`.

    >>> import tutelage
    >>> tutelage.train("examples/sft_chat.yaml", run_dir="runs/a", train__lr=1e-5)  # doctest: +SKIP
    """
    from tutelage.methods.config import load_config
    from tutelage.methods.control_arm import run_job

    run_config, folder = load_config(config, {k.replace("__", "."): v for k, v in settings.items()})
    return run_job(run_config, folder)


def resume(run_dir: str | Path) -> dict[str, Any]:
    """Go on with a run that was stopped or killed."""
    from tutelage.methods.control_arm import run_job
    from tutelage.methods.job import config_of

    run_config, folder = config_of(Path(run_dir))
    return run_job(run_config, folder, is_resume=True)


def evaluate(config: str | Path | Mapping[str, Any], model: str, *, against: str | None = None) -> dict[str, Any]:
    """pass@k of a model on a config's questions; with `against`, the paired gain and the drift."""
    from tutelage.methods.config import load_config
    from tutelage.methods.measure import measure

    run_config, folder = load_config(config)
    return measure(run_config, folder, [model, *([against] if against else [])])
