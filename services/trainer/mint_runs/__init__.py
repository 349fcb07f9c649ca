"""The runs worker: claims queued runs and drives them over the trainer's step API, without a base of its own.

==============================  ==================================================================================
:mod:`mint_runs.worker`           claims runs, keeps their leases, ends them
:mod:`mint_runs.lease`            holding a lease: renewal, and stopping in time
:mod:`mint_runs.attempt`          one attempt at one run: its clients, its commits, its publication
:mod:`mint_runs.progress`         progress, events and figures of steps on their way to the catalog
:mod:`mint_runs.training`         the newest state of a run, and sessions that go on from it
:mod:`mint_runs.step_session`     a session at the trainer that outlives restarts of the trainer
:mod:`mint_runs.data`             lines of JSON to examples
:mod:`mint_runs.prompts`          lines of JSON to prompts
:mod:`mint_runs.tokenization`     the base's tokenizer and chat template, without torch
:mod:`mint_runs.examples`         examples to token ids with the loss on completions only
:mod:`mint_runs.order`            which examples belong to which step
:mod:`mint_runs.rollouts`         batches of samples: made through inference, scored, kept, read back
:mod:`mint_runs.scoring`          completions to rewards
:mod:`mint_runs.advantages`       rewards to advantages, and weights of tokens
:mod:`mint_runs.updates`          a rollout batch to the data of one update
:mod:`mint_runs.grpo_plan`        a GRPO recipe with its defaults filled in
:mod:`mint_runs.recipes`          what runs can do: supervised fine-tuning, GRPO, evaluation
==============================  ==================================================================================
"""

from __future__ import annotations

__all__: list[str] = []
