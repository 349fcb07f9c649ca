"""Policies past their undelete grace period, removed for good.

First the head becomes a tombstone without uid, or goes away if no revision was ever published, and a ``purges/`` key
says what is left to remove; both in one transaction that compares the head, so an undelete comes before it or finds
nothing. From then on the policy cannot come back, and the rest is removed step by step, each of which may be repeated:
revisions, whose blobs begin their own grace period then, what was published, evaluations, graves, rollouts. The key
goes last. A policy that was made again under the name leaves such a key for its predecessor.
"""

from __future__ import annotations

from typing import Final

from mint_catalog.model.records import Policy, PolicyState, Revision
from mint_catalog.policies.blobs import release_blob
from mint_catalog.storage.draft import Answer, Draft
from mint_catalog.storage.store import Delete
from mint_catalog.upkeep.garbage.rollouts import delete_rollouts
from mint_catalog.upkeep.garbage.work import Work, in_batches
from mint_core.errors import WrongState
from mint_core.names import BlobName, PolicyName, RevisionName

__all__ = ["purge_policies"]

_BATCH: Final = 30
"""Revisions removed in one transaction, with a write to the blob of each."""


async def purge_policies(work: Work) -> None:
    """Begin the removal of policies that cannot be undeleted any more, and finish all that were begun."""
    async for page in work.walk(work.keys.family("policies")):
        for kv in page:
            head = work.tables.codecs.policy.decode(kv)
            if head.state is PolicyState.DELETED and head.uid and _is_over(work, head):
                await _begin(work, head)
    async for page in work.walk(work.keys.family("purges")):
        for kv in page:
            name, uid = work.keys.purged(kv.key)
            if not work.dry_run:
                try:
                    await _finish(work, name, uid, int(kv.value))
                except WrongState:  # the tenant is being erased, which removes the rest
                    continue
                await work.commit([work.unchanged(kv)], [Delete(kv.key)])


def _is_over(work: Work, head: Policy) -> bool:
    return work.older_than(head.delete_time, work.grace.undelete_s)


async def _begin(work: Work, seen: Policy) -> None:
    ref = work.tables.policy(seen.name)
    begun = False

    async def body(draft: Draft) -> Answer[Policy]:
        nonlocal begun
        await draft.fetch(ref)
        head = draft.get(ref)
        begun = head is not None and head.uid == seen.uid and head.state is PolicyState.DELETED
        if head is None or not begun:
            return Answer(ref, None)
        draft.reason = "the time in which it could be undeleted is over"
        draft.put_bytes(work.keys.purge(seen.name, seen.uid), str(head.next_revision_number).encode())
        if head.next_revision_number == 1:
            return draft.delete(ref)
        tombstone = Policy(
            seen.name,
            state=PolicyState.DELETED,
            next_revision_number=head.next_revision_number,
            delete_time=head.delete_time,
        )
        draft.put(ref, tombstone)
        return Answer(ref, None)

    if not work.dry_run:
        try:
            await work.transact(body, work.tables.codecs.policy)
        except WrongState:  # the tenant is being erased
            return
        if not begun:
            return
    work.report.num_policies_purged += 1
    work.report.example(seen.name)


async def _finish(work: Work, name: PolicyName, uid: str, next_number: int) -> None:
    keys = work.keys
    async for page in work.walk(keys.revisions(name)):
        revisions = [work.tables.codecs.revision.decode(kv) for kv in page]
        for batch in in_batches([each for each in revisions if each.policy_uid == uid], _BATCH):
            await _remove(work, [each.name for each in batch], uid)
        if revisions[-1].number >= next_number:
            break
    async for page in work.walk(keys.published_by(name)):
        # Numbers go on over all policies of one name, so what has a lower one was published on this one or before it.
        old = [kv for kv in page if work.tables.codecs.published.decode(kv).number < next_number]
        for some in in_batches(old, 100):
            await work.commit([work.unchanged(kv) for kv in some], [Delete(kv.key) for kv in some])
    await work.delete_below(keys.evaluations(name, uid))
    await work.delete_below(keys.graves(name, uid))
    async for page in work.walk(keys.rollouts(name, uid)):
        await delete_rollouts(work, page)


async def _remove(work: Work, names: list[RevisionName], uid: str) -> None:
    """Remove revisions in one transaction, after which their blobs are no longer held by them."""
    tables = work.tables
    refs = [tables.revision(name) for name in names]

    async def body(draft: Draft) -> Answer[Revision]:
        draft.reason = "the policy was deleted and the time in which it could be undeleted is over"
        await draft.fetch(*refs)
        found = [revision for ref in refs if (revision := draft.get(ref)) is not None and revision.policy_uid == uid]
        digests = {revision.blob.digest for revision in found if revision.blob is not None}
        blobs = [BlobName(names[0].tenant, digest) for digest in sorted(digests)]
        if blobs:
            await draft.fetch(*map(tables.blob, blobs))
        for blob in blobs:
            release_blob(draft, tables, blob)
        for revision in found:
            draft.delete(tables.revision(revision.name))
        return Answer(refs[0], None)

    await work.transact(body, tables.codecs.revision)
