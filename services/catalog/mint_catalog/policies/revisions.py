"""Adapter revisions: publication, reading, retirement, deletion.

Publish is one transaction: the fence is valid, the head is unchanged, the blob is VERIFIED and its record is touched.
It allocates the number, and is idempotent by (policy, run, step) and by request id.

A deleted revision keeps its record: number and digest stay known for ever, everything else about it is gone for
readers, and its blob is no longer held by it. (run, step) of a deleted revision is not published again.
"""

from __future__ import annotations

from dataclasses import replace

from mint_catalog.model.checks import (
    check_lineage,
    check_lora,
    check_range,
    check_signature,
    check_text,
    live_policy,
    not_found,
)
from mint_catalog.model.records import (
    Alias,
    BlobRef,
    Fence,
    Lineage,
    Policy,
    Published,
    Revision,
    RevisionState,
    check_etag,
    now,
)
from mint_catalog.model.tables import Tables
from mint_catalog.policies.blobs import release_blob, verified_blob
from mint_catalog.policies.quota import check_revisions
from mint_catalog.storage.draft import Answer, Draft, Transactions, Written
from mint_catalog.storage.paging import Page, check_revision, list_page
from mint_catalog.storage.requests import Request
from mint_catalog.storage.store import Store, prefix_end
from mint_catalog.work.leases import require_fence
from mint_core import failpoints
from mint_core.errors import AlreadyExists, BaseModelMismatch, InvalidArgument, LeaseHeld, WrongState
from mint_core.names import BlobName, PolicyName, RevisionName, check_digest

__all__ = ["Revisions", "own_digest", "own_revision"]

_MAX_ALIASES = 1000

_BEFORE = failpoints.declare("catalog.publish.before", "the blob is verified, the revision is not published yet")
_AFTER = failpoints.declare("catalog.publish.after", "the revision is published, the answer is not sent yet")


def own_revision(revision: Revision | None, head: Policy, name: RevisionName) -> Revision:
    """The revision, unless it is absent or belongs to an earlier policy of the same name."""
    if revision is None or revision.policy_uid != head.uid or revision.state is RevisionState.DELETED:
        raise not_found(name)
    return revision


async def own_digest(draft: Draft, tables: Tables, head: Policy, name: RevisionName, said: str, *, field: str) -> str:
    """Digest of one of the policy's revisions; what the caller ``said`` it is may be empty but not another.

    A digest never changes, so it is not compared on commit. Raises ``NotFound``, ``InvalidArgument``.
    """
    ref = tables.revision(name)
    await draft.fetch(ref, compare=False)
    revision = own_revision(draft.get(ref), head, name)
    digest = revision.blob.digest if revision.blob else ""
    if said not in ("", digest):
        raise InvalidArgument(f"{field} is {said[:80]!r}: {name} has {digest}", field=field)
    return digest


class Revisions:
    """Publish, read, list and retire revisions."""

    def __init__(self, store: Store, tables: Tables) -> None:
        self._store = store
        self._tables = tables
        self._transactions = Transactions(store, tables.keys)

    async def publish(
        self,
        policy: PolicyName,
        wanted: Revision,
        fence: Fence | None,
        *,
        unfenced: bool = False,
        request: Request | None = None,
    ) -> Written[Revision]:
        """Publish a verified blob as the policy's next revision.

        Raises ``InvalidArgument``, ``NotFound``, ``AlreadyExists`` ((run, step) has another digest), ``LeaseLost``,
        ``LeaseHeld`` (unfenced while somebody trains), ``BlobMissing``, ``BaseModelMismatch``, ``ResourceExhausted``
        (quota), ``RequestIdReused``.
        """
        blob, lineage = wanted.blob or BlobRef(), wanted.lineage or Lineage()
        blob_name = BlobName(policy.tenant, check_digest(blob.digest, field="revision.blob.digest"))
        run = check_lineage(policy, lineage, field="revision.lineage")
        lora = check_lora(wanted.lora, field="revision.lora")
        check_range(wanted.num_tensors, field="revision.num_tensors", least=0)
        check_text(wanted.layout, field="revision.layout", max_chars=64)
        signature = check_signature(wanted.signature, field="revision.signature") if wanted.signature else None
        _check_proof(fence, unfenced)
        tables = self._tables
        head_ref, lease_ref, blob_ref = tables.policy(policy), tables.lease(policy), tables.blob(blob_name)
        published_ref = tables.published(policy, run.run, lineage.step) if run else None

        async def body(draft: Draft) -> Answer[Revision]:
            await draft.fetch(head_ref, lease_ref, blob_ref, *([published_ref] if published_ref else []))
            head = live_policy(draft.get(head_ref), policy)
            published = draft.get(published_ref) if published_ref else None
            if published is not None and published.blob is not None and published.blob.digest == blob.digest:
                # A retry, maybe after the lease was given back: nothing is written, so the fence does not matter.
                return await self._published(draft, head, published.number)
            if fence is not None:
                require_fence(draft, lease_ref, policy, fence)
            elif draft.get(lease_ref) is not None:
                raise LeaseHeld(
                    f"{policy} is leased: publish with the holder's fence, or when the lease has ended",
                    metadata={"resource": str(policy)},
                )
            if published is not None:
                raise _other_digest(head, published, blob)
            record = verified_blob(draft.get(blob_ref), blob_name)
            _check_fits(wanted, head, record.blob or BlobRef())
            await check_revisions(self._store, self._tables, head)
            number = head.next_revision_number
            name = RevisionName(policy.tenant, policy.policy, number)
            revision = Revision(
                name=name,
                number=number,
                policy_uid=head.uid,
                blob=record.blob,
                base_digest=head.base_digest,
                lora=lora,
                num_tensors=wanted.num_tensors,
                layout=wanted.layout,
                lineage=wanted.lineage,
                state=RevisionState.READY,
                publish_time=now(),
                object_key=record.object_key,
                signature=signature,
            )
            draft.put(head_ref, replace(head, next_revision_number=number + 1, update_time=revision.publish_time))
            draft.hold(blob_ref)  # publications of one blob do not conflict; a condemnation under way loses
            if published_ref is not None:
                draft.put(published_ref, Published(number, record.blob))
            await _BEFORE.reached()
            return draft.put(tables.revision(name), revision)

        written = await self._transactions.run(body, tables.codecs.revision, request)
        await _AFTER.reached()
        return written

    async def _published(self, draft: Draft, head: Policy, number: int) -> Answer[Revision]:
        name = RevisionName(head.name.tenant, head.name.policy, number)
        ref = self._tables.revision(name)
        await draft.fetch(ref)
        revision = draft.get(ref)
        if revision is not None and revision.state is RevisionState.DELETED:
            raise not_found(name, "this run and step was published as it, and it was deleted; publish a later step")
        return Answer(ref, own_revision(revision, head, name))

    async def get(self, name: RevisionName, *, min_revision: int = 0) -> Revision:
        """Read one revision. Raises ``NotFound``."""
        return (await self.read(name, min_revision=min_revision))[1]

    async def read(self, name: RevisionName, *, min_revision: int = 0) -> tuple[Policy, Revision, int]:
        """The head, the revision, and the catalog revision both were read at. Raises ``NotFound``."""
        head_ref, ref = self._tables.policy(name.parent), self._tables.revision(name)
        result = await self._store.get([head_ref.key, ref.key])
        check_revision(result.revision, min_revision)
        head_kv, kv = result.values
        head = live_policy(head_ref.codec.decode(head_kv) if head_kv else None, name.parent)
        return head, own_revision(ref.codec.decode(kv) if kv else None, head, name), result.revision

    async def list(self, policy: PolicyName, *, page_size: int, page_token: str) -> Page[Revision]:
        """One page of a policy's revisions, oldest first. Raises ``NotFound``, ``RevisionCompacted``."""
        ref = self._tables.policy(policy)
        kv = (await self._store.get([ref.key])).values[0]
        head = live_policy(ref.codec.decode(kv) if kv else None, policy)
        return await list_page(
            self._store,
            self._tables.keys.revisions(policy),
            self._tables.codecs.revision,
            bound=f"revisions\0{policy}\0{head.uid}",
            page_size=page_size,
            page_token=page_token,
            keep=lambda revision: revision.policy_uid == head.uid and revision.state is not RevisionState.DELETED,
        )

    async def retire(self, name: RevisionName, etag: str = "", request: Request | None = None) -> Written[Revision]:
        """Forbid new promotions of a revision.

        Raises ``NotFound``, ``EtagMismatch``, ``WrongState`` (not READY), ``RequestIdReused``.
        """
        head_ref, ref = self._tables.policy(name.parent), self._tables.revision(name)

        async def body(draft: Draft) -> Answer[Revision]:
            await draft.fetch(head_ref, ref)
            head = live_policy(draft.get(head_ref), name.parent)
            revision = own_revision(draft.get(ref), head, name)
            check_etag(etag, revision.mod_revision, resource=name)
            if revision.state is not RevisionState.READY:
                raise WrongState(
                    f"{name} is {revision.state.name}: only a READY revision can be retired",
                    metadata={"resource": str(name), "state": revision.state.name},
                )
            draft.touch(head_ref)
            return draft.put(ref, replace(revision, state=RevisionState.RETIRED))

        return await self._transactions.run(body, self._tables.codecs.revision, request)

    async def delete(self, name: RevisionName, etag: str = "", request: Request | None = None) -> int:
        """Delete a retired revision that no alias names; returns the catalog revision.

        Raises ``NotFound``, ``EtagMismatch``, ``WrongState`` (not RETIRED, or named by an alias as its target, its
        canary or in its history), ``RequestIdReused``.
        """
        tables = self._tables
        head_ref, ref = tables.policy(name.parent), tables.revision(name)
        aliases = tables.keys.aliases(name.parent)

        async def body(draft: Draft) -> Answer[Revision]:
            await draft.fetch(head_ref, ref)
            head = live_policy(draft.get(head_ref), name.parent)
            revision = own_revision(draft.get(ref), head, name)
            check_etag(etag, revision.mod_revision, resource=name)
            if revision.state is not RevisionState.RETIRED:
                raise WrongState(
                    f"{name} is {revision.state.name}: retire it before it is deleted",
                    metadata={"resource": str(name), "state": revision.state.name},
                )
            # Whatever moves an alias bumps the head, so this scan is as good as compared.
            for kv in (await self._store.scan(aliases, prefix_end(aliases), limit=_MAX_ALIASES)).values:
                _check_unnamed(tables.codecs.alias.decode(kv), name)
            if revision.blob is not None:
                blob = BlobName(name.tenant, revision.blob.digest)
                await draft.fetch(tables.blob(blob))
                release_blob(draft, tables, blob)
            draft.touch(head_ref)
            return draft.put(ref, replace(revision, state=RevisionState.DELETED))

        return (await self._transactions.run(body, tables.codecs.revision, request)).catalog_revision


def _check_unnamed(alias: Alias, name: RevisionName) -> None:
    """Raise ``WrongState`` if the alias needs the revision."""
    canary = alias.canary.target if alias.canary else None
    # A canary that was taken back is nothing to roll back to.
    moves = [entry.target for entry in alias.history if not entry.rolled_back_canary]
    why = ""
    if alias.active is not None and alias.active.revision_number == name.number:
        why = "points at it: promote another revision or delete the alias first"
    elif canary is not None and canary.revision_number == name.number:
        why = "has it as its canary: clear the canary first"
    elif any(target is not None and target.revision_number == name.number for target in moves):
        why = "has it in its history, where a rollback may need it: move the alias on, or delete it"
    if why:
        raise WrongState(
            f"{name} cannot be deleted: {alias.name} {why}",
            metadata={"resource": str(name), "alias": str(alias.name)},
        )


def _other_digest(head: Policy, published: Published, blob: BlobRef) -> AlreadyExists:
    name = RevisionName(head.name.tenant, head.name.policy, published.number)
    known = published.blob.digest if published.blob else ""
    return AlreadyExists(
        f"this run and step was published as {name} with digest {known}, not {blob.digest}: one step has one adapter",
        metadata={"resource": str(name), "digest": known},
    )


def _check_proof(fence: Fence | None, unfenced: bool) -> None:
    if fence is None and not unfenced:
        raise InvalidArgument("fence is missing: pass the fence of the policy's lease, or set unfenced", field="fence")
    if fence is not None and unfenced:
        raise InvalidArgument("fence and unfenced exclude each other: leave one out", field="unfenced")


def _check_fits(wanted: Revision, head: Policy, stored: BlobRef) -> None:
    if wanted.base_digest != head.base_digest:
        raise BaseModelMismatch(
            f"the adapter fits base {wanted.base_digest!r}, {head.name} has base {head.base_digest}: export it for "
            "this base or publish it on another policy",
            metadata={"expected": head.base_digest, "actual": wanted.base_digest},
        )
    size = wanted.blob.size_bytes if wanted.blob else 0
    if size and size != stored.size_bytes:
        raise InvalidArgument(
            f"revision.blob.size_bytes is {size}: the verified blob has {stored.size_bytes}",
            field="revision.blob.size_bytes",
        )
