"""Where a run's rollout batches are kept: an object in the store, and the catalog's pointer that makes it the batch.

The object is put first. Its key carries the writer's fence, so a worker that died between the two leaves an object that
nothing points at and nobody overwrites; it is swept when the run ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import timestamp_pb2

from mint_api.v1 import common_pb2, rollout_service_pb2
from mint_blobs import rollout_key, rollout_prefix
from mint_core import clock, failpoints, log
from mint_core.errors import BlobCorrupt, LeaseLost, MintError, NotFound
from mint_core.names import PolicyName, RunName
from mint_runs.attempt import Attempt
from mint_runs.rollouts.batch import RolloutBatch
from mint_runs.rollouts.codec import read_batch, write_batch

__all__ = ["RolloutStorage", "rollout_id"]

_PERSISTED = failpoints.declare("runs.persisted", "a rollout batch is stored and its pointer is written")

_log = log.get_logger(__name__)

_MAX_ID_CHARS = 63
_NUM_HASH_CHARS = 32


def rollout_id(run: str, step: int) -> str:
    """Id of the rollout of ``step`` of ``run`` (a run's id): a pure function, so that any attempt finds it."""
    suffix = f"-{step:06d}"
    if len(run) + len(suffix) <= _MAX_ID_CHARS:
        return run + suffix
    return hashlib.sha256(run.encode()).hexdigest()[:_NUM_HASH_CHARS] + suffix


class RolloutStorage:
    """The rollout batches of one attempt's run."""

    def __init__(self, attempt: Attempt, *, ttl_s: float) -> None:
        """A batch may be deleted ``ttl_s`` after it was made."""
        self._attempt = attempt
        self._ttl_s = ttl_s
        self._run_id = RunName.parse(attempt.run.name).run
        self._policy = PolicyName.parse(attempt.run.policy)

    async def find(self, step: int) -> RolloutBatch | None:
        """The batch that this or an earlier attempt kept for ``step``, or None.

        Raises :class:`BlobCorrupt` if it is not whole any more or is not this step's.
        """
        attempt = self._attempt
        name = f"{self._policy}/rollouts/{rollout_id(self._run_id, step)}"
        try:
            pointer = await attempt.patiently("catalog", lambda: attempt.client.rollouts.get(name))
        except NotFound:
            return None
        with self._scratch() as path:
            try:
                await attempt.patiently(
                    "object store",
                    lambda: attempt.store.get_file(
                        pointer.object_key, path, digest=pointer.blob.digest, size_bytes=pointer.blob.size_bytes
                    ),
                )
            except NotFound as error:
                raise BlobCorrupt(
                    f"the object of {name} is gone: {error.message}", metadata={"object_key": pointer.object_key}
                ) from error
            batch = await asyncio.to_thread(read_batch, path, key=pointer.object_key)
        expected = (attempt.run.name, step, pointer.revision, pointer.revision_digest)
        if (batch.run, batch.step, batch.revision, batch.revision_digest) != expected:
            raise BlobCorrupt(
                f"{pointer.object_key!r} holds step {batch.step} of {batch.run} by {batch.revision}, but {name} says "
                f"step {step} of {attempt.run.name} by {pointer.revision}",
                metadata={"object_key": pointer.object_key},
            )
        return batch

    async def keep(self, batch: RolloutBatch) -> RolloutBatch:
        """Store ``batch`` and write its pointer; answers it as any later attempt will read it."""
        attempt, token = self._attempt, self._attempt.fence.token
        key = rollout_key(self._policy, self._run_id, batch.step, token)
        with self._scratch() as path:
            written = await asyncio.to_thread(write_batch, batch, path)
            attempt.lease.check()
            await attempt.patiently("object store", lambda: attempt.store.put_file(key, path, digest=written.digest))
            kept = await asyncio.to_thread(read_batch, path, key=key)
        expire_time = timestamp_pb2.Timestamp()
        expire_time.FromNanoseconds(round((clock.wall_s() + self._ttl_s) * 1e9))
        pointer = rollout_service_pb2.Rollout(
            revision=kept.revision,
            revision_digest=kept.revision_digest,
            run=kept.run,
            step=kept.step,
            object_key=key,
            blob=common_pb2.BlobRef(digest=written.digest, size_bytes=written.size_bytes),
            numerics=kept.numerics,
            num_samples=kept.num_samples,
            num_tokens=kept.num_tokens,
            num_unscored=kept.num_unscored,
            reward_mean=kept.reward_mean,
            expire_time=expire_time,
        )
        attempt.lease.check()
        await attempt.patiently(
            "catalog",
            lambda: attempt.client.rollouts.create(
                str(self._policy), rollout_id(self._run_id, kept.step), pointer, attempt.fence
            ),
        )
        await _PERSISTED.reached()
        return kept

    async def sweep(self) -> None:
        """Delete what is not needed once the run is done: this policy's expired batches, each object before its
        pointer, so that none is forgotten; and this run's objects that got no pointer.

        What fails is left for the next sweep. Raises :class:`LeaseLost`.
        """
        attempt = self._attempt
        kept: set[str] = set()
        try:
            async for pointer in attempt.client.rollouts.list(str(self._policy)):
                if pointer.expire_time.ToNanoseconds() > clock.wall_s() * 1e9:
                    kept.add(pointer.object_key)
                    continue
                attempt.lease.check()
                await attempt.store.delete(pointer.object_key)
                await attempt.client.rollouts.delete(pointer.name, attempt.fence)
                _log.info("expired rollout deleted", extra={"fields": {"rollout": pointer.name}})
            async for info in attempt.store.list(rollout_prefix(self._policy, self._run_id)):
                if info.key not in kept:
                    attempt.lease.check()
                    await attempt.store.delete(info.key)
        except LeaseLost:
            raise
        except MintError as error:
            _log.warning("expired rollouts not deleted", extra={"fields": {"error": str(error)}})

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self._attempt.settings.scratch_path, prefix="mint-rollout-") as folder:
            yield Path(folder) / "batch.safetensors"
