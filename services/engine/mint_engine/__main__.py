"""``mint-engine``: one SGLang with a resident base, asked by digest."""

from __future__ import annotations

import uvloop

from mint_core.config import load_or_exit
from mint_core.server import run
from mint_engine.app import build
from mint_engine.settings import EngineSettings

__all__ = ["main"]


def main() -> None:
    settings = load_or_exit(EngineSettings)
    # A token is a message from SGLang's sockets and one to a caller: most of it is the event loop's work.
    run("engine", settings, lambda: build(settings), loop_factory=uvloop.new_event_loop)


if __name__ == "__main__":
    main()
