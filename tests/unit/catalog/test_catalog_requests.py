from __future__ import annotations

import asyncio
import uuid

import pytest
from unit.catalog.catalog_lab import POLICY, Lab

from mint_catalog.model.keys import Keys
from mint_catalog.storage import requests as requests_module
from mint_catalog.storage.requests import Request
from mint_core.errors import InvalidArgument, RequestIdReused


def _request(request_id: str = "", *, method: str = "Create", principal: str = "ada", payload: bytes = b"p") -> Request:
    request = Request.of(
        tenant="acme",
        principal=principal,
        method=method,
        request_id=request_id or str(uuid.uuid4()),
        payload=payload,
    )
    assert request is not None
    return request


def test_no_id_is_no_identity() -> None:
    assert Request.of(tenant="t", principal="p", method="m", request_id="", payload=b"") is None


@pytest.mark.parametrize("bad", ["1", "not-a-uuid", "00000000-0000-1000-8000-000000000000", "4" * 32, "x" * 500])
def test_an_id_is_a_uuid4(bad: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        _request(bad)
    assert caught.value.field == "request_id"


def test_an_id_is_scoped_by_principal_and_method() -> None:
    keys, same = Keys(), str(uuid.uuid4())
    own = _request(same).keys(keys)
    assert own == _request(same, payload=b"other").keys(keys)
    assert not set(own) & set(_request(same, principal="bob").keys(keys))
    assert not set(own) & set(_request(same, method="Delete").keys(keys))


async def test_a_repeated_request_gets_the_stored_answer() -> None:
    lab = Lab()
    request = _request()
    first = await lab.policy(request=request)
    await lab.policies.update(POLICY, first.record, {"owner"})
    again = await lab.policies.create(POLICY, first.record, request)
    assert again == first


async def test_the_same_id_with_another_payload_is_refused() -> None:
    lab, request_id = Lab(), str(uuid.uuid4())
    await lab.policy(request=_request(request_id))
    with pytest.raises(RequestIdReused):
        await lab.policy(request=_request(request_id, payload=b"q"))


async def test_fifty_at_once_apply_once() -> None:
    lab = Lab()
    await lab.base_model()
    request = _request()
    written = await asyncio.gather(*(lab.policy(request=request) for _ in range(50)))
    assert len({(each.record.uid, each.catalog_revision) for each in written}) == 1


async def test_an_answer_that_was_lost_is_found_again() -> None:
    lab = Lab()
    await lab.policy()
    await lab.publish("one")
    request = _request()
    lab.store.fail_next_txn = "after"
    with pytest.raises(Exception, match="may have been applied"):
        await lab.aliases.promote(lab.move(1), request)
    await lab.aliases.delete(lab.move(1).name)
    again = await lab.aliases.promote(lab.move(1), request)
    assert again.record.active is not None
    with pytest.raises(Exception, match="does not exist"):
        await lab.aliases.get(lab.move(1).name)


async def test_a_repeated_deletion_answers_the_same_revision() -> None:
    lab = Lab()
    await lab.policy()
    request = _request()
    first = await lab.policies.delete(POLICY, "", request)
    await lab.policy()
    assert await lab.policies.delete(POLICY, "", request) == first
    assert (await lab.policies.get(POLICY)).name == POLICY


async def test_a_request_that_changed_nothing_is_remembered_too() -> None:
    lab = Lab()
    await lab.policy()
    await lab.publish("one")
    await lab.publish("two")
    live = await lab.promote(1)
    request = _request()
    assert (await lab.aliases.promote(lab.move(1), request)).record == live.record
    await lab.promote(2)
    assert (await lab.aliases.promote(lab.move(1), request)).record == live.record
    assert (await lab.aliases.get(live.record.name)).active != live.record.active


async def test_an_id_is_known_on_the_next_day(monkeypatch: pytest.MonkeyPatch) -> None:
    lab, request = Lab(), _request()
    time = [1_700_000_000.0]
    monkeypatch.setattr(requests_module, "wall_s", lambda: time[0])
    first = await lab.policy(request=request)
    for step in (86_400.0, -86_400.0):
        time[0] = 1_700_000_000.0 + step
        assert (await lab.policy(request=request)).record.uid == first.record.uid
