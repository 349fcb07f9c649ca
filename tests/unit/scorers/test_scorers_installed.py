"""Which scorers are installed, and what is said about one that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from mint_scorers import UnknownScorer, UnusableScorer, installed_scorers, make_scorer
from support.scorer_packages import install_scorers

SHIPPED = ["arithmetic", "exact_match", "json_fields", "json_schema"]

SOURCE = """
def length(options):
    return lambda sample: float(len(sample.completion))

def broken(options):
    raise OSError("no model at /models/judge")

number = 3

def gives_number(options):
    return 3
"""


def test_the_shipped_scorers_are_installed() -> None:
    assert installed_scorers() == SHIPPED


def test_a_package_brings_its_scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_scorers(
        tmp_path, monkeypatch, package="more_scorers", source=SOURCE, entry_points={"length": "more_scorers:length"}
    )
    assert installed_scorers() == [*SHIPPED, "length"]
    assert callable(make_scorer("length", {}))


def test_an_unknown_name_is_answered_by_the_known_ones() -> None:
    with pytest.raises(
        UnknownScorer, match="'nix' is not installed; installed are arithmetic, exact_match, json_fields, json_schema"
    ):
        make_scorer("nix", {})


def test_a_name_that_two_packages_claim_is_used_by_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_scorers(
        tmp_path, monkeypatch, package="zealous", source=SOURCE, entry_points={"exact_match": "zealous:length"}
    )
    assert installed_scorers() == SHIPPED
    with pytest.raises(UnusableScorer, match=r"2 times, as mint_scorers.* of mint-lora .* and as .*of zealous 1.0"):
        make_scorer("exact_match", {})


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("bad_scorers_nowhere:make", "cannot be loaded: ModuleNotFoundError: No module named 'bad_scorers_nowhere'"),
        ("bad_scorers:nothing", "cannot be loaded: AttributeError"),
        ("bad_scorers:number", "of type int: an entry point of group mint.scorers names a callable"),
        ("bad_scorers:broken", "cannot be made: OSError: no model at /models/judge"),
        ("bad_scorers:gives_number", "whose factory gave one of type int: it must give a callable that takes a sample"),
    ],
)
def test_what_cannot_be_used_says_which_package_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, complaint: str
) -> None:
    install_scorers(tmp_path, monkeypatch, package="bad_scorers", source=SOURCE, entry_points={"bad": target})
    with pytest.raises(UnusableScorer, match=complaint) as caught:
        make_scorer("bad", {})
    assert "of bad_scorers 1.0" in str(caught.value)
