"""The exporter is killed at each of its failpoints, and in the midst of an upload in parts: there is nothing, or one
revision, and the repeated call ends with exactly one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import mint_exporter.app  # noqa: F401 - declares all failpoints
from mint_api.runtime.v1 import exporter_service_pb2
from mint_client._calling import new_request_id
from mint_core import failpoints
from mint_core.errors import Unavailable
from support.adapters import dense_shapes
from support.etcd import EtcdServer, running_etcd
from support.exporter_house import PART_BYTES, House, exporter_house
from support.fault_proxy import Faults
from support.peft_archives import peft_archive
from support.weed import WeedServer, running_weed

pytestmark = pytest.mark.asyncio(loop_scope="module")

# In the order an export passes them, then those that only an import has.
STEPS = tuple(
    f"exporter.{each}" for each in ("fetched", "packed", "staged", "uploaded", "read_back", "verified", "published")
)
IMPORT_STEPS = ("exporter.import.fetched", "exporter.import.extracted")


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with running_etcd() as server:
        yield server


@pytest.fixture(scope="module")
def weed() -> Iterator[WeedServer]:
    with running_weed() as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(etcd: EtcdServer, weed: WeedServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with exporter_house(tmp_path_factory.mktemp("house"), etcd, weed) as made:
        yield made


async def test_the_matrix_is_the_registry() -> None:
    known = {each.name for each in failpoints.declared() if each.name.startswith("exporter.")}
    assert known == {*STEPS, *IMPORT_STEPS}


@pytest.mark.timeout(360)
async def test_killed_at_every_step_and_repeated(house: House, tmp_path: Path) -> None:
    matrix = [
        *((point, _export) for point in STEPS),
        *((point, _import) for point in IMPORT_STEPS),
        # The trainer has uploaded it.
        *((point, _export_stored) for point in STEPS if point != "exporter.uploaded"),
    ]
    repeat: Callable[[], Awaitable[str]] | None = None
    for number, (point, make) in enumerate(matrix):
        # The repetition of the blow before passes the next point once, but for the first of its kind. So one start of
        # the process serves both.
        nth = 2 if number and make is matrix[number - 1][1] else 1
        house.exporter.stop(kill=False)
        await house.exporter.start(MINT_FAILPOINTS=f"{point}=kill@{nth}")
        if repeat is not None:
            await house.check(await repeat(), [1])
        policy, call = await make(house, tmp_path, number)
        blow = asyncio.create_task(call())
        assert await house.exporter.exit_status() == -9, point
        with pytest.raises(Unavailable):
            await blow
        await house.check(policy, [1] if point == "exporter.published" else [])

        async def again(call: Callable[[], Awaitable[Any]] = call, policy: str = policy) -> str:
            assert house.left_on_disk() == []
            assert (await call()).revision.number == 1
            return policy

        repeat = again
    await house.exporter.start()
    assert repeat is not None
    await house.check(await repeat(), [1])


async def _export(house: House, folder: Path, seed: int) -> tuple[str, Callable[[], Awaitable[Any]]]:
    policy = await house.policy()
    fence = await house.lease(policy)
    state = await house.save(folder, policy, fence, seed=seed)
    request = exporter_service_pb2.ExportRequest(policy=policy, training_state=state, fence=fence)
    return policy, lambda: house.once("Export", request)


async def _export_stored(house: House, folder: Path, seed: int) -> tuple[str, Callable[[], Awaitable[Any]]]:
    policy = await house.policy()
    fence = await house.lease(policy)
    # Another seed than any of _export's: equal bytes would be verified already.
    state = await house.save_for_export(folder, policy, fence, seed=1000 + seed)
    request = exporter_service_pb2.ExportRequest(policy=policy, training_state=state, fence=fence)
    return policy, lambda: house.once("Export", request)


async def _import(house: House, folder: Path, seed: int) -> tuple[str, Callable[[], Awaitable[Any]]]:
    policy = await house.policy()
    path = folder / f"{seed}.tar.gz"
    path.write_bytes(peft_archive(folder / str(seed), dense_shapes(), seed=seed))
    archive = await house.client.blobs.upload("acme", path)
    request = exporter_service_pb2.ImportRevisionRequest(policy=policy, archive=archive, request_id=new_request_id())
    return policy, lambda: house.once("ImportRevision", request)


@pytest.mark.timeout(120)
async def test_killed_in_the_midst_of_an_upload_in_parts(house: House, tmp_path: Path) -> None:
    policy = await house.policy()
    fence = await house.lease(policy)
    large = {f"model.layers.0.self_attn.{name}_proj": (40_000, 40_000) for name in "qkvo"}
    state = await house.save(tmp_path, policy, fence, seed=99, shapes=large, rank=16)
    assert state.weights.size_bytes > 3 * PART_BYTES
    request = exporter_service_pb2.ExportRequest(policy=policy, training_state=state, fence=fence)
    house.proxy.faults = Faults(stall_after_bytes=0, only="partNumber=3")
    export = asyncio.create_task(house.once("Export", request))
    for _ in range(1500):
        if house.proxy.num_afflicted:
            break
        await asyncio.sleep(0.02)
    house.exporter.stop()
    house.proxy.heal()
    with pytest.raises(Unavailable):
        await export
    # Nothing of it can be seen, but the parts take up space.
    assert len(await house.part_uploads()) == 1
    await house.check(policy, [])
    await house.exporter.start()
    assert house.left_on_disk() == []
    assert (await house.once("Export", request)).revision.number == 1
    await house.check(policy, [1])
    # The repetition does not touch what another exporter might be uploading; garbage collection gives it back.
    assert len(await house.part_uploads()) == 1
    await house.collect_garbage()
    assert await house.part_uploads() == []
    await house.check(policy, [1])
