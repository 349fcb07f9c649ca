"""One request id, sent many times at once through two catalogs, and again after its answer was lost: applied once."""

from __future__ import annotations

import asyncio
import signal
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mint_api.runtime.v1 import publish_service_pb2
from mint_api.v1 import alias_service_pb2, policy_service_pb2, revision_service_pb2, run_service_pb2
from mint_core import errors
from support.catalog_rig import BASE, BASE_DIGEST, CatalogProcess, Rig, running_catalog
from support.etcd import EtcdServer, running_etcd

NUM_TIMES = 50
Send = Callable[[Rig], Awaitable[Any]]


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with running_etcd(in_memory=True) as server:
        yield server


async def _promote(rig: Rig, policy: str, request_id: str) -> Send:
    await rig.promote(policy, 1)
    request = alias_service_pb2.PromoteAliasRequest(
        name=f"{policy}/aliases/live", revision_number=2, request_id=request_id
    )
    return lambda rig: rig.call(rig.aliases.PromoteAlias, request)


async def _rollback(rig: Rig, policy: str, request_id: str) -> Send:
    await rig.promote(policy, 1)
    await rig.promote(policy, 2)
    request = alias_service_pb2.RollbackAliasRequest(name=f"{policy}/aliases/live", request_id=request_id)
    return lambda rig: rig.call(rig.aliases.RollbackAlias, request)


async def _delete_alias(rig: Rig, policy: str, request_id: str) -> Send:
    await rig.promote(policy, 1)
    request = alias_service_pb2.DeleteAliasRequest(name=f"{policy}/aliases/live", request_id=request_id)
    return lambda rig: rig.call(rig.aliases.DeleteAlias, request)


async def _publish(rig: Rig, policy: str, request_id: str) -> Send:
    request = publish_service_pb2.PublishRevisionRequest(parent=policy, unfenced=True, request_id=request_id)
    request.revision.blob.CopyFrom(await rig.blob(policy, "three"))
    request.revision.base_digest, request.revision.lora.rank = BASE_DIGEST, 4
    return lambda rig: rig.call(rig.publish.PublishRevision, request)


async def _update(rig: Rig, policy: str, request_id: str) -> Send:
    request = policy_service_pb2.UpdatePolicyRequest(request_id=request_id)
    request.policy.name, request.policy.labels["team"] = policy, "search"
    request.update_mask.paths.append("labels")
    return lambda rig: rig.call(rig.policies.UpdatePolicy, request)


async def _create(rig: Rig, policy: str, request_id: str) -> Send:
    request = policy_service_pb2.CreatePolicyRequest(
        parent=policy.partition("/policies/")[0],
        policy_id="another",
        policy=policy_service_pb2.Policy(base_model=BASE),
        request_id=request_id,
    )
    return lambda rig: rig.call(rig.policies.CreatePolicy, request)


async def _delete(rig: Rig, policy: str, request_id: str) -> Send:
    request = policy_service_pb2.DeletePolicyRequest(name=policy, request_id=request_id)
    return lambda rig: rig.call(rig.policies.DeletePolicy, request)


async def _run(rig: Rig, policy: str, request_id: str) -> Send:
    run = run_service_pb2.Run(policy=policy, sft=run_service_pb2.SftRecipe(num_steps=10))
    run.sft.train_data.CopyFrom(await rig.blob(policy, "{}"))
    request = run_service_pb2.CreateRunRequest(parent=policy.partition("/policies/")[0], run=run, request_id=request_id)
    return lambda rig: rig.call(rig.runs.CreateRun, request)


WRITES = {
    "promote": _promote,
    "roll back": _rollback,
    "delete alias": _delete_alias,
    "publish": _publish,
    "update": _update,
    "create": _create,
    "delete": _delete,
    "create run": _run,
}


async def _two_revisions(rig: Rig) -> str:
    policy = await rig.policy()
    await rig.revision(policy, "one")
    await rig.revision(policy, "two")
    return policy


async def _num_revisions(rig: Rig, policy: str) -> int:
    listed = await rig.call(rig.revisions.ListRevisions, revision_service_pb2.ListRevisionsRequest(parent=policy))
    return len(listed.revisions)


async def _num_moves(rig: Rig, policy: str) -> int:
    get = alias_service_pb2.GetAliasRequest(name=f"{policy}/aliases/live")
    return len((await rig.call(rig.aliases.GetAlias, get)).alias.history)


async def _num_runs(rig: Rig, policy: str) -> int:
    request = run_service_pb2.ListRunsRequest(parent=policy.partition("/policies/")[0])
    return len((await rig.call(rig.runs.ListRuns, request)).runs)


async def test_fifty_at_once_apply_once(etcd: EtcdServer) -> None:
    async with running_catalog(etcd) as one, running_catalog(etcd) as two:
        for name, make in WRITES.items():
            policy = await _two_revisions(one)
            send = await make(one, policy, str(uuid.uuid4()))
            sending = (send(one if number % 2 else two) for number in range(NUM_TIMES))
            answers = await asyncio.gather(*sending)
            assert all(answer == answers[0] for answer in answers), name
            assert await send(two) == answers[0], f"{name}: a late repeat is answered the same"
            match name:
                case "promote" | "roll back":
                    assert await _num_moves(one, policy) == {"promote": 2, "roll back": 3}[name]
                case "publish":
                    assert await _num_revisions(one, policy) == 3
                case "create run":
                    assert await _num_runs(one, policy) == 1


async def test_fifty_at_once_with_two_payloads(etcd: EtcdServer) -> None:
    """One of the two is applied, the other one is told so."""
    async with running_catalog(etcd) as one, running_catalog(etcd) as two:
        policy = await _two_revisions(one)
        request_id = str(uuid.uuid4())
        requests = [
            alias_service_pb2.PromoteAliasRequest(
                name=f"{policy}/aliases/live", revision_number=number, request_id=request_id
            )
            for number in (1, 2)
        ]

        def send(number: int) -> Awaitable[Any]:
            rig = one if number % 4 < 2 else two
            return rig.call(rig.aliases.PromoteAlias, requests[number % 2])

        answers = await asyncio.gather(*map(send, range(NUM_TIMES)), return_exceptions=True)
        refused = [type(answer) for answer in answers if isinstance(answer, BaseException)]
        assert refused == [errors.RequestIdReused] * (NUM_TIMES // 2)
        assert await _num_moves(one, policy) == 1


@pytest.mark.parametrize("point", ["catalog.alias.before", "catalog.alias.after"])
@pytest.mark.parametrize("write", ["promote", "roll back"])
async def test_killed_in_mid_move(etcd: EtcdServer, tmp_path: Path, point: str, write: str) -> None:
    """The catalog dies with the move decided or done; fifty repeats at once through the other one apply it once."""
    async with running_catalog(etcd) as survivor:
        policy = await _two_revisions(survivor)
        send = await WRITES[write](survivor, policy, str(uuid.uuid4()))
        num_before = await _num_moves(survivor, policy)
        catalog = CatalogProcess(etcd, tmp_path / "catalog.log", MINT_FAILPOINTS=f"{point}=kill")
        try:
            await catalog.start()
            async with catalog.rig() as rig:
                with pytest.raises(errors.Unavailable):
                    await send(rig)
                assert catalog.wait_for_death() == -signal.SIGKILL
        finally:
            catalog.stop()
        assert await _num_moves(survivor, policy) == num_before + point.endswith("after")
        answers = await asyncio.gather(*(send(survivor) for _ in range(NUM_TIMES)))
        assert all(answer == answers[0] for answer in answers)
        assert await _num_moves(survivor, policy) == num_before + 1
