"""``mint-inference``: generation and scores for clients."""

from __future__ import annotations

import uvloop

from mint_core.config import load_or_exit
from mint_core.server import run
from mint_inference.app import inference
from mint_inference.settings import InferenceSettings

__all__ = ["main"]


def main() -> None:
    settings = load_or_exit(InferenceSettings)
    run("inference", settings, lambda: inference(settings), loop_factory=uvloop.new_event_loop)


if __name__ == "__main__":
    main()
