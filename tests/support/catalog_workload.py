"""Clients that move, publish and read at once, and write down what they asked and what they were told.

They share a handful of policies, so that they meet; they fail over from one catalog to the other; they know nothing of
what kills the servers. A write that got no answer is unknown. With a request id it is sent again, with the same id,
until there is an answer.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from mint_api.runtime.v1 import publish_service_pb2, work_service_pb2
from mint_api.v1 import alias_service_pb2, common_pb2, policy_service_pb2, revision_service_pb2
from mint_core.errors import Cancelled, DeadlineExceeded, MintError, Unavailable
from support.catalog_models import (
    AliasSeen,
    Entry,
    Labelled,
    MoveAlias,
    NumberSeen,
    PolicySeen,
    Publish,
    Published,
    Read,
    UpdateLabel,
)
from support.catalog_rig import BASE_DIGEST, Rig
from support.history import ANY, STRONG, Acquire, Freshness, Granted, History, Listed, ListRevisions, Record
from support.linearizability import Operation, Outcome

__all__ = ["Client", "World"]

_ALIASES: Final = ("live", "next")
_LABEL: Final = "w"
_NO_ANSWER: Final = (Unavailable, DeadlineExceeded, Cancelled)
_PATIENCE_S: Final = 20.0
_LEASE_TTL_S: Final = 2


@dataclass
class World:
    """What the clients share. The first policy is trained under a lease, the others are published to without."""

    history: History = field(default_factory=History)
    policies: list[str] = field(default_factory=list)
    blob: common_pb2.BlobRef = field(default_factory=common_pb2.BlobRef)
    numbers: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Acknowledged revision numbers."""
    versions: dict[str, int] = field(default_factory=dict)
    """Newest version seen of each alias and policy."""
    num_operations: int = 0
    num_unanswered_reads: int = 0

    async def set_up(self, rig: Rig, *, num_policies: int = 4) -> None:
        """Make the policies, each with a revision."""
        for number in range(num_policies):
            policy = await rig.policy("history", f"p{number}")
            self.policies.append(policy)
            self.blob = await rig.blob(policy, "adapter")

    def saw(self, target: str, version: int) -> None:
        self.versions[target] = max(version, self.versions.get(target, 0))


@dataclass(frozen=True, slots=True)
class _Reply:
    """A decoded answer."""

    answer: Any
    catalog_revision: int = 0
    digests: tuple[tuple[int, str], ...] = ()


class Client:
    """One client with its own channels to every catalog."""

    WEIGHTS: ClassVar[Mapping[str, int]] = {
        "promote": 20,
        "rollback": 8,
        "update": 10,
        "publish": 8,
        "train": 8,
        "resolve": 22,
        "get_alias": 8,
        "get_policy": 5,
        "list_aliases": 2,
        "list_policies": 2,
        "batch_resolve": 2,
    }

    def __init__(
        self,
        number: int,
        seed: int,
        rigs: Sequence[Rig],
        world: World,
        *,
        timeout_s: float = 2.0,
        weights: Mapping[str, int] | None = None,
    ) -> None:
        """``weights`` change how often it does what, of ``Client.WEIGHTS``."""
        self._number = number
        self._rng = random.Random(f"{seed}/{number}")
        self._rigs = rigs
        self._at = number % len(rigs)
        self._world = world
        self._timeout_s = timeout_s
        self._num_tags = 0
        self._fence: common_pb2.Fence | None = None
        self._weights = {**self.WEIGHTS, **(weights or {})}

    async def run(self, enough: Callable[[], bool]) -> None:
        """Do one thing after the other."""
        actions, weights = list(self._weights), list(self._weights.values())
        while not enough():
            action = self._rng.choices(actions, weights)[0]
            await getattr(self, f"_{action}")()

    # -- writes

    async def _promote(self) -> None:
        alias = self._alias()
        numbers = self._world.numbers[alias.partition("/aliases/")[0]]
        if not numbers:
            return await self._publish()
        version = self._world.versions.get(alias, 0) if self._rng.random() < 0.5 else 0
        asked = MoveAlias(self._tag(), self._rng.choice(numbers[-8:]), version)
        return await self._move(alias, asked)

    async def _rollback(self) -> None:
        alias = self._alias()
        version = self._world.versions.get(alias, 0) if self._rng.random() < 0.3 else 0
        await self._move(alias, MoveAlias(self._tag(), 0, version, rollback=True))

    async def _move(self, alias: str, asked: MoveAlias) -> None:
        kind = alias_service_pb2.RollbackAliasRequest if asked.rollback else alias_service_pb2.PromoteAliasRequest
        request: Any = kind(
            name=alias,
            revision_number=asked.number,
            etag=str(asked.version) if asked.version else "",
            reason=asked.tag,
            request_id=self._maybe_id(),
        )

        async def send(rig: Rig) -> _Reply:
            method = rig.aliases.RollbackAlias if asked.rollback else rig.aliases.PromoteAlias
            answer = await self._call(rig, method, request)
            return _alias_reply(answer.alias, answer.catalog_revision)

        await self._write(alias, asked, send, again=bool(request.request_id))

    async def _update(self) -> None:
        policy = self._rng.choice(self._world.policies)
        version = self._world.versions.get(policy, 0) if self._rng.random() < 0.5 else 0
        asked = UpdateLabel(self._tag(), version)
        request = policy_service_pb2.UpdatePolicyRequest(request_id=self._maybe_id())
        request.policy.name, request.policy.etag = policy, str(version) if version else ""
        request.policy.labels[_LABEL] = asked.tag
        request.update_mask.paths.append("labels")

        async def send(rig: Rig) -> _Reply:
            answer = await self._call(rig, rig.policies.UpdatePolicy, request)
            return _Reply(Labelled(int(answer.policy.etag)), answer.catalog_revision)

        await self._write(policy, asked, send, again=bool(request.request_id))

    async def _publish(self, fence: common_pb2.Fence | None = None) -> None:
        policies = self._world.policies
        policy = policies[0] if fence else self._rng.choice(policies[1:])
        asked = Publish(self._tag())
        request = publish_service_pb2.PublishRevisionRequest(parent=policy, fence=fence, unfenced=fence is None)
        request.revision.blob.CopyFrom(self._world.blob)
        request.revision.base_digest, request.revision.lora.rank = BASE_DIGEST, 4
        request.revision.lineage.code_version = asked.tag
        request.request_id = self._maybe_id()
        again = bool(request.request_id)
        if not again and self._rng.random() < 0.5:  # the other way to make a retry safe
            again, request.revision.lineage.run = True, f"tenants/history/runs/{asked.tag}"

        async def send(rig: Rig) -> _Reply:
            answer = await self._call(rig, rig.publish.PublishRevision, request)
            revision = answer.revision
            digests = ((revision.number, revision.blob.digest),)
            return _Reply(Published(revision.number, int(revision.etag)), answer.catalog_revision, digests)

        reply = await self._write(policy, asked, send, again=again, fence=fence.token if fence else 0)
        if reply is not None:
            self._world.numbers[policy].append(reply.answer.number)

    async def _train(self) -> None:
        """Publish under a lease that is renewed now and then; one that was lost is used on for a while."""
        policy = self._world.policies[0]
        if self._fence is None or self._rng.random() < 0.05:
            asked = Acquire(f"client-{self._number}-{self._tag()}")
            request = work_service_pb2.AcquireLeaseRequest(resource=policy, holder=asked.holder)
            request.ttl.FromSeconds(_LEASE_TTL_S)
            fences: list[common_pb2.Fence] = []

            async def send(rig: Rig) -> _Reply:
                lease = (await self._call(rig, rig.work.AcquireLease, request)).lease
                fences.append(lease.fence)
                return _Reply(Granted(lease.fence.token))

            if await self._write(policy, asked, send, again=False) is not None:
                self._fence = fences[-1]
        if self._fence is None:
            return
        await self._publish(self._fence)
        chance = self._rng.random()
        if chance < 0.1:
            self._fence = None
        elif chance < 0.25:  # given back for it, and it goes on: a holder that does not know
            await self._quietly(lambda rig: rig.work.ReleaseLease, work_service_pb2.ReleaseLeaseRequest)
        elif chance < 0.5:
            await self._quietly(lambda rig: rig.work.RenewLease, work_service_pb2.RenewLeaseRequest)

    async def _quietly(self, method: Callable[[Rig], Any], request: Callable[..., Any]) -> None:
        try:
            await self._call(self._rig, method(self._rig), request(fence=self._fence))
        except MintError:
            return

    # -- reads

    async def _resolve(self) -> None:
        alias, chance = self._alias(), self._rng.random()
        freshness = STRONG if chance < 0.5 else ANY
        if chance > 0.75:
            freshness = Freshness(at_least=self._world.versions.get(alias, 0))
        request = alias_service_pb2.ResolveRequest(name=alias, consistency=_consistency(freshness))

        async def ask(rig: Rig) -> dict[str, _Reply]:
            return {alias: _resolution_reply((await self._call(rig, rig.aliases.Resolve, request)).resolution)}

        await self._read([alias], ask, freshness)

    async def _batch_resolve(self) -> None:
        aliases = [f"{policy}/aliases/{alias}" for policy in self._world.policies for alias in _ALIASES]
        request = alias_service_pb2.BatchResolveRequest(names=aliases, consistency=_consistency(STRONG))

        async def ask(rig: Rig) -> dict[str, _Reply]:
            results = (await self._call(rig, rig.aliases.BatchResolve, request)).results
            pairs = zip(aliases, results, strict=True)
            return {alias: _resolution_reply(each.resolution) for alias, each in pairs if not each.status.code}

        await self._read(aliases, ask)

    async def _get_alias(self) -> None:
        alias = self._alias()
        await self._read_alias(alias)

    async def _read_alias(self, alias: str) -> None:
        request = alias_service_pb2.GetAliasRequest(name=alias, consistency=_consistency(STRONG))

        async def ask(rig: Rig) -> dict[str, _Reply]:
            return {alias: _alias_reply((await self._call(rig, rig.aliases.GetAlias, request)).alias)}

        await self._read([alias], ask)

    async def _get_policy(self) -> None:
        policy = self._rng.choice(self._world.policies)
        await self._read_policy(policy)

    async def _read_policy(self, policy: str) -> None:
        request = policy_service_pb2.GetPolicyRequest(name=policy, consistency=_consistency(STRONG))

        async def ask(rig: Rig) -> dict[str, _Reply]:
            return {policy: _policy_reply((await self._call(rig, rig.policies.GetPolicy, request)).policy)}

        await self._read([policy], ask)

    async def _list_aliases(self) -> None:
        policy = self._rng.choice(self._world.policies)
        request = alias_service_pb2.ListAliasesRequest(parent=policy)

        async def ask(rig: Rig) -> dict[str, _Reply]:
            answer = await self._call(rig, rig.aliases.ListAliases, request)
            found = {each.name: _alias_reply(each, answer.catalog_revision) for each in answer.aliases}
            names = (f"{policy}/aliases/{alias}" for alias in _ALIASES)
            return {name: found.get(name, _Reply(None, answer.catalog_revision)) for name in names}

        await self._read([policy], ask)

    async def _list_policies(self) -> None:
        async def ask(rig: Rig) -> dict[str, _Reply]:
            found: dict[str, _Reply] = {}
            token = ""
            while True:
                request = policy_service_pb2.ListPoliciesRequest(
                    parent="tenants/history", page_size=3, page_token=token, consistency=_consistency(STRONG)
                )
                answer = await self._call(rig, rig.policies.ListPolicies, request)
                found |= {each.name: _policy_reply(each, answer.catalog_revision) for each in answer.policies}
                token = answer.next_page_token
                if not token:
                    return found

        await self._read(["tenants/history"], ask)

    async def read_everything(self) -> None:
        """The end of a history: what is there now, every revision included."""
        for policy in self._world.policies:
            await self._read_policy(policy)
            for alias in _ALIASES:
                await self._read_alias(f"{policy}/aliases/{alias}")
            await self._list_revisions(policy)

    async def _list_revisions(self, policy: str) -> None:
        async def ask(rig: Rig) -> dict[str, _Reply]:
            revisions: list[Any] = []
            token = ""
            while True:
                request = revision_service_pb2.ListRevisionsRequest(parent=policy, page_size=200, page_token=token)
                answer = await self._call(rig, rig.revisions.ListRevisions, request)
                revisions += answer.revisions
                token = answer.next_page_token
                if not token:
                    break
            listed = Listed(tuple((each.number, each.lineage.code_version, int(each.etag)) for each in revisions))
            return {policy: _Reply(listed, 0, tuple((each.number, each.blob.digest) for each in revisions))}

        await self._read([policy], ask, asked=ListRevisions())

    # -- calling and recording

    @property
    def _rig(self) -> Rig:
        return self._rigs[self._at]

    async def _call(self, rig: Rig, method: Any, request: Any) -> Any:
        return await rig.call(method, request, self._timeout_s)

    def _tag(self) -> str:
        self._num_tags += 1
        return f"c{self._number}.{self._num_tags}"

    def _alias(self) -> str:
        return f"{self._rng.choice(self._world.policies)}/aliases/{self._rng.choice(_ALIASES)}"

    def _maybe_id(self) -> str:
        return str(uuid.UUID(int=self._rng.getrandbits(128), version=4)) if self._rng.random() < 0.4 else ""

    async def _write(
        self, target: str, asked: Any, send: Callable[[Rig], Awaitable[_Reply]], *, again: bool, fence: int = 0
    ) -> _Reply | None:
        invoked_s = time.monotonic()
        reply, outcome, answer, lost = None, Outcome.UNKNOWN, None, False
        while True:
            try:
                reply = await send(self._rig)
                outcome, answer = Outcome.OK, reply.answer
            except _NO_ANSWER:
                lost = True
                if again and time.monotonic() < invoked_s + _PATIENCE_S:
                    await self._fail_over()
                    continue
            except MintError as error:
                if not lost:  # else the first try may still have been applied, or be yet
                    outcome, answer = Outcome.FAILED, error.reason
            break
        operation = Operation(self._number, asked, answer, outcome, invoked_s, time.monotonic())
        self._record(Record(target, operation, STRONG, fence=fence), reply)
        self._world.num_operations += 1
        if outcome is Outcome.UNKNOWN:
            await self._until_answered()
        return reply

    async def _read(
        self,
        targets: list[str],
        ask: Callable[[Rig], Awaitable[dict[str, _Reply]]],
        freshness: Freshness = STRONG,
        asked: Any = None,
    ) -> None:
        invoked_s = time.monotonic()
        while True:
            try:
                replies = await ask(self._rig)
                break
            except _NO_ANSWER:
                self._world.num_unanswered_reads += 1
                await self._fail_over()
                invoked_s = time.monotonic()
            except MintError as error:
                outcome = Outcome.OK if error.reason == "RESOURCE_NOT_FOUND" else Outcome.FAILED
                replies = dict.fromkeys(targets, _Reply(None if outcome is Outcome.OK else error.reason))
                break
        returned_s = time.monotonic()
        for target, reply in replies.items():
            failed = isinstance(reply.answer, str)
            outcome = Outcome.FAILED if failed else Outcome.OK
            operation = Operation(self._number, asked or Read(), reply.answer, outcome, invoked_s, returned_s)
            self._record(Record(target, operation, freshness), reply)
        self._world.num_operations += 1

    def _record(self, record: Record, reply: _Reply | None) -> None:
        if reply is not None:
            record = Record(
                record.target, record.operation, record.freshness, reply.catalog_revision, record.fence, reply.digests
            )
            version = getattr(reply.answer, "version", 0)
            if version and not isinstance(reply.answer, Published):
                self._world.saw(record.target, version)
        self._world.history.records.append(record)

    async def _fail_over(self) -> None:
        self._at = (self._at + 1) % len(self._rigs)
        await asyncio.sleep(self._rng.uniform(0.02, 0.08))

    async def _until_answered(self) -> None:
        """Go on when some catalog answers again: who gets no answer does not ask for more."""
        request = policy_service_pb2.GetPolicyRequest(name=self._world.policies[0], consistency=_consistency(STRONG))
        while True:
            await self._fail_over()
            try:
                await self._call(self._rig, self._rig.policies.GetPolicy, request)
            except _NO_ANSWER:
                continue
            return


def _consistency(freshness: Freshness) -> common_pb2.Consistency:
    if freshness.strong:
        return common_pb2.Consistency(strong=True)
    if freshness.at_least:
        return common_pb2.Consistency(min_catalog_revision=freshness.at_least)
    return common_pb2.Consistency()


def _alias_reply(alias: Any, catalog_revision: int = 0) -> _Reply:
    history = tuple(Entry(each.target.revision_number, each.attribution.reason) for each in alias.history)
    assert history
    assert history[0].number == alias.active.revision_number, f"{alias.name} is not at the top of its own history"
    digests = tuple((each.target.revision_number, each.target.digest) for each in alias.history)
    return _Reply(AliasSeen(int(alias.etag), history), catalog_revision, digests)


def _resolution_reply(resolution: Any) -> _Reply:
    number = int(resolution.revision.rpartition("/")[2])
    answer = NumberSeen(number, resolution.catalog_revision)
    return _Reply(answer, resolution.catalog_revision, ((number, resolution.blob.digest),))


def _policy_reply(policy: Any, catalog_revision: int = 0) -> _Reply:
    answer = PolicySeen(policy.labels[_LABEL], policy.next_revision_number, int(policy.etag))
    return _Reply(answer, catalog_revision)
