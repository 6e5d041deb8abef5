"""The named methods: each is one short file with its settings, its card and `build`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tutelage.methods import rejection_sampling, sft
from tutelage.methods.card import Card
from tutelage.methods.settings import Settings


@dataclass(frozen=True, slots=True)
class Method:
    """A named choice of source and signal."""

    card: Card
    settings: type[Settings]
    build: Callable[..., Any]
    """`build(settings, workbench) -> train.loop.Stage`."""


METHODS: dict[str, Method] = {
    sft.CARD.name: Method(sft.CARD, sft.SFT, sft.build),
    rejection_sampling.CARD.name: Method(
        rejection_sampling.CARD, rejection_sampling.RejectionSampling, rejection_sampling.build
    ),
}
"""Every method by its name in a config."""

__all__ = ["METHODS", "Card", "Method"]
