"""Publish, promote, roll back, retire, delete, lease and record rollouts in random orders, with lost answers and late
repeats, against a model of a dozen lines."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from unit.catalog.catalog_lab import POLICY, Lab, digest_of, rollout

from mint_catalog.model.records import Fence, RevisionState
from mint_catalog.storage.requests import Request
from mint_core.errors import (
    AlreadyExists,
    EtagMismatch,
    LeaseHeld,
    LeaseLost,
    MintError,
    NotFound,
    Unavailable,
    WrongState,
)
from mint_core.names import RevisionName, RolloutName, TenantName

HOLDERS = st.sampled_from(["worker-1", "worker-2"])
ALIASES = st.sampled_from(["live", "canary"])
ROLLOUTS = st.sampled_from(["r1-1", "r1-2", "r1-3"])
FAULTS = st.sampled_from(["", "", "", "before", "after"])


@dataclass
class _Model:
    """What must be true, whatever was lost on the way."""

    digests: dict[int, str] = field(default_factory=dict)
    first_number: int = 1
    next_number: int = 1
    retired: set[int] = field(default_factory=set)
    aliases: dict[str, list[int]] = field(default_factory=dict)
    rollouts: dict[str, int] = field(default_factory=dict)
    fence: int = 0
    holder: str = ""

    def own(self, number: int) -> bool:
        return self.first_number <= number < self.next_number

    def ready(self, number: int) -> bool:
        return self.own(number) and number not in self.retired


class CatalogMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.lab = Lab()
        self.model = _Model()
        self.stale_fences: list[int] = []
        self.num_bytes = 0
        self.run_(self.lab.policy())

    def teardown(self) -> None:
        self.loop.close()

    def run_(self, awaitable: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(awaitable)  # type: ignore[arg-type]

    def attempt(self, call: Callable[[Request | None], Awaitable[Any]], fault: str) -> Any:
        """Call with a request id, once more when the answer was lost: together they apply once."""
        request = Request.of(tenant="acme", principal="p", method="m", request_id=str(uuid.uuid4()), payload=b"same")
        self.lab.store.fail_next_txn = fault
        try:
            result = self.run_(call(request))
        except Unavailable:
            return self.run_(call(request))
        finally:
            self.lab.store.fail_next_txn = ""
        assert self.run_(call(request)) == result, "a repeated request answers the same"
        return result

    @rule(fault=FAULTS, with_fence=st.booleans())
    def publish(self, fault: str, with_fence: bool) -> None:
        model, lab = self.model, self.lab
        self.num_bytes += 1
        text = f"bytes {self.num_bytes}"
        self.run_(lab.blob(text))
        fence = Fence(str(POLICY), model.fence) if with_fence and model.fence else None
        try:
            written = self.attempt(lambda request: lab.publish(text, fence, request=request), fault)
        except LeaseHeld:
            assert fence is None
            assert model.fence
            return
        except Unavailable:
            return  # the blob's own write met the fault
        assert fence is not None or not model.fence
        assert written.record.number == model.next_number
        model.digests[model.next_number] = digest_of(text)
        model.next_number += 1

    @rule(data=st.data(), number=st.integers(1, 12))
    def publish_under_a_stale_fence(self, data: st.DataObject, number: int) -> None:
        token = data.draw(st.sampled_from(self.stale_fences)) if self.stale_fences else number
        if token == self.model.fence:
            return
        self.run_(self.lab.blob("stale"))
        before = self.lab.store.revision
        try:
            self.run_(self.lab.publish("stale", Fence(str(POLICY), token)))
        except LeaseLost:
            assert self.lab.store.revision <= before + 2
        else:
            raise AssertionError("a stale fence published")

    def _repeated(self, call: Callable[[], Awaitable[Any]], fault: str) -> Any:
        """A call that is safe to repeat, made again when its answer was lost."""
        self.lab.store.fail_next_txn = fault
        try:
            return self.run_(call())
        except Unavailable:
            return self.run_(call())
        finally:
            self.lab.store.fail_next_txn = ""

    def _some_fence(self, data: st.DataObject) -> Fence:
        return Fence(str(POLICY), data.draw(st.sampled_from([self.model.fence or 1, *self.stale_fences])))

    @rule(data=st.data(), rollout_id=ROLLOUTS, number=st.integers(1, 4), fault=FAULTS)
    def record_rollout(self, data: st.DataObject, rollout_id: str, number: int, fault: str) -> None:
        model, fence = self.model, self._some_fence(data)
        known = model.rollouts.get(rollout_id)
        wanted = rollout(rollout_id, revision=f"{POLICY}/revisions/{number}")
        try:
            written = self._repeated(lambda: self.lab.rollouts.create(wanted, fence), fault)
        except NotFound:
            assert not model.own(number)
        except LeaseLost:
            assert fence.token != model.fence
            assert known != number
        except AlreadyExists:
            assert fence.token == model.fence
            assert known not in (None, number)
        else:
            assert fence.token == model.fence or known == number
            assert model.rollouts.setdefault(rollout_id, number) == number
            assert written.record.revision_digest == model.digests[number]

    @rule(data=st.data(), rollout_id=ROLLOUTS, fault=FAULTS)
    def delete_rollout(self, data: st.DataObject, rollout_id: str, fault: str) -> None:
        fence, name = self._some_fence(data), RolloutName("acme", "tone", rollout_id)
        try:
            self._repeated(lambda: self.lab.rollouts.delete(name, fence), fault)
        except LeaseLost:
            assert fence.token != self.model.fence
        else:
            assert fence.token == self.model.fence
            self.model.rollouts.pop(rollout_id, None)

    @rule(alias=ALIASES, number=st.integers(1, 12), fault=FAULTS, stale_etag=st.booleans())
    def promote(self, alias: str, number: int, fault: str, stale_etag: bool) -> None:
        model, history = self.model, self.model.aliases.get(alias, [])
        etag = "1" if stale_etag and history else ""
        move = self.lab.move(number, alias=alias, etag=etag)
        try:
            written = self.attempt(lambda request: self.lab.aliases.promote(move, request), fault)
        except EtagMismatch:
            assert etag
            return
        except NotFound:
            assert not model.own(number)
            return
        except WrongState:
            assert number in model.retired
            return
        assert model.ready(number)
        assert not etag
        self._moved(alias, number)
        assert written.record.active.digest == model.digests[number]

    @rule(alias=ALIASES, fault=FAULTS)
    def rollback(self, alias: str, fault: str) -> None:
        model, history = self.model, self.model.aliases.get(alias, [])
        move = self.lab.move(0, alias=alias)
        wanted = next((number for number in history[1:] if number != history[0] and model.ready(number)), None)
        try:
            written = self.attempt(lambda request: self.lab.aliases.rollback(move, request), fault)
        except NotFound:
            assert not history
        except WrongState:
            assert wanted is None
        else:
            assert written.record.active.revision_number == wanted
            assert wanted is not None
            self._moved(alias, wanted)

    def _moved(self, alias: str, number: int) -> None:
        history = self.model.aliases.setdefault(alias, [])
        if not history or history[0] != number:
            history.insert(0, number)
            del history[32:]

    @rule(number=st.integers(1, 12), fault=FAULTS)
    def retire(self, number: int, fault: str) -> None:
        name = RevisionName("acme", "tone", number)
        try:
            self.attempt(lambda request: self.lab.revisions.retire(name, "", request), fault)
        except NotFound:
            assert not self.model.own(number)
        except WrongState:
            assert number in self.model.retired
        else:
            assert self.model.ready(number)
            self.model.retired.add(number)

    @rule(alias=ALIASES, fault=FAULTS)
    def delete_alias(self, alias: str, fault: str) -> None:
        try:
            self.attempt(
                lambda request: self.lab.aliases.delete(self.lab.move(1, alias=alias).name, "", request), fault
            )
        except NotFound:
            assert alias not in self.model.aliases
        else:
            del self.model.aliases[alias]

    @rule(holder=HOLDERS)
    def acquire(self, holder: str) -> None:
        try:
            held = self.run_(self.lab.leases.acquire(POLICY, holder, 10))
        except LeaseHeld:
            assert self.model.holder not in ("", holder)
            return
        assert self.model.holder in ("", holder)
        assert self.model.fence in (0, held.token)
        assert all(token < held.token for token in self.stale_fences)
        self.model.fence, self.model.holder = held.token, holder

    @rule(seconds=st.integers(3, 12))
    def sleep(self, seconds: int) -> None:
        self.run_(self.lab.store.pass_time(seconds))
        alive = [holder.token for _, holder in self.run_(self.lab.leases.list(TenantName("acme")))]
        if self.model.fence and self.model.fence not in alive:
            self._lost()

    @rule()
    def release(self) -> None:
        if self.model.fence:
            self.run_(self.lab.leases.release(POLICY, self.model.fence))
            self._lost()

    def _lost(self) -> None:
        self.stale_fences.append(self.model.fence)
        self.model.fence, self.model.holder = 0, ""

    @rule(fault=FAULTS)
    def delete_and_make_again(self, fault: str) -> None:
        self.attempt(lambda request: self.lab.policies.delete(POLICY, "", request), fault)
        created = self.run_(self.lab.policy()).record
        assert created.next_revision_number == self.model.next_number
        if self.model.fence:
            self._lost()
        self.model.first_number = self.model.next_number
        self.model.aliases.clear()
        self.model.rollouts.clear()

    @invariant()
    def rollouts_are_what_was_recorded(self) -> None:
        page = self.run_(self.lab.rollouts.list(POLICY, page_size=0, page_token=""))
        found = {each.name.rollout: int(each.revision.rsplit("/", 1)[-1]) for each in page.records}
        assert found == self.model.rollouts

    @invariant()
    def a_digest_never_changes(self) -> None:
        for number, digest in self.model.digests.items():
            name = RevisionName("acme", "tone", number)
            try:
                revision = self.run_(self.lab.revisions.get(name))
            except NotFound:
                assert not self.model.own(number)
                continue
            assert self.model.own(number)
            assert revision.blob.digest == digest
            expected = RevisionState.RETIRED if number in self.model.retired else RevisionState.READY
            assert revision.state is expected

    @invariant()
    def aliases_are_where_they_were_moved(self) -> None:
        for alias in ("live", "canary"):
            history = self.model.aliases.get(alias)
            try:
                record = self.run_(self.lab.aliases.get(self.lab.move(1, alias=alias).name))
            except MintError:
                assert history is None
                continue
            assert [entry.target.revision_number for entry in record.history] == history
            assert history is not None
            resolved = self.run_(self.lab.resolver.resolve(str(record.name)))
            assert resolved.blob.digest == self.model.digests[history[0]]


CatalogMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestCatalogMachine = CatalogMachine.TestCase
