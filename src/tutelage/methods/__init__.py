"""The named methods: each is one short file with its settings, its card and `build`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tutelage.methods import (
    data_stage,
    distill_off_policy,
    distill_on_policy,
    raft,
    rejection_sampling,
    rest,
    rft,
    rl,
    rl_cards,
    sft,
    star,
)
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
    distill_off_policy.CARD.name: Method(
        distill_off_policy.CARD, distill_off_policy.DistillOffPolicy, distill_off_policy.build
    ),
    distill_on_policy.CARD.name: Method(
        distill_on_policy.CARD, distill_on_policy.DistillOnPolicy, distill_on_policy.build
    ),
    rejection_sampling.CARD.name: Method(
        rejection_sampling.CARD, rejection_sampling.RejectionSampling, rejection_sampling.build
    ),
    star.CARD.name: Method(star.CARD, star.STaR, star.build),
    rest.CARD.name: Method(rest.CARD, rest.ReST, rest.build),
    rest.EM_CARD.name: Method(rest.EM_CARD, rest.ReSTEM, rest.build_em),
    raft.CARD.name: Method(raft.CARD, raft.RAFT, raft.build),
    rft.CARD.name: Method(rft.CARD, rft.RFT, rft.build),
    data_stage.CARD.name: Method(data_stage.CARD, data_stage.DataStage, data_stage.build),
    **{name: Method(card, rl.PolicyGradientStage, rl.build) for name, card in rl_cards.CARDS.items()},
}
"""Every method by its name in a config."""

__all__ = ["METHODS", "Card", "Method"]
