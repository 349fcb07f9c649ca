"""Rollout batches: made through inference, kept in the object store, read back bit for bit.

================================  ====================================================================
:mod:`mint_runs.rollouts.batch`     a batch as plain data
:mod:`mint_runs.rollouts.codec`     a batch as one safetensors file
:mod:`mint_runs.rollouts.sampling`  completions of one revision, many at a time
:mod:`mint_runs.rollouts.making`    the batch of one step: found, or sampled, scored and kept
:mod:`mint_runs.rollouts.storage`   the object and the pointer to it; what has expired is swept
================================  ====================================================================
"""

from __future__ import annotations

from mint_runs.rollouts.batch import RolloutBatch, RolloutGroup, RolloutSample

__all__ = ["RolloutBatch", "RolloutGroup", "RolloutSample"]
