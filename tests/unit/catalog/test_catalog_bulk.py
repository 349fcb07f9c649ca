from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.catalog.catalog_lab import BASE, Lab, digest_of

from mint_catalog.model.audit_codec import AuditCodec
from mint_catalog.model.records import BlobRef, Policy, Revision
from mint_catalog.policies.bulk import BulkCreation, BulkResult, worked_at_once
from mint_catalog.policies.creation import NewPolicy
from mint_catalog.policies.policy_listing import PolicyQuery
from mint_catalog.storage.requests import Request
from mint_catalog.storage.store import Compare, KeyValue, Operation, Put, TxnResult
from mint_catalog.trail.audit import audited
from mint_core.errors import (
    AlreadyExists,
    BlobMissing,
    InvalidArgument,
    MintError,
    NotFound,
    RequestIdReused,
    Unavailable,
    WrongState,
)
from mint_core.names import AliasName, PolicyName, RevisionName


def item(
    number: int, blob: BlobRef | None = None, *, base: str = str(BASE), request_id: str = "", payload: bytes = b""
) -> NewPolicy:
    name = PolicyName("acme", f"p{number:04d}")
    revisions = [Revision(RevisionName("acme", name.policy, 1), blob=blob)] if blob else []
    request = Request.of(
        tenant="acme",
        principal="ada",
        method="mint.v1.CreatePolicyRequest",
        request_id=request_id,
        payload=payload or name.policy.encode(),
    )
    return NewPolicy(name, Policy(name, base_model=base), revisions, {"live": 1} if blob else {}, request)


async def create(lab: Lab, items: Sequence[NewPolicy | MintError]) -> BulkResult:
    return await BulkCreation(lab.store, lab.tables, lab.policies).create("acme", len(items), iter(items))


def kinds(result: BulkResult) -> list[type[MintError] | None]:
    return [None if error is None else type(error) for error in result.errors]


async def ready() -> Lab:
    lab = Lab()
    await lab.base_model()
    return lab


class Recording:
    """The store, with what was asked of it."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.txns: list[tuple[Sequence[Compare], Sequence[Operation]]] = []
        self.num_gets = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def get(self, keys: Sequence[bytes], *, revision: int = 0) -> Any:
        self.num_gets += 1
        return await self._store.get(keys, revision=revision)

    async def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        self.txns.append((compares, operations))
        result: TxnResult = await self._store.txn(compares, operations)
        return result


async def test_a_thousand_policies_take_few_transactions_and_fewer_reads() -> None:
    lab = await ready()
    blobs = [await lab.blob(f"w{number}") for number in range(10)]
    lab.store = store = Recording(lab.store)
    result = await create(lab, [item(number, blobs[number % 10]) for number in range(1000)])
    assert kinds(result) == [None] * 1000
    assert len(store.txns) < 35
    assert store.num_gets == 1
    assert max(len(operations) for _, operations in store.txns) <= 100
    for number in (0, 567, 999):
        policy = PolicyName("acme", f"p{number:04d}")
        assert (await lab.policies.get(policy)).next_revision_number == 2
        alias = await lab.aliases.get(AliasName("acme", policy.policy, "live"))
        assert alias.active is not None
        assert alias.active.digest == blobs[number % 10].digest
    assert lab.store.revision == result.catalog_revision


async def test_each_transaction_carries_one_audit_entry_that_tells_all_its_records() -> None:
    lab = await ready()
    blob = await lab.blob("one")
    lab.store = store = Recording(lab.store)
    await create(lab, [item(number, blob) for number in range(60)])
    assert len(store.txns) == 2
    for _, operations in store.txns:
        puts = [operation for operation in operations if isinstance(operation, Put)]
        entries = [put for put in puts if put.key.startswith(lab.keys.family("audit", "acme"))]
        assert len(entries) == 1
        entry = AuditCodec(lab.keys).decode(_kv(entries[0]))
        told = {change.key: change.after for change in entry.changes}
        assert told == {put.key: put.value for put in puts if audited(lab.keys, put.key)}


def _kv(put: Put) -> Any:
    return KeyValue(put.key, put.value, 1, 1)


async def test_every_item_has_its_own_outcome() -> None:
    lab = await ready()
    blob = await lab.blob("one")
    await lab.policy(PolicyName("acme", "p0001"))
    unread = InvalidArgument("policy_id is 'A'", field="policy_id")
    result = await create(
        lab,
        [
            item(0, blob),
            item(1, blob),
            item(2, BlobRef(digest_of("missing"), 3)),
            unread,
            item(3, base="baseModels/other"),
            item(4, base="x"),
            item(5),
            item(0, blob),
        ],
    )
    expected = [None, AlreadyExists, BlobMissing, InvalidArgument, NotFound, InvalidArgument, None, AlreadyExists]
    assert kinds(result) == expected
    assert result.errors[3] is unread
    names = {policy.name.policy for policy in (await lab.policies.list(_all())).records}
    assert names == {"p0000", "p0001", "p0005"}


def _all() -> Any:
    return PolicyQuery("acme", 1000)


async def test_of_one_name_twice_the_first_that_can_be_made_is() -> None:
    lab = await ready()
    blob = await lab.blob("one")
    result = await create(lab, [item(0, BlobRef(digest_of("missing"), 3)), item(0, blob), item(0)])
    assert kinds(result) == [BlobMissing, None, AlreadyExists]
    assert (await lab.policies.get(PolicyName("acme", "p0000"))).next_revision_number == 2


@pytest.mark.parametrize("num_items", [0, 1001])
async def test_no_item_and_too_many_are_refused(num_items: int) -> None:
    lab = await ready()
    with pytest.raises(InvalidArgument, match=f"requests has {num_items} items") as caught:
        await create(lab, [item(number) for number in range(num_items)])
    assert caught.value.field == "requests"


async def test_a_batch_sent_again_applies_once_by_its_items_request_ids() -> None:
    lab = await ready()
    blob = await lab.blob("one")
    items = [item(number, blob, request_id=str(uuid.uuid4())) for number in range(40)]
    assert kinds(await create(lab, items)) == [None] * 40
    uid = (await lab.policies.get(PolicyName("acme", "p0007"))).uid
    assert kinds(await create(lab, items)) == [None] * 40
    assert (await lab.policies.get(PolicyName("acme", "p0007"))).uid == uid
    assert items[7].request is not None
    other = item(7, blob, request_id=items[7].request.request_id, payload=b"other")
    assert kinds(await create(lab, [other, item(8, blob)])) == [RequestIdReused, AlreadyExists]
    # An id answers also after what it needed is gone.
    await lab.store.txn([], [Put(lab.keys.family("blobs", "acme") + blob.digest[7:].encode(), b"")])
    assert kinds(await create(lab, items[:2])) == [None, None]


async def test_a_transaction_of_unknown_outcome_is_unavailable_and_settled_by_the_retry() -> None:
    lab = await ready()
    items = [item(number, request_id=str(uuid.uuid4())) for number in range(10)]
    for fault in ("before", "after"):
        lab.store.fail_next_txn = fault
        assert kinds(await create(lab, items)) == [Unavailable] * 10
    assert kinds(await create(lab, items)) == [None] * 10
    assert len((await lab.policies.list(_all())).records) == 10


async def test_a_store_that_cannot_be_read_is_unavailable_for_each_item() -> None:
    class Away(Recording):
        async def get(self, keys: Sequence[bytes], *, revision: int = 0) -> Any:
            raise Unavailable("etcd did not answer a read; retry")

    lab = await ready()
    lab.store = Away(lab.store)
    result = await create(lab, [item(0), item(1, base="x")])
    assert kinds(result) == [Unavailable, InvalidArgument]
    assert result.catalog_revision == 0


async def test_a_conflict_is_settled_item_by_item() -> None:
    lab = await ready()
    blob = await lab.blob("one")
    await lab.policy(PolicyName("acme", "p0003"))
    await lab.policies.delete(PolicyName("acme", "p0003"))
    result = await create(lab, [item(number, blob) for number in range(20)])
    assert kinds(result) == [None] * 20
    assert (await lab.policies.get(PolicyName("acme", "p0003"))).next_revision_number == 2


async def test_rivals_make_each_name_once() -> None:
    lab = await ready()
    blob = await lab.blob("one")
    results = await asyncio.gather(*(create(lab, [item(number, blob) for number in range(50)]) for _ in range(4)))
    for number in range(50):
        outcomes = [kinds(result)[number] for result in results]
        assert sorted(map(str, outcomes)) == sorted(map(str, [None] + [AlreadyExists] * 3))


async def test_a_tenant_that_is_being_erased_takes_no_policies() -> None:
    lab = await ready()
    await lab.store.txn([], [Put(lab.keys.erasing("acme"), b"")])
    assert kinds(await create(lab, [item(0), item(1)])) == [WrongState, WrongState]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.sampled_from(["", "one", "two", "missing"]), st.booleans()),
        min_size=1,
        max_size=30,
    )
)
async def test_a_batch_does_what_single_creations_in_order_do(specs: list[tuple[int, str, bool]]) -> None:
    """The same outcome for each item, whatever names, blobs and ids meet in a batch."""
    labs = [await ready(), await ready()]
    ids = [str(uuid.uuid4()) for _ in range(7)]
    for lab in labs:
        await lab.blob("one")
        await lab.blob("two")
    items = [
        item(
            number,
            BlobRef(digest_of(text)) if text else None,
            request_id=ids[number] if with_id else "",
            payload=text.encode() + b".",
        )
        for number, text, with_id in specs
    ]
    together = kinds(await create(labs[0], items))
    one_by_one: list[type[MintError] | None] = []
    for each in items:
        one_by_one += kinds(await create(labs[1], [each]))
    assert together == one_by_one


async def _source(items: Iterable[int], taken: list[int]) -> AsyncIterator[int]:
    for each in items:
        taken.append(each)
        yield each


async def test_work_goes_on_at_once_and_reads_no_further_than_it_may() -> None:
    taken: list[int] = []
    gates = [asyncio.Event() for _ in range(10)]

    async def work(number: int) -> int:
        await gates[number].wait()
        return number

    answers = worked_at_once(_source(range(10), taken), work, limit=3)
    gates[1].set()
    assert await anext(answers) == 1
    first = asyncio.ensure_future(anext(answers))
    await asyncio.sleep(0.01)
    assert taken == [0, 1, 2, 3], "three under way, one answered"
    for gate in gates:
        gate.set()
    assert sorted([await first, *[answer async for answer in answers]]) == [0, 2, 3, 4, 5, 6, 7, 8, 9]


async def test_work_ends_when_nobody_wants_its_answers() -> None:
    ended: list[int] = []

    async def work(number: int) -> int:
        try:
            await asyncio.sleep(0 if number == 0 else 60)
        finally:
            ended.append(number)
        return number

    answers = worked_at_once(_source(range(10), []), work, limit=3)
    assert await anext(answers) == 0
    await asyncio.sleep(0.01)
    await answers.aclose()
    assert len(ended) >= 2
