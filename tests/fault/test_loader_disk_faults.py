"""A node's disk that loses bits or has no room left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mint_api.runtime.v1 import loader_service_pb2 as pb
from mint_blobs import blob_key
from mint_core.errors import ResourceExhausted
from mint_loader.adapters import verify_adapter
from support.loader_node import Materials, Node, running_node
from support.serving_adapters import make_serving_adapter
from support.weed import WeedServer

FLIPS = {
    "length of the header": ("adapter_model.safetensors", 0),
    "header": ("adapter_model.safetensors", 40),
    "weights": ("adapter_model.safetensors", -1),
    "configuration": ("adapter_config.json", 60),
}


@pytest.fixture
async def node(tmp_path: Path, loader_weed: WeedServer, loader_materials: Materials) -> AsyncIterator[Node]:
    async with running_node(tmp_path, loader_weed, loader_materials) as node:
        yield node


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x04
    path.write_bytes(data)


async def test_one_flipped_bit_on_the_disk_of_a_running_loader_costs_one_fetch(node: Node) -> None:
    await node.start()
    good, bad = await node.adapter(0), await node.adapter(1)
    for ref in (good, bad):
        await node.ensure(ref, pb.TIER_DISK)
    entry = node.cache / bad.blob.digest.removeprefix("sha256:")
    for number, (name, (file, at)) in enumerate(FLIPS.items()):
        flip(entry / file, at)
        num_misses = (await node.status()).num_misses
        answers = await asyncio.gather(*(node.ensure(bad, pb.TIER_DISK) for _ in range(10)))
        assert pb.TIER_STORE in {answer.found_at for answer in answers}, name
        assert (await node.status()).num_misses == num_misses + 1, "one fetch for all"
        assert verify_adapter(entry, bad.blob.digest)
        assert len(list((node.cache / ".quarantine").iterdir())) == number + 1
        assert (await node.ensure(good, pb.TIER_DISK)).found_at == pb.TIER_DISK
    assert (await node.ensure(bad)).found_at == pb.TIER_DISK
    assert set(node.engine.loaded) == {bad.blob.digest}
    assert sum("quarantine" in str(line["message"]) for line in node.log) == len(FLIPS)


@contextlib.asynccontextmanager
async def small_disk(folder: Path, size_kib: int) -> AsyncIterator[None]:
    """A tmpfs of that size at ``folder``."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    folder.mkdir()
    if await run("mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(folder)) != 0:
        pytest.skip("this machine may not mount a tmpfs")
    try:
        yield
    finally:
        await run("umount", "-l", str(folder))
        shutil.rmtree(folder, ignore_errors=True)


async def run(*command: str) -> int:
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    return await process.wait()


async def test_a_disk_smaller_than_the_bound_is_a_smaller_cache(node: Node) -> None:
    refs = [await node.adapter(number) for number in range(6)]
    room_kib = int(3.5 * refs[0].blob.size_bytes / 1024) + 64
    async with small_disk(node.cache, room_kib):
        await node.start(max_cache_bytes=10**9)
        for ref in (*refs, *reversed(refs)):
            await node.ensure(ref, pb.TIER_DISK)
        status = await node.status()
        assert 1 <= status.num_cached <= 4
        assert status.num_evictions >= 4
        assert status.cache_bytes < room_kib * 1024


async def test_a_disk_that_others_fill_is_told_and_needs_no_restart(node: Node, tmp_path: Path) -> None:
    first, second = await node.adapter(0), await node.adapter(1)
    made = make_serving_adapter(node.materials.base, tmp_path / "folders", tmp_path / "blobs", seed=70, rank=8)
    larger = node.ref(made.digest, made.blob.stat().st_size, blob_key("acme", made.digest, "stage-1"))
    await node.store.put_file(larger.object_key, made.blob, digest=made.digest)
    async with small_disk(node.cache, 1024):
        await node.start(max_cache_bytes=10**9)
        await node.ensure(first)
        stranger = node.cache / "stranger"
        with contextlib.suppress(OSError), stranger.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        # One of the same size takes the place of the first.
        assert (await node.ensure(second)).found_at == pb.TIER_STORE
        assert (await node.status()).num_cached == 1
        for _ in range(2):
            with pytest.raises(ResourceExhausted, match="make room on that disk") as caught:
                await node.ensure(larger)
            assert caught.value.retry_after_s is not None
            # What the engine holds needs no disk.
            assert (await node.ensure(first)).found_at == pb.TIER_HOST
        stranger.unlink()
        assert (await node.ensure(larger)).found_at == pb.TIER_STORE
        assert set(node.engine.loaded) == {ref.blob.digest for ref in (first, second, larger)}
