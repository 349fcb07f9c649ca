from __future__ import annotations

from dataclasses import replace

import pytest
from unit.catalog.catalog_lab import BASE, BASE_DIGEST, Lab

from mint_catalog.model.records import EngineReplica, EngineReplicaState, Numerics
from mint_core.errors import (
    BaseModelMismatch,
    InvalidArgument,
    LeaseHeld,
    LeaseLost,
    NotFound,
)
from mint_core.names import BaseModelName, EngineReplicaName

E1 = EngineReplicaName("e1")
REPLICA = EngineReplica(
    E1, "127.0.0.1:1", str(BASE), Numerics(BASE_DIGEST, "float32"), 4, 2, 64, 2048, EngineReplicaState.READY
)


async def _lab() -> Lab:
    lab = Lab()
    await lab.base_model()
    return lab


async def test_a_replica_lives_as_long_as_it_renews() -> None:
    lab = await _lab()
    token = await lab.registry.register(REPLICA, "process-1", 10)
    registered = await lab.registry.get(E1)
    assert registered.register_time is not None
    assert (await lab.registry.list(None))[0] == [registered]
    await lab.store.pass_time(8)
    await lab.registry.renew(E1, token, EngineReplicaState.DRAINING)
    await lab.store.pass_time(8)
    await lab.registry.renew(E1, token, EngineReplicaState.UNSPECIFIED)
    assert (await lab.registry.get(E1)).state is EngineReplicaState.DRAINING
    await lab.store.pass_time(11)
    with pytest.raises(NotFound):
        await lab.registry.get(E1)
    with pytest.raises(LeaseLost):
        await lab.registry.renew(E1, token, EngineReplicaState.READY)
    assert (await lab.registry.list(None))[0] == []


async def test_the_same_process_renews_and_another_one_waits() -> None:
    lab = await _lab()
    token = await lab.registry.register(REPLICA, "process-1", 10)
    moved = replace(REPLICA, address="127.0.0.1:9")
    assert await lab.registry.register(moved, "process-1", 10) == token
    assert (await lab.registry.get(E1)).address == "127.0.0.1:9"
    with pytest.raises(LeaseHeld):
        await lab.registry.register(REPLICA, "process-2", 10)
    await lab.store.pass_time(11)
    assert await lab.registry.register(REPLICA, "process-2", 10) > token
    with pytest.raises(LeaseLost):
        await lab.registry.renew(E1, token, EngineReplicaState.READY)


async def test_deregistration_is_by_the_holder() -> None:
    lab = await _lab()
    token = await lab.registry.register(REPLICA, "process-1", 10)
    await lab.registry.deregister(E1, token + 1)
    await lab.registry.get(E1)
    await lab.registry.deregister(E1, token)
    await lab.registry.deregister(E1, token)
    assert await lab.registry.register(REPLICA, "process-2", 10) > token


async def test_a_foreign_base_is_refused() -> None:
    lab = await _lab()
    foreign = replace(REPLICA, numerics=Numerics("sha256:" + "c" * 64))
    with pytest.raises(BaseModelMismatch) as caught:
        await lab.registry.register(foreign, "process-1", 10)
    assert caught.value.metadata["expected"] == BASE_DIGEST
    with pytest.raises(NotFound):
        await lab.registry.register(replace(REPLICA, base_model="baseModels/none"), "process-1", 10)
    with pytest.raises(InvalidArgument):
        await lab.registry.register(replace(REPLICA, address=""), "process-1", 10)
    with pytest.raises(InvalidArgument):
        await lab.registry.register(REPLICA, "x", 10)


async def test_replicas_are_listed_by_base() -> None:
    lab = await _lab()
    await lab.registry.register(REPLICA, "process-1", 10)
    assert len((await lab.registry.list(BASE))[0]) == 1
    assert (await lab.registry.list(BaseModelName("other")))[0] == []
