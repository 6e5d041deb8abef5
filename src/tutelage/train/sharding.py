"""FSDP2: each process holds a part of every weight, its gradient and its moments, and gathers a layer when it runs it.

`torch.distributed.fsdp.fully_shard` is used as it is, on the process group that Accelerate made. Accelerate's own FSDP
plugin wraps model and optimiser and averages gradients over processes; here the step's divisor is exact and known
beforehand, so gradients are summed, and the loss runs inside the sharded module's forward. (Accelerate 1.15 also offers
its plugin on accelerators only; this runs on CPUs over gloo as well.)

The weights that are trained are sharded in float32 (float64 where the model is) and are the masters; forward and
backward run in the model's own precision, gradients are reduced in float32.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.errors import ConfigError

LOW_PRECISION = (torch.bfloat16, torch.float16)
FORWARDS = ("target_hidden", "target_logits", "own_logits", "per_target")
"""Methods of a policy that run the model, besides `forward`."""


def shard(policy: Any, *, device: str = "cpu") -> None:
    """Shard a policy's weights over all processes, in place. Every process calls it with equal weights.

    Every decoder layer is one unit, what is left (embeddings, last norm, output layer) another. Its forward and the
    methods in `FORWARDS` are then collective: all processes must call them equally often.

    Raises:
        ConfigError: the processes are not connected, or the model does not say what its layers are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if not torch.distributed.is_initialized():
        raise ConfigError(
            "distributed.sharding=full needs several processes: start the run with `accelerate launch` or torchrun, "
            "or set distributed.sharding=none"
        )
    layers = _layers(policy.causal_model)
    compute = policy.output_layer.weight_VD.dtype
    for p in policy.parameters():
        if p.requires_grad and p.dtype in LOW_PRECISION:
            p.data = p.data.float()  # the master: compute in `compute`, step in float32
    mixed = MixedPrecisionPolicy(cast_forward_inputs=False)
    if compute in LOW_PRECISION:
        mixed = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    kind = torch.device(device).type
    mesh = init_device_mesh(kind, (torch.distributed.get_world_size(),))
    options = {"mesh": mesh, "mp_policy": mixed, "reshard_after_forward": True}
    for layer in layers:
        fully_shard(layer, **options)  # type: ignore[call-overload]
    fully_shard(policy, **options)  # type: ignore[call-overload]
    for unit in (*layers, policy):
        unit.set_gradient_divide_factor(1.0)  # the divisor is in the loss already: sums, not means
        unit.set_force_sum_reduction_for_comms(True)  # gloo has plain sums only
    for name in FORWARDS:
        register_fsdp_forward_method(policy, name)


def _layers(model: Any) -> list[nn.Module]:
    """The model's repeated layers, by the names that transformers gives them."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [m for m in model.modules() if type(m).__name__ in names]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} does not say which of its layers stay whole (_no_split_modules), so it cannot be "
            "sharded: set distributed.sharding=none"
        )
    return found


def is_sharded(tensor: Tensor) -> bool:
    """True for a part of a tensor that other processes hold the rest of."""
    return hasattr(tensor, "placements")


def local(tensor: Any) -> Tensor:
    """This process's part of a sharded tensor, in place: writing to it writes to the tensor. It may be empty."""
    part: Tensor = tensor.detach().to_local()
    return part


def cut(full: Tensor, like: Any) -> Tensor:
    """This process's part of a whole tensor, as `like` is cut."""
    from torch.distributed.tensor import distribute_tensor

    whole = full.to(like.device)
    part: Tensor = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()
    return part


def whole(part: Tensor, like: Any) -> Tensor:
    """The tensor whose parts the processes hold, as `like` is cut. Every process must call it."""
    from torch.distributed.tensor import DTensor

    tensor = DTensor.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride(), run_check=False
    )
    out: Tensor = tensor.full_tensor()
    return out


def gathered(parts: Iterable[tuple[str, Tensor, Any]]) -> Iterator[tuple[str, Tensor]]:
    """(name, part, like) to (name, whole tensor), one at a time. Every process must go through all of it."""
    for name, part, like in parts:
        yield name, whole(part, like)


def is_first() -> bool:
    return bool(torch.distributed.get_rank() == 0)


@torch.no_grad()
def copy_to(model: nn.Module, parameters: Mapping[str, Any], masters: Mapping[str, Tensor]) -> None:
    """Overwrite a whole model's parameters of the same names. Every process must call it."""
    mine = dict(model.named_parameters())
    for name, full in gathered((n, masters[n], p) for n, p in parameters.items()):
        mine[name].copy_(full)
