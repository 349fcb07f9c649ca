"""The order of replicas for an adapter: alike for everybody, even, and little moved by who comes and goes."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mint_core.placement import placement_order

NAMES = st.lists(st.text("abcdefgh", min_size=1, max_size=6), min_size=1, max_size=8, unique=True)


@given(NAMES, st.randoms())
def test_the_order_depends_on_nothing_but_the_names(names: list[str], random: object) -> None:
    shuffled = list(names)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert placement_order("sha256:1", names) == placement_order("sha256:1", shuffled)


@given(NAMES)
def test_who_goes_leaves_the_others_in_their_order(names: list[str]) -> None:
    order = placement_order("sha256:1", names)
    assert placement_order("sha256:1", names[1:]) == [name for name in order if name != names[0]]


def test_adapters_are_spread_evenly() -> None:
    names = [f"engineReplicas/{number}" for number in range(4)]
    first = Counter(placement_order(f"sha256:{number}", names)[0] for number in range(4000))
    assert all(850 < first[name] < 1150 for name in names)
