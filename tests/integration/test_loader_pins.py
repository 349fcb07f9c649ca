"""Pins by the command line, over real publications and promotions; catalog, etcd, store and loader are real."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mint_api.runtime.v1 import loader_service_pb2 as pb
from mint_api.runtime.v1 import publish_service_pb2 as publish_pb
from mint_api.v1 import base_model_service_pb2, policy_service_pb2
from mint_cli.main import run
from mint_client.loaders import LoaderClient
from mint_core.errors import AdapterPinned, NotFound
from support.catalog_rig import BASE, Rig, running_catalog
from support.etcd import running_etcd
from support.loader_node import Materials, Node, make_materials, running_node
from support.weed import WeedServer, running_weed

POLICY = "tenants/acme/policies/helper"
LIVE = f"{POLICY}/aliases/live"


@pytest.fixture(scope="module")
def weed() -> Iterator[WeedServer]:
    with running_weed() as server:
        yield server


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    return make_materials(tmp_path_factory.mktemp("materials"), 3)


@dataclass
class World:
    """One node beside a catalog with one policy."""

    node: Node
    catalog: Rig
    loader: LoaderClient

    async def publish(self, number: int) -> str:
        """Store an adapter and publish it as the policy's next revision; its digest."""
        made = self.node.materials.adapters[number]
        name = f"tenants/acme/blobs/{made.digest}"
        stage = publish_pb.StageBlobRequest(name=name, size_bytes=made.blob.stat().st_size)
        key = (await self.catalog.call(self.catalog.publish.StageBlob, stage)).blob.object_key
        await self.node.store.put_file(key, made.blob, digest=made.digest)
        verify = publish_pb.VerifyBlobRequest(name=name, object_key=key)
        verified = await self.catalog.call(self.catalog.publish.VerifyBlob, verify)
        request = publish_pb.PublishRevisionRequest(parent=POLICY, unfenced=True)
        request.revision.blob.CopyFrom(verified.blob.blob)
        request.revision.base_digest = self.node.materials.base_digest
        request.revision.lora.rank = 4
        await self.catalog.call(self.catalog.publish.PublishRevision, request)
        return made.digest

    def pinned(self) -> set[str]:
        """What the engine never evicts."""
        return {each.digest for each in self.node.replica.host.residents() if each.pinned}

    async def state(self) -> pb.PinState.ValueType:
        (pin,) = await self.loader.pins()
        return pin.state


@pytest.fixture
async def world(tmp_path: Path, weed: WeedServer, materials: Materials) -> AsyncIterator[World]:
    with running_etcd(in_memory=True) as etcd:
        async with running_catalog(etcd) as catalog, running_node(tmp_path, weed, materials) as node:
            model = base_model_service_pb2.BaseModel(name=BASE, digest=materials.base_digest)
            await catalog.call(
                catalog.base_models.RegisterBaseModel, base_model_service_pb2.RegisterBaseModelRequest(base_model=model)
            )
            policy = policy_service_pb2.CreatePolicyRequest(
                parent="tenants/acme", policy_id="helper", policy=policy_service_pb2.Policy(base_model=BASE)
            )
            await catalog.call(catalog.policies.CreatePolicy, policy)
            await node.start(catalog_address=catalog.public_address, pin_poll_s=0.1)
            async with LoaderClient(node.socket) as loader:
                yield World(node, catalog, loader)


async def until(condition: Callable[[], Awaitable[Any]], within_s: float = 30) -> None:
    async with asyncio.timeout(within_s):
        while not await condition():  # noqa: ASYNC110 - other processes
            await asyncio.sleep(0.05)


async def test_a_pinned_alias_is_held_followed_and_kept_over_a_restart(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    async def mint(*arguments: str) -> Any:
        capsys.readouterr()
        assert await asyncio.to_thread(run, ["loader", *arguments, "--loader-runtime", world.node.socket]) == 0
        text = capsys.readouterr().out
        return json.loads(text) if "--json" in arguments else text

    first = await world.publish(0)
    await world.catalog.promote(POLICY, 1)
    (made,) = (await mint("pin", "acme/helper", "--end", "+1h", "--json"))["pins"]
    assert (made["alias"], made["tier"]) == (LIVE, "HOST")

    async def is_held() -> bool:
        return await world.state() == pb.PIN_STATE_HELD

    await until(is_held)
    assert world.pinned() == {first}
    with pytest.raises(AdapterPinned):
        await world.node.replica.host.unload(first)

    # A publication of a pinned policy comes to the disk, a promotion to the engine, before anybody asks.
    second = await world.publish(1)

    async def is_fetched() -> bool:
        done = [each for each in await world.loader.tickets() if each.state == pb.LOAD_TICKET_STATE_DONE]
        return second in {each.adapter.blob.digest for each in done}

    await until(is_fetched)
    assert world.pinned() == {first}
    assert (await world.loader.status()).num_prefetched == 1
    await world.catalog.promote(POLICY, 2)

    async def has_moved() -> bool:
        return world.pinned() == {second}

    await until(has_moved)
    assert (await world.loader.status()).num_misses == 2
    await world.node.replica.host.unload(first)

    await world.node.stop(signal.SIGKILL)
    await world.node.start(catalog_address=world.catalog.public_address, pin_poll_s=0.1)
    (pin,) = (await mint("pins", "--json"))["pins"]
    assert (pin["alias"], pin["adapters"][0]["blob"]["digest"]) == (LIVE, second)
    await until(is_held)
    assert "acme/helper@live" in await mint("pins")
    status = await mint("status")
    assert "disk" in status
    assert "host" in status

    await mint("unpin", "acme/helper")

    async def is_free() -> bool:
        return not world.pinned()

    await until(is_free)
    assert await world.loader.pins() == []
    with pytest.raises(NotFound, match="there is no pin of"):
        await world.loader.unpin(LIVE)
    with pytest.raises(NotFound):
        await world.loader.pin(f"{POLICY}/aliases/nobody")

    catalog = ["--catalog", world.catalog.public_address]
    (ticket,) = (await mint("prefetch", "acme/helper@1", "--tier", "host", "--json", *catalog))["load_tickets"]
    await mint("cancel", ticket["name"])
    assert ticket["name"].removeprefix("loadTickets/") in await mint("tickets", "--tenant", "acme")


async def test_a_policy_served_here_has_its_publications_on_the_disk_and_another_has_not(world: World) -> None:
    await world.publish(0)
    await world.catalog.promote(POLICY, 1)
    resolved = await world.catalog.resolve(POLICY)
    ref = pb.AdapterRef(
        tenant="tenants/acme", blob=resolved.blob, object_key=resolved.object_key, base_digest=resolved.base_digest
    )
    await world.loader.ensure_loaded(ref, tier=pb.TIER_DISK)  # by whom, nobody said
    await world.publish(1)
    await world.loader.ensure_loaded(ref, tier=pb.TIER_DISK, revision=resolved.revision)
    await asyncio.sleep(0.5)
    assert (await world.loader.status()).num_prefetched == 0
    third = await world.publish(2)

    async def is_there() -> bool:
        return third.removeprefix("sha256:") in world.node.names()

    await until(is_there)
    status = await world.loader.status()
    assert (status.num_prefetched, status.num_cached) == (1, 2)
