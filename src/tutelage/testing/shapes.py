"""Check at run time what the names already promise: `logits_BTV` has three axes, and every B is one B."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tutelage.errors import DataError

_SUFFIX = re.compile(r"_([A-Z]+)$")


def shapes_match_names(function: Callable[..., Any]) -> Callable[..., Any]:
    """Raise DataError when an argument's shape contradicts its suffix or another argument's.

    Costs a few microseconds a call. Tests apply it to the public functions of `numerics` and the signals;
    production code applies it nowhere.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        sizes: dict[str, tuple[int, str]] = {}
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            suffix = _SUFFIX.search(name)
            if suffix is None or not isinstance(value, Tensor):
                continue
            if value.ndim != len(suffix[1]):
                raise DataError(
                    f"{function.__name__}: {name} names {len(suffix[1])} axes, got shape {tuple(value.shape)}"
                )
            for letter, size in zip(suffix[1], value.shape, strict=True):
                known, first = sizes.setdefault(letter, (size, name))
                if known != size:
                    raise DataError(f"{function.__name__}: {letter} is {known} in {first} but {size} in {name}")
        return function(*args, **kwargs)

    return checked
