"""Backup and restore over the in-memory store: all or nothing, and runs go on."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from unit.catalog.catalog_lab import TENANT, Lab, digest_of, rollout
from unit.catalog.garbage_lab import GarbageLab
from unit.catalog.memory_store import MemoryStore

import mint_catalog.model.keys
from mint_catalog.model.keys import TENANT_PART
from mint_catalog.model.records import BlobState
from mint_catalog.model.run_records import RunState
from mint_catalog.storage.changes import Changes
from mint_catalog.storage.duty import Duty
from mint_catalog.storage.store import Compare, Operation, Put, TxnResult, prefix_end
from mint_catalog.upkeep.backup import (
    Backup,
    BackupHeader,
    BackupPart,
    BackupRecord,
    BackupTrailer,
    held_revision,
    order_of,
)
from mint_catalog.upkeep.restore import Restore, RestoreReport
from mint_catalog.work.queue import Outcome
from mint_core.errors import DataLoss, EtagMismatch, InvalidArgument, LeaseHeld, RevisionCompacted, WrongState
from mint_core.names import AliasName, RunName

_FLEETING = ("duties/", "engineHolders/", "engines/", "holds/", "leases/", "tick")


async def _filled() -> GarbageLab:
    """A catalog with something in most families; run r1 is RUNNING, r2 waits."""
    lab = GarbageLab()
    await lab.policy()
    for number in range(1, 4):
        await lab.put(f"bytes {number}")
        await lab.publish(f"bytes {number}")
        await lab.promote(number)
    await lab.run("r1")
    await lab.run("r2")
    claim, fence = await lab.claimed()
    assert claim.run.name == RunName("acme", "r1")
    await lab.rollouts.create(rollout(), fence)
    await lab.store.txn([], [Put(lab.keys.tick, b"1")])
    return lab


def _restore(lab: Any, objects: Any = None) -> Restore:
    return Restore(lab.store, lab.tables, lab.duties, objects)


async def _parts(lab: Lab) -> list[BackupPart]:
    return [part async for part in Backup(lab.store, lab.keys).stream()]


async def _stream(parts: Sequence[BackupPart]) -> AsyncIterator[BackupPart]:
    for part in parts:
        await asyncio.sleep(0)
        yield part


async def _all(lab: Lab) -> dict[bytes, bytes]:
    prefix = lab.keys.prefix
    found = (await lab.store.scan(prefix, prefix_end(prefix), limit=100_000)).values
    return {kv.key[len(prefix) :]: kv.value for kv in found}


def _lasting(records: dict[bytes, bytes]) -> dict[bytes, bytes]:
    return {key: value for key, value in records.items() if not key.decode().startswith(_FLEETING)}


async def _restored(parts: Sequence[BackupPart], lab: GarbageLab, objects: Any = None) -> RestoreReport:
    return await _restore(lab, objects).restore(_stream(parts))


async def test_a_restored_catalog_holds_what_the_backup_was_made_of() -> None:
    lab, other = await _filled(), GarbageLab()
    parts = await _parts(lab)
    header, trailer = parts[0], parts[-1]
    assert isinstance(header, BackupHeader)
    assert isinstance(trailer, BackupTrailer)
    report = await _restored(parts, other)
    expected = _lasting(await _all(lab))
    assert _lasting(await _all(other)) == expected
    assert report.num_records == trailer.num_records == len(expected)
    assert header.catalog_revision == lab.store.revision - 2  # the hold came and went
    again = await _parts(other)
    assert again[-1] == trailer, "a backup of the restored catalog has the same digest"


async def test_records_come_in_order_and_what_is_acted_on_comes_last() -> None:
    parts = await _parts(await _filled())
    keys = [record.key for part in parts[1:-1] for record in part]  # type: ignore[union-attr]
    assert keys == sorted(keys, key=order_of)
    families = list(dict.fromkeys(key.partition(b"/")[0] for key in keys))
    assert families.index(b"runs") < families.index(b"claims") < families.index(b"queue")


async def test_the_backup_is_of_one_revision() -> None:
    lab = await _filled()
    before = _lasting(await _all(lab))
    keys: dict[bytes, bytes] = {}
    async for part in Backup(lab.store, lab.keys).stream():
        if isinstance(part, BackupHeader):
            await lab.promote(1)
            await lab.store.txn([], [Put(lab.keys.prefix + b"blobs/acme/ff", b"new")])
        elif not isinstance(part, BackupTrailer):
            keys |= {record.key: record.value for record in part}
    assert keys == before


async def test_a_running_run_goes_back_to_the_queue_and_its_worker_is_refused() -> None:
    lab, other = await _filled(), GarbageLab()
    await _restored(await _parts(lab), other)
    assert (await other.runs.get(RunName("acme", "r1"))).state is RunState.RUNNING
    assert await other.queue.reap() == 1
    run = await other.runs.get(RunName("acme", "r1"))
    assert (run.state, run.num_attempts) == (RunState.QUEUED, 1)
    claim, fence = await other.claimed("worker-7")
    await other.queue.finish(claim.run.name, fence, Outcome(RunState.SUCCEEDED))
    follower = await other.claim("worker-9")
    assert follower is not None
    assert {claim.run.name.run, follower.run.name.run} == {"r1", "r2"}


async def test_a_part_is_about_a_mebibyte() -> None:
    lab = GarbageLab()
    for number in range(40):
        await lab.store.txn([], [Put(lab.keys.prefix + f"blobs/acme/{number:02d}".encode(), b"x" * 100_000)])
    sizes = [sum(len(record.value) for record in part) for part in (await _parts(lab))[1:-1]]  # type: ignore[union-attr]
    assert len(sizes) == 4
    assert max(sizes) < 1_200_000
    assert sum(sizes) == 4_000_000


def _flip(parts: list[BackupPart]) -> list[BackupPart]:
    records = list(parts[1])  # type: ignore[arg-type]
    old = records[3]
    records[3] = BackupRecord(old.key, old.value[:-1] + bytes([old.value[-1] ^ 1]) if old.value else b"!")
    return [parts[0], records, *parts[2:]]


def _swap(parts: list[BackupPart]) -> list[BackupPart]:
    records = list(parts[1])  # type: ignore[arg-type]
    records[2], records[3] = records[3], records[2]
    return [parts[0], records, *parts[2:]]


def _foreign(parts: list[BackupPart]) -> list[BackupPart]:
    return [parts[0], [BackupRecord(b"leases/acme/policies/tone", b"")], *parts[2:]]


@pytest.mark.parametrize(
    "damage",
    [
        lambda parts: parts[:-1],
        lambda parts: [parts[0], parts[-1]],
        lambda parts: [parts[0], parts[0], *parts[1:]],
        _flip,
        _swap,
        _foreign,
    ],
    ids=["truncated", "a part missing", "second header", "a bit flipped", "out of order", "a lease"],
)
async def test_a_damaged_backup_is_taken_back(damage: Any) -> None:
    parts, other = await _parts(await _filled()), GarbageLab()
    await other.store.txn([], [Put(other.keys.tick, b"1")])
    with pytest.raises(DataLoss, match="damaged"):
        await _restored(damage(parts), other)
    assert set(await _all(other)) == {b"tick"}
    await _restored(parts, other)
    assert len(_lasting(await _all(other))) > 10


async def test_what_is_no_backup_changes_nothing() -> None:
    parts, other = await _parts(await _filled()), GarbageLab()
    header = parts[0]
    assert isinstance(header, BackupHeader)
    newer = BackupHeader(header.format + 1, header.catalog_revision, header.create_time)
    for wrong in ([], parts[1:], [newer, *parts[1:]]):
        with pytest.raises(InvalidArgument):
            await _restored(wrong, other)
        assert await _all(other) == {}


async def test_only_an_empty_catalog_is_restored_into() -> None:
    parts, other = await _parts(await _filled()), GarbageLab()
    await other.base_model()
    before = await _all(other)
    with pytest.raises(WrongState, match="not empty"):
        await _restored(parts, other)
    assert await _all(other) == before


async def test_a_restore_whose_catalog_was_killed_is_taken_back_by_the_next() -> None:
    lab, other = await _filled(), GarbageLab()
    parts = await _parts(lab)
    await other.store.txn([], [Put(other.keys.restoring, b"1"), Put(other.keys.prefix + b"policies/x/00/y", b"half")])
    with pytest.raises(WrongState, match="not through"):
        await _parts(other)
    await _restored(parts, other)
    assert _lasting(await _all(other)) == _lasting(await _all(lab))
    await _parts(other)


async def test_a_caller_that_goes_away_leaves_nothing() -> None:
    parts, other = await _parts(await _filled()), GarbageLab()

    async def stuck() -> AsyncIterator[BackupPart]:
        for part in parts[:-1]:
            yield part
        await asyncio.Event().wait()

    restoring = asyncio.create_task(_restore(other).restore(stuck()))
    async with asyncio.timeout(10):
        while True:
            if any(key.startswith(b"policies/acme") for key in await _all(other)):
                break
            await asyncio.sleep(0.001)
    restoring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await restoring
    assert await _all(other) == {}


class _LateStore(MemoryStore):
    """Its writes of records are under way until ``arrived`` is called, also when their caller has gone away."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = asyncio.Event()
        self._arrive = asyncio.Event()
        self._under_way: list[asyncio.Task[TxnResult]] = []

    async def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        if not any(isinstance(operation, Put) and b"/policies/" in operation.key for operation in operations):
            return await super().txn(compares, operations)
        writing = asyncio.create_task(self._write_late(compares, operations))
        self._under_way.append(writing)
        self.sent.set()
        return await asyncio.shield(writing)

    async def _write_late(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        await self._arrive.wait()
        return await super().txn(compares, operations)

    async def arrived(self) -> list[TxnResult]:
        self._arrive.set()
        return await asyncio.gather(*self._under_way)


async def test_a_write_that_arrives_after_it_was_taken_back_is_not_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, other = await _parts(await _filled()), GarbageLab(store=(store := _LateStore()))
    taken_back = asyncio.Event()
    let_go = asyncio.Event()
    finish = Restore._finish

    async def finish_slowly(self: Restore, duty: Duty) -> None:
        taken_back.set()  # the duty is still held, so that it alone would let the write pass
        await let_go.wait()
        await finish(self, duty)

    async def broken_off() -> AsyncIterator[BackupPart]:
        for part in parts[:-1]:
            yield part
        await store.sent.wait()

    monkeypatch.setattr(Restore, "_finish", finish_slowly)
    restoring = asyncio.create_task(_restore(other).restore(broken_off()))
    await asyncio.wait_for(taken_back.wait(), 10)
    late = await store.arrived()
    let_go.set()
    with pytest.raises(DataLoss, match="early end"):
        await restoring
    assert [result.succeeded for result in late] == [False]
    assert await _all(other) == {}


@pytest.mark.parametrize("when", ["before", "after"])
async def test_an_unknown_outcome_is_written_again(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mint_catalog.upkeep.restore._FIRST_BACKOFF_S", 0.001)
    lab, other = await _filled(), GarbageLab()
    parts = await _parts(lab)

    async def failing() -> AsyncIterator[BackupPart]:
        async for part in _stream(parts):
            if not isinstance(part, BackupHeader | BackupTrailer):
                other.store.fail_next_txn = when
            yield part

    await _restore(other).restore(failing())
    assert _lasting(await _all(other)) == _lasting(await _all(lab))


async def test_one_restore_at_a_time_and_no_garbage_collection_under_it() -> None:
    parts, other = await _parts(await _filled()), GarbageLab()
    async with other.duties.hold("gc"):
        with pytest.raises(LeaseHeld):
            await _restored(parts, other)
    assert await _all(other) == {}


async def test_blobs_that_are_missing_are_staged_and_named() -> None:
    lab, other = await _filled(), GarbageLab()
    for number in range(30):  # more than are looked up one by one
        await lab.put(f"more {number}", "acme")
    (await lab.put("shrunk"), await lab.put("gone", "beta"), await lab.put("there", "beta"))
    records = {name: record for tenant in ("acme", "beta") for name, record in (await _blobs(lab, tenant)).items()}
    gone = [name for name in records if name.endswith((digest_of("gone"), digest_of("more 3")))]
    for name in gone:
        await lab.objects.delete(records[name].object_key)
    shrunk = next(name for name in records if name.endswith(digest_of("shrunk")))
    await lab.objects.put_bytes(records[shrunk].object_key, b"short", if_absent=False)
    data = next(name for name in records if name.endswith(digest_of("{}")))  # the lab never uploads it
    report = await _restored(await _parts(lab), other, lab.objects)
    assert set(report.missing.names) == {*gone, shrunk, data}
    assert report.missing.num == 4
    assert report.missing.num_checked == len(records)
    staged = {
        name
        for tenant in ("acme", "beta")
        for name, record in (await _blobs(other, tenant)).items()
        if record.state is BlobState.STAGED
    }
    assert staged == set(report.missing.names)


async def _blobs(lab: Lab, tenant: str) -> dict[str, Any]:
    prefix = lab.keys.family("blobs", tenant)
    found = (await lab.store.scan(prefix, prefix_end(prefix), limit=1000)).values
    return {str(record.name): record for record in map(lab.codecs.blob.decode, found)}


async def test_a_backup_holds_back_compaction_and_says_when_it_could_not() -> None:
    lab = await _filled()
    assert await held_revision(lab.store, lab.keys) is None
    stream = Backup(lab.store, lab.keys).stream()
    async with contextlib.aclosing(stream):
        header = await anext(stream)
        assert isinstance(header, BackupHeader)
        assert await held_revision(lab.store, lab.keys) == header.catalog_revision
    assert await held_revision(lab.store, lab.keys) is None
    stream = Backup(lab.store, lab.keys).stream()
    async with contextlib.aclosing(stream):
        await anext(stream)
        await lab.promote(1)
        await lab.store.compact(lab.store.revision)
        with pytest.raises(RevisionCompacted):
            await anext(stream)


def test_every_family_is_known_to_backup_and_erasure() -> None:
    text = Path(mint_catalog.model.keys.__file__).read_text()
    used = set(re.findall(r'(?:self\._key|self\.family)\(\s*"(\w+)"', text))
    assert used - set(TENANT_PART) == set()
    assert len(used) > 20


async def test_watches_and_etags_from_before_are_refused() -> None:
    lab, other = await _filled(), GarbageLab()
    for _ in range(60):  # a restored catalog begins to count anew, and writes a hundred records at once
        await lab.promote(1)
        await lab.promote(2)
    old = await lab.aliases.get(AliasName("acme", "tone", "live"))
    await _restored(await _parts(lab), other)
    assert other.store.revision < lab.store.revision
    changes = Changes(other.store, other.tables, other.hub, other.runs)
    with pytest.raises(RevisionCompacted, match="restored from a backup"):
        await anext(changes.policies(TENANT, after=lab.store.revision))
    with pytest.raises(EtagMismatch):
        await other.promote(3, etag=str(old.mod_revision))
    await other.promote(3)
