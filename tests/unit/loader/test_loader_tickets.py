"""Load tickets: their life, their limits, their deadlines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mint_core.errors import InvalidArgument, NotFound, ResourceExhausted
from mint_core.names import LoadTicketName
from mint_loader.loading import Limits
from mint_loader.model import Tier
from mint_loader.tickets import Tickets, TicketState
from support.loader_room import RoomNode, room_node, until


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[RoomNode]:
    async with room_node(tmp_path) as each:
        yield each


async def test_a_tickets_life(node: RoomNode) -> None:
    tickets = Tickets(node.loading)
    ref = await node.adapter(b"one")
    node.store.go.clear()
    (ticket,) = tickets.submit([ref], Tier.DISK, priority=0)
    assert ticket.state is TicketState.QUEUED
    await until(lambda: tickets.get(ticket.name).state is TicketState.LOADING)
    node.store.go.set()
    await until(lambda: ticket.state.is_final)
    assert ticket.state is TicketState.DONE
    assert (await tickets.cancel(ticket.name)).state is TicketState.DONE
    assert ref.digest in node.cache


async def test_a_cancelled_ticket_in_the_queue_is_never_fetched(tmp_path: Path) -> None:
    async with room_node(tmp_path, limits=Limits(max_fetches=1)) as node:
        tickets = Tickets(node.loading)
        refs = [await node.adapter(data) for data in (b"one", b"two")]
        node.store.go.clear()
        first, second = tickets.submit(refs, Tier.DISK, priority=0)
        await until(lambda: node.loading.fetch_gate.num_queued == 1)
        assert (await tickets.cancel(second.name)).state is TicketState.CANCELLED
        node.store.go.set()
        await until(lambda: first.state.is_final)
        assert first.state is TicketState.DONE
        assert node.store.order == [refs[0].digest]
        assert node.loading.fetch_gate.num_queued == 0


async def test_a_failed_ticket_says_why_and_unknown_ones_are_not_found(node: RoomNode) -> None:
    tickets = Tickets(node.loading, max_open=2)
    ref = await node.adapter(b"pickle")
    (ticket,) = tickets.submit([ref], Tier.DISK, priority=0)
    await until(lambda: ticket.state.is_final)
    assert ticket.state is TicketState.FAILED
    assert ticket.error == "INVALID_FIELD: not an adapter"
    with pytest.raises(NotFound):
        tickets.get(LoadTicketName("nobody"))
    with pytest.raises(ResourceExhausted, match="2 may be open"):
        tickets.submit([ref] * 3, Tier.DISK, priority=0)
    await tickets.close()


async def test_a_tickets_deadline_cancels_it(node: RoomNode) -> None:
    tickets = Tickets(node.loading, timeout_s=0.05)
    node.store.go.clear()
    (ticket,) = tickets.submit([await node.adapter(b"one")], Tier.DISK, priority=0)
    await until(lambda: ticket.state.is_final)
    assert ticket.state is TicketState.CANCELLED
    assert ticket.error.startswith("DEADLINE_EXCEEDED: ")
    node.store.go.set()


async def test_one_tenant_cannot_have_all_the_tickets(node: RoomNode) -> None:
    tickets = Tickets(node.loading, max_open=4, max_open_per_tenant=3)
    mine = [await node.adapter(f"mine {number}".encode()) for number in range(4)]
    theirs = await node.adapter(b"theirs", tenant="evil")
    node.store.go.clear()
    with pytest.raises(
        ResourceExhausted, match="0 load tickets of tenant 'acme' are open and 4 came; 3 of one"
    ) as caught:
        tickets.submit(mine, Tier.DISK, priority=0)
    assert caught.value.retry_after_s == 1.0
    open_tickets = tickets.submit(mine[:3], Tier.DISK, priority=0)
    tickets.submit([theirs], Tier.DISK, priority=0)
    assert (tickets.num_open("acme"), tickets.num_open("evil")) == (3, 1)
    node.store.go.set()
    await until(lambda: all(ticket.state.is_final for ticket in open_tickets))
    await until(lambda: not tickets.tenants())
    tickets.submit(mine[3:], Tier.DISK, priority=0)
    await tickets.close()


async def test_tickets_are_listed_open_ones_first(node: RoomNode) -> None:
    tickets = Tickets(node.loading)
    refs = [await node.adapter(data) for data in (b"one", b"two", b"three")]
    other = await node.adapter(b"four", tenant="evil")
    done = tickets.submit(refs[:2], Tier.DISK, priority=0)
    await until(lambda: all(ticket.state.is_final for ticket in done))
    node.store.go.clear()
    waiting = tickets.submit([refs[2], other], Tier.DISK, priority=0)
    assert tickets.listed()[:2] == waiting
    assert {ticket.ref.digest for ticket in tickets.listed()[2:]} == {refs[0].digest, refs[1].digest}
    assert tickets.listed(open_only=True) == waiting
    assert tickets.listed(tenant="evil") == waiting[1:]
    assert len(tickets.listed(limit=1)) == 1
    node.store.go.set()
    await tickets.close()


async def test_a_ticket_with_a_deadline_of_its_own_ends_by_it(node: RoomNode) -> None:
    tickets = Tickets(node.loading)
    ref = await node.adapter(b"one")
    with pytest.raises(InvalidArgument, match=r"deadline lies 2\.0 s in the past"):
        tickets.submit([ref], Tier.DISK, priority=0, timeout_s=-2.0)
    node.store.go.clear()
    (ticket,) = tickets.submit([ref], Tier.DISK, priority=0, timeout_s=0.05)
    await until(lambda: ticket.state.is_final)
    assert ticket.state is TicketState.CANCELLED
    assert ticket.error.startswith("DEADLINE_EXCEEDED: ")
    node.store.go.set()
