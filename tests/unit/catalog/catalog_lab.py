"""The catalog's domain over the in-memory store, with the steps that most tests begin with."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any

from unit.catalog.memory_store import MemoryStore

from mint_catalog.model.codecs import MessageCodecs
from mint_catalog.model.keys import Keys
from mint_catalog.model.records import Alias, BaseModel, BlobRef, Fence, Lineage, LoraConfig, Policy, Revision, Rollout
from mint_catalog.model.run_records import EvaluationRecipe, Run, SftRecipe
from mint_catalog.model.tables import Tables
from mint_catalog.policies.base_models import BaseModels
from mint_catalog.policies.blobs import Blobs
from mint_catalog.policies.evaluations import Evaluations
from mint_catalog.policies.heads import Policies
from mint_catalog.policies.revisions import Revisions
from mint_catalog.policies.rollouts import Rollouts
from mint_catalog.serving.aliases import Aliases, Move
from mint_catalog.serving.cache import AliasCache
from mint_catalog.serving.registry import Registry
from mint_catalog.serving.resolve import Resolver
from mint_catalog.storage.draft import Written
from mint_catalog.storage.recent import Recent
from mint_catalog.storage.requests import Request
from mint_catalog.storage.signals import Signal
from mint_catalog.storage.store import Store
from mint_catalog.storage.watch import Hub
from mint_catalog.work.leases import Leases
from mint_catalog.work.queue import Claim, RunQueue
from mint_catalog.work.runs import Runs
from mint_core.names import (
    AliasName,
    BaseModelName,
    BlobName,
    PolicyName,
    RevisionName,
    RolloutName,
    RunName,
    TenantName,
)

__all__ = ["BASE", "BASE_DIGEST", "POLICY", "TENANT", "Lab", "digest_of", "rollout"]

TENANT = TenantName("acme")
POLICY = PolicyName("acme", "tone")
BASE = BaseModelName("tiny")
BASE_DIGEST = "sha256:" + "b" * 64


def digest_of(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def rollout(rollout_id: str = "r1-1", **changes: object) -> Rollout:
    """The rollout of step 1 of the run r1, sampled from the policy's first revision."""
    fields: dict[str, object] = {
        "revision": f"{POLICY}/revisions/1",
        "run": "tenants/acme/runs/r1",
        "step": 1,
        "object_key": f"tenants/acme/rollouts/tone/r1/{rollout_id}.safetensors",
        "blob": BlobRef(digest_of(rollout_id), 1000),
        "num_samples": 8,
        "num_unscored": 1,
        "num_tokens": 100,
        "reward_mean": 0.5,
        "expire_time": datetime(2026, 1, 2, tzinfo=UTC),
    }
    return Rollout(RolloutName("acme", "tone", rollout_id), **(fields | changes))  # type: ignore[arg-type]


class Lab:
    """The domain over a store: the in-memory one unless another is given."""

    def __init__(
        self,
        store: Store | None = None,
        *,
        prefix: str = "/mint/v1/",
        max_attempts: int = 3,
        backoff_s: float = 0.0,
    ) -> None:
        self.store: Any = MemoryStore() if store is None else store
        self.keys = Keys(prefix)
        self.codecs = MessageCodecs.over(self.keys)
        self.tables = Tables(self.keys, self.codecs.for_store())
        self.signal = Signal()
        self.base_models = BaseModels(self.store, self.tables)
        self.policies = Policies(self.store, self.tables)
        self.revisions = Revisions(self.store, self.tables)
        self.recent = Recent(max_records=1000)  # nobody runs the hub here: others' writes make it stale
        self.aliases = Aliases(self.store, self.tables, recent=self.recent)
        self.hub = Hub(self.store, self.keys)
        self.cache = AliasCache(self.keys, self.hub, max_entries=1000, staleness_s=5.0)
        self.hub.listen("aliases", self.cache)
        self.resolver = Resolver(self.store, self.tables, self.cache)
        self.blobs = Blobs(self.store, self.tables)
        self.leases = Leases(self.store, self.tables)
        self.runs = Runs(self.store, self.tables)
        self.queue = RunQueue(
            self.store, self.tables, self.signal, max_attempts=max_attempts, backoff_s=backoff_s, backoff_max_s=300.0
        )
        self.registry = Registry(self.store, self.tables)
        self.evaluations = Evaluations(self.store, self.tables)
        self.rollouts = Rollouts(self.store, self.tables)

    async def base_model(self) -> None:
        await self.base_models.register(BaseModel(BASE, digest=BASE_DIGEST, size_bytes=10))

    async def policy(self, name: PolicyName = POLICY, request: Request | None = None) -> Written[Policy]:
        await self.base_model()
        return await self.policies.create(name, Policy(name, base_model=str(BASE)), request)

    async def blob(self, text: str, tenant: str = "acme") -> BlobRef:
        """A verified blob."""
        blob = BlobRef(digest_of(text), len(text))
        name = BlobName(tenant, blob.digest)
        record = await self.blobs.stage(name, blob.size_bytes)
        await self.blobs.verify(name, record.object_key)
        return blob

    async def publish(
        self,
        text: str,
        fence: Fence | None = None,
        *,
        policy: PolicyName = POLICY,
        run: str = "",
        step: int = 0,
        request: Request | None = None,
    ) -> Written[Revision]:
        """Publish a verified blob with these bytes."""
        wanted = Revision(
            RevisionName(policy.tenant, policy.policy, 1),
            blob=await self.blob(text, policy.tenant),
            base_digest=BASE_DIGEST,
            lora=LoraConfig(rank=4),
            lineage=Lineage(run=run, step=step),
        )
        return await self.revisions.publish(policy, wanted, fence, unfenced=fence is None, request=request)

    def move(self, number: int, *, alias: str = "live", etag: str = "", reason: str = "") -> Move:
        return Move(AliasName("acme", "tone", alias), number, etag, reason, "ada")

    async def promote(self, number: int, *, alias: str = "live", etag: str = "") -> Written[Alias]:
        return await self.aliases.promote(self.move(number, alias=alias, etag=etag))

    async def run(self, run_id: str = "r1", *, policy: PolicyName = POLICY, **changes: object) -> Written[Run]:
        """Queue an SFT run."""
        data = await self.blob("{}")
        fields: dict[str, object] = {"policy": str(policy), "sft": SftRecipe(train_data=data, num_steps=10)}
        wanted = Run(RunName("acme", "ignored"), **(fields | changes))  # type: ignore[arg-type]
        return await self.runs.create(TENANT, run_id, wanted)

    async def evaluation(self, run_id: str = "e1", **changes: object) -> Written[Run]:
        """Queue an evaluation of the policy's first revision."""
        recipe = EvaluationRecipe(f"{POLICY}/revisions/1", await self.blob("{}"), "exact_match")
        return await self.run(run_id, sft=None, evaluation=recipe, **changes)

    async def fence(self, holder: str = "worker-1", ttl_s: int = 30) -> Fence:
        """The fence of the policy's lease."""
        held = await self.leases.acquire(POLICY, holder, ttl_s)
        return Fence(str(POLICY), held.token)

    async def claim(self, holder: str = "worker-1", ttl_s: int = 30) -> Claim | None:
        return await self.queue.claim(BASE, holder, ttl_s, wait_s=0)

    async def claimed(self, holder: str = "worker-1") -> tuple[Claim, Fence]:
        claim = await self.claim(holder)
        assert claim is not None
        return claim, Fence(str(claim.resource), claim.holder.token)
