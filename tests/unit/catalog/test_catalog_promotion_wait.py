"""Promotions that wait until engine replicas hold the adapter."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from unit.catalog.catalog_lab import BASE, BASE_DIGEST, Lab, digest_of

from mint_catalog.model.records import (
    Alias,
    BaseModel,
    EngineReplica,
    EngineReplicaState,
    Gate,
    GateCondition,
    Numerics,
)
from mint_catalog.serving import residency as residency_room
from mint_catalog.serving.aliases import Aliases, Edit, Move
from mint_catalog.serving.registry import Registry
from mint_catalog.serving.residency import Residency
from mint_catalog.storage.requests import Request
from mint_catalog.storage.store import prefix_end
from mint_core import calls
from mint_core.errors import (
    DeadlineExceeded,
    EtagMismatch,
    GateNotMet,
    InvalidArgument,
    MintError,
    NotFound,
    ResourceExhausted,
    Unavailable,
    WrongState,
)
from mint_core.names import AliasName, BaseModelName, EngineReplicaName, RevisionName

LIVE = AliasName("acme", "tone", "live")
DIGEST = digest_of("bytes 2")
REPLICA = EngineReplica(
    EngineReplicaName("e0"), "127.0.0.1:1", str(BASE), Numerics(BASE_DIGEST), 4, 2, 64, 2048, EngineReplicaState.READY
)


class WaitLab(Lab):
    """Two revisions, ``live`` points at the first; replicas e1 and e2 are registered."""

    async def begin(self) -> WaitLab:
        self.residency = Residency(self.store, self.tables)
        self.aliases = Aliases(self.store, self.tables, self.residency)
        await self.policy()
        for number in (1, 2):
            await self.publish(f"bytes {number}")
        await self.promote(1)
        self.tokens = {name: await self.register(name) for name in ("e1", "e2")}
        return self

    async def register(self, name: str, **changes: object) -> int:
        replica = replace(REPLICA, name=EngineReplicaName(name), **changes)  # type: ignore[arg-type]
        return await self.registry.register(replica, f"process-{name}", 10)

    async def renew(
        self, name: str, *held: str, state: EngineReplicaState = EngineReplicaState.UNSPECIFIED
    ) -> list[str]:
        wanted = await self.registry.renew(EngineReplicaName(name), self.tokens[name], state, held)
        self.residency.look()
        return wanted.digests

    def waiting(self, num_replicas: int = 1, timeout_s: float = 5.0, **changes: object) -> Move:
        move = self.move(2)
        fields = {"min_resident_replicas": num_replicas, "residency_timeout_s": timeout_s} | changes
        return replace(move, **fields)  # type: ignore[arg-type]

    @contextlib.asynccontextmanager
    async def promoting(self, move: Move) -> AsyncIterator[asyncio.Task[Alias]]:
        """A promotion whose wish is written."""

        async def promote() -> Alias:
            return (await self.aliases.promote(move)).record

        task = asyncio.create_task(promote())
        async with asyncio.timeout(5):
            while not await self.num_keys("wishes"):
                assert not task.done(), task.exception()
        yield task
        if not task.done():
            task.cancel()
            await asyncio.wait([task])

    async def num_keys(self, family: str) -> int:
        prefix = self.keys.family(family)
        return int(await self.store.count(prefix, prefix_end(prefix)))

    async def is_clean(self) -> bool:
        return await self.num_keys("wishes") == await self.num_keys("holdings") == 0

    async def active(self) -> int:
        alias = await self.aliases.get(LIVE)
        assert alias.active is not None
        return alias.active.revision_number


async def test_it_moves_when_enough_replicas_hold_it() -> None:
    lab = await WaitLab().begin()
    assert await lab.renew("e1") == []
    async with lab.promoting(lab.waiting(2)) as task:
        assert await lab.renew("e1") == await lab.renew("e2") == [DIGEST]
        assert await lab.renew("e1", DIGEST) == [DIGEST]
        await asyncio.sleep(0.02)
        assert not task.done()
        assert await lab.active() == 1
        await lab.renew("e2", DIGEST)
        moved = await task
    assert moved.active is not None
    assert moved.active.revision_number == 2
    assert await lab.is_clean()
    assert await lab.renew("e1") == []


async def test_too_few_in_time_change_nothing() -> None:
    lab = await WaitLab().begin()
    async with lab.promoting(lab.waiting(2, 0.1)) as task:
        await lab.renew("e1", DIGEST)
        with pytest.raises(DeadlineExceeded) as missed:
            await task
    assert missed.value.metadata["num_holding"] == "1"
    assert "wanted are 2" in missed.value.message
    assert await lab.active() == 1
    assert await lab.is_clean()


async def test_the_calls_own_deadline_ends_the_wait_with_an_answer() -> None:
    lab = await WaitLab().begin()
    with calls.inbound_call("ada", 0.2), pytest.raises(DeadlineExceeded) as missed:
        async with asyncio.timeout(0.2):
            await lab.aliases.promote(lab.waiting(1, 3600.0))
    assert "nothing was changed" in missed.value.message
    assert await lab.is_clean()


@pytest.mark.parametrize("state", [EngineReplicaState.DRAINING, EngineReplicaState.SICK])
async def test_only_ready_replicas_count(state: EngineReplicaState) -> None:
    lab = await WaitLab().begin()
    async with lab.promoting(lab.waiting(1, 0.1)) as task:
        await lab.renew("e1", DIGEST, state=state)
        with pytest.raises(DeadlineExceeded):
            await task


async def test_a_replica_that_lost_it_again_or_is_gone_does_not_count() -> None:
    lab = await WaitLab().begin()
    async with lab.promoting(lab.waiting(2, 0.2)) as task:
        await lab.renew("e1", DIGEST)
        await lab.renew("e1")
        await lab.renew("e2", DIGEST)
        await lab.registry.deregister(EngineReplicaName("e2"), lab.tokens["e2"])
        lab.tokens["e2"] = await lab.register("e2")  # another life, which begins empty
        with pytest.raises(DeadlineExceeded) as missed:
            await task
    assert missed.value.metadata["num_holding"] == "0"


async def test_replicas_of_another_base_are_not_asked() -> None:
    lab = await WaitLab().begin()
    other = BaseModelName("other")
    await lab.base_models.register(BaseModel(other, digest=digest_of("other"), size_bytes=1))
    lab.tokens["e3"] = await lab.register("e3", base_model=str(other), numerics=Numerics(digest_of("other")))
    async with lab.promoting(lab.waiting()):
        assert await lab.renew("e3", DIGEST) == []
        assert await lab.num_keys("holdings") == 0


async def test_as_many_nodes_are_told_to_load_as_are_waited_for() -> None:
    lab = await WaitLab().begin()
    names = [f"n{number}" for number in range(6)]
    for name in names:
        lab.tokens[name] = await lab.register(name, loader_address="127.0.0.1:2")
    drained = EngineReplicaState.DRAINING
    async with lab.promoting(lab.waiting(2)) as task:
        revision = await lab.revisions.get(RevisionName("acme", "tone", 2))

        async def told(names: list[str], registry: Registry) -> list[str]:
            found = []
            for name in names:
                engine = EngineReplicaName(name)
                wants = await registry.renew(engine, lab.tokens[name], EngineReplicaState.UNSPECIFIED)
                assert wants.digests == [DIGEST]
                for wanted in wants.to_load:
                    assert (wanted.tenant, wanted.blob, wanted.object_key, wanted.base_digest) == (
                        "tenants/acme",
                        revision.blob,
                        revision.object_key,
                        BASE_DIGEST,
                    )
                    found.append(name)
            return found

        chosen = await told([*names, "e1", "e2"], lab.registry)
        assert len(chosen) == 2, "and none of those without a loader"
        other_catalog = Registry(lab.store, lab.tables)
        assert await told(names, other_catalog) == chosen
        await lab.renew(chosen[0], state=drained)
        again = await told(names, Registry(lab.store, lab.tables))
        assert chosen[0] not in again
        assert len(again) == 2
        for name in again:
            wants = await lab.registry.renew(EngineReplicaName(name), lab.tokens[name], drained, [DIGEST])
            assert wants.to_load == [], "it holds it already"
        task.cancel()


async def test_digests_that_nobody_wants_are_not_kept() -> None:
    lab = await WaitLab().begin()
    async with lab.promoting(lab.waiting()):
        await lab.renew("e1", digest_of("bytes 1"), "nonsense")
        assert await lab.num_keys("holdings") == 0


async def test_two_may_wait_for_the_same() -> None:
    lab = await WaitLab().begin()
    other = lab.waiting(1, name=AliasName("acme", "tone", "other"))
    async with lab.promoting(lab.waiting(1)) as one, lab.promoting(other) as two:
        while await lab.num_keys("wishes") < 2:  # noqa: ASYNC110 - written by another task
            await asyncio.sleep(0)
        assert await lab.renew("e1", DIGEST) == [DIGEST]
        await asyncio.gather(one, two)
    assert await lab.is_clean()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"min_resident_replicas": -1}, InvalidArgument),
        ({"min_resident_replicas": 1001}, InvalidArgument),
        ({"residency_timeout_s": -1.0}, InvalidArgument),
        ({"residency_timeout_s": 3600.1}, InvalidArgument),
        ({"residency_timeout_s": float("nan")}, InvalidArgument),
        ({"revision_number": 9}, NotFound),
        ({"etag": "1"}, EtagMismatch),
        ({"reason": "x" * 1025}, InvalidArgument),
    ],
)
async def test_what_can_be_refused_is_refused_before_the_wait(
    changes: dict[str, object], error: type[MintError]
) -> None:
    lab = await WaitLab().begin()
    async with asyncio.timeout(1):
        with pytest.raises(error):
            await lab.aliases.promote(replace(lab.waiting(1, 60.0), **changes))  # type: ignore[arg-type]
    assert await lab.is_clean()


async def test_a_gate_is_asked_before_the_wait() -> None:
    lab = await WaitLab().begin()
    await lab.aliases.set_gate(Edit(LIVE), Gate((GateCondition("exact", "score"),)))
    async with asyncio.timeout(1):
        with pytest.raises(GateNotMet):
            await lab.aliases.promote(lab.waiting(1, 60.0))


async def test_what_points_there_already_waits_for_nobody() -> None:
    lab = await WaitLab().begin()
    async with asyncio.timeout(1):
        await lab.aliases.promote(replace(lab.waiting(2, 60.0), revision_number=1))


async def test_a_retry_of_what_was_answered_waits_for_nobody() -> None:
    lab = await WaitLab().begin()
    request_id = "0b6a7a33-6a0e-4d5e-9f6a-0f8f8d0c7a11"
    request = Request.of(tenant="acme", principal="ada", method="PromoteAlias", request_id=request_id, payload=b"x")
    first = await lab.aliases.promote(lab.move(2), request)
    await lab.promote(1)
    async with asyncio.timeout(1):
        assert await lab.aliases.promote(lab.waiting(2, 60.0), request) == first
    assert await lab.active() == 1


async def test_a_caller_who_gives_up_takes_its_wish_along() -> None:
    lab = await WaitLab().begin()
    async with lab.promoting(lab.waiting()) as task:
        await lab.renew("e2")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await lab.is_clean()
    assert await lab.active() == 1


async def test_it_is_decided_again_after_the_wait() -> None:
    lab = await WaitLab().begin()
    etag = str((await lab.aliases.get(LIVE)).mod_revision)
    async with lab.promoting(lab.waiting(1, etag=etag)) as task:
        await lab.aliases.set_gate(Edit(LIVE), Gate((GateCondition("exact", "score"),)))
        await lab.renew("e1", DIGEST)
        with pytest.raises(EtagMismatch):
            await task
    await lab.aliases.set_gate(Edit(LIVE), None)
    async with lab.promoting(lab.waiting()) as task:
        await lab.revisions.retire(RevisionName("acme", "tone", 2))
        await lab.renew("e1", DIGEST)
        with pytest.raises(WrongState):
            await task
    assert await lab.active() == 1


async def test_a_wish_that_nobody_renews_ends_with_all_that_was_told_of_it() -> None:
    lab = await WaitLab().begin()
    async with lab.promoting(lab.waiting()):
        await lab.renew("e1", digest_of("bytes 1"))
        await lab.store.pass_time(9)
        await lab.renew("e1")
        await lab.store.pass_time(2)  # as if the catalog had died
        assert await lab.is_clean()
        assert await lab.renew("e1", DIGEST) == []


async def test_a_wish_whose_lease_ended_is_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(0, 5)
    monkeypatch.setattr(residency_room, "boottime_s", lambda: float(next(seconds)))
    lab = await WaitLab().begin()
    async with lab.promoting(lab.waiting()) as task:
        await lab.store.pass_time(9)
        lab.tokens = {name: await lab.register(name) for name in ("e1", "e2")}
        await lab.store.pass_time(2)
        assert await lab.num_keys("wishes") == 0
        lab.residency.look()
        while not await lab.num_keys("wishes"):  # noqa: ASYNC110 - written by another task
            await asyncio.sleep(0)
        await lab.renew("e1", DIGEST)
        await task


async def test_a_stopping_catalog_sends_those_who_wait_away() -> None:
    lab = await WaitLab().begin()
    async with lab.promoting(lab.waiting()) as task:
        lab.residency.close()
        with pytest.raises(Unavailable):
            await task
    assert await lab.is_clean()


async def test_not_too_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency_room, "_MAX_WAITS", 1)
    lab = await WaitLab().begin()
    async with lab.promoting(lab.waiting()) as task:
        with pytest.raises(ResourceExhausted):
            await lab.aliases.promote(lab.waiting(1, 60.0, name=AliasName("acme", "tone", "other")))
        await lab.renew("e1", DIGEST)
        await task
    async with lab.promoting(lab.waiting(1, name=AliasName("acme", "tone", "other"))) as task:
        await lab.renew("e1", DIGEST)
        await task
