"""AdamW and SGD over float32 masters of low-precision weights.

Weights may be bfloat16, which makes forward and backward several times faster on hardware with bfloat16 units. An
update of relative size 1e-3 is below bfloat16's resolution, so each such weight has a float32 master: gradients are
added up in float32 as each microbatch finishes, the update is made on the master, and the weight is the master rounded.

Sharded parameters (`train.sharding`) are float32 already and are their own masters; each process updates its part.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tutelage.data.files import tensor_file_errors
from tutelage.errors import CheckpointError, ConfigError, NumericsError
from tutelage.train import sharding
from tutelage.train.sharding import LOW_PRECISION


class Optimizer:
    """One update rule over named parameters.

    Args:
        parameters: name and parameter, in a fixed order; those that need no gradient are left out.
        kind: "adamw" or "sgd".
        weight_decay: decoupled, on matrices only (biases and norms are not decayed).
        sum_parts: a number summed over the processes; used where the parameters are sharded.
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
        sum_parts: Callable[[float], float] = lambda number: number,
    ) -> None:
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        if not self.parameters:
            raise ConfigError("nothing to train: no parameter of the model needs a gradient")
        self.masters: dict[str, Tensor] = {}
        self._is_first_microbatch: dict[str, bool] = {}
        self.is_sharded = any(sharding.is_sharded(p) for p in self.parameters.values())
        """Every process holds a part of each weight; then `gathered` is needed to see the whole."""
        self._sum_parts = sum_parts
        self._whole: dict[str, Tensor] | None = None
        self.num_changes = 0
        """Times the weights were updated or overwritten."""
        for name, p in self.parameters.items():
            if sharding.is_sharded(p):
                self.masters[name] = sharding.local(p)
            elif p.dtype in LOW_PRECISION:
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
            if self.is_sharded:
                gradient = self.parameters[name].grad
                master.grad = None if gradient is None else sharding.local(gradient)
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
        square = sum(float(n) ** 2 for n in torch._foreach_norm(gradients))
        norm = math.sqrt(self._sum_parts(square) if self.is_sharded else square)
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
        self.num_changes += 1
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
            master.copy_(self._part(name, weights[name]))
        self.num_changes += 1
        self._publish()

    @torch.no_grad()
    def refine(self, weights: Mapping[str, Tensor]) -> None:
        """Start the masters from weights of which the parameters are the roundings.

        Masters that start on bfloat16's grid need several small updates in one direction before a parameter moves;
        those that lie between its points pass the nearest one at once, in proportion to the update. The parameters
        stay as they are.
        """
        for name, master in self.masters.items():
            master.copy_(self._part(name, weights[name]))

    def weights(self) -> dict[str, Tensor]:
        """Name -> master, for saving: the weights in full precision. Sharded ones: within `gathered`, first process."""
        if not self.is_sharded:
            return {name: m.detach() for name, m in self.masters.items()}
        return {name: self._gathered()[name] for name in self.masters}

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within this block the first process can call `weights` and `save`. Every process must enter it.

        Does nothing where the parameters are whole. Sharded ones are gathered one by one into the first process's
        memory (not the device's): weights and moments, 12 bytes a parameter with AdamW.
        """
        if not self.is_sharded:
            yield
            return
        names = {id(m): n for n, m in self.masters.items()}
        parts = [(n, m, self.parameters[n]) for n, m in self.masters.items()]
        for master, values in self.rule.state.items():
            name = names[id(master)]
            parts += [
                (f"{key}/{name}", value, self.parameters[name])
                for key, value in values.items()
                if value is not None and value.shape == master.shape and value.ndim > 0
            ]
        kept = {}
        for name, tensor in sharding.gathered(parts):
            if sharding.is_first():
                kept[name] = tensor.cpu()
        self._whole = kept
        try:
            yield
        finally:
            self._whole = None

    def _gathered(self) -> Mapping[str, Tensor]:
        if self._whole is None:
            raise CheckpointError("sharded weights can be read within `gathered` only, which every process must enter")
        return self._whole

    def _part(self, name: str, full: Tensor) -> Tensor:
        """What of a whole tensor this process holds."""
        return sharding.cut(full, self.parameters[name]) if self.is_sharded else full

    def save(self, path: Path) -> None:
        """Moments and step counts, as safetensors."""
        names = {id(m): n for n, m in self.masters.items()}
        tensors = {}
        for master, values in self.rule.state.items():
            for key, value in values.items():
                full = f"{key}/{names[id(master)]}"
                if self.is_sharded and full in self._gathered():
                    tensors[full] = self._gathered()[full].contiguous()
                elif value is not None:
                    tensors[full] = torch.as_tensor(value).detach().cpu().contiguous()
        with tensor_file_errors(path):
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
            is_count = value.ndim == 0 or key == "step"
            state[key] = value if is_count else self._part(name, value).to(master.device, master.dtype)


def learning_rate(base: float, progress: float, *, schedule: str, warmup: float, floor: float = 0.0) -> float:
    """Learning rate at a share `progress` in (0, 1] of the stage's updates; an update's is that of its middle.

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
