"""Write the tables of ``docs/benchmarks.md`` from ``bench/results``: ``python -m bench.docs``

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; the text around it is written by hand.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

from bench.support.report import RESULTS, Target

__all__ = ["table"]

_PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
_TABLE = re.compile(r"(<!-- table: ([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def table(result: dict[str, Any], targets: dict[str, Target]) -> str:
    """A result's figures beside their targets, then what they were computed from, then where and how it ran."""
    lines = ["| figure | value | target |", "|---|---:|---:|"]
    for key, value in result["figures"].items():
        target = targets.get(key)
        shown = "" if target is None else str(target) if target.is_met(value) else f"**missed:** {target}"
        lines.append(f"| `{key}` | {_shown(value)} | {shown} |")
    lines += ["", "| behind it | value |", "|---|---:|"]
    lines += [f"| `{key}` | {_shown(value)} |" for key, value in result["details"].items()]
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items())
    return "\n".join([*lines, "", f"Machine: {machine}. Settings: {settings}.", ""])


def main() -> None:
    def replaced(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        path = RESULTS / f"{name}.json"
        if not path.exists():
            print(f"{name}: no result, left as it is; run `make bench-{name}`")
            return match.group(0)
        print(f"{name}: from {path}")
        targets = importlib.import_module(f"bench.{name.partition('-')[0]}").TARGETS
        return f"{begin}{table(json.loads(path.read_text()), targets)}{end}"

    _PAGE.write_text(_TABLE.sub(replaced, _PAGE.read_text()))


if __name__ == "__main__":
    main()
