from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_core.split import position_of, sees_canary

KEYS = [f"user-{number}" for number in range(10_000)]


@pytest.mark.parametrize("weight", [0.01, 0.1, 0.5, 0.9])
def test_the_share_of_keys_is_the_weight(weight: float) -> None:
    share = sum(sees_canary(weight, "salt", key) for key in KEYS) / len(KEYS)
    # Five standard deviations of a binomial share.
    assert abs(share - weight) < 5 * (weight * (1 - weight) / len(KEYS)) ** 0.5


def test_positions_are_uniform() -> None:
    counts = [0] * 20
    for key in KEYS:
        counts[int(position_of("salt", key) * 20)] += 1
    expected = len(KEYS) / 20
    # 19 degrees of freedom: above 60 about once in 10^5 salts, and the salt is fixed.
    assert sum((count - expected) ** 2 / expected for count in counts) < 60


@settings(max_examples=200, deadline=None)
@given(
    salt=st.text(max_size=20),
    key=st.text(min_size=1, max_size=40),
    low=st.floats(0, 1),
    high=st.floats(0, 1),
)
def test_a_key_that_sees_the_canary_sees_it_at_every_larger_weight(
    salt: str, key: str, low: float, high: float
) -> None:
    low, high = sorted((low, high))
    assert sees_canary(low, salt, key) <= sees_canary(high, salt, key)
    assert 0 <= position_of(salt, key) < 1
    assert sees_canary(1.0, salt, key)
    assert not sees_canary(0.0, salt, key)


def test_no_key_never_sees_it() -> None:
    assert not sees_canary(1.0, "salt", "")


def test_salts_give_other_orders() -> None:
    one, other = ({key for key in KEYS if sees_canary(0.1, salt, key)} for salt in ("a", "b"))
    assert 50 < len(one & other) < 200  # 100 by chance


def test_salt_and_key_do_not_run_into_each_other() -> None:
    assert position_of("ab", "c") != position_of("a", "bc")


def test_it_is_the_same_in_every_process_and_release() -> None:
    assert position_of("tenants/acme/policies/tone/aliases/live", "user-1") == 0.7623214295389104
