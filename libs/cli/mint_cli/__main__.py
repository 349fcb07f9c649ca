"""``python -m mint_cli``."""

from __future__ import annotations

from mint_cli.main import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
