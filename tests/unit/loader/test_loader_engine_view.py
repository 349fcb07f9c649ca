"""Questions to the engine are shared, and never answered with what was asked before they came."""

from __future__ import annotations

import asyncio

import pytest

from mint_core.errors import Unavailable
from mint_loader.engine_view import EngineView
from mint_loader.model import EngineLoad, Resident


class _Engine:
    def __init__(self) -> None:
        self.num_asked = 0
        self.held = frozenset[str]()
        self.error: Unavailable | None = None
        self.go = asyncio.Event()

    async def load(self, digest: str, folder: str, *, into_slot: bool, pinned: bool, timeout_s: float) -> EngineLoad:
        raise NotImplementedError

    async def unpin(self, digest: str, *, timeout_s: float) -> None:
        raise NotImplementedError

    async def resident(self, *, timeout_s: float) -> Resident:
        self.num_asked += 1
        held = self.held
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return Resident("base", held)


async def test_the_last_answer_is_known_for_a_while_and_forgotten_with_a_failure() -> None:
    engine = _Engine()
    engine.go.set()
    view = EngineView(engine, timeout_s=1.0)
    assert view.lately(60.0) is None
    assert await view.resident() is view.lately(60.0)
    assert view.lately(-1.0) is None
    engine.error = Unavailable("away")
    with pytest.raises(Unavailable):
        await view.resident()
    assert view.lately(60.0) is None
    assert engine.num_asked == 2


async def test_500_share_two_questions_and_no_answer_is_older_than_its_question() -> None:
    engine = _Engine()
    view = EngineView(engine, timeout_s=1.0)
    first = asyncio.ensure_future(view.resident())
    await asyncio.sleep(0.001)
    engine.held = frozenset({"new"})
    others = [asyncio.ensure_future(view.resident()) for _ in range(500)]
    others[0].cancel()
    await asyncio.sleep(0.001)
    engine.go.set()
    assert (await first).digests == frozenset()
    assert {each.digests for each in await asyncio.gather(*others[1:])} == {frozenset({"new"})}
    assert engine.num_asked == 2
    engine.held = frozenset()
    assert (await view.resident()).digests == frozenset()


async def test_a_failure_reaches_everybody_who_asked_and_is_not_kept() -> None:
    engine = _Engine()
    view = EngineView(engine, timeout_s=1.0)
    engine.error = Unavailable("away")
    asked = [asyncio.ensure_future(view.resident()) for _ in range(3)]
    engine.go.set()
    for each in asked:
        with pytest.raises(Unavailable, match="away"):
            await each
    engine.error = None
    assert (await view.resident()).base_digest == "base"


async def test_closing_gives_the_questions_up() -> None:
    view = EngineView(_Engine(), timeout_s=1.0)
    asked = [asyncio.ensure_future(view.resident()) for _ in range(3)]
    await asyncio.sleep(0.001)
    asked.append(asyncio.ensure_future(view.resident()))
    await asyncio.sleep(0)
    await view.close()
    for each in asked:
        with pytest.raises(Unavailable, match="shutting down"):
            await each
