"""A policy's quota: bounds of what may be kept under it, checked by whatever would add to it.

Every check belongs to a draft that compares the policy's head, so that two that would go over a bound together cannot.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from mint_catalog.model.records import Policy, RevisionState
from mint_catalog.model.tables import Tables
from mint_catalog.storage.draft import Draft
from mint_catalog.storage.paging import scan_family, stretches_below
from mint_catalog.storage.store import KeyValue, Store, prefix_end
from mint_catalog.work.waiting import Waiting
from mint_core.errors import ResourceExhausted
from mint_core.names import BaseModelName, RunName

__all__ = ["check_open_runs", "check_revisions"]

_CHUNK = 100


def _exhausted(head: Policy, what: str, field: str, bound: int) -> ResourceExhausted:
    return ResourceExhausted(
        f"{head.name} has {bound} {what}, as many as its quota allows; remove one, or raise policy.quota.{field}",
        metadata={"resource": str(head.name), "quota": field, "bound": str(bound)},
    )


async def check_revisions(store: Store, tables: Tables, head: Policy) -> None:
    """Raise ``ResourceExhausted`` unless the policy may have one revision more. The caller's draft bumps ``head``."""
    bound = head.quota.max_revisions if head.quota else 0
    if not bound:
        return
    prefix = tables.keys.revisions(head.name)
    if await store.count(prefix, prefix_end(prefix)) < bound:
        return  # deleted ones and those of a former policy of the name included
    num_kept = 0
    async for stretch in stretches_below(store, prefix, "", revision=0, limit=_CHUNK, sharded=False):
        revisions = map(tables.codecs.revision.decode, stretch.values)
        num_kept += sum(
            revision.policy_uid == head.uid and revision.state is not RevisionState.DELETED for revision in revisions
        )
    if num_kept >= bound:
        raise _exhausted(head, "revisions", "max_revisions", bound)


async def check_open_runs(store: Store, tables: Tables, draft: Draft, head: Policy) -> None:
    """Raise ``ResourceExhausted`` unless the policy may have one open run more; ``draft`` has fetched the head.

    With a quota the draft bumps the head, so that runs are created one after the other.
    """
    bound = head.quota.max_open_runs if head.quota else 0
    if not bound:
        return
    draft.touch(tables.policy(head.name))
    found: set[RunName] = set()
    async for run in _open_runs(store, tables, head):
        found.add(run)
        if len(found) >= bound:
            raise _exhausted(head, "open runs", "max_open_runs", bound)


async def _open_runs(store: Store, tables: Tables, head: Policy) -> AsyncIterator[RunName]:
    """Runs of the policy that wait in a lane, wait for a time, or are claimed."""
    keys, base, name = tables.keys, BaseModelName.parse(head.base_model), head.name
    async for lane in _keys_below(store, keys.lanes(base)):
        if keys.parts(lane.key)[-1] == name.tenant:
            async for entry in _keys_below(store, keys.lane_entries(lane.key)):
                waiting = Waiting.of(keys, entry)
                if waiting.policy == name:
                    yield waiting.run
    async for entry in _keys_below(store, keys.delays(base)):
        run, policy_id = keys.run_name(entry.key), entry.value.decode().split(" ")[2].partition("/")[0]
        if run.tenant == name.tenant and policy_id == name.policy:
            yield run
    async for stretch in scan_family(store, keys, "claims", tenant=name.tenant, limit=_CHUNK, keys_only=True):
        claimed = [tables.run(keys.run_name(kv.key)) for kv in stretch.values]
        values = (await store.get([ref.key for ref in claimed])).values if claimed else ()
        for ref, kv in zip(claimed, values, strict=True):
            run_record = ref.codec.decode(kv) if kv else None
            if run_record is not None and run_record.policy == str(name) and run_record.policy_uid == head.uid:
                yield run_record.name


async def _keys_below(store: Store, prefix: bytes) -> AsyncIterator[KeyValue]:
    async for stretch in stretches_below(store, prefix, "", revision=0, limit=_CHUNK, sharded=False):
        for kv in stretch.values:
            yield kv
