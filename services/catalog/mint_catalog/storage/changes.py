"""Streams of what happened to policies, revisions, aliases, runs and leases."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, Protocol, TypeVar

from mint_catalog.model.records import Alias, Holder, Policy, PolicyState, Revision, RevisionState
from mint_catalog.model.run_records import Run
from mint_catalog.model.tables import RecordCodec, Tables
from mint_catalog.storage.store import Change, KeyValue, Store, prefix_end
from mint_catalog.storage.store import Revision as StoreRevision
from mint_catalog.work.leases import lease_lost
from mint_catalog.work.runs import Runs
from mint_core.errors import InvalidArgument, NotFound, RevisionCompacted
from mint_core.names import PolicyName, ResourceName, RunName, TenantName

__all__ = ["Changes", "Event", "EventType"]

R = TypeVar("R")


class EventType(IntEnum):
    PUT = 1
    DELETE = 2
    BOOKMARK = 3


@dataclass(frozen=True, slots=True)
class Event(Generic[R]):
    """One event, or a bookmark: nothing else happened up to ``catalog_revision``."""

    type: EventType
    catalog_revision: int
    record: R | None = None
    """The record, of a PUT."""
    name: ResourceName | None = None
    """Its name, of a PUT or DELETE."""


class Feed(Protocol):
    """Where changes come from."""

    def subscribe(self, start: bytes, end: bytes, *, after: int) -> AsyncGenerator[StoreRevision, None]:
        """Every revision after ``after`` that changes the range; one without changes is a bookmark."""
        ...


class Changes:
    """Turns the store's changes into events of records."""

    def __init__(self, store: Store, tables: Tables, feed: Feed, runs: Runs) -> None:
        self._store = store
        self._tables = tables
        self._feed = feed
        self._runs = runs

    async def policies(self, tenant: TenantName, *, after: int) -> AsyncGenerator[Event[Policy], None]:
        """Changes of a tenant's policies after a revision; 0 means from now. Raises ``RevisionCompacted``."""
        keys = self._tables.keys
        events = self._events(
            keys.family("policies", tenant.tenant),
            self._tables.codecs.policy,
            keys.policy_name,
            lambda policy: policy.state is PolicyState.DELETED,
            after,
        )
        async with contextlib.aclosing(events):
            async for event in events:
                yield event

    async def revisions(self, parent: str, *, after: int) -> AsyncGenerator[Event[Revision], None]:
        """Publications and state changes of one policy, one tenant or (``tenants/-``) all.

        Raises ``InvalidArgument``, ``RevisionCompacted``.
        """
        keys = self._tables.keys
        events = self._events(
            self._below("revisions", parent),
            self._tables.codecs.revision,
            keys.revision_name,
            lambda revision: revision.state is RevisionState.DELETED,
            after,
        )
        async with contextlib.aclosing(events):
            async for event in events:
                yield event

    async def aliases(self, parent: str, *, after: int) -> AsyncGenerator[Event[Alias], None]:
        """Moves of the aliases of one policy, one tenant or (``tenants/-``) all.

        Raises ``InvalidArgument``, ``RevisionCompacted``.
        """
        keys = self._tables.keys
        events = self._events(
            self._below("aliases", parent), self._tables.codecs.alias, keys.alias_name, lambda _: False, after
        )
        async with contextlib.aclosing(events):
            async for event in events:
                yield event

    async def run(self, name: RunName) -> AsyncGenerator[Run, None]:
        """The run as it is, then each time it changed, until it has ended. Raises ``NotFound``."""
        run, revision = await self._runs.read(name)
        yield run
        key = self._tables.keys.run(name)
        while not run.state.ended:
            try:
                feed = self._feed.subscribe(key, key + b"\0", after=revision)
                async with contextlib.aclosing(feed):
                    async for seen in feed:
                        revision = seen.revision
                        for change in seen.changes:
                            if change.deleted:
                                raise NotFound(f"{name} was deleted", metadata={"resource": str(name)})
                            run = self._tables.codecs.run.decode(_key_value(change))
                            yield run
                        if run.state.ended:
                            return
            except RevisionCompacted:
                run, revision = await self._runs.read(name)
                yield run

    async def lease(self, resource: PolicyName | RunName, token: int) -> AsyncGenerator[Holder, None]:
        """The lease as it is, then nothing until it is lost. Ends only by raising.

        Raises ``LeaseLost`` when it has ended or was superseded, ``Unavailable`` when the process stops.
        """
        ref = self._tables.lease(resource)
        is_told = False
        while True:
            result = await self._store.get([ref.key])
            kv = result.values[0]
            if kv is None or kv.create_revision != token:
                raise lease_lost(resource, token)
            if not is_told:
                is_told = True
                yield ref.codec.decode(kv)
            with contextlib.suppress(RevisionCompacted):  # looked at anew
                feed = self._feed.subscribe(ref.key, ref.key + b"\0", after=result.revision)
                async with contextlib.aclosing(feed):
                    async for seen in feed:
                        if any(change.deleted or change.create_revision != token for change in seen.changes):
                            raise lease_lost(resource, token)

    def _below(self, family: str, parent: str) -> bytes:
        """Prefix of the keys of a policy, a tenant, or all."""
        keys = self._tables.keys
        if parent == "tenants/-":
            return keys.family(family)
        if "/policies/" in parent:
            policy = PolicyName.parse(parent, field="parent")
            return keys.revisions(policy) if family == "revisions" else keys.aliases(policy)
        return keys.family(family, TenantName.parse(parent, field="parent").tenant)

    async def _events(
        self,
        prefix: bytes,
        codec: RecordCodec[R],
        name_of: Callable[[bytes], ResourceName],
        gone: Callable[[R], bool],
        after: int,
    ) -> AsyncGenerator[Event[R], None]:
        if after < 0:
            raise InvalidArgument(
                f"start_after_catalog_revision is {after}: it must not be negative; 0 means from now",
                field="start_after_catalog_revision",
            )
        head = (await self._store.get([self._tables.keys.tick])).revision
        if after > head:
            # Of before a restore, or of another installation: waiting for it would tell nothing for a long time.
            raise RevisionCompacted(
                f"start_after_catalog_revision is {after}: this catalog is at {head}, it was restored from a backup or "
                "is another one; list again and watch from there"
            )
        if after == 0:
            after = head
            # Tells the caller from where it watches, before anything happens.
            yield Event(EventType.BOOKMARK, after)
        feed = self._feed.subscribe(prefix, prefix_end(prefix), after=after)
        async with contextlib.aclosing(feed):
            async for seen in feed:
                for change in seen.changes:
                    name = name_of(change.key)
                    record = None if change.deleted else codec.decode(_key_value(change))
                    if record is None or gone(record):
                        yield Event(EventType.DELETE, seen.revision, None, name)
                    else:
                        yield Event(EventType.PUT, seen.revision, record, name)
                if not seen.changes:
                    yield Event(EventType.BOOKMARK, seen.revision)


def _key_value(change: Change) -> KeyValue:
    return KeyValue(change.key, change.value, change.create_revision, change.mod_revision)
