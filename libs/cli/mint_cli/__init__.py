"""The command ``mint``: MinT on this machine, and its public RPCs for people and scripts.

=============================  ==================================================================
:mod:`mint_cli.main`             the command line
:mod:`mint_cli.commands`         the commands, one module for each group
:mod:`mint_cli.runs`             runs as several commands handle them: queued, watched, concluded
:mod:`mint_cli.curves`           a run's figures over its steps, drawn by ``plot_terminal``, ``plot_png``
:mod:`mint_cli.installation`     which processes make an installation, with which settings
:mod:`mint_cli.supervisor`       runs them and restarts what dies
:mod:`mint_cli.state`            the state directory
:mod:`mint_cli.model`            base models on this machine
=============================  ==================================================================
"""

from __future__ import annotations

__all__: list[str] = []
