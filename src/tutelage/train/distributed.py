"""Several processes, through Accelerate. The only place that knows there may be more than one.

Work is split by index: process r of w takes items r, r + w, r + 2w, ... Every process knows the whole list, so sums
are the same whatever w is, up to the order of addition.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from tutelage.errors import SamplerError, TutelageError

Item = TypeVar("Item")


class Processes:
    """One process, or the ones that `accelerate launch` started."""

    def __init__(self, accelerator: Any = None) -> None:
        self.accelerator = accelerator

    @property
    def count(self) -> int:
        return self.accelerator.num_processes if self.accelerator else 1

    @property
    def index(self) -> int:
        return self.accelerator.process_index if self.accelerator else 0

    @property
    def local_index(self) -> int:
        """Among the processes of this machine: which of its devices to use."""
        return self.accelerator.local_process_index if self.accelerator else 0

    def idle_turns(self, num_items: int) -> int:
        """How many items fewer this process has in `share` than the one with the most."""
        return -(-num_items // self.count) - len(range(self.index, num_items, self.count))

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def share(self, items: Sequence[Item]) -> Iterator[Item]:
        """This process's items, by index."""
        return iter(items[self.index :: self.count])

    def wait(self) -> None:
        if self.count > 1:
            self.accelerator.wait_for_everyone()

    def sum_numbers(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """The same names summed over all processes, in float64."""
        if self.count == 1:
            return dict(numbers)
        gathered: list[dict[str, float]] = self._gather(dict(numbers))
        names = list(dict.fromkeys(name for part in gathered for name in part))
        return {name: sum(part.get(name, 0.0) for part in gathered) for name in names}

    def sum_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor replaced by its sum over all processes, a few large messages instead of many small ones."""
        if self.count == 1:
            return
        for bucket in _buckets(list(tensors), limit=1 << 25):
            flat = torch.cat([t.reshape(-1) for t in bucket])
            flat = self.accelerator.reduce(flat, reduction="sum")
            start = 0
            for t in bucket:
                t.copy_(flat[start : start + t.numel()].view_as(t))
                start += t.numel()

    def gather_dict(self, part: dict[int, Any]) -> dict[int, Any]:
        """The union of every process's entries."""
        if self.count == 1:
            return part
        out: dict[int, Any] = {}
        for other in self._gather(part):
            out.update(other)
        return out

    def gather_or_stop(self, part: dict[int, Any], failed: SamplerError | None) -> dict[int, Any]:
        """As `gather_dict`; where one process could not be answered, all raise its error."""
        errors = self.gather_dict({self.index: str(failed)} if failed is not None else {})
        if errors:
            raise SamplerError(next(iter(errors.values())), is_everywhere=True) from failed
        return self.gather_dict(part)

    def from_first(self, work: Callable[[], Item]) -> Item:
        """What `work` gives in the first process, in all of them; its error where it fails."""
        if self.count == 1:
            return work()
        answer: tuple[Any, TutelageError | None] = (None, None)
        if self.is_first:
            try:
                answer = (work(), None)
            except TutelageError as error:
                answer = (None, error)
        value, failed = self._gather(answer)[0]
        if failed is not None:
            raise failed
        return value  # type: ignore[no-any-return]

    def any(self, flag: bool) -> bool:
        """True in all processes if it is in one."""
        return flag if self.count == 1 else any(self._gather(flag))

    def _gather(self, value: Any) -> list[Any]:
        from accelerate.utils import gather_object

        return list(gather_object([value]))


def _buckets(tensors: Sequence[Tensor], *, limit: int) -> Iterator[list[Tensor]]:
    """Runs of tensors of one dtype, each of at most `limit` numbers (or one tensor)."""
    bucket: list[Tensor] = []
    for t in tensors:
        if bucket and (bucket[0].dtype != t.dtype or sum(b.numel() for b in bucket) + t.numel() > limit):
            yield bucket
            bucket = []
        bucket.append(t)
    if bucket:
        yield bucket
