"""Trajectories at rest and on their way to the model: the store, demonstrations, packing and collation.

Names are imported when they are first used, so that reading a store does not wait for torch. `collate` and `select`
are the modules; the functions are `tutelage.data.collate.collate` and `tutelage.data.select.select`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutelage.data.collate import Batch, input_length
    from tutelage.data.demos import Demo
    from tutelage.data.files import DiskError
    from tutelage.data.journal import Journal
    from tutelage.data.pack import Packing, microbatches, pack_padded, pack_tokens
    from tutelage.data.quarantine import Quarantine
    from tutelage.data.rounds import RoundStore
    from tutelage.data.select import Selection, SelectionRules
    from tutelage.data.store import Shard, TrajectoryStore, TrajectoryWriter

_MODULE_OF = {
    "Batch": "collate",
    "Demo": "demos",
    "DiskError": "files",
    "Journal": "journal",
    "Packing": "pack",
    "Quarantine": "quarantine",
    "RoundStore": "rounds",
    "Selection": "select",
    "SelectionRules": "select",
    "Shard": "store",
    "TrajectoryStore": "store",
    "TrajectoryWriter": "store",
    "input_length": "collate",
    "microbatches": "pack",
    "pack_padded": "pack",
    "pack_tokens": "pack",
}

__all__ = [
    "Batch",
    "Demo",
    "DiskError",
    "Journal",
    "Packing",
    "Quarantine",
    "RoundStore",
    "Selection",
    "SelectionRules",
    "Shard",
    "TrajectoryStore",
    "TrajectoryWriter",
    "input_length",
    "microbatches",
    "pack_padded",
    "pack_tokens",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
