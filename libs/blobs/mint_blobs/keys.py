"""Where things lie in the bucket.

::

    tenants/{t}/blobs/{hex of digest}/{stage id}            adapter revisions, data sets
    tenants/{t}/states/{policy}/{run}/{step:08d}-{fence}/   a training state, three objects:
        weights.safetensors  optimizer.safetensors  state.json
        export.safetensors                              in place of them, for an export and nothing else
    tenants/{t}/rollouts/{policy}/{run}/{step:08d}-{fence}  the rollout batch of one step
    tenants/{t}/imports/…                                   what the tenant put there itself, to be imported

No key is shared between tenants: knowing a digest grants nothing. A blob's stage id is never reused, so a deletion
that arrives late cannot hit a later upload of the same bytes. The key of a state or rollout batch carries the fence of
its writer, so two writers never share one, and deleting one takes nothing from another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mint_blobs.digests import digest_hex
from mint_core.errors import InvalidArgument
from mint_core.names import PolicyName, check_digest, check_id

__all__ = [
    "StateKeys",
    "blob_key",
    "blob_prefix",
    "check_key",
    "import_prefix",
    "rollout_key",
    "rollout_prefix",
    "state_keys",
]

_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")
_MAX_KEY_BYTES = 1024


def check_key(key: str, *, field: str = "key") -> str:
    """Return ``key`` if it is a relative path of plain segments, else raise :class:`InvalidArgument`."""
    if len(key) > _MAX_KEY_BYTES or not all(
        _SEGMENT.fullmatch(segment) and ".." not in segment for segment in key.split("/")
    ):
        raise InvalidArgument(
            f"{field} is {key[:120]!r}: an object key is at most {_MAX_KEY_BYTES} bytes of segments of "
            "A-Z, a-z, 0-9, '.', '_', ':', '-' joined by '/', none empty, none with '..'",
            field=field,
        )
    return key


def blob_prefix(tenant: str, digest: str | None = None) -> str:
    """Prefix of all blobs of a tenant, or of all stages of one digest."""
    prefix = f"tenants/{check_id(tenant, field='tenant')}/blobs/"
    return prefix if digest is None else f"{prefix}{digest_hex(check_digest(digest, field='digest'))}/"


def blob_key(tenant: str, digest: str, stage_id: str) -> str:
    """Key of one staged copy of the blob ``digest``; ``stage_id`` is an id that was never used before."""
    return blob_prefix(tenant, digest) + check_id(stage_id, field="stage_id")


def import_prefix(tenant: str) -> str:
    """Prefix of what a tenant put into the bucket itself; garbage collection leaves it alone."""
    return f"tenants/{check_id(tenant, field='tenant')}/imports/"


@dataclass(frozen=True, slots=True)
class StateKeys:
    """The three objects of one training state."""

    weights: str
    """LoRA tensors with PEFT names, the adapter configuration in the metadata; all the exporter reads."""

    optimizer: str
    """Optimizer moments and RNG states as tensors."""

    state: str
    """Step, schedule and data position as JSON."""

    export: str
    """Weights that were saved to be exported only: nothing can be resumed from them."""


def state_keys(policy: PolicyName, run: str, step: int, fence: int) -> StateKeys:
    """Keys of the training state that the holder of ``fence`` saved after ``step`` steps of ``run``."""
    folder = _run_key("states", policy, run, step, fence)
    return StateKeys(
        weights=f"{folder}/weights.safetensors",
        optimizer=f"{folder}/optimizer.safetensors",
        state=f"{folder}/state.json",
        export=f"{folder}/export.safetensors",
    )


def rollout_prefix(policy: PolicyName, run: str) -> str:
    """Prefix of all rollout batches of ``run``."""
    return _run_prefix("rollouts", policy, run)


def rollout_key(policy: PolicyName, run: str, step: int, fence: int) -> str:
    """Key of the rollout batch that the holder of ``fence`` made for ``step`` (from 1) of ``run``."""
    return _run_key("rollouts", policy, run, step, fence)


def _run_prefix(kind: str, policy: PolicyName, run: str) -> str:
    return f"tenants/{policy.tenant}/{kind}/{policy.policy}/{check_id(run, field='run')}/"


def _run_key(kind: str, policy: PolicyName, run: str, step: int, fence: int) -> str:
    if step < 0 or fence < 0:
        raise InvalidArgument(f"step is {step} and fence is {fence}: neither may be negative", field="step")
    return f"{_run_prefix(kind, policy, run)}{step:08d}-{fence}"
