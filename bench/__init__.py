"""Benchmarks, one module for each question: ``python -m bench.<name>``. ``docs/benchmarks.md`` says what they found."""

from __future__ import annotations

import sys
from pathlib import Path

# Servers are started as the tests start them.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
