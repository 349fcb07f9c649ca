"""Canaries, gates and promotions that wait, as callers see them: the catalog over a real etcd, what inference makes of
its answers, and the engine's own registration."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from mint_api.v1 import alias_service_pb2 as alias_pb
from mint_api.v1 import common_pb2
from mint_api.v1 import engine_replica_service_pb2 as replica_pb
from mint_api.v1 import evaluation_service_pb2 as evaluation_pb
from mint_core import errors
from mint_core.channel import connect
from mint_core.names import AliasName
from mint_engine.adapter_folder import AdapterFolder
from mint_engine.host import EngineHost
from mint_engine.registration import Registration
from mint_engine.replica import Replica
from mint_inference.clients import CatalogClient
from mint_inference.model import Consistency
from mint_inference.resolver import Resolver, ResolverLimits
from support.catalog_rig import BASE, BASE_DIGEST, Rig, digest_of, running_catalog
from support.etcd import EtcdServer, running_etcd
from support.fake_engine import FakeEngine, FakePrompts

KEYS = [f"user-{number}" for number in range(100)]


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with running_etcd() as server:
        yield server


@pytest.fixture
async def rig(etcd: EtcdServer) -> AsyncIterator[Rig]:
    async with running_catalog(etcd) as running:
        yield running


async def _policy(rig: Rig) -> str:
    """A policy with two revisions, ``live`` at the first."""
    policy = await rig.policy()
    await rig.revision(policy, "one")
    await rig.revision(policy, "two")
    await rig.promote(policy, 1)
    return policy


async def _alias(rig: Rig, policy: str) -> alias_pb.Alias:
    request = alias_pb.GetAliasRequest(name=f"{policy}/aliases/live")
    alias: alias_pb.Alias = (await rig.call(rig.aliases.GetAlias, request)).alias
    return alias


async def _set_canary(rig: Rig, policy: str, weight: float, number: int = 2, **fields: Any) -> alias_pb.Alias:
    canary = alias_pb.Canary(target=alias_pb.AliasTarget(revision_number=number), weight=weight)
    request = alias_pb.SetCanaryRequest(name=f"{policy}/aliases/live", canary=canary, **fields)
    alias: alias_pb.Alias = (await rig.call(rig.aliases.SetCanary, request)).alias
    return alias


async def _set_gate(rig: Rig, policy: str, **condition: Any) -> alias_pb.Alias:
    gate = alias_pb.Gate(conditions=[alias_pb.GateCondition(scorer="exact", metric="score", **condition)])
    request = alias_pb.SetGateRequest(name=f"{policy}/aliases/live", gate=gate)
    alias: alias_pb.Alias = (await rig.call(rig.aliases.SetGate, request)).alias
    return alias


async def _evaluate(rig: Rig, policy: str, number: int, score: float) -> int:
    evaluation = evaluation_pb.Evaluation(
        revision=f"{policy}/revisions/{number}", scorer="exact", num_examples=100, metrics={"score": score}
    )
    request = evaluation_pb.CreateEvaluationRequest(
        parent=policy, evaluation_id=f"e{uuid.uuid4().hex[:8]}", evaluation=evaluation
    )
    return int((await rig.call(rig.evaluations.CreateEvaluation, request)).catalog_revision)


async def test_resolve_splits_by_sticky_key(rig: Rig) -> None:
    policy = await _policy(rig)
    seen: list[set[str]] = []
    for weight in (0.2, 0.4):
        alias = await _set_canary(rig, policy, weight)
        assert alias.canary.salt == alias.name
        assert alias.canary_resolution.revision == f"{policy}/revisions/2"
        chosen = set()
        for key in KEYS:
            request = alias_pb.ResolveRequest(name=alias.name, sticky_key=key)
            resolution = (await rig.call(rig.aliases.Resolve, request)).resolution
            assert resolution.canary == (resolution.revision == f"{policy}/revisions/2")
            assert resolution.split.canary.revision == f"{policy}/revisions/2"
            if resolution.canary:
                chosen.add(key)
        seen.append(chosen)
    assert 0 < len(seen[0]) < len(seen[1]) < len(KEYS)
    assert seen[0] < seen[1]
    assert not (await rig.resolve(policy)).canary
    cleared = await rig.call(rig.aliases.SetCanary, alias_pb.SetCanaryRequest(name=alias.name, reason="enough"))
    assert not cleared.alias.HasField("canary")
    assert not (await rig.resolve(policy)).HasField("split")


async def test_inference_splits_as_the_catalog_does_and_hears_of_the_canary_by_the_watch(rig: Rig) -> None:
    policy = await _policy(rig)
    live = AliasName.parse(f"{policy}/aliases/live")
    num_asked = asked_before = 0
    async with connect(rig.public_address) as channel:
        client = CatalogClient(channel)
        resolve = client.resolve

        async def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_asked
            num_asked += 1
            return await resolve(*args, **kwargs)

        client.resolve = counting  # type: ignore[method-assign]
        resolver = Resolver(client, ResolverLimits())
        following = asyncio.create_task(resolver.follow())

        async def canaries() -> set[str]:
            answers = {key: await resolver.resolve(live, key, Consistency()) for key in KEYS}
            assert all(each.revision.endswith("/2") for each in answers.values() if each.canary)
            assert not (await resolver.resolve(live, "", Consistency())).canary
            return {key for key, answer in answers.items() if answer.canary}

        async def until_canaries(wanted: bool) -> set[str]:
            async with asyncio.timeout(10):
                while bool(found := await canaries()) != wanted:  # noqa: ASYNC110 - told by the watch
                    await asyncio.sleep(0.02)
                return found

        async with asyncio.timeout(10):
            while not num_asked or num_asked > asked_before:
                asked_before = num_asked
                await canaries()
                await asyncio.sleep(0.1)
        asked_before = num_asked
        await _set_canary(rig, policy, 0.3)
        found = await until_canaries(True)
        asked = {
            key
            for key in KEYS
            if (
                await rig.call(rig.aliases.Resolve, alias_pb.ResolveRequest(name=str(live), sticky_key=key))
            ).resolution.canary
        }
        assert found == asked
        await rig.promote(policy, 2)
        assert await until_canaries(False) == set()
        assert num_asked - asked_before <= 1, "the watch told everything"
        strong = await resolver.resolve(live, "ada", Consistency(strong=True))
        assert (strong.revision, strong.canary) == (f"{policy}/revisions/2", False)
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following
        await resolver.close()


async def test_a_gate_keeps_a_promotion_back_and_takes_a_canary_back(rig: Rig) -> None:
    policy = await _policy(rig)
    await _set_gate(rig, policy, min_value=0.5, max_regression=0.1, min_examples=50)
    with pytest.raises(errors.GateNotMet) as missing:
        await rig.promote(policy, 2)
    assert missing.value.metadata["actual"] == "no evaluation"
    await _set_canary(rig, policy, 0.5)
    events = rig.stream(
        rig.aliases.WatchAliases,
        alias_pb.WatchAliasesRequest(parent=policy, start_after_catalog_revision=int((await _alias(rig, policy)).etag)),
    )
    await _evaluate(rig, policy, 1, 0.9)
    broken_at = await _evaluate(rig, policy, 2, 0.7)
    alias = await _alias(rig, policy)
    assert not alias.HasField("canary")
    assert alias.history[0].rolled_back_canary
    assert alias.history[0].attribution.principal == "catalog"
    assert "0.7" in alias.history[0].attribution.reason
    async with asyncio.timeout(10), contextlib.aclosing(events):
        async for event in events:
            if event.type == common_pb2.WATCH_EVENT_TYPE_PUT:
                assert event.catalog_revision == broken_at
                assert not event.alias.HasField("canary")
                break
    with pytest.raises(errors.GateNotMet) as refused:
        await _set_canary(rig, policy, 0.5)
    assert refused.value.metadata["resource"] == alias.name
    with pytest.raises(errors.GateNotMet):
        await rig.promote(policy, 2)
    forced = alias_pb.PromoteAliasRequest(name=alias.name, revision_number=2, ignore_gate=True, reason="fire")
    promoted = (await rig.call(rig.aliases.PromoteAlias, forced)).alias
    assert promoted.history[0].attribution.reason.startswith("fire (ignoring the gate: ")
    cleared = (await rig.call(rig.aliases.SetGate, alias_pb.SetGateRequest(name=alias.name))).alias
    assert not cleared.HasField("gate")


@pytest.mark.parametrize(
    ("request_type", "fields", "field"),
    [
        ("SetCanary", {"name": "x"}, "name"),
        ("SetCanary", {"canary": {}}, "canary.target.revision_number"),
        ("SetCanary", {"canary": {"target": {"revision_number": 2}}}, "canary.weight"),
        ("SetCanary", {"canary": {"target": {"revision_number": 2}, "weight": float("nan")}}, "canary.weight"),
        ("SetCanary", {"canary": {"target": {"revision_number": 1}, "weight": 1}}, "canary.target.revision_number"),
        ("SetCanary", {"request_id": "x"}, "request_id"),
        ("SetGate", {"name": "x"}, "name"),
        ("SetGate", {"gate": {}}, "gate.conditions"),
        ("SetGate", {"gate": {"conditions": [{"metric": "score"}]}}, "gate.conditions[0].scorer"),
        ("SetGate", {"gate": {"conditions": [{"scorer": "exact"}]}}, "gate.conditions[0].metric"),
        ("PromoteAlias", {"revision_number": 2, "ignore_gate": True}, "reason"),
        ("PromoteAlias", {"revision_number": 2, "min_resident_replicas": -1}, "min_resident_replicas"),
        (
            "PromoteAlias",
            {"revision_number": 2, "min_resident_replicas": 1, "residency_timeout": {"seconds": 3601}},
            "residency_timeout",
        ),
        (
            "PromoteAlias",
            {"revision_number": 2, "min_resident_replicas": 1, "residency_timeout": {"seconds": -1}},
            "residency_timeout",
        ),
    ],
)
async def test_bad_requests_name_their_field(rig: Rig, request_type: str, fields: dict[str, Any], field: str) -> None:
    policy = await _policy(rig)
    before = await _alias(rig, policy)
    request = getattr(alias_pb, f"{request_type}Request")(**({"name": before.name} | fields))
    with pytest.raises(errors.InvalidArgument) as refused:
        await rig.call(getattr(rig.aliases, request_type), request)
    assert refused.value.field == field
    assert await _alias(rig, policy) == before


async def test_no_tenant_sets_anothers_canary(rig: Rig) -> None:
    policy = await _policy(rig)
    other = policy.replace("tenants/", "tenants/x", 1)
    for call in (_set_canary(rig, other, 0.5), _set_gate(rig, other)):
        with pytest.raises(errors.NotFound):
            await call


@contextlib.asynccontextmanager
async def _engine(rig: Rig, ttl_s: float) -> AsyncIterator[tuple[EngineHost, str]]:
    """An engine host and its registration in the catalog."""

    def check(folder: str, digest: str) -> AdapterFolder:
        return AdapterFolder(Path(folder), rank=4, num_tensors=2, size_bytes=10)

    host = EngineHost(FakeEngine(), FakePrompts(), check)
    name = f"engineReplicas/e{uuid.uuid4().hex[:8]}"
    async with connect(rig.runtime_address) as channel:
        # The address must answer; which service it is does not matter here.
        replica = Replica(host, name, rig.runtime_address, BASE, BASE_DIGEST, "")
        registration = Registration(channel, replica, ttl_s=ttl_s)
        running = asyncio.create_task(registration.run())
        async with asyncio.timeout(10):
            while not registration.is_registered:  # noqa: ASYNC110 - another task's doing
                await asyncio.sleep(0.02)
        yield host, name
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    await host.close()


async def test_a_promotion_waits_until_engines_hold_the_adapter(rig: Rig) -> None:
    policy = await _policy(rig)
    request = alias_pb.PromoteAliasRequest(
        name=f"{policy}/aliases/live", revision_number=2, min_resident_replicas=2, reason="waited"
    )
    async with _engine(rig, 2.0) as (first, _), _engine(rig, 2.0) as (second, _):
        await first.load(digest_of("two"), "two")
        waiting = asyncio.create_task(rig.call(rig.aliases.PromoteAlias, request))
        await asyncio.sleep(0.8)
        assert not waiting.done()
        assert (await _alias(rig, policy)).active.revision_number == 1
        await second.load(digest_of("two"), "two")
        promoted = (await waiting).alias
        assert promoted.active.revision_number == 2
        assert promoted.history[0].attribution.reason == "waited"


async def test_a_promotion_that_waits_in_vain_changes_nothing(rig: Rig) -> None:
    policy = await _policy(rig)
    before = await _alias(rig, policy)
    request = alias_pb.PromoteAliasRequest(name=before.name, revision_number=2, min_resident_replicas=1)
    request.residency_timeout.FromMilliseconds(300)
    with pytest.raises(errors.DeadlineExceeded) as missed:
        await rig.call(rig.aliases.PromoteAlias, request)
    assert "nothing was changed" in missed.value.message
    request.residency_timeout.FromSeconds(3600)
    with pytest.raises(errors.DeadlineExceeded):
        await rig.call(rig.aliases.PromoteAlias, request, timeout_s=0.5)
    assert await _alias(rig, policy) == before


async def test_an_engine_that_stops_serving_does_not_count(rig: Rig) -> None:
    policy = await _policy(rig)
    request = alias_pb.PromoteAliasRequest(name=f"{policy}/aliases/live", revision_number=2, min_resident_replicas=1)
    request.residency_timeout.FromSeconds(1)
    async with _engine(rig, 2.0) as (host, name):
        await host.load(digest_of("two"), "two")
        host.begin_drain()
        async with asyncio.timeout(10):
            while True:
                got = await rig.call(rig.replicas.GetEngineReplica, replica_pb.GetEngineReplicaRequest(name=name))
                if got.engine_replica.state == replica_pb.ENGINE_REPLICA_STATE_DRAINING:
                    break
                await asyncio.sleep(0.05)
        with pytest.raises(errors.DeadlineExceeded):
            await rig.call(rig.aliases.PromoteAlias, request)
