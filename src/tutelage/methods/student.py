"""The trained model of a run: loaded, given adapters, sharded; its optimiser; its weights on disk and in a plain copy.

`gathered` and `refresh` are collective where the weights are sharded: every process calls them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutelage.data.files import sync_tree, tensor_file_errors
from tutelage.methods.config import RunConfig
from tutelage.policies.load import DTYPES, load_model, save_model, stored_dtype
from tutelage.policies.policy import Policy, add_lora, merged_copy
from tutelage.train import sharding
from tutelage.train.distributed import Processes
from tutelage.train.optim import Optimizer
from tutelage.train.trainer import Trainer

MASTERS = "masters.safetensors"
"""Adapter weights in full precision, beside peft's own file."""


class Student:
    """The trained model, made from the settings when it is first asked for.

    Args:
        path: where the weights are that the run begins with.
    """

    def __init__(
        self, config: RunConfig, path: str, *, tokenizer: Any, precision: str, device: str, processes: Processes
    ) -> None:
        self.config, self.path, self.tokenizer = config, path, tokenizer
        self.precision, self.device, self.processes = precision, device, processes
        self.is_sharded = processes.count > 1 and sharding_of(config) == "full"
        self._plain_changes = -1

    @cached_property
    def policy(self) -> Policy:
        """What is trained."""
        if not self.is_sharded:
            return Policy(self._load(self.device), fused_layers=self.config.model.fused_layers)
        policy = Policy(self._load("cpu"), fused_layers=False)  # each layer goes to the device when it is cut
        sharding.shard(policy, device=self.device)
        return policy

    def _load(self, device: str) -> Any:
        model = load_model(self.path, dtype=self.precision, device=device)
        if lora := self.config.model.lora:
            model = add_lora(
                model, r=lora.r, alpha=lora.alpha, dropout=lora.dropout, target=lora.target, seed=self.config.seed
            )
        return model

    @cached_property
    def trainer(self) -> Trainer:
        train = self.config.stages[0].train
        optimizer = Optimizer(
            self.policy.model.named_parameters(),
            kind=train.optimizer,
            betas=train.betas,
            weight_decay=train.weight_decay,
            momentum=train.momentum,
            sum_parts=lambda number: self.processes.sum_numbers({"": number})[""],
        )
        if not self.config.model.lora and self._is_rounded:
            optimizer.refine(self.load_base())
        return Trainer(self.policy, optimizer, processes=self.processes, device=self.device)

    @property
    def _is_rounded(self) -> bool:
        """Whether loading rounds the stored weights."""
        dtype = DTYPES[self.precision]
        return dtype in sharding.LOW_PRECISION and stored_dtype(self.path) != dtype

    @property
    def num_changes(self) -> int:
        """Times the weights were updated or overwritten."""
        return self.trainer.optimizer.num_changes if "trainer" in self.__dict__ else 0

    # -- a whole copy --------------------------------------------------------------------------

    @cached_property
    def _copy(self) -> Policy:
        """A whole model in this process, for those who run it outside the training step."""
        return Policy(self._load(self.device).eval())

    @property
    def plain(self) -> Policy:
        """The student as a whole model with the weights of the last `refresh`: itself where it is not sharded."""
        return self._copy if self.is_sharded else self.policy

    def refresh(self) -> None:
        """Bring the plain copy up to date. Does nothing where the student is its own."""
        if not self.is_sharded:
            return
        optimizer = self.trainer.optimizer
        if optimizer.num_changes != self._plain_changes:
            sharding.copy_to(self._copy.model, optimizer.parameters, optimizer.masters)
            self._plain_changes = optimizer.num_changes

    # -- on disk -------------------------------------------------------------------------------

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it the first process can save."""
        if not self.is_sharded:
            yield
            return
        with self.trainer.optimizer.gathered():
            yield

    def save_weights(self, folder: Path) -> None:
        """The trained weights in full precision: a whole model, or the adapter."""
        masters = self.trainer.optimizer.weights()
        if self.config.model.lora:
            from safetensors.torch import save_file

            state = {"state_dict": dict(masters)} if self.is_sharded else {}
            with tensor_file_errors(folder):
                self.policy.model.save_pretrained(folder, safe_serialization=True, **state)
                save_file({k: v.cpu().contiguous() for k, v in masters.items()}, folder / MASTERS)
            self.tokenizer.save_pretrained(folder)
            sync_tree(folder)
            return
        if self.is_sharded:
            save_model(self.policy.model, self.tokenizer, folder, state={**_buffers(self.policy.model), **masters})
            return
        with _ParametersAs(self.policy.model, masters):
            save_model(self.policy.model, self.tokenizer, folder)

    def load_weights(self, folder: Path) -> Mapping[str, Tensor]:
        """Name -> weight of what `save_weights` wrote."""
        from safetensors.torch import load_file

        if self.config.model.lora:
            masters: dict[str, Tensor] = load_file(folder / MASTERS)
            return masters
        return _named(load_model(str(folder), dtype="float32" if self.precision != "float64" else "float64"))

    def load_base(self) -> Mapping[str, Tensor]:
        """The weights the run began with, in the precision of the masters."""
        if self.config.model.lora:
            fresh = self._load("cpu")
            return {n: p.detach().float() for n, p in fresh.named_parameters() if p.requires_grad}
        return _named(load_model(self.path, dtype="float64" if self.precision == "float64" else "float32"))

    def save_final(self, folder: Path) -> None:
        """The trained model as transformers loads it: adapters folded into a copy, in the precision it came in.

        Called by the first process after all have called `refresh`, within `gathered`.
        """
        if self.config.model.lora:
            save_model(merged_copy(self.plain.model), self.tokenizer, folder, dtype=torch.float32)
            return
        self.save_weights(folder)

    def serving_weights(self) -> dict[str, Tensor]:
        """Name -> weight as a server loads them, in the precision of training: adapters folded in. After `refresh`, or
        (without adapters) within `gathered`."""
        if self.config.model.lora:
            return dict(merged_copy(self.plain.model).state_dict())
        if not self.is_sharded:
            return dict(self.policy.model.state_dict())
        dtype = self.policy.output_layer.weight_VD.dtype
        return {n: w.to(dtype) for n, w in self.trainer.optimizer.weights().items()}


def sharding_of(config: RunConfig) -> str:
    """none or full, as asked or as `accelerate launch --use_fsdp` says."""
    import os

    asked = config.distributed.sharding
    if asked != "auto":
        return asked
    return "full" if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") else "none"


def _named(model: Any) -> Mapping[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters()}


def _buffers(model: Any) -> dict[str, Tensor]:
    """What a checkpoint holds besides parameters."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


class _ParametersAs:
    """Within the block the model's parameters hold other tensors: for saving masters without a second model."""

    def __init__(self, model: Any, tensors: Mapping[str, Tensor]) -> None:
        self.parameters: list[tuple[Any, Tensor]] = [
            (p, tensors[n]) for n, p in model.named_parameters() if n in tensors
        ]

    def __enter__(self) -> None:
        self.kept = [p.data for p, _ in self.parameters]
        for p, t in self.parameters:
            p.data = t

    def __exit__(self, *_: object) -> None:
        for (parameter, _master), data in zip(self.parameters, self.kept, strict=True):
            parameter.data = data
