"""Scoring: completions to rewards, by a scorer that may raise, hang, die or answer nonsense.

==============================  ==================================================================================
:mod:`mint_runs.scoring.opening`  finds the scorer that a recipe names
:mod:`mint_runs.scoring.outcome`  what scoring a sample came to
:mod:`mint_runs.scoring.local`    installed scorers, in a few processes that are replaced when lost
:mod:`mint_runs.scoring.process`  one such process
:mod:`mint_runs.scoring.remote`   scorers behind gRPC
==============================  ==================================================================================
"""

from __future__ import annotations

from mint_runs.scoring.opening import open_scorer
from mint_runs.scoring.outcome import Scored, Scoring

__all__ = ["Scored", "Scoring", "open_scorer"]
