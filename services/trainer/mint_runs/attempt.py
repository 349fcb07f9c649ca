"""One attempt at one run: what a recipe works with, and the writes that recipes share.

Every write is made under the lease: it is checked here, and the fence is compared again where the write lands.
"""

from __future__ import annotations

import asyncio
import datetime
import functools
import hashlib
import importlib.metadata
import tempfile
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from mint_api.runtime.v1 import publish_service_pb2
from mint_api.v1 import common_pb2, policy_service_pb2, revision_service_pb2, run_service_pb2
from mint_blobs import ObjectStore
from mint_client import MintClient
from mint_client.runtime import ExporterClient, WorkClient
from mint_core import failpoints
from mint_core.errors import BlobMissing, GateNotMet, NotFound
from mint_core.names import BlobName, RunName
from mint_runs.lease import HeldLease
from mint_runs.patience import patiently
from mint_runs.progress import Reporter
from mint_runs.settings import RunsSettings
from mint_runs.tokenization import BaseTokenizer

__all__ = ["Attempt", "Outcome", "RunCancelled", "RunDrained"]

_SAVED = failpoints.declare("runs.saved", "a state is stored by the trainer, not yet current in the catalog")
_COMMITTED = failpoints.declare("runs.committed", "a saved state is current in the catalog")
_EXPORTED = failpoints.declare("runs.exported", "a state is published as a revision, no alias moved yet")
_PROMOTED = failpoints.declare("runs.promoted", "the alias points at the published revision, the run has not ended")

_NUM_REVISIONS_LOOKED_AT = 16

T = TypeVar("T")


class RunCancelled(Exception):
    """A cancel was asked for and honoured."""


class RunDrained(Exception):
    """This worker is going away; the run's state is saved and another worker may go on."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run that ended as planned leaves."""

    published_revision: str = ""
    """A revision name, or empty."""


@dataclass(slots=True)
class Attempt:
    """See the module."""

    run: run_service_pb2.Run
    policy: policy_service_pb2.Policy
    fence: common_pb2.Fence
    lease: HeldLease
    client: MintClient
    work: WorkClient
    exporter: ExporterClient
    store: ObjectStore
    tokenizer: BaseTokenizer
    reporter: Reporter
    settings: RunsSettings
    draining: asyncio.Event
    """Set when this worker is to go away."""
    published_revision: str = ""
    """Set as soon as there is one, also when the attempt fails after it."""
    _num_sessions: int = field(default=0, init=False)

    @property
    def tenant(self) -> str:
        return RunName.parse(self.run.name).tenant

    @property
    def created_at(self) -> datetime.datetime:
        """When the run was created, for whatever must be equal in every attempt."""
        return self.run.create_time.ToDatetime(datetime.UTC)

    @property
    def stop_requested(self) -> Literal["", "cancel", "drain"]:
        """Why the recipe should stop at the next step."""
        if self.reporter.cancel_requested:
            return "cancel"
        return "drain" if self.draining.is_set() else ""

    def check(self) -> None:
        """Raise :class:`LeaseLost` unless the lease is held, :class:`RunCancelled` or :class:`RunDrained` if asked to
        stop: for where everything worth keeping is saved."""
        self.lease.check()
        reason = self.stop_requested
        if reason == "cancel":
            raise RunCancelled
        if reason == "drain":
            raise RunDrained

    def next_session_id(self) -> str:
        """An id for a session at the trainer that no other attempt uses: sessions know no fences."""
        self._num_sessions += 1
        digest = hashlib.sha256(self.run.name.encode()).hexdigest()[:16]
        return f"run-{digest}-{self.fence.token}-{self._num_sessions}"

    async def read_lines(self, blob: common_pb2.BlobRef, read: Callable[[Any], T], *, source: str) -> T:
        """Fetch a blob of this tenant and give its file, opened for reading bytes, to ``read`` in a thread.

        Raises :class:`BlobMissing` if it is absent or not verified.
        """
        name = str(BlobName(self.tenant, blob.digest))
        try:
            record = await self.patiently("catalog", lambda: self.work.get_blob(name))
        except NotFound:
            record = publish_service_pb2.BlobRecord()
        if record.state != publish_service_pb2.BLOB_STATE_VERIFIED:
            raise BlobMissing(
                f"{source} is {blob.digest}, which is not stored for tenant {self.tenant}: upload it and create the "
                "run again",
                metadata={"digest": blob.digest},
            )
        with tempfile.TemporaryDirectory(dir=self.settings.scratch_path, prefix="mint-runs-") as folder:
            path = Path(folder) / "data"
            await self.patiently(
                "object store",
                lambda: self.store.get_file(
                    record.object_key, path, digest=blob.digest, size_bytes=record.blob.size_bytes
                ),
            )

            def read_file() -> T:
                with path.open("rb") as file:
                    return read(file)

            return await asyncio.to_thread(read_file)

    async def commit(self, state: common_pb2.TrainingState) -> None:
        """Make a saved state current for the run and its policy."""
        await _SAVED.reached()
        self.lease.check()
        await self.patiently("catalog", lambda: self.work.commit_training_state(self.run.name, self.fence, state))
        self.reporter.event("saved", f"state after step {state.step} is saved")
        await _COMMITTED.reached()

    async def publish(self, state: common_pb2.TrainingState, *, data_digest: str) -> str:
        """:meth:`export` a state that the run's initial one led to, and promote the run's alias to it; answers the
        revision's name."""
        parent = await self.initial_revision()
        revision = await self.export(state, data_digest=data_digest, parent_revision=parent.name if parent else "")
        if self.run.promote_alias:
            await self.promote(revision.number)
        return revision.name

    async def export(
        self, state: common_pb2.TrainingState, *, data_digest: str, parent_revision: str
    ) -> revision_service_pb2.Revision:
        """Export and publish a committed state.

        Safe to repeat in a later attempt: the same step of the same run is the same revision.
        """
        lineage = revision_service_pb2.Lineage(
            parent_revision=parent_revision,
            run=self.run.name,
            step=state.step,
            data_digest=data_digest,
            code_version=f"mint-lora {importlib.metadata.version('mint-lora')}",
            recipe=self.run.WhichOneof("recipe") or "",
        )
        request_id = str(uuid.uuid4())
        self.lease.check()
        response = await self.patiently(
            "exporter",
            lambda: self.exporter.export(self.run.policy, state, self.fence, lineage=lineage, request_id=request_id),
        )
        revision: revision_service_pb2.Revision = response.revision
        self.published_revision = revision.name
        self.reporter.event("published", f"revision {revision.number} is {revision.blob.digest}")
        await _EXPORTED.reached()
        return revision

    async def promote(self, number: int) -> None:
        """Point the run's alias at revision ``number``; a repetition moves nothing.

        An alias whose gate the revision does not meet stays where it is, and an event of the run says so: the revision
        is published, and whoever evaluates it may promote it.
        """
        alias = f"{self.run.policy}/aliases/{self.run.promote_alias}"
        # Aliases know no fences. The id makes the promotion of this run's revision happen once: a repetition, by a
        # later attempt or by a worker that slept through its lease, gets the stored answer and moves nothing, also
        # when somebody has moved the alias since.
        request_id = _derived_uuid(f"{self.run.name} promotes {alias} to {number}")
        self.lease.check()
        try:
            await self.patiently(
                "catalog",
                lambda: self.client.aliases.promote(
                    alias, number, reason=f"published by {self.run.name}", request_id=request_id
                ),
            )
        except GateNotMet as error:
            self.reporter.event("not_promoted", error.message)
            return
        self.reporter.event("promoted", f"{self.run.promote_alias} points at revision {number}")
        await _PROMOTED.reached()

    async def initial_revision(self) -> revision_service_pb2.Revision | None:
        """The revision that was exported from the state this run started from, if there is one."""
        start = self.run.initial_training_state
        return await self.find_revision(start.run, start.step) if start.run else None

    async def find_revision(self, run: str, step: int) -> revision_service_pb2.Revision | None:
        """The policy's revision that was exported after ``step`` steps of ``run``, if it is among the newest."""
        newest = self.policy.next_revision_number - 1
        for number in range(newest, max(0, newest - _NUM_REVISIONS_LOOKED_AT), -1):
            name = f"{self.run.policy}/revisions/{number}"
            try:
                revision = await self.patiently("catalog", functools.partial(self.client.revisions.get, name))
            except NotFound:
                continue
            if (revision.lineage.run, revision.lineage.step) == (run, step):
                return revision
        return None

    async def patiently(self, what: str, call: Callable[[], Awaitable[T]]) -> T:
        """:func:`mint_runs.patience.patiently` with the patience of the settings."""
        return await patiently(what, call, patience_s=self.settings.patience_s)


def _derived_uuid(text: str) -> str:
    """A UUID4 in form that is a function of ``text``."""
    return str(uuid.UUID(bytes=hashlib.sha256(text.encode()).digest()[:16], version=4))
