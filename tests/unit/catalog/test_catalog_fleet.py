"""Fleet operations over the in-memory store, killed at every transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from unit.catalog.catalog_lab import TENANT, Lab
from unit.catalog.memory_store import MemoryStore
from unit.catalog.mortal_store import Killed, MortalStore

from mint_catalog.fleet.operations import Fleet
from mint_catalog.fleet.work import FleetWork
from mint_catalog.model.fleet_records import (
    FleetOperation,
    FleetPause,
    FleetPromote,
    FleetResume,
    FleetRollback,
    FleetState,
)
from mint_catalog.model.records import Alias, Policy, PolicyState
from mint_catalog.storage.duty import Duties
from mint_catalog.storage.store import prefix_end
from mint_core.errors import AlreadyExists, InvalidArgument, MintError, NotFound, Unavailable, WrongState
from mint_core.names import AliasName, FleetOperationName, PolicyName, RevisionName

NAME = FleetOperationName("acme", "op")


class FleetLab(Lab):
    def __init__(self, store: Any = None) -> None:
        super().__init__(store)
        self.duties = Duties(self.store, self.keys)
        self.fleet = Fleet(self.store, self.tables)
        self.work = FleetWork(self.store, self.tables, self.aliases, self.policies)

    async def policies_of(
        self, num: int, *, num_revisions: int = 2, promoted: Sequence[int] = (1,)
    ) -> list[PolicyName]:
        names = [PolicyName("acme", f"p{number:02d}") for number in range(num)]
        for name in names:
            await self.policy(name)
            for number in range(1, num_revisions + 1):
                await self.publish(f"{name.policy} {number}", policy=name)
            for number in promoted:
                move = self.move(number)
                await self.aliases.promote(_of(move, name))
        return names

    async def begin(self, wanted: FleetOperation, principal: str = "ada") -> FleetOperation:
        return (await self.fleet.create(TENANT, NAME.fleet_operation, wanted, principal)).record

    async def do(self) -> FleetOperation:
        """What the loop does, once."""
        async with self.duties.hold("fleet") as duty:
            await self.work.operate(duty, NAME)
        return await self.fleet.get(NAME)

    async def alias(self, name: PolicyName) -> Alias:
        return await self.aliases.get(AliasName(name.tenant, name.policy, "live"))

    async def results(self, *, failed_only: bool = False) -> dict[str, tuple[int, MintError | None]]:
        found: dict[str, tuple[int, MintError | None]] = {}
        token = ""
        while True:
            page = await self.fleet.results(NAME, page_size=7, page_token=token, failed_only=failed_only)
            for result in page.records:
                found[result.policy.policy] = (result.revision_number, result.error)
            token = page.next_page_token
            if not token:
                return found

    async def left(self) -> int:
        """Keys of work that is left."""
        counts = [await self.store.count(key, prefix_end(key)) for key in map(self.keys.family, _WORK)]
        return sum(counts)


_WORK = ("fleetItems", "fleetOpen")


def _of(move: Any, name: PolicyName) -> Any:
    return replace(move, name=AliasName(name.tenant, name.policy, "live"))


def _wanted(**fields: Any) -> FleetOperation:
    return FleetOperation(NAME, **fields)


async def test_promote_moves_each_selected_policy_to_its_newest_ready_revision() -> None:
    lab = FleetLab()
    names = await lab.policies_of(50)
    await lab.policies.update(names[0], Policy(names[0], labels={"team": "ads"}), ["labels"])
    await lab.policies.delete(names[1])
    await lab.revisions.retire(_revision(names[2], 2), "")
    began = await lab.begin(_wanted(promote=FleetPromote("live"), reason="spring"), "ada")
    assert (began.state, began.principal, began.num_done) == (FleetState.RUNNING, "ada", 0)
    done = await lab.do()
    assert (done.state, done.num_done, done.num_failed) == (FleetState.DONE, 49, 0)
    assert done.end_time is not None
    results = await lab.results()
    assert set(results) == {name.policy for name in names if name is not names[1]}
    assert results["p02"] == (1, None)
    assert results["p03"] == (2, None)
    newest = (await lab.alias(names[3])).history[0]
    assert newest.attribution is not None
    assert (newest.attribution.principal, newest.attribution.reason) == ("ada", "spring")
    assert await lab.left() == 0
    assert await lab.work.pending() is False


async def test_the_filter_selects_once_at_the_operations_revision() -> None:
    lab = FleetLab()
    names = await lab.policies_of(5)
    for name in names[:3]:
        await lab.policies.update(name, Policy(name, labels={"team": "search"}), ["labels"])
    await lab.begin(_wanted(filter='labels.team = "search" AND alias = "live"', promote=FleetPromote("live")))
    await lab.policies.update(names[0], Policy(names[0], labels={}), ["labels"])
    await lab.policies.update(names[4], Policy(names[4], labels={"team": "search"}), ["labels"])
    await lab.do()
    assert set(await lab.results()) == {"p00", "p01", "p02"}


async def test_items_that_fail_say_why_and_do_not_stop_the_others() -> None:
    lab = FleetLab()
    names = await lab.policies_of(3, promoted=(1, 2))
    await lab.policy(bare := PolicyName("acme", "bare"))
    await lab.begin(_wanted(rollback=FleetRollback("live")))
    done = await lab.do()
    assert (done.num_done, done.num_failed) == (4, 1)
    assert {(await lab.alias(name)).active.revision_number for name in names} == {1}  # type: ignore[union-attr]
    failed = await lab.results(failed_only=True)
    assert set(failed) == {bare.policy}
    assert isinstance(failed["bare"][1], NotFound)
    assert "aliases/live" in failed["bare"][1].message


async def test_pause_and_resume() -> None:
    lab = FleetLab()
    names = await lab.policies_of(3)
    await lab.begin(_wanted(pause=FleetPause()))
    await lab.do()
    assert {(await lab.policies.get(name)).state for name in names} == {PolicyState.PAUSED}
    with pytest.raises(WrongState, match="PAUSED"):
        await lab.aliases.promote(_of(lab.move(2), names[0]))
    again = FleetOperationName("acme", "again")
    await lab.fleet.create(TENANT, "again", FleetOperation(again, resume=FleetResume()), "ada")
    async with lab.duties.hold("fleet") as duty:
        await lab.work.work(duty)
    assert {(await lab.policies.get(name)).state for name in names} == {PolicyState.ACTIVE}
    assert (await lab.fleet.get(again)).state is FleetState.DONE


@pytest.mark.parametrize("applied", [False, True], ids=["before the write", "after the write"])
async def test_killed_at_every_transaction_each_item_is_done_once(applied: bool) -> None:
    kill_at, num_kills = 1, 0
    while True:
        lab = FleetLab(mortal := MortalStore(MemoryStore()))
        names = await lab.policies_of(3, num_revisions=3, promoted=(1, 2, 3))
        await lab.begin(_wanted(rollback=FleetRollback("live")))
        async with lab.duties.hold("fleet") as duty:
            mortal.kill_at(kill_at, applied=applied)
            try:
                await lab.work.operate(duty, NAME)
                break
            except Killed:
                num_kills += 1
            finally:
                mortal.revive()
        done = await lab.do()
        assert (done.state, done.num_done, done.num_failed) == (FleetState.DONE, 3, 0), kill_at
        for name in names:
            alias = await lab.alias(name)
            assert alias.active is not None
            # A rollback that was applied twice would be back at 3, or at 1.
            assert (alias.active.revision_number, len(alias.history)) == (2, 4), kill_at
        assert await lab.left() == 0
        kill_at += 1
    assert num_kills >= 6  # items, selected, three rollbacks, results, end


async def test_the_store_going_away_fails_no_item() -> None:
    lab = FleetLab()
    names = await lab.policies_of(3)
    await lab.begin(_wanted(promote=FleetPromote("live")))
    async with lab.duties.hold("fleet") as duty:
        original, calls = lab.aliases.promote, 0

        async def promote(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise Unavailable("etcd is away")
            return await original(*args)

        lab.aliases.promote = promote  # type: ignore[method-assign]
        with pytest.raises(Unavailable):
            await lab.work.operate(duty, NAME)
        await lab.work.operate(duty, NAME)
    assert (await lab.fleet.get(NAME)).num_failed == 0
    assert {(await lab.alias(name)).active.revision_number for name in names} == {2}  # type: ignore[union-attr]


async def test_compaction_before_all_are_selected_selects_anew() -> None:
    lab = FleetLab()
    await lab.policies_of(3)
    began = await lab.begin(_wanted(promote=FleetPromote("live")))
    await lab.policy(PolicyName("acme", "late"))
    await lab.store.compact(lab.store.revision)
    done = await lab.do()
    assert done.catalog_revision > began.catalog_revision
    assert set(await lab.results()) == {"late", "p00", "p01", "p02"}


async def test_cancel_keeps_what_was_tried_and_leaves_the_rest() -> None:
    lab = FleetLab()
    await lab.policies_of(60, num_revisions=2)
    await lab.begin(_wanted(promote=FleetPromote("live")))
    async with lab.duties.hold("fleet") as duty:
        original, tried = lab.aliases.promote, 0

        async def promote(*args: Any) -> Any:
            nonlocal tried
            tried += 1
            if tried == 5:
                await lab.fleet.cancel(NAME, "a slip")
            return await original(*args)

        lab.aliases.promote = promote  # type: ignore[method-assign]
        await lab.work.operate(duty, NAME)
    done = await lab.fleet.get(NAME)
    assert (done.state, done.num_done) == (FleetState.CANCELLED, 40)
    assert len(await lab.results()) == 40
    assert await lab.left() == 0
    assert (await lab.fleet.cancel(NAME, "")).record.state is FleetState.CANCELLED


async def test_what_cannot_be_asked_for() -> None:
    lab = FleetLab()
    with pytest.raises(InvalidArgument, match="no verb"):
        await lab.begin(_wanted())
    with pytest.raises(InvalidArgument, match="filter"):
        await lab.begin(_wanted(pause=FleetPause(), filter="nonsense"))
    with pytest.raises(InvalidArgument, match="alias"):
        await lab.begin(_wanted(promote=FleetPromote("")))
    await lab.begin(_wanted(pause=FleetPause()))
    with pytest.raises(AlreadyExists):
        await lab.begin(_wanted(pause=FleetPause()))
    await lab.do()
    with pytest.raises(WrongState, match="DONE"):
        await lab.fleet.cancel(NAME, "")
    with pytest.raises(NotFound):
        await lab.fleet.get(FleetOperationName("acme", "other"))
    chosen = (await lab.fleet.create(TENANT, "", _wanted(pause=FleetPause()), "ada")).record
    assert chosen.name.fleet_operation


def _revision(name: PolicyName, number: int) -> RevisionName:
    return RevisionName(name.tenant, name.policy, number)
