"""Clients of the services between MinT's own processes; no part of what users are promised."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any, Self

from mint_api.runtime.v1 import (
    exporter_service_pb2,
    exporter_service_pb2_grpc,
    publish_service_pb2,
    publish_service_pb2_grpc,
    work_service_pb2,
    work_service_pb2_grpc,
)
from mint_api.v1 import common_pb2, revision_service_pb2, run_service_pb2
from mint_client._calling import Connection, new_request_id
from mint_client._peft_folder import write_peft_folder
from mint_core.channel import DEFAULT_TIMEOUT_S, call, stream

__all__ = ["ExporterClient", "WorkClient"]

_STREAM_TIMEOUT_S = 3600.0


class WorkClient:
    """The catalog's run queue and leases, and the blob records a worker reads its data by and a trainer stores by."""

    def __init__(self, catalog_runtime_address: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._connection = Connection("catalog", catalog_runtime_address)
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._connection.close()

    @property
    def _work(self) -> Any:
        return self._connection.stub(work_service_pb2_grpc.WorkServiceStub)

    async def claim_run(
        self, holder: str, base_model: str, *, ttl_s: float, wait_s: float
    ) -> work_service_pb2.ClaimRunResponse | None:
        """The next run and the lease it is worked on under, or None if there was none within ``wait_s``."""
        request = work_service_pb2.ClaimRunRequest(holder=holder, base_model=base_model)
        request.ttl.FromMilliseconds(round(ttl_s * 1000))
        response: work_service_pb2.ClaimRunResponse = await call(self._work.ClaimRun, request, timeout_s=wait_s)
        return response if response.HasField("run") else None

    async def acquire_lease(self, resource: str, holder: str, *, ttl_s: float) -> work_service_pb2.Lease:
        request = work_service_pb2.AcquireLeaseRequest(resource=resource, holder=holder)
        request.ttl.FromMilliseconds(round(ttl_s * 1000))
        return (await call(self._work.AcquireLease, request, timeout_s=self._timeout_s)).lease

    async def renew_lease(self, fence: common_pb2.Fence, *, timeout_s: float | None = None) -> work_service_pb2.Lease:
        request = work_service_pb2.RenewLeaseRequest(fence=fence)
        return (await call(self._work.RenewLease, request, timeout_s=timeout_s or self._timeout_s)).lease

    async def release_lease(self, fence: common_pb2.Fence) -> None:
        request = work_service_pb2.ReleaseLeaseRequest(fence=fence)
        await call(self._work.ReleaseLease, request, timeout_s=self._timeout_s)

    async def watch_lease(self, fence: common_pb2.Fence) -> AsyncGenerator[work_service_pb2.Lease, None]:
        """The lease as it is, then nothing until :class:`LeaseLost` is raised; other errors say nothing about it."""
        request = work_service_pb2.WatchLeaseRequest(fence=fence)
        responses: Any = stream(self._work.WatchLease, request, timeout_s=None)
        async with contextlib.aclosing(responses):
            async for response in responses:
                yield response.lease

    async def list_leases(self, tenant: str) -> list[work_service_pb2.Lease]:
        request = work_service_pb2.ListLeasesRequest(parent=f"tenants/{tenant}")
        return list((await call(self._work.ListLeases, request, timeout_s=self._timeout_s)).leases)

    async def report_run(
        self,
        name: str,
        fence: common_pb2.Fence,
        *,
        progress: run_service_pb2.RunProgress | None = None,
        events: Sequence[run_service_pb2.RunEvent] = (),
        steps: Sequence[run_service_pb2.RunStep] = (),
    ) -> bool:
        """Write progress, append events, keep figures of at most 100 steps; answers whether a cancel was asked for."""
        request = work_service_pb2.ReportRunRequest(
            name=name, fence=fence, progress=progress, events=events, steps=steps
        )
        response = await call(self._work.ReportRun, request, timeout_s=self._timeout_s)
        return bool(response.cancel_requested)

    async def commit_training_state(self, name: str, fence: common_pb2.Fence, state: common_pb2.TrainingState) -> int:
        """Make a saved state current for the run and its policy; answers the catalog revision."""
        request = work_service_pb2.CommitTrainingStateRequest(name=name, fence=fence, state=state)
        response = await call(self._work.CommitTrainingState, request, timeout_s=self._timeout_s)
        return int(response.catalog_revision)

    async def finish_run(
        self,
        name: str,
        fence: common_pb2.Fence,
        state: run_service_pb2.RunState.ValueType,
        *,
        error: str = "",
        retriable: bool = False,
        published_revision: str = "",
    ) -> run_service_pb2.Run:
        """End the run and release its lease."""
        request = work_service_pb2.FinishRunRequest(
            name=name,
            fence=fence,
            state=state,
            error=error,
            retriable=retriable,
            published_revision=published_revision,
        )
        return (await call(self._work.FinishRun, request, timeout_s=self._timeout_s)).run

    async def get_blob(self, name: str) -> publish_service_pb2.BlobRecord:
        """The record of ``tenants/{t}/blobs/{digest}``: state and object key."""
        stub = self._connection.stub(publish_service_pb2_grpc.PublishServiceStub)
        request = publish_service_pb2.GetBlobRequest(name=name)
        return (await call(stub.GetBlob, request, timeout_s=self._timeout_s)).blob

    async def stage_blob(self, name: str, size_bytes: int) -> publish_service_pb2.BlobRecord:
        """The record of ``tenants/{t}/blobs/{digest}``, made where there was none: the bytes go to its object key."""
        stub = self._connection.stub(publish_service_pb2_grpc.PublishServiceStub)
        request = publish_service_pb2.StageBlobRequest(name=name, size_bytes=size_bytes)
        return (await call(stub.StageBlob, request, timeout_s=self._timeout_s)).blob


class ExporterClient:
    """From training state to published revision; PEFT adapters in and out."""

    def __init__(self, exporter_runtime_address: str, *, timeout_s: float = 600.0) -> None:
        self._connection = Connection("exporter", exporter_runtime_address)
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._connection.close()

    @property
    def _stub(self) -> Any:
        return self._connection.stub(exporter_service_pb2_grpc.ExporterServiceStub)

    async def export(
        self,
        policy: str,
        state: common_pb2.TrainingState,
        fence: common_pb2.Fence,
        *,
        lineage: revision_service_pb2.Lineage | None = None,
        request_id: str | None = None,
    ) -> exporter_service_pb2.ExportResponse:
        """Pack the state's weights, store and publish them; safe to repeat at any point."""
        request = exporter_service_pb2.ExportRequest(
            policy=policy,
            training_state=state,
            fence=fence,
            lineage=lineage,
            request_id=request_id or new_request_id(),
        )
        response: exporter_service_pb2.ExportResponse = await call(
            self._stub.Export, request, timeout_s=self._timeout_s
        )
        return response

    async def import_revision(
        self,
        policy: str,
        weights: common_pb2.BlobRef,
        adapter_config_json: str,
        *,
        lineage: revision_service_pb2.Lineage | None = None,
        request_id: str | None = None,
    ) -> revision_service_pb2.Revision:
        """Publish an uploaded PEFT adapter."""
        return await self._import(
            exporter_service_pb2.ImportRevisionRequest(
                policy=policy,
                weights=weights,
                adapter_config_json=adapter_config_json,
                lineage=lineage,
                request_id=request_id or new_request_id(),
            )
        )

    async def import_archive(
        self,
        policy: str,
        archive: common_pb2.BlobRef,
        *,
        lineage: revision_service_pb2.Lineage | None = None,
        request_id: str | None = None,
    ) -> revision_service_pb2.Revision:
        """Publish the adapter in an uploaded tar, tar.gz or zip of a PEFT folder."""
        return await self._import(
            exporter_service_pb2.ImportRevisionRequest(
                policy=policy, archive=archive, lineage=lineage, request_id=request_id or new_request_id()
            )
        )

    async def import_object(
        self,
        policy: str,
        key: str,
        *,
        digest: str = "",
        lineage: revision_service_pb2.Lineage | None = None,
        request_id: str | None = None,
    ) -> revision_service_pb2.Revision:
        """Publish the adapter in an object below ``tenants/{tenant}/imports/``: an archive, or weights with their
        ``adapter_config.json`` beside them. ``digest`` may be empty where the store has it recorded."""
        blob = common_pb2.BlobRef(digest=digest) if digest else None
        return await self._import(
            exporter_service_pb2.ImportRevisionRequest(
                policy=policy,
                object=exporter_service_pb2.ImportObject(key=key, blob=blob),
                lineage=lineage,
                request_id=request_id or new_request_id(),
            )
        )

    async def export_peft(self, revision: str, folder: Path, *, layout: str = "") -> None:
        """Bring a revision to ``folder`` as PEFT reads it; the folder appears only whole, each file with its digest.

        Raises :class:`AlreadyExists` if there is such a folder, :class:`InvalidArgument` if it cannot be made.
        """
        request = exporter_service_pb2.ExportPeftRequest(revision=revision, layout=layout)
        responses: Any = stream(self._stub.ExportPeft, request, timeout_s=_STREAM_TIMEOUT_S)
        async with contextlib.aclosing(responses):
            await write_peft_folder(responses, folder)

    async def diff(self, revision: str, other: str) -> exporter_service_pb2.DiffRevisionsResponse:
        """Compare two revisions of a tenant: configuration, and delta W module by module."""
        request = exporter_service_pb2.DiffRevisionsRequest(revision=revision, other=other)
        response: exporter_service_pb2.DiffRevisionsResponse = await call(
            self._stub.DiffRevisions, request, timeout_s=self._timeout_s
        )
        return response

    async def _import(self, request: exporter_service_pb2.ImportRevisionRequest) -> revision_service_pb2.Revision:
        return (await call(self._stub.ImportRevision, request, timeout_s=self._timeout_s)).revision
