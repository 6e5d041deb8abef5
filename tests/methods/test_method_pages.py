"""Every method has a page with its equation, data, policy, when, gotcha, differences and source."""

import re
from pathlib import Path

import pytest

from tutelage.methods import METHODS

PAGES = Path(__file__).parents[2] / "docs" / "methods"
ON_ANOTHER_PAGE = {"reinforce_rej": "reinforce", "rloo": "reinforce", "rest_em": "rest", "raft_pp": "raft"}
PARTS = ("**What.**", "**Data.**", "**Policy.**", "**When.**", "**Gotcha.**", "**How ours differs.**", "**Source")


def section(method: str) -> str:
    """The method's own section of its page, or the page."""
    text = (PAGES / f"{ON_ANOTHER_PAGE.get(method, method)}.md").read_text(encoding="utf-8")
    own = [s for s in re.split(r"(?m)^(?=## )", text) if s.startswith("## ") and f"(`method: {method}`)" in s]
    return own[0] if own else text


@pytest.mark.parametrize("method", METHODS)
def test_a_page_says_all_that_a_reader_needs(method: str) -> None:
    text = section(method)
    assert [part for part in PARTS if part not in text] == []
    assert re.search(r"(?m)^    \S", text), "no equation"


def test_defaults_that_the_pages_quote() -> None:
    rest_em, raft_pp = (METHODS[m].settings.model_fields for m in ("rest_em", "raft_pp"))
    rollout, keep = (rest_em[n].get_default(call_default_factory=True) for n in ("rollout", "keep"))
    assert (rollout.n, rollout.temperature, keep.cap, keep.order, keep.distinct) == (32, 0.7, 10, "sampled", "text")
    train = rest_em["train"].get_default(call_default_factory=True)
    assert (train.epochs, train.schedule, rest_em["rounds"].default) == (2, "constant", 3)
    assert raft_pp["train"].get_default(call_default_factory=True).batch_size is None
