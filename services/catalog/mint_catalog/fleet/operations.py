"""Verbs over many policies: what is asked for and what came of it. :mod:`mint_catalog.fleet.work` does the work."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Final

from mint_catalog.model.checks import check_text, not_found
from mint_catalog.model.fleet_records import (
    FleetOperation,
    FleetPromote,
    FleetResult,
    FleetRollback,
    FleetState,
    FleetVerb,
)
from mint_catalog.model.records import now
from mint_catalog.model.tables import Tables
from mint_catalog.policies import policy_filter
from mint_catalog.storage.draft import Answer, Draft, Transactions, Written
from mint_catalog.storage.paging import Page, list_page
from mint_catalog.storage.requests import Request
from mint_catalog.storage.store import Store
from mint_core.errors import AlreadyExists, InvalidArgument, WrongState
from mint_core.names import FleetOperationName, TenantName, check_id

__all__ = ["SELECTED", "SELECTING", "Fleet"]

SELECTING: Final = b"selecting"
"""Value of an open operation's key while its policies are being selected; nothing was tried yet."""
SELECTED: Final = b"selected"
_MAX_REASON: Final = 900


class Fleet:
    """Create, read, list and cancel fleet operations."""

    def __init__(self, store: Store, tables: Tables) -> None:
        self._store = store
        self._tables = tables
        self._keys = tables.keys
        self._transactions = Transactions(store, tables.keys)

    async def create(
        self,
        tenant: TenantName,
        operation_id: str,
        wanted: FleetOperation,
        principal: str,
        request: Request | None = None,
    ) -> Written[FleetOperation]:
        """Begin an operation; without an id the catalog chooses one.

        Raises ``InvalidArgument``, ``AlreadyExists``, ``RequestIdReused``.
        """
        policy_filter.parse(wanted.filter)
        check_text(wanted.reason, field="fleet_operation.reason", max_chars=_MAX_REASON)
        _check_verb(wanted.verb)
        chosen = check_id(operation_id, field="fleet_operation_id") if operation_id else secrets.token_hex(8)
        name = FleetOperationName(tenant.tenant, chosen)
        ref = self._tables.fleet_operation(name)

        async def body(draft: Draft) -> Answer[FleetOperation]:
            await draft.fetch(ref)
            draft.reason = wanted.reason
            if draft.get(ref) is not None:
                raise AlreadyExists(f"{name} exists; choose another id", metadata={"resource": str(name)})
            operation = FleetOperation(
                name=name,
                filter=wanted.filter,
                promote=wanted.promote,
                rollback=wanted.rollback,
                pause=wanted.pause,
                resume=wanted.resume,
                reason=wanted.reason,
                state=FleetState.RUNNING,
                principal=principal,
                create_time=now(),
                catalog_revision=draft.revision,
            )
            draft.put_bytes(self._keys.fleet_open(name), SELECTING)
            return draft.put(ref, operation)

        return await self._transactions.run(body, self._tables.codecs.fleet_operation, request)

    async def get(self, name: FleetOperationName) -> FleetOperation:
        """Read an operation. Raises ``NotFound``."""
        ref = self._tables.fleet_operation(name)
        kv = (await self._store.get([ref.key])).values[0]
        if kv is None:
            raise not_found(name)
        return ref.codec.decode(kv)

    async def list(self, tenant: TenantName, *, page_size: int, page_token: str) -> Page[FleetOperation]:
        """One page of a tenant's operations. Raises ``InvalidArgument``, ``RevisionCompacted``."""
        return await list_page(
            self._store,
            self._keys.family("fleet", tenant.tenant),
            self._tables.codecs.fleet_operation,
            bound=f"fleet\0{tenant.tenant}",
            page_size=page_size,
            page_token=page_token,
        )

    async def results(
        self, name: FleetOperationName, *, page_size: int, page_token: str, failed_only: bool
    ) -> Page[FleetResult]:
        """One page of the items tried so far. Raises ``InvalidArgument``, ``NotFound``, ``RevisionCompacted``."""
        await self.get(name)
        return await list_page(
            self._store,
            self._keys.fleet_results(name),
            self._tables.codecs.fleet_result,
            bound=f"fleetResults\0{name}\0{failed_only}",
            page_size=page_size,
            page_token=page_token,
            sharded=True,
            keep=(lambda result: result.error is not None) if failed_only else None,
        )

    async def cancel(self, name: FleetOperationName, reason: str) -> Written[FleetOperation]:
        """Stop an operation after the items under way. Raises ``InvalidArgument``, ``NotFound``, ``WrongState``."""
        check_text(reason, field="reason", max_chars=_MAX_REASON)
        ref = self._tables.fleet_operation(name)

        async def body(draft: Draft) -> Answer[FleetOperation]:
            await draft.fetch(ref)
            draft.reason = reason
            operation = draft.get(ref)
            if operation is None:
                raise not_found(name)
            if operation.state is FleetState.CANCELLED:
                return Answer(ref, operation)
            if operation.state is not FleetState.RUNNING:
                raise WrongState(
                    f"{name} is {operation.state.name}: only a RUNNING one can be cancelled",
                    metadata={"resource": str(name), "state": operation.state.name},
                )
            return draft.put(ref, replace(operation, state=FleetState.CANCELLED, end_time=now()))

        return await self._transactions.run(body, self._tables.codecs.fleet_operation)


def _check_verb(verb: FleetVerb | None) -> None:
    if verb is None:
        raise InvalidArgument(
            "fleet_operation has no verb: set promote, rollback, pause or resume", field="fleet_operation"
        )
    if isinstance(verb, FleetPromote | FleetRollback):
        kind = "promote" if isinstance(verb, FleetPromote) else "rollback"
        check_id(verb.alias, field=f"fleet_operation.{kind}.alias")
