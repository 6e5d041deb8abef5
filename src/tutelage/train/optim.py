"""AdamW and SGD over float32 masters of low-precision weights.

Weights may be bfloat16, which makes forward and backward several times faster on hardware with bfloat16 units. An
update of relative size 1e-3 is below bfloat16's resolution, so each such weight has a float32 master: gradients are
added up in float32 as each microbatch finishes, the update is made on the master, and the weight is the master rounded.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tutelage.errors import CheckpointError, ConfigError, NumericsError

LOW_PRECISION = (torch.bfloat16, torch.float16)


class Optimizer:
    """One update rule over named parameters.

    Args:
        parameters: name and parameter, in a fixed order; those that need no gradient are left out.
        kind: "adamw" or "sgd".
        weight_decay: decoupled, on matrices only (biases and norms are not decayed).
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        kind: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
    ) -> None:
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        if not self.parameters:
            raise ConfigError("nothing to train: no parameter of the model needs a gradient")
        self.masters: dict[str, Tensor] = {}
        self._is_first_microbatch: dict[str, bool] = {}
        for name, p in self.parameters.items():
            if p.dtype in LOW_PRECISION:
                self.masters[name] = p.detach().float().clone()
                self._is_first_microbatch[name] = True
                p.register_post_accumulate_grad_hook(self._collector(name))
            else:
                self.masters[name] = p
        matrices = [m for m in self.masters.values() if m.ndim >= 2]
        vectors = [m for m in self.masters.values() if m.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        groups = [g for g in groups if g["params"]]
        self._is_fused = False
        if kind == "adamw":
            self._is_fused = all(m.dtype == torch.float32 for m in self.masters.values())
            self.rule: torch.optim.Optimizer = torch.optim.AdamW(
                groups, lr=0.0, betas=betas, eps=eps, fused=self._is_fused
            )
        elif kind == "sgd":
            self.rule = torch.optim.SGD(groups, lr=0.0, momentum=momentum)
        else:
            raise ConfigError(f"optimiser must be adamw or sgd; got {kind!r}")

    def _collector(self, name: str) -> Callable[[Tensor], None]:
        def collect(p: Tensor) -> None:
            master = self.masters[name]
            assert p.grad is not None
            if master.grad is None:
                master.grad = p.grad.float()
            elif self._is_first_microbatch[name]:
                master.grad.copy_(p.grad)
            else:
                master.grad.add_(p.grad)
            self._is_first_microbatch[name] = False
            p.grad = None

        return collect

    def zero_grad(self) -> None:
        """Forget the gradients. The masters' buffers are kept and overwritten by the next microbatch."""
        for name, p in self.parameters.items():
            p.grad = None
            if name in self._is_first_microbatch:
                self._is_first_microbatch[name] = True

    def gradients(self) -> dict[str, Tensor]:
        """Name -> float32 (or wider) gradient of the step; zeros where no microbatch touched the parameter."""
        out = {}
        for name, master in self.masters.items():
            if self._is_first_microbatch.get(name, False) and master.grad is not None:
                master.grad.zero_()
                self._is_first_microbatch[name] = False
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            out[name] = master.grad
        return out

    def step(self, lr: float, *, max_grad_norm: float | None) -> float:
        """Clip to `max_grad_norm`, update, and return the gradient's norm before clipping.

        Raises:
            NumericsError: the norm is not finite. Nothing has been updated.
        """
        gradients = list(self.gradients().values())
        norm = math.sqrt(sum(float(n) ** 2 for n in torch._foreach_norm(gradients)))
        if not math.isfinite(norm):
            raise NumericsError(
                f"the gradient's norm must be finite, got {norm}; nothing was updated. "
                "Lower train.lr, or look at the trajectories of this step in the run's store."
            )
        scale = 1.0 if max_grad_norm is None or norm <= max_grad_norm else norm / max_grad_norm
        if self._is_fused:  # the fused rule divides by this as it reads: one pass over memory less
            self.rule.grad_scale = torch.tensor(scale, device=gradients[0].device)  # type: ignore[attr-defined]
        elif scale != 1.0:
            torch._foreach_mul_(gradients, 1 / scale)
        for group in self.rule.param_groups:
            group["lr"] = lr
        self.rule.step()
        self._publish()
        return norm

    @torch.no_grad()
    def _publish(self) -> None:
        low = [(p, self.masters[n]) for n, p in self.parameters.items() if n in self._is_first_microbatch]
        if low:
            torch._foreach_copy_([p for p, _ in low], [m for _, m in low])

    def reset(self) -> None:
        """Forget all moments, as a new optimiser."""
        self.rule.state.clear()

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Overwrite masters and parameters."""
        for name, master in self.masters.items():
            master.copy_(weights[name])
        self._publish()

    def weights(self) -> dict[str, Tensor]:
        """Name -> master, for saving: the weights in full precision."""
        return {name: m.detach() for name, m in self.masters.items()}

    def save(self, path: Path) -> None:
        """Moments and step counts, as safetensors."""
        names = {id(m): n for n, m in self.masters.items()}
        tensors = {}
        for master, values in self.rule.state.items():
            for key, value in values.items():
                if value is not None:
                    tensors[f"{key}/{names[id(master)]}"] = torch.as_tensor(value).detach().cpu().contiguous()
        save_file(tensors, path, metadata={"kind": type(self.rule).__name__})

    def load(self, path: Path) -> None:
        """Exactly what `save` wrote.

        Raises:
            CheckpointError: the file names a parameter this model does not have.
        """
        self.reset()
        for full, value in load_file(path).items():
            key, _, name = full.partition("/")
            if name not in self.masters:
                raise CheckpointError(f"{path}: optimiser state for {name!r}, which this model does not train")
            master = self.masters[name]
            state: dict[str, Any] = self.rule.state[master]
            state[key] = value if key == "step" else value.to(master.device, master.dtype)


def learning_rate(base: float, progress: float, *, schedule: str, warmup: float, floor: float = 0.0) -> float:
    """Learning rate after a share `progress` in (0, 1] of the stage's updates.

    Rises linearly over the first `warmup` share, then: "constant"; "linear" falls to `floor` * base at 1; "cosine"
    falls to it as half a cosine.
    """
    if warmup > 0 and progress < warmup:
        return base * progress / warmup
    rest = 0.0 if warmup >= 1 else min(1.0, (progress - warmup) / (1 - warmup))
    if schedule == "constant":
        return base
    if schedule == "linear":
        return base * (floor + (1 - floor) * (1 - rest))
    if schedule == "cosine":
        return base * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * rest)))
    raise ConfigError(f"schedule must be constant, linear or cosine; got {schedule!r}")
