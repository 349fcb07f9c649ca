"""Pins: kept on the disk and in the engine, in their time, after their alias, over restarts."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mint_core import clock
from mint_core.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SignatureRequired,
    Unavailable,
)
from mint_core.names import AliasName, PolicyName
from mint_core.signing import Signer, TrustedKeys
from mint_loader.model import AdapterRef, PinnedTargets, SignatureCheck, Tier
from mint_loader.pin_store import Pin, PinStore
from mint_loader.pins import Pins
from mint_loader.tickets import Tickets
from support.loader_room import RoomNode, room_node, until

LIVE, BETA = AliasName("acme", "helper", "live"), AliasName("acme", "helper", "beta")


class FakeCatalog:
    def __init__(self) -> None:
        self.pointed: dict[AliasName, tuple[AdapterRef, ...]] = {}
        self.is_away = False

    async def targets(self, alias: AliasName) -> tuple[AdapterRef, ...]:
        if self.is_away:
            raise Unavailable("the catalog is away")
        if alias not in self.pointed:
            raise NotFound(f"{alias} does not exist")
        return self.pointed[alias]


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[RoomNode]:
    async with room_node(tmp_path) as each:
        yield each


@contextlib.asynccontextmanager
async def pinning(
    node: RoomNode,
    catalog: PinnedTargets | None,
    *,
    max_pins: int = 1000,
    max_bytes: int = 5000,
    check_signature: SignatureCheck | None = None,
) -> AsyncIterator[Pins]:
    tickets = Tickets(node.loading)
    pins = Pins(
        PinStore(node.cache.folder / ".pins.json"),
        catalog,
        node.engine,
        node.cache,
        tickets,
        max_pins=max_pins,
        max_bytes=max_bytes,
        lead_s=100.0,
        poll_s=0.01,
        check_signature=check_signature,
    )
    await pins.open()
    running = asyncio.ensure_future(pins.run())
    try:
        yield pins
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await tickets.close()


async def test_a_pin_brings_keeps_follows_and_lets_go(node: RoomNode) -> None:
    catalog = FakeCatalog()
    old, new, canary = [await node.adapter(data) for data in (b"old", b"new", b"canary")]
    catalog.pointed[LIVE] = (old,)
    async with pinning(node, catalog) as pins:
        pin = await pins.pin(LIVE, Tier.HOST, start_s=None, end_s=None)
        await until(lambda: pins.is_held(pin))
        assert node.engine.pinned == {old.digest}
        assert node.cache.kept == {old.digest}
        assert pins.concerns(PolicyName("acme", "helper"))
        catalog.pointed[LIVE] = (new, canary)
        pins.moved(LIVE)
        await until(lambda: node.engine.pinned == {new.digest, canary.digest})
        assert node.cache.kept == {new.digest, canary.digest}
        await pins.unpin(LIVE)
        await until(lambda: not node.engine.pinned)
        assert node.cache.kept == frozenset()
        assert node.engine.digests >= {old.digest, new.digest, canary.digest}  # let go, not thrown out
        with pytest.raises(NotFound, match="there is no pin of"):
            await pins.unpin(LIVE)


async def test_pins_survive_a_restart_without_the_catalog_and_an_engine_that_lost_everything(node: RoomNode) -> None:
    catalog = FakeCatalog()
    key = Ed25519PrivateKey.generate()
    ref = await node.adapter(b"one")
    ref = dataclasses.replace(ref, signature=Signer(key).sign("acme", ref.digest, ref.base_digest))
    catalog.pointed[LIVE] = catalog.pointed[BETA] = (ref,)
    async with pinning(node, catalog) as pins:
        await pins.pin(LIVE, Tier.SLOT, start_s=None, end_s=4e9)
        beta = await pins.pin(BETA, Tier.DISK, start_s=None, end_s=None)
        await until(lambda: pins.is_held(beta))
        await until(lambda: node.engine.pinned == {ref.digest})
        before = pins.all()
    node.engine.digests.clear()
    node.engine.pinned.clear()
    catalog.is_away = True
    async with pinning(node, catalog) as pins:
        assert pins.all() == before
        assert node.cache.kept == {ref.digest}
        await until(lambda: node.engine.pinned == {ref.digest})
        await pins.unpin(LIVE)
        await until(lambda: not node.engine.pinned)
    node.engine.pinned.add(ref.digest)  # a loader killed before it told the engine
    async with pinning(node, None) as pins:
        await until(lambda: not node.engine.pinned)
        assert [pin.alias for pin in pins.all()] == [BETA]


async def test_a_schedule_prefetches_before_pins_in_its_time_and_ends(node: RoomNode) -> None:
    catalog = FakeCatalog()
    ref = await node.adapter(b"one")
    catalog.pointed[LIVE] = (ref,)
    now_s = clock.wall_s()
    async with pinning(node, catalog) as pins:
        pin = await pins.pin(LIVE, Tier.HOST, start_s=now_s + 1000, end_s=now_s + 2000)
        await asyncio.sleep(0.05)
        assert pins.is_scheduled(pin)
        assert ref.digest not in node.cache
        await pins.pin(LIVE, Tier.HOST, start_s=now_s + 50, end_s=now_s + 2000)  # sooner than its lead
        await until(lambda: ref.digest in node.cache)
        assert node.engine.pinned == set()
        assert node.cache.kept == {ref.digest}
        await pins.pin(LIVE, Tier.HOST, start_s=now_s, end_s=clock.wall_s() + 0.5)
        await until(lambda: node.engine.pinned == {ref.digest})
        await until(lambda: not pins.all())
        await until(lambda: not node.engine.pinned)
        assert node.cache.kept == frozenset()


async def test_what_cannot_be_pinned_is_refused_and_nothing_changes(node: RoomNode) -> None:
    catalog = FakeCatalog()
    small, large = await node.adapter(b"s"), await node.adapter(b"large" * 10)
    catalog.pointed = {LIVE: (small,), BETA: (large,)}
    key = Ed25519PrivateKey.generate()
    async with pinning(node, catalog, max_bytes=20, max_pins=1) as pins:
        with pytest.raises(NotFound):
            await pins.pin(AliasName("acme", "nobody", "live"), Tier.HOST, start_s=None, end_s=None)
        with pytest.raises(InvalidArgument, match="pin to DISK, HOST or SLOT"):
            await pins.pin(LIVE, Tier.STORE, start_s=None, end_s=None)
        with pytest.raises(InvalidArgument, match="before the pin would begin"):
            await pins.pin(LIVE, Tier.HOST, start_s=4e9, end_s=3e9)
        with pytest.raises(InvalidArgument, match="before the pin would begin"):
            await pins.pin(LIVE, Tier.HOST, start_s=None, end_s=1.0)
        with pytest.raises(ResourceExhausted, match="the pins would keep 50 bytes on this node's disk, 20 are"):
            await pins.pin(BETA, Tier.DISK, start_s=None, end_s=None)
        await pins.pin(LIVE, Tier.DISK, start_s=None, end_s=None)
        with pytest.raises(ResourceExhausted, match="1 pins exist, which is the limit"):
            await pins.pin(BETA, Tier.DISK, start_s=None, end_s=None)
        assert [pin.alias for pin in pins.all()] == [LIVE]
    async with pinning(node, None) as pins:
        with pytest.raises(FailedPrecondition, match="knows no catalog"):
            await pins.pin(BETA, Tier.DISK, start_s=None, end_s=None)
    trusted = TrustedKeys({"acme": [key.public_key()]})
    async with pinning(node, catalog, check_signature=trusted.check) as pins:
        with pytest.raises(SignatureRequired):
            await pins.pin(BETA, Tier.DISK, start_s=None, end_s=None)


async def test_a_pin_that_cannot_be_held_says_why_and_tries_again(
    node: RoomNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mint_loader.pins._RETRY_S", 0.05)
    catalog = FakeCatalog()
    ref, grown = await node.adapter(b"one"), await node.adapter(b"grown" * 5)
    catalog.pointed[LIVE] = (ref,)
    node.store.error = Unavailable("the store is away")
    async with pinning(node, catalog, max_bytes=10) as pins:
        pin = await pins.pin(LIVE, Tier.DISK, start_s=None, end_s=None)
        await until(lambda: pin.error == "TEMPORARILY_UNAVAILABLE: the store is away")
        node.store.error = None
        await until(lambda: pins.is_held(pin))
        assert pin.error == ""
        catalog.pointed[LIVE] = (grown,)
        pins.moved(LIVE)
        await until(lambda: pin.error.startswith("LIMIT_EXCEEDED: its adapters grew"))
        assert node.cache.kept == frozenset()
        del catalog.pointed[LIVE]
        pins.moved(LIVE)
        await until(lambda: pin.error.startswith("RESOURCE_NOT_FOUND: "))


def test_a_file_that_makes_no_sense_is_refused_with_its_name(tmp_path: Path) -> None:
    store = PinStore(tmp_path / "pins.json")
    assert store.read() == []
    pin = Pin(LIVE, Tier.HOST, None, 5.0, 1.0, "ada", ())
    store.write([pin])
    assert store.read() == [pin]
    for text in ("{", "[]", '{"version": 2, "pins": []}', '{"version": 1, "pins": [{"alias": "x"}]}'):
        store.path.write_text(text)
        with pytest.raises(FailedPrecondition, match=r"pins\.json does not hold this node's pins .* remove it"):
            store.read()
    with pytest.raises(Unavailable, match="cannot be written"):
        PinStore(tmp_path / "nowhere" / "pins.json").write([pin])


async def test_while_the_engine_is_away_everything_comes_to_the_disk(node: RoomNode) -> None:
    catalog = FakeCatalog()
    ref = await node.adapter(b"one")
    catalog.pointed[LIVE] = (ref,)
    node.engine.error = Unavailable("the engine is away")
    async with pinning(node, catalog) as pins:
        pin = await pins.pin(LIVE, Tier.HOST, start_s=None, end_s=None)
        await until(lambda: ref.digest in node.cache)
        assert not pins.is_held(pin)
        node.engine.error = None
        await until(lambda: pins.is_held(pin))
        assert node.engine.pinned == {ref.digest}
