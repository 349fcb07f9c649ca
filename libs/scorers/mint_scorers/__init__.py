"""Scorers: what turns a completion into a reward. The interface, the installed ones, and those that MinT ships.

An operator installs a scorer as a Python package with an entry point of group ``mint.scorers``; a tenant names it in a
recipe. This room imports nothing of MinT: such a package then depends on little, and a scorer's process loads little.

==============================  ==================================================================================
:mod:`mint_scorers.scorer`        the interface: a sample goes in, a reward comes out
:mod:`mint_scorers.installed`     which scorers are installed, and making one
:mod:`mint_scorers.options`       reading a scorer's options
:mod:`mint_scorers.process`       one scorer in a process of its own: a line of JSON in, a line of JSON out
:mod:`mint_scorers.exact_match`   shipped: the completion is the reference
:mod:`mint_scorers.json_fields`   shipped: how much of a reference object the completion has right
:mod:`mint_scorers.json_schema`   shipped: the completion is JSON that a schema accepts
:mod:`mint_scorers.arithmetic`    shipped: the last number of the completion is the right one
==============================  ==================================================================================
"""

from __future__ import annotations

from mint_scorers.installed import ENTRY_POINT_GROUP, UnknownScorer, UnusableScorer, installed_scorers, make_scorer
from mint_scorers.scorer import Sample, Scorer, ScorerFactory

__all__ = [
    "ENTRY_POINT_GROUP",
    "Sample",
    "Scorer",
    "ScorerFactory",
    "UnknownScorer",
    "UnusableScorer",
    "installed_scorers",
    "make_scorer",
]
