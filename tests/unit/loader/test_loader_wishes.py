"""What the engine is asked to hold is loaded, once, and again if that failed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from mint_core.errors import Unavailable
from mint_loader import wishes as wishes_room
from mint_loader.engine_view import EngineView
from mint_loader.model import AdapterRef, EngineLoad, Resident, Tier
from mint_loader.tickets import Tickets
from mint_loader.wishes import Wishes

ONE, TWO = (AdapterRef("acme", "sha256:" + digit * 64, 1, "key", "sha256:" + "b" * 64) for digit in "12")


class _Engine:
    def __init__(self) -> None:
        self.held: set[str] = set()
        self.wanted: list[AdapterRef] = []
        self.is_away = False
        self.num_looks = 0

    async def load(self, digest: str, folder: str, *, into_slot: bool, pinned: bool, timeout_s: float) -> EngineLoad:
        raise NotImplementedError

    async def unpin(self, digest: str, *, timeout_s: float) -> None:
        raise NotImplementedError

    async def resident(self, *, timeout_s: float) -> Resident:
        self.num_looks += 1
        if self.is_away:
            raise Unavailable("away")
        return Resident("sha256:" + "b" * 64, frozenset(self.held), tuple(self.wanted))


class _Loading:
    """Takes tickets' loads and does them when told to."""

    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.asked: list[tuple[str, Tier]] = []
        self.error: Unavailable | None = None
        self.go = asyncio.Event()
        self.go.set()

    async def ensure(self, ref: AdapterRef, tier: Tier, **_: object) -> None:
        self.asked.append((ref.digest, tier))
        await self.go.wait()
        if self.error is not None:
            raise self.error
        self.engine.held.add(ref.digest)


@pytest.fixture
async def node() -> AsyncIterator[tuple[_Engine, _Loading]]:
    engine = _Engine()
    loading = _Loading(engine)
    tickets = Tickets(loading)  # type: ignore[arg-type]
    running = asyncio.create_task(Wishes(EngineView(engine, timeout_s=2.0), tickets, poll_s=0.001).run())
    yield engine, loading
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    await tickets.close()


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - any condition
            await asyncio.sleep(0.001)


async def _looks(engine: _Engine, count: int = 10) -> None:
    until = engine.num_looks + count
    await _until(lambda: engine.num_looks >= until)


async def test_what_is_wanted_and_not_held_is_loaded_once(node: tuple[_Engine, _Loading]) -> None:
    engine, loading = node
    engine.held.add(TWO.digest)
    loading.go.clear()
    engine.wanted = [ONE, TWO]
    await _looks(engine)
    assert loading.asked == [(ONE.digest, Tier.HOST)]
    loading.go.set()
    await _until(lambda: ONE.digest in engine.held)
    await _looks(engine)
    assert len(loading.asked) == 1


async def test_a_failed_load_is_tried_again_after_a_pause(
    node: tuple[_Engine, _Loading], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, loading = node
    loading.error = Unavailable("no")
    engine.wanted = [ONE]
    await _looks(engine)
    assert len(loading.asked) == 1
    monkeypatch.setattr(wishes_room, "_RETRY_S", 0.0)
    loading.error = None
    await _until(lambda: ONE.digest in engine.held)


async def test_a_wish_that_comes_again_is_loaded_again(node: tuple[_Engine, _Loading]) -> None:
    engine, loading = node
    engine.wanted = [ONE]
    await _until(lambda: ONE.digest in engine.held)
    engine.wanted = []
    await _looks(engine)
    engine.held.clear()
    engine.wanted = [ONE]
    await _until(lambda: ONE.digest in engine.held)
    assert len(loading.asked) == 2


async def test_an_engine_that_is_away_is_asked_again(node: tuple[_Engine, _Loading]) -> None:
    engine, _ = node
    engine.is_away = True
    engine.wanted = [ONE]
    await _looks(engine)
    engine.is_away = False
    await _until(lambda: ONE.digest in engine.held)
