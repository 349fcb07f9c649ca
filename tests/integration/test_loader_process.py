"""The loader's process between a real object store and the engine's servicer: killed at every step, fed bad bytes."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mint_api.runtime.v1 import loader_service_pb2 as pb
from mint_blobs import blob_key
from mint_core.channel import call
from mint_core.errors import (
    BaseModelMismatch,
    BlobCorrupt,
    DeadlineExceeded,
    InvalidArgument,
    MintError,
    NotFound,
    ResourceExhausted,
    SignatureInvalid,
    SignatureRequired,
    Unavailable,
)
from mint_core.signing import Signer
from support.loader_node import Materials, Node, make_materials, running_node
from support.weed import WeedServer, running_weed


@pytest.fixture(scope="module")
def weed() -> Iterator[WeedServer]:
    with running_weed() as server:
        yield server


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    return make_materials(tmp_path_factory.mktemp("materials"))


@pytest.fixture
async def node(tmp_path: Path, weed: WeedServer, materials: Materials) -> AsyncIterator[Node]:
    async with running_node(tmp_path, weed, materials) as node:
        yield node


async def test_store_to_disk_to_engine_and_once_for_500(node: Node) -> None:
    await node.start()
    ref = await node.adapter(0)
    answers = await asyncio.gather(*(node.ensure(ref) for _ in range(500)))
    # Those who arrived after the load was done found it in the engine; which of the 500 arrives
    # first is the scheduler's choice, so the one that came before the load may be any of them.
    found = {answer.found_at for answer in answers}
    assert pb.TIER_STORE in found
    assert found <= {pb.TIER_STORE, pb.TIER_HOST}
    assert node.engine.calls == [f"load {ref.blob.digest}"]
    status = await node.status()
    assert (status.num_misses, status.num_cached, status.bytes_fetched) == (1, 1, ref.blob.size_bytes)
    assert (await node.ensure(ref)).found_at == pb.TIER_HOST
    assert await node.stop() == 0


async def test_what_a_promotion_waits_for_is_loaded_unasked(node: Node) -> None:
    await node.start(wish_poll_s=0.1)
    ref = await node.adapter(0)
    nonsense = pb.AdapterRef(tenant="tenants/acme", object_key="elsewhere")
    node.replica.to_load[:] = [nonsense, ref]  # as the registration does when the catalog says so
    async with asyncio.timeout(20):
        while not node.replica.host.residents():  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
    assert [each.digest for each in node.replica.host.residents()] == [ref.blob.digest]
    assert node.engine.calls == [f"load {ref.blob.digest}"]


async def test_what_is_on_disk_survives_a_restart_and_needs_no_store(node: Node) -> None:
    await node.start()
    ref = await node.adapter(0)
    await node.ensure(ref, pb.TIER_DISK)
    await node.stop(signal.SIGKILL)
    await node.store.delete(ref.object_key)
    await node.start()
    assert (await node.ensure(ref)).found_at == pb.TIER_DISK


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
async def test_one_flipped_bit_on_disk_is_found_after_a_restart_and_fetched_again(node: Node, file: str) -> None:
    await node.start()
    ref = await node.adapter(0)
    await node.ensure(ref, pb.TIER_DISK)
    await node.stop()
    path = node.cache / ref.blob.digest.removeprefix("sha256:") / file
    data = bytearray(path.read_bytes())
    at = data.index(b'"r": 4') + 5 if file.endswith(".json") else len(data) - 7
    data[at] ^= 1
    path.write_bytes(data)
    await node.start()
    assert (await node.ensure(ref)).found_at == pb.TIER_STORE
    assert (await node.status()).num_misses == 1


async def test_a_cache_for_two_holds_two(node: Node) -> None:
    refs = [await node.adapter(number) for number in range(4)]
    await node.start(max_cache_bytes=int(2.9 * refs[0].blob.size_bytes))
    for ref in (*refs, *reversed(refs)):
        await node.ensure(ref, pb.TIER_DISK)
    status = await node.status()
    assert status.cache_bytes <= status.max_cache_bytes
    assert (status.num_cached, status.num_evictions) == (2, 4)
    await node.stop(signal.SIGKILL)
    await node.start(max_cache_bytes=int(1.9 * refs[0].blob.size_bytes))
    assert (await node.status()).num_cached == 1


async def test_bad_references_and_bad_blobs_have_their_own_errors(node: Node, materials: Materials) -> None:
    await node.start(max_cache_bytes=10_000_000)
    good = await node.adapter(0)
    pickle = b"\x80\x04\x95" + b"x" * 100
    pickled = node.folder / "pickle"
    pickled.write_bytes(pickle)
    from mint_blobs import digest_file

    pickle_digest = await digest_file(pickled)
    pickle_key = blob_key("acme", pickle_digest, "stage-1")
    await node.store.put_file(pickle_key, pickled, digest=pickle_digest)
    torn = node.ref(good.blob.digest, good.blob.size_bytes, blob_key("acme", good.blob.digest, "torn"))
    await node.store.put_bytes(torn.object_key, materials.adapters[0].blob.read_bytes()[:-100])
    flipped = node.ref(good.blob.digest, good.blob.size_bytes, blob_key("acme", good.blob.digest, "flipped"))
    data = bytearray(materials.adapters[0].blob.read_bytes())
    data[-1] ^= 1
    await node.store.put_bytes(flipped.object_key, bytes(data))
    foreign = node.ref(good.blob.digest, good.blob.size_bytes, good.object_key)
    foreign.base_digest = f"sha256:{'0' * 64}"
    absent = node.ref(good.blob.digest, good.blob.size_bytes, blob_key("acme", good.blob.digest, "absent"))
    theirs = node.ref(good.blob.digest, good.blob.size_bytes, good.object_key, tenant="evil")
    huge = node.ref(good.blob.digest, 10**12, good.object_key)
    cases: list[tuple[pb.AdapterRef, type[MintError]]] = [
        (pb.AdapterRef(), InvalidArgument),
        (theirs, InvalidArgument),
        (absent, NotFound),
        (torn, BlobCorrupt),
        (flipped, BlobCorrupt),
        (node.ref(pickle_digest, len(pickle), pickle_key), InvalidArgument),
        (foreign, BaseModelMismatch),
        (huge, ResourceExhausted),
    ]
    for ref, expected in cases:
        with pytest.raises(MintError) as caught:
            await node.ensure(ref)
        assert type(caught.value) is expected, caught.value
        assert node.names() == []
    assert (await node.ensure(good)).found_at == pb.TIER_STORE


async def test_a_store_that_is_away_or_stands_still_is_unavailable_in_time_and_heals(node: Node) -> None:
    await node.start()
    refs = [await node.adapter(number) for number in range(2)]
    node.weed.pause()
    try:
        async with asyncio.timeout(15):
            with pytest.raises((Unavailable, DeadlineExceeded)):
                await node.ensure(refs[0], timeout_s=10)
    finally:
        node.weed.resume()
    assert (await node.ensure(refs[1])).found_at == pb.TIER_STORE
    assert (await node.ensure(refs[0])).found_at == pb.TIER_STORE
    assert len(node.names()) == 2


async def test_an_engine_that_is_away_is_unavailable(node: Node) -> None:
    ref = await node.adapter(0)
    await node.start(engine_address=f"unix:{node.folder / 'nobody.sock'}")
    with pytest.raises(Unavailable):
        await node.ensure(ref)
    assert (await node.ensure(ref, pb.TIER_DISK)).found_at == pb.TIER_STORE


async def test_tickets_over_the_wire(node: Node) -> None:
    await node.start()
    assert node.stub is not None
    refs = [await node.adapter(number) for number in range(3)]
    response = await call(node.stub.Prefetch, pb.PrefetchRequest(adapters=refs))
    assert [ticket.adapter.blob.digest for ticket in response.load_tickets] == [ref.blob.digest for ref in refs]
    for ticket in response.load_tickets:
        async with asyncio.timeout(20):
            while ticket.state not in (pb.LOAD_TICKET_STATE_DONE, pb.LOAD_TICKET_STATE_FAILED):
                got = await call(node.stub.GetLoadTicket, pb.GetLoadTicketRequest(name=ticket.name))
                ticket = got.load_ticket
                await asyncio.sleep(0.02)
        assert (ticket.state, ticket.error) == (pb.LOAD_TICKET_STATE_DONE, "")
        cancelled = await call(node.stub.CancelLoadTicket, pb.CancelLoadTicketRequest(name=ticket.name))
        assert cancelled.load_ticket.state == pb.LOAD_TICKET_STATE_DONE
    assert len(node.names()) == 3
    assert node.engine.loaded == {}
    with pytest.raises(NotFound):
        await call(node.stub.GetLoadTicket, pb.GetLoadTicketRequest(name="loadTickets/nobody"))


async def test_a_second_loader_on_one_folder_is_refused_with_one_sentence(node: Node) -> None:
    await node.start()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "mint_loader",
        f"--engine-address={node.engine_address}",
        f"--cache-dir={node.cache}",
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 1
    assert b"in use by another loader" in said.splitlines()[-1]


async def test_a_full_disk_is_told_and_costs_nothing_later(node: Node) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    node.cache.mkdir()
    mounting = await asyncio.create_subprocess_exec("mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", node.cache)
    if await mounting.wait() != 0:
        pytest.skip("this machine may not mount a tmpfs")
    try:
        await node.start()
        ref = await node.adapter(0)
        assert ref.blob.size_bytes > 20 * 1024
        with pytest.raises(ResourceExhausted, match="make room on that disk"):
            await node.ensure(ref)
        assert node.names() == []
        remounting = await asyncio.create_subprocess_exec("mount", "-o", "remount,size=16m", node.cache)
        assert await remounting.wait() == 0
        assert (await node.ensure(ref)).found_at == pb.TIER_STORE
        await node.stop()
    finally:
        unmounting = await asyncio.create_subprocess_exec("umount", "-l", node.cache)
        await unmounting.wait()
        shutil.rmtree(node.cache, ignore_errors=True)


async def test_what_the_operators_keys_do_not_cover_is_refused_before_a_byte_moves(node: Node, tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    signer = Signer(key)
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[tenants]\nacme = ["{signer.public_key}"]\n')
    await node.start(trusted_keys=keys)
    ref = await node.adapter(0)
    with pytest.raises(SignatureRequired, match="demands signatures on this node"):
        await node.ensure(ref)
    foreign = Signer(Ed25519PrivateKey.generate()).sign("acme", ref.blob.digest, ref.base_digest)
    ref.signature.key_id, ref.signature.value = foreign.key_id, foreign.value
    with pytest.raises(SignatureInvalid, match="this node trusts"):
        await node.ensure(ref)
    node.replica.to_load[:] = [ref]  # nor is what a promotion waits for
    with pytest.raises(SignatureInvalid):
        await node.ensure(ref, pb.TIER_DISK)
    assert node.names() == []
    assert node.engine.calls == []
    node.replica.to_load[:] = []
    mine = signer.sign("acme", ref.blob.digest, ref.base_digest)
    ref.signature.key_id, ref.signature.value = mine.key_id, mine.value
    assert (await node.ensure(ref)).found_at == pb.TIER_STORE
    unsigned = await node.adapter(1, tenant="free")
    assert (await node.ensure(unsigned)).found_at == pb.TIER_STORE
    keys.write_text("nonsense")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "mint_loader",
        f"--engine-address={node.engine_address}",
        f"--cache-dir={tmp_path / 'other'}",
        f"--trusted-keys={keys}",
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    assert b"is no TOML" in said.splitlines()[-1]
