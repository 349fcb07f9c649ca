"""A scorer's process."""

from __future__ import annotations

import sys

from mint_scorers.process import serve

__all__ = ["main"]


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m mint_scorers NAME, see mint_scorers/process.py")
    serve(sys.argv[1])


if __name__ == "__main__":
    main()
