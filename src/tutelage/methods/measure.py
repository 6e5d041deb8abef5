"""Measure models on a config's questions, outside a run: `tutelage eval`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.errors import ConfigError
from tutelage.evals import EvalResult, compare, evaluate
from tutelage.methods.config import RunConfig
from tutelage.methods.job import measuring_of
from tutelage.methods.workbench import Confirm, Workbench
from tutelage.types import Progress, Trajectory


def measure(
    config: RunConfig,
    folder: Path,
    models: Sequence[str],
    *,
    progress: Progress | None = None,
    confirm: Confirm | None = None,
) -> dict[str, Any]:
    """pass@k with intervals and chance level of each model; with two, the first's paired gain over the second and its
    drift from it.

    Drift is KL(first ‖ second) and KL(second ‖ first), in nats per token, each estimated on the samples of the model
    it starts from (mean of log p - log q on sampled tokens; unbiased at temperature 1 and top-p 1).

    Args:
        models: folders, run folders (their `model/` is taken), or hub names.
    """
    results: dict[str, EvalResult] = {}
    benches: dict[str, Workbench] = {}
    facts: dict[str, Any] = {}
    for name in models:
        bench = Workbench(_for(config, name), folder, confirm=confirm)
        benches[name] = bench
        measuring = measuring_of(bench.config, bench)
        if measuring is None:
            raise ConfigError(
                "an evaluation needs held-out questions and a verifier: set tasks.heldout (or tasks.heldout_path) and "
                "verifier in the config, or in its evaluation"
            )
        facts = measuring.facts()
        sampler = bench.sampler("student", name)
        assert config.evaluation is not None
        results[name] = evaluate(
            sampler,
            measuring.tasks,
            measuring.verifier,
            text=bench.text,
            n=config.evaluation.n,
            params=measuring.params,
            seed=config.evaluation.seed,
            ks=config.evaluation.ks,
            progress=progress,
        )
        bench.policy.use_plain_attention()
    out: dict[str, Any] = {
        "num_tasks": len(results[models[0]].counts),
        "questions": facts,
        "models": {name: r.to_json(tasks=False) for name, r in results.items()},
    }
    if len(models) == 2:
        first, second = models
        pair = results[second], results[first]
        out["gain"] = {m: compare(*pair, metric=m).to_json() for m in results[first].metrics}
        out["drift"] = _drift(benches, results, first, second)
    for bench in benches.values():
        bench.close()
    return out


def _for(config: RunConfig, name: str) -> RunConfig:
    path = Path(name) / "model"
    chosen = str(path) if (path / "config.json").exists() else name
    return config.model_copy(update={"model": config.model.model_copy(update={"name": chosen, "lora": None})})


def _drift(
    benches: dict[str, Workbench], results: dict[str, EvalResult], first: str, second: str
) -> dict[str, float | None]:
    """Both directions, where both models read tokens the same way."""
    if benches[first].text.fingerprint != benches[second].text.fingerprint:
        return {}
    return {
        f"KL({a} ‖ {b}), nats/token": _kl(results[a].trajectories, benches[a], benches[b])
        for a, b in ((first, second), (second, first))
    }


def _kl(samples: Sequence[Trajectory], own: Workbench, other: Workbench, *, most: int = 256) -> float | None:
    """Mean of log p(own) - log p(other) over up to `most` of own's samples' tokens."""
    chosen = [_unshaped(t) for t in samples if t.num_targets][:most]
    if not chosen:
        return None
    pairs = zip(own.trainer.score(chosen), other.trainer.score(chosen), strict=True)
    return float(np.mean([p - q for a, b in pairs for p, q in zip(a, b, strict=True)]))


def _unshaped(t: Trajectory) -> Trajectory:
    """The same tokens, to be scored under the models' own distributions."""
    return replace(t, spans=tuple(replace(s, sampling=None) for s in t.spans))
