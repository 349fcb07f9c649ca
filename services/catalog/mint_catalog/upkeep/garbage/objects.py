"""Objects that no record names: replaced uploads, superseded training states, rollout batches without a pointer.

A crash between two steps of anything that stores can leave such an object, and a run leaves all of its training
states but the last. What is younger than the grace period is never touched. Beyond that

* a blob's object goes when the blob's record names another one or is gone: a key is given out once, and written down
  before it is used;
* a training state goes when its run has ended, and neither the policy nor any of its runs names it as the latest or as
  the one it began with. States that were saved without a run belong to whoever saved them and are left alone;
* a rollout batch goes when no pointer names it.

Names are read at one revision of the catalog taken after the objects were listed. What is not named there is not named
again later: names are copied from records, or are of objects just stored.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import timedelta
from typing import Final

from mint_catalog.model.records import TrainingState
from mint_catalog.storage.paging import scan_family, tenants_of
from mint_catalog.upkeep.garbage.work import PAGE, Work, in_batches
from mint_core.names import BlobName, PolicyName

__all__ = ["delete_unnamed_objects"]

_BATCH: Final = 100
_State = tuple[str, str]
"""Policy id and run id of a training state's folder."""


async def delete_unnamed_objects(work: Work) -> None:
    """Look at every object of every tenant that the catalog knows."""
    async for tenant in _tenants(work):
        blobs: list[str] = []
        states: dict[str, list[str]] = {}
        rollouts: set[str] = set()
        num_held = 0
        async for info in work.objects.list(f"tenants/{tenant}/"):
            if not work.older_than(info.modified_at, work.grace.unreferenced_s):
                continue
            match info.key.split("/"):
                case [_, _, "blobs", _, _]:
                    blobs.append(info.key)
                case [_, _, "states", _, _, _, _]:
                    states.setdefault(info.key.rpartition("/")[0], []).append(info.key)
                    num_held += 1
                case [_, _, "rollouts", _, _, *_]:
                    rollouts.add(info.key)
                    num_held += 1
            if len(blobs) >= _BATCH:
                await _delete(work, await _unnamed_blobs(work, tenant, blobs))
                blobs = []
            if num_held >= work.chunk:
                await _delete(work, await _unnamed_rollouts(work, tenant, rollouts))
                await _delete(work, await _superseded(work, tenant, states))
                states, rollouts, num_held = {}, set(), 0
        await _delete(work, await _unnamed_blobs(work, tenant, blobs))
        await _delete(work, await _unnamed_rollouts(work, tenant, rollouts))
        await _delete(work, await _superseded(work, tenant, states))
        await _abort_part_uploads(work, tenant)


async def _tenants(work: Work) -> AsyncIterator[str]:
    """Tenants that have a blob, a policy or a run; each once, in order."""
    families = [tenants_of(work.store, work.keys, family) for family in ("blobs", "policies", "runs")]
    heads = [await anext(family, "") for family in families]
    while any(heads):
        least = min(filter(None, heads))
        yield least
        for index, family in enumerate(families):
            if heads[index] == least:
                heads[index] = await anext(family, "")


async def _delete(work: Work, keys: Iterable[str]) -> None:
    async def one(key: str) -> None:
        if not work.dry_run:
            await work.objects.delete(key)
        work.report.num_objects_deleted += 1
        work.report.example(key)

    for batch in in_batches(list(keys), _BATCH):
        await work.check_duty()
        await work.each(batch, one)


async def _unnamed_blobs(work: Work, tenant: str, object_keys: Sequence[str]) -> list[str]:
    if not object_keys:
        return []
    refs = {key: work.tables.blob(BlobName(tenant, f"sha256:{key.split('/')[3]}")) for key in object_keys}
    wanted = sorted({ref.key for ref in refs.values()})
    found = await work.store.get(wanted)
    named = {work.tables.codecs.blob.decode(kv).object_key if kv is not None else None for kv in found.values}
    return [key for key in object_keys if key not in named]


async def _unnamed_rollouts(work: Work, tenant: str, object_keys: set[str]) -> set[str]:
    if object_keys:
        codec = work.tables.codecs.rollout
        async for stretch in scan_family(work.store, work.keys, "rollouts", tenant=tenant, limit=PAGE):
            object_keys -= {codec.decode(kv).object_key for kv in stretch.values}
    return object_keys


async def _superseded(work: Work, tenant: str, folders: dict[str, list[str]]) -> list[str]:
    """Objects of the folders that hold a training state of an ended run, named by nothing any more."""
    if not folders:
        return []
    owners: dict[str, _State] = {folder: (folder.split("/")[3], folder.split("/")[4]) for folder in folders}
    revision = (await work.store.get([work.keys.tick])).revision
    uids, named = await _heads(work, tenant, sorted({policy for policy, _ in owners.values()}), revision)
    wanted, ended = set(owners.values()), set()
    async for stretch in scan_family(work.store, work.keys, "runs", tenant=tenant, revision=revision, limit=PAGE):
        for kv in stretch.values:
            run = work.tables.codecs.run.decode(kv)
            policy = PolicyName.parse(run.policy).policy
            if policy not in uids:
                continue
            if run.state.ended and (policy, run.name.run) in wanted:
                ended.add((policy, run.name.run))
            if uids[policy] == run.policy_uid or not run.state.ended:
                named |= _folders(run.initial_training_state) | _folders(run.latest_training_state)
    return [key for folder, keys in folders.items() if owners[folder] in ended and folder not in named for key in keys]


async def _heads(work: Work, tenant: str, policies: list[str], revision: int) -> tuple[dict[str, str], set[str]]:
    """The uid of each policy, empty for one that is purged, and the folders that the heads name."""
    uids = dict.fromkeys(policies, "")
    named: set[str] = set()
    codec = work.tables.codecs.policy
    for batch in in_batches(policies, _BATCH):
        keys = [work.keys.policy(PolicyName(tenant, policy)) for policy in batch]
        for policy, kv in zip(batch, (await work.store.get(keys, revision=revision)).values, strict=True):
            if kv is not None:
                head = codec.decode(kv)
                uids[policy] = head.uid
                named |= _folders(head.latest_training_state)
    return uids, named


def _folders(state: TrainingState | None) -> set[str]:
    if state is None:
        return set()
    return {key.rpartition("/")[0] for key in (state.weights_key, state.optimizer_key) if key}


async def _abort_part_uploads(work: Work, tenant: str) -> None:
    before = work.started_at - timedelta(seconds=work.grace.unreferenced_s)
    async for upload in work.objects.list_part_uploads(f"tenants/{tenant}/"):
        if upload.started_at < before:
            if not work.dry_run:
                await work.objects.abort_part_upload(upload)
            work.report.num_part_uploads_aborted += 1
            work.report.example(upload.key)
