"""``mint-engine``: one SGLang with a resident base, asked by digest."""

from __future__ import annotations

from mint_core.config import load_or_exit
from mint_core.server import run
from mint_engine.app import build
from mint_engine.settings import EngineSettings

__all__ = ["main"]


def main() -> None:
    settings = load_or_exit(EngineSettings)
    run("engine", settings, lambda: build(settings))


if __name__ == "__main__":
    main()
