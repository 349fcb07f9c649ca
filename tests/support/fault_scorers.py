"""A scorer that does what each example asks of it, and the package metadata by which a runs worker finds it."""

from __future__ import annotations

import math
import os
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path

from mint_scorers import Sample, Scorer

__all__ = ["SCORER", "install_fault_scorer", "make_fault_scorer"]

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


def install_fault_scorer(folder: Path) -> dict[str, str]:
    """Write the metadata of an installed distribution to ``folder``; the environment in which Python finds it."""
    metadata = folder / "mint_fault_scorers-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mint-fault-scorers\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        f"[mint.scorers]\n{SCORER} = {make_fault_scorer.__module__}:{make_fault_scorer.__name__}\n"
    )
    return {"PYTHONPATH": os.pathsep.join((str(folder), str(Path(__file__).parents[1])))}
