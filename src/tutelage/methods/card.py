"""A method's card: what it is, in one place. `tutelage methods`, the docs and the report are made from it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a reader needs in order to choose a method."""

    name: str
    title: str
    what: str
    """The method in one sentence."""
    source: str
    """Whose trajectories: the first slot."""
    signal: str
    """What is learned: the second slot."""
    eats: str
    """The data it needs."""
    policy: str
    """On- or off-policy, and why."""
    when: str
    """The gap it is for."""
    gotcha: str
    """What goes wrong, and what watches for it here."""
    cite: tuple[str, ...]
    """Sources."""
