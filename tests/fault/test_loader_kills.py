"""The loader dies by SIGKILL at each of its failpoints: what is on the disk then is whole, and the next one goes on.

The list of points is the loader's own: a new one is killed at as soon as it is declared, and the test fails until its
scenario comes by it.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import mint_loader.app  # noqa: F401 - declares the points of all of its modules
from mint_api.runtime.v1 import loader_service_pb2 as pb
from mint_core import failpoints
from mint_core.errors import Unavailable
from mint_loader.adapters import verify_adapter
from support.loader_node import Materials, Node, running_node
from support.weed import WeedServer

POINTS = [point.name for point in failpoints.declared() if point.name.startswith("loader.")]
SLOT = 2.5
"""Adapters that the cache has room for: two, and what a fill reserves beyond its blob."""


@pytest.fixture
async def node(tmp_path: Path, loader_weed: WeedServer, loader_materials: Materials) -> AsyncIterator[Node]:
    async with running_node(tmp_path, loader_weed, loader_materials) as node:
        yield node


async def scenario(node: Node, refs: list[pb.AdapterRef]) -> None:
    """To the disk, to the engine, and once more than fits; every failpoint is passed at least once."""
    await node.ensure(refs[0], pb.TIER_DISK)
    await node.ensure(refs[1])
    await node.ensure(refs[2])


def whole_entries(node: Node) -> set[str]:
    """Digests of what stands under a name; each must be whole."""
    found = set()
    for path in node.cache.glob("[0-9a-f]*"):
        digest = f"sha256:{path.name}"
        assert sorted(each.name for each in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        assert verify_adapter(path, digest)
        found.add(digest)
    return found


async def killed_at(node: Node, point: str, nth: int) -> None:
    refs = [await node.adapter(number) for number in range(3)]
    max_cache_bytes = int(SLOT * refs[0].blob.size_bytes) + 20_000
    await node.start(failpoints=f"{point}=kill@{nth}", max_cache_bytes=max_cache_bytes)
    with pytest.raises(Unavailable):
        await scenario(node, refs)
    assert await node.died() == -signal.SIGKILL
    found = whole_entries(node)
    assert set(node.engine.loaded) <= {ref.blob.digest for ref in refs}

    await node.start(max_cache_bytes=max_cache_bytes)
    status = await node.status()
    assert node.names() == sorted(digest.removeprefix("sha256:") for digest in found), "leftovers were not swept"
    assert (status.num_cached, status.cache_bytes <= max_cache_bytes) == (len(found), True)
    for ref in refs:
        if ref.blob.digest in found:  # it is verified, not fetched again
            num_misses = (await node.status()).num_misses
            assert (await node.ensure(ref, pb.TIER_DISK)).found_at == pb.TIER_DISK
            assert (await node.status()).num_misses == num_misses
            break
    for ref in refs:
        await node.ensure(ref)
    assert set(node.engine.loaded) == {ref.blob.digest for ref in refs}
    assert whole_entries(node) <= set(node.engine.loaded)


@pytest.mark.parametrize("point", POINTS)
async def test_killed_at_every_point_it_leaves_whole_adapters_and_the_next_goes_on(node: Node, point: str) -> None:
    await killed_at(node, point, 1)


@pytest.mark.motion
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("nth", [2, 3])
async def test_killed_at_a_later_passing(node: Node, point: str, nth: int) -> None:
    if nth == 3 and point in ("loader.evicting", "loader.loading", "loader.loaded"):
        pytest.skip("passed twice or less")
    if nth == 2 and point == "loader.evicting":
        pytest.skip("passed once")
    await killed_at(node, point, nth)


def test_the_points_are_known() -> None:
    assert len(POINTS) >= 6
