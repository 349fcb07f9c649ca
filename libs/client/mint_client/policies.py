"""Policy records: one at a time, many at a time, and any number over one stream."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from google.protobuf import field_mask_pb2

from mint_api.v1 import common_pb2, policy_service_pb2, policy_service_pb2_grpc, revision_service_pb2
from mint_client._calling import Connection, new_request_id, pages
from mint_core.channel import call, stream
from mint_core.errors import MintError
from mint_core.status import error_from_status

__all__ = ["ImportedPolicy", "Policies"]

_MAX_BATCH_BYTES = 2 * 1024 * 1024
"""Of one message of an import; gRPC takes 4 MiB."""


@dataclass(frozen=True, slots=True)
class ImportedPolicy:
    """What became of one request of an import."""

    request: policy_service_pb2.CreatePolicyRequest
    error: MintError | None
    """None: the policy was created."""


class Policies:
    """Policy records."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s

    async def _call(self, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        return await call(method, request, timeout_s=self._timeout_s if timeout_s is None else timeout_s)

    @property
    def _stub(self) -> Any:
        return self._connection.stub(policy_service_pb2_grpc.PolicyServiceStub)

    async def create(
        self,
        tenant: str,
        policy_id: str,
        *,
        base_model: str,
        lora: common_pb2.LoraConfig | None = None,
        labels: Mapping[str, str] | None = None,
        owner: str = "",
        description: str = "",
        quota: policy_service_pb2.PolicyQuota | None = None,
        revisions: Sequence[revision_service_pb2.Revision] = (),
        aliases: Mapping[str, int] | None = None,
        request_id: str | None = None,
    ) -> policy_service_pb2.Policy:
        """Create ``tenants/{tenant}/policies/{policy_id}`` over ``base_model`` (``baseModels/…``).

        ``revisions`` are adapters whose blobs are VERIFIED already, ``aliases`` maps alias ids to positions in them,
        from 1; all is made in one transaction.
        """
        policy = policy_service_pb2.Policy(
            base_model=base_model, lora=lora, labels=labels, owner=owner, description=description, quota=quota
        )
        request = policy_service_pb2.CreatePolicyRequest(
            parent=f"tenants/{tenant}",
            policy_id=policy_id,
            policy=policy,
            request_id=request_id or new_request_id(),
            revisions=revisions,
            aliases=aliases,
        )
        return (await self._call(self._stub.CreatePolicy, request)).policy

    async def get(self, name: str, *, consistency: common_pb2.Consistency | None = None) -> policy_service_pb2.Policy:
        request = policy_service_pb2.GetPolicyRequest(name=name, consistency=consistency)
        return (await self._call(self._stub.GetPolicy, request)).policy

    async def update(self, policy: policy_service_pb2.Policy, fields: list[str]) -> policy_service_pb2.Policy:
        """Take ``fields`` of ``policy``; its etag, when set, guards against a change in between."""
        request = policy_service_pb2.UpdatePolicyRequest(
            policy=policy, update_mask=field_mask_pb2.FieldMask(paths=fields), request_id=new_request_id()
        )
        return (await self._call(self._stub.UpdatePolicy, request)).policy

    async def delete(self, name: str, *, etag: str = "") -> None:
        request = policy_service_pb2.DeletePolicyRequest(name=name, etag=etag, request_id=new_request_id())
        await self._call(self._stub.DeletePolicy, request)

    async def undelete(self, name: str) -> policy_service_pb2.Policy:
        """Bring a deleted policy back with its aliases, within the installation's grace period."""
        request = policy_service_pb2.UndeletePolicyRequest(name=name, request_id=new_request_id())
        return (await self._call(self._stub.UndeletePolicy, request)).policy

    async def pause(self, name: str, *, etag: str = "") -> policy_service_pb2.Policy:
        """Take no new runs and promotions; what is served goes on."""
        return await self._set_state(name, policy_service_pb2.POLICY_STATE_PAUSED, etag)

    async def resume(self, name: str, *, etag: str = "") -> policy_service_pb2.Policy:
        """Take runs and promotions again."""
        return await self._set_state(name, policy_service_pb2.POLICY_STATE_ACTIVE, etag)

    async def _set_state(self, name: str, state: Any, etag: str) -> policy_service_pb2.Policy:
        return await self.update(policy_service_pb2.Policy(name=name, state=state, etag=etag), ["state"])

    async def batch_create(
        self,
        tenant: str,
        requests: Sequence[policy_service_pb2.CreatePolicyRequest],
        *,
        timeout_s: float | None = None,
    ) -> list[MintError | None]:
        """Create up to 1000 policies of ``tenant``; the outcome of each in order, None for one that was created.

        Items without a ``request_id`` get one, so that sending the same messages again applies them once.
        """
        for request in requests:
            request.request_id = request.request_id or new_request_id()
        batch = policy_service_pb2.BatchCreatePoliciesRequest(parent=f"tenants/{tenant}", requests=requests)
        response = await self._call(self._stub.BatchCreatePolicies, batch, timeout_s)
        return [error_from_status(status) if status.code else None for status in response.statuses]

    async def import_(
        self,
        requests: AsyncIterable[policy_service_pb2.CreatePolicyRequest],
        *,
        batch_size: int = 500,
    ) -> AsyncGenerator[ImportedPolicy, None]:
        """Create any number of policies, of any tenants (each request's ``parent``), over one stream.

        ``requests`` is read as fast as the catalog takes them; what it raises is raised after the outcomes of all that
        came before. Outcomes come as batches are done, in no order. An
        outcome of ``Unavailable`` leaves open whether the policy was created; the request has a ``request_id`` then,
        so it may be sent again.
        """
        sent: dict[int, policy_service_pb2.BatchCreatePoliciesRequest] = {}
        failures: list[Exception] = []
        sequences = itertools.count(1)

        async def messages() -> AsyncIterator[policy_service_pb2.ImportPoliciesRequest]:
            # gRPC would turn what a request iterator raises into a cancellation: it is kept and raised by the reader.
            try:
                async for batch in _batches(requests, batch_size):
                    sequence = next(sequences)
                    sent[sequence] = batch
                    yield policy_service_pb2.ImportPoliciesRequest(sequence=sequence, batch=batch)
            except Exception as error:  # noqa: BLE001 - whatever the caller's iterator raises goes back to the caller
                failures.append(error)

        answers = stream(self._stub.ImportPolicies, messages(), timeout_s=None)
        async with contextlib.aclosing(cast("AsyncGenerator[Any, None]", answers)) as responses:
            async for response in responses:
                batch = sent.pop(response.sequence)
                for request, status in zip(batch.requests, response.result.statuses, strict=True):
                    yield ImportedPolicy(request, error_from_status(status) if status.code else None)
        if failures:
            raise failures[0]

    def list(
        self,
        tenant: str,
        *,
        restriction: str = "",
        order_by: str = "",
        page_size: int = 0,
    ) -> AsyncIterator[policy_service_pb2.Policy]:
        """All policies of ``tenant`` ("-" for all tenants) that meet ``restriction`` (the request's filter).

        They are read at one catalog revision.
        """

        async def read(token: str) -> Any:
            request = policy_service_pb2.ListPoliciesRequest(
                parent=f"tenants/{tenant}", page_size=page_size, page_token=token, filter=restriction, order_by=order_by
            )
            return await self._call(self._stub.ListPolicies, request)

        return pages(read, "policies")


async def _batches(
    requests: AsyncIterable[policy_service_pb2.CreatePolicyRequest], size: int
) -> AsyncIterator[policy_service_pb2.BatchCreatePoliciesRequest]:
    """Requests of one parent together, in their order, each with a request id."""
    batch, num_bytes = policy_service_pb2.BatchCreatePoliciesRequest(), 0
    try:
        async for request in requests:
            num_bytes += request.ByteSize()
            full = len(batch.requests) == size or num_bytes > _MAX_BATCH_BYTES
            if batch.requests and (full or request.parent != batch.parent):
                yield batch
                batch, num_bytes = policy_service_pb2.BatchCreatePoliciesRequest(), request.ByteSize()
            batch.parent = request.parent
            batch.requests.add().CopyFrom(request)
            batch.requests[-1].request_id = request.request_id or new_request_id()
    except Exception:  # whatever it is, what was read before it is sent
        if batch.requests:
            yield batch
        raise
    if batch.requests:
        yield batch
