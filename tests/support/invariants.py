"""The invariants every fault test ends with, asked of a running installation.

I1 an alias never names a revision whose blob is absent or unverified; I2 revision → digest never changes; I4 the
revision reported is the revision that generated; I7 references return to zero.
"""

from __future__ import annotations

import asyncio

from mint_api.runtime.v1 import (
    engine_service_pb2,
    engine_service_pb2_grpc,
    publish_service_pb2,
    publish_service_pb2_grpc,
)
from mint_api.v1 import common_pb2
from mint_client import MintClient
from mint_core.channel import call
from support.publishing import answer
from support.stack import Stack

STRONG = common_pb2.Consistency(strong=True)


class Invariants:
    """Remembers what was seen, so that nothing may change behind the test's back."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._digests: dict[str, str] = {}

    async def check(self, client: MintClient, policies: list[str]) -> None:
        """Raise AssertionError naming the invariant that does not hold."""
        async with self._stack.channel("catalog") as channel:
            publish = publish_service_pb2_grpc.PublishServiceStub(channel)
            for policy in policies:
                await self._check_policy(client, publish, policy)
        await self._check_references()

    async def _check_policy(
        self, client: MintClient, publish: publish_service_pb2_grpc.PublishServiceStub, policy: str
    ) -> None:
        numbers = []
        async for revision in client.revisions.list(policy):
            numbers.append(revision.number)
            known = self._digests.setdefault(f"{policy}@{revision.policy_uid}/{revision.number}", revision.blob.digest)
            assert known == revision.blob.digest, f"I2: {revision.name} changed from {known} to {revision.blob.digest}"
        assert numbers == sorted(set(numbers)), f"I2: numbers of {policy} repeat: {numbers}"
        for alias in await client.aliases.list(policy):
            assert alias.active.revision_number in numbers, f"I1: {alias.name} names an unknown revision"
            name = f"{'/'.join(policy.split('/')[:2])}/blobs/{alias.active.digest}"
            blob = (await call(publish.GetBlob, publish_service_pb2.GetBlobRequest(name=name))).blob
            assert blob.state == publish_service_pb2.BLOB_STATE_VERIFIED, f"I1: {alias.name} names an unverified blob"
            resolution = await client.aliases.resolve(alias.name, consistency=STRONG)
            assert resolution.blob.digest == alias.active.digest, f"I1: {alias.name} resolves to another digest"
            said = await answer(client, alias.name)
            assert said.digest == alias.active.digest, f"I4: {alias.name} was answered by {said.digest}"

    async def _check_references(self) -> None:
        async with self._stack.channel("engine") as channel:
            engine = engine_service_pb2_grpc.EngineServiceStub(channel)
            for _ in range(50):
                residency = await call(engine.GetResidency, engine_service_pb2.GetResidencyRequest())
                held = [adapter.digest for adapter in residency.adapters if adapter.num_references]
                if not held and residency.num_running == 0:
                    return
                await asyncio.sleep(0.1)
        raise AssertionError(f"I7: references never returned to zero: {held}")
