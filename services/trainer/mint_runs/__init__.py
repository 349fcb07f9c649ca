"""The runs worker: claims queued runs and drives them over the trainer's step API, without a base of its own.

==============================  ==================================================================================
:mod:`mint_runs.worker`           claims runs, keeps their leases, ends them
:mod:`mint_runs.lease`            holding a lease: renewal, and stopping in time
:mod:`mint_runs.attempt`          one attempt at one run: its clients, its commits, its publication
:mod:`mint_runs.progress`         progress and events on their way to the catalog
:mod:`mint_runs.step_session`     a session at the trainer that outlives restarts of the trainer
:mod:`mint_runs.data`             lines of JSON to examples
:mod:`mint_runs.tokenization`     the base's tokenizer and chat template, without torch
:mod:`mint_runs.examples`         examples to token ids with the loss on completions only
:mod:`mint_runs.order`            which examples belong to which step
:mod:`mint_runs.recipes`          what runs can do: supervised fine-tuning
==============================  ==================================================================================
"""

from __future__ import annotations

__all__: list[str] = []
