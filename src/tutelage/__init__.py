"""Post-train language models by imitation: SFT, distillation and rejection sampling.

import tutelage
result = tutelage.train("examples/rejection_sampling_gym.yaml", run_dir="runs/sums")
print(result["before"]["pass@1"], result["after"]["pass@1"], result["gain"])
tutelage.evaluate("examples/rejection_sampling_gym.yaml", "runs/sums", against="smollm2-135m-instruct")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutelage.api import evaluate, resume, train

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "resume", "train"]


def __getattr__(name: str) -> Any:
    """Names are imported when first used: `import tutelage` waits for nothing."""
    if name in ("evaluate", "resume", "train"):
        from tutelage import api

        return getattr(api, name)
    raise AttributeError(f"module 'tutelage' has no attribute {name!r}")
