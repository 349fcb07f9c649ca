"""The invariants every fault test ends with, asked of a running installation.

I1 an alias never names a revision whose blob is absent or unverified; I2 revision → digest never changes; I4 the
revision reported is the revision that generated, in an answer and in a rollout; I7 references return to zero. Of runs:
a step is published once, and one that succeeded has done all its steps.
"""

from __future__ import annotations

import asyncio

from mint_api.runtime.v1 import (
    engine_service_pb2,
    engine_service_pb2_grpc,
    publish_service_pb2,
    publish_service_pb2_grpc,
)
from mint_api.v1 import common_pb2, run_service_pb2
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
        # Before the revisions: what is sampled or promoted while this looks names revisions that are listed after it.
        aliases = await client.aliases.list(policy)
        rollouts = [rollout async for rollout in client.rollouts.list(policy)]
        numbers = []
        published: dict[tuple[str, int], str] = {}
        digests: dict[str, str] = {}
        async for revision in client.revisions.list(policy):
            numbers.append(revision.number)
            digests[revision.name] = revision.blob.digest
            lineage = revision.lineage
            if lineage.run:
                first = published.setdefault((lineage.run, lineage.step), revision.name)
                assert first == revision.name, (
                    f"step {lineage.step} of {lineage.run} was published twice: {first} and {revision.name}"
                )
            known = self._digests.setdefault(f"{policy}@{revision.policy_uid}/{revision.number}", revision.blob.digest)
            assert known == revision.blob.digest, f"I2: {revision.name} changed from {known} to {revision.blob.digest}"
        assert numbers == sorted(set(numbers)), f"I2: numbers of {policy} repeat: {numbers}"
        for rollout in rollouts:
            assert rollout.revision in digests, f"I4: {rollout.name} names {rollout.revision}, which does not exist"
            assert rollout.revision_digest == digests[rollout.revision], (
                f"I4: {rollout.name} names {rollout.revision} with {rollout.revision_digest}, it has "
                f"{digests[rollout.revision]}"
            )
        async for run in client.runs.list(policy.split("/")[1], policy=policy):
            recipe = run.WhichOneof("recipe")
            if run.state == run_service_pb2.RUN_STATE_SUCCEEDED and recipe != "evaluation":
                planned = getattr(run, recipe).num_steps
                assert run.progress.step == planned, f"{run.name} succeeded at step {run.progress.step} of {planned}"
        for alias in aliases:
            assert alias.active.revision_number in numbers, f"I1: {alias.name} names an unknown revision"
            name = f"{'/'.join(policy.split('/')[:2])}/blobs/{alias.active.digest}"
            blob = (await call(publish.GetBlob, publish_service_pb2.GetBlobRequest(name=name))).blob
            assert blob.state == publish_service_pb2.BLOB_STATE_VERIFIED, f"I1: {alias.name} names an unverified blob"
            resolution = await client.aliases.resolve(alias.name, consistency=STRONG)
            said = await answer(client, alias.name)
            if (await client.aliases.get(alias.name)).etag == alias.etag:  # else it moved while this looked
                assert resolution.blob.digest == alias.active.digest, f"I1: {alias.name} resolves to another digest"
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
