"""A scorer that does what each example asks of it. It is installed as a package of its own: it knows no tests."""

from __future__ import annotations

import math
import os
import threading
import zlib
from collections.abc import Mapping

from mint_scorers import Sample, Scorer

__all__ = ["SCORER", "make_fault_scorer"]

SCORER = "as-the-example-says"


def make_fault_scorer(options: Mapping[str, str]) -> Scorer:
    """The factory; there are no options."""
    if options:
        raise ValueError(f"options are {sorted(options)}: expected none")
    return score


def score(sample: Sample) -> float:
    """Do what the example's field ``behaviour`` says; without one, every completion has a reward of its own."""
    behaviour = sample.example.get("behaviour", "spread")
    if behaviour == "spread":
        return zlib.crc32(sample.completion.encode()) / 2**32
    if behaviour == "equal":
        return 1.0
    if behaviour == "nan":
        return math.nan
    if behaviour == "hang":
        threading.Event().wait()
    if behaviour == "exit":
        os._exit(3)
    raise RuntimeError(f"this scorer was asked to {behaviour}")
