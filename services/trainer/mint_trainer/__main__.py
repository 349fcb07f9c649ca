"""``mint-trainer``: the trainer's process."""

from __future__ import annotations

from functools import partial

from mint_core import config, server
from mint_trainer.app import build
from mint_trainer.settings import TrainerSettings

__all__ = ["main"]


def main() -> None:
    """Load the base and serve the step API until SIGTERM."""
    settings = config.load_or_exit(TrainerSettings)
    server.run("trainer", settings, partial(build, settings))


if __name__ == "__main__":
    main()
