"""A catalog over a real etcd, in this process or in one of its own, and short ways to call it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from mint_api.runtime.v1 import (
    publish_service_pb2,
    publish_service_pb2_grpc,
    registry_service_pb2_grpc,
    usage_report_service_pb2_grpc,
    work_service_pb2,
    work_service_pb2_grpc,
)
from mint_api.v1 import (
    alias_service_pb2,
    alias_service_pb2_grpc,
    audit_service_pb2_grpc,
    base_model_service_pb2,
    base_model_service_pb2_grpc,
    common_pb2,
    engine_replica_service_pb2_grpc,
    evaluation_service_pb2_grpc,
    policy_service_pb2,
    policy_service_pb2_grpc,
    revision_service_pb2_grpc,
    rollout_service_pb2,
    rollout_service_pb2_grpc,
    run_service_pb2,
    run_service_pb2_grpc,
    usage_service_pb2_grpc,
)
from mint_catalog.app import catalog
from mint_catalog.settings import CatalogSettings
from mint_core.channel import call, connect, stream
from mint_core.errors import MintError
from mint_core.server import running
from support.children import dying_with_parent
from support.etcd import EtcdCluster, EtcdServer

__all__ = ["BASE", "BASE_DIGEST", "CatalogProcess", "Rig", "connected", "digest_of", "running_catalog"]

BASE = "baseModels/tiny"
BASE_DIGEST = "sha256:" + "b" * 64


def digest_of(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


class Rig:
    """Stubs of every service of one catalog, and the steps that most tests begin with."""

    def __init__(
        self, public: grpc.aio.Channel, runtime: grpc.aio.Channel, *, public_address: str, runtime_address: str
    ) -> None:
        self.public_address = public_address
        self.runtime_address = runtime_address
        self.base_models = base_model_service_pb2_grpc.BaseModelServiceStub(public)
        self.policies = policy_service_pb2_grpc.PolicyServiceStub(public)
        self.revisions = revision_service_pb2_grpc.RevisionServiceStub(public)
        self.aliases = alias_service_pb2_grpc.AliasServiceStub(public)
        self.runs = run_service_pb2_grpc.RunServiceStub(public)
        self.replicas = engine_replica_service_pb2_grpc.EngineReplicaServiceStub(public)
        self.evaluations = evaluation_service_pb2_grpc.EvaluationServiceStub(public)
        self.rollouts = rollout_service_pb2_grpc.RolloutServiceStub(public)
        self.audit = audit_service_pb2_grpc.AuditServiceStub(public)
        self.usage = usage_service_pb2_grpc.UsageServiceStub(public)
        self.usage_reports = usage_report_service_pb2_grpc.UsageReportServiceStub(runtime)
        self.publish = publish_service_pb2_grpc.PublishServiceStub(runtime)
        self.work = work_service_pb2_grpc.WorkServiceStub(runtime)
        self.registry = registry_service_pb2_grpc.RegistryServiceStub(runtime)

    @staticmethod
    async def call(method: Any, request: Any, timeout_s: float = 20.0) -> Any:
        return await call(method, request, timeout_s=timeout_s)

    @staticmethod
    def stream(method: Any, request: Any, timeout_s: float = 60.0) -> AsyncGenerator[Any, None]:
        responses: Any = stream(method, request, timeout_s=timeout_s)
        return responses  # type: ignore[no-any-return]

    async def base_model(self) -> None:
        model = base_model_service_pb2.BaseModel(name=BASE, digest=BASE_DIGEST)
        await self.call(
            self.base_models.RegisterBaseModel, base_model_service_pb2.RegisterBaseModelRequest(base_model=model)
        )

    async def policy(self, tenant: str = "", policy_id: str = "tone", *, request_id: str = "") -> str:
        """A new policy; its name. Without a tenant it gets one of its own."""
        await self.base_model()
        request = policy_service_pb2.CreatePolicyRequest(
            parent=f"tenants/{tenant or 't' + uuid.uuid4().hex[:10]}",
            policy_id=policy_id,
            policy=policy_service_pb2.Policy(base_model=BASE),
            request_id=request_id,
        )
        created = await self.call(self.policies.CreatePolicy, request)
        return str(created.policy.name)

    async def blob(self, policy: str, text: str) -> common_pb2.BlobRef:
        """A verified blob of the policy's tenant."""
        name = f"tenants/{policy.split('/')[1]}/blobs/{digest_of(text)}"
        staged = await self.call(
            self.publish.StageBlob, publish_service_pb2.StageBlobRequest(name=name, size_bytes=len(text))
        )
        verify = publish_service_pb2.VerifyBlobRequest(name=name, object_key=staged.blob.object_key)
        verified = await self.call(self.publish.VerifyBlob, verify)
        blob: common_pb2.BlobRef = verified.blob.blob
        return blob

    async def revision(
        self,
        policy: str,
        text: str,
        fence: common_pb2.Fence | None = None,
        *,
        run: str = "",
        step: int = 0,
        request_id: str = "",
    ) -> Any:
        """Publish a verified blob; the whole response."""
        request = publish_service_pb2.PublishRevisionRequest(
            parent=policy, fence=fence, unfenced=fence is None, request_id=request_id
        )
        request.revision.blob.CopyFrom(await self.blob(policy, text))
        request.revision.base_digest = BASE_DIGEST
        request.revision.lora.rank = 4
        request.revision.lineage.run = run
        request.revision.lineage.step = step
        return await self.call(self.publish.PublishRevision, request)

    async def promote(
        self, policy: str, number: int, *, alias: str = "live", etag: str = "", request_id: str = ""
    ) -> Any:
        request = alias_service_pb2.PromoteAliasRequest(
            name=f"{policy}/aliases/{alias}", revision_number=number, etag=etag, request_id=request_id
        )
        return await self.call(self.aliases.PromoteAlias, request)

    async def resolve(self, policy: str, alias: str = "live") -> Any:
        request = alias_service_pb2.ResolveRequest(name=f"{policy}/aliases/{alias}")
        return (await self.call(self.aliases.Resolve, request)).resolution

    async def run(self, policy: str, run_id: str = "", *, priority: int = 0) -> Any:
        """A queued SFT run."""
        run = run_service_pb2.Run(policy=policy, priority=priority, sft=run_service_pb2.SftRecipe(num_steps=10))
        run.sft.train_data.CopyFrom(await self.blob(policy, "{}"))
        parent = policy.split("/policies/", maxsplit=1)[0]
        request = run_service_pb2.CreateRunRequest(parent=parent, run_id=run_id, run=run)
        return (await self.call(self.runs.CreateRun, request)).run

    async def evaluation(self, policy: str, run_id: str = "", *, priority: int = 0) -> Any:
        """A queued evaluation of the policy's first revision."""
        run = run_service_pb2.Run(policy=policy, priority=priority)
        run.evaluation.revision, run.evaluation.scorer = f"{policy}/revisions/1", "exact_match"
        run.evaluation.data.CopyFrom(await self.blob(policy, "{}"))
        parent = policy.split("/policies/", maxsplit=1)[0]
        request = run_service_pb2.CreateRunRequest(parent=parent, run_id=run_id, run=run)
        return (await self.call(self.runs.CreateRun, request)).run

    def rollout(
        self, policy: str, rollout_id: str, fence: common_pb2.Fence, *, run: str, step: int = 1
    ) -> rollout_service_pb2.CreateRolloutRequest:
        """How to record a batch that was sampled from the policy's first revision."""
        request = rollout_service_pb2.CreateRolloutRequest(parent=policy, rollout_id=rollout_id, fence=fence)
        tenant = policy.split("/policies/", maxsplit=1)[0]
        request.rollout.revision, request.rollout.run, request.rollout.step = f"{policy}/revisions/1", run, step
        request.rollout.object_key = f"{tenant}/rollouts/{rollout_id}.safetensors"
        request.rollout.blob.digest, request.rollout.blob.size_bytes = digest_of(rollout_id), 100
        request.rollout.num_samples, request.rollout.reward_mean = 8, 0.5
        request.rollout.expire_time.FromSeconds(1_900_000_000)
        return request

    async def claim(self, holder: str, ttl_s: int = 30, wait_s: float = 5.0) -> Any:
        request = work_service_pb2.ClaimRunRequest(holder=holder, base_model=BASE)
        request.ttl.FromSeconds(ttl_s)
        return await self.call(self.work.ClaimRun, request, timeout_s=wait_s + 0.5)

    async def acquire(self, resource: str, holder: str, ttl_s: int = 30) -> common_pb2.Fence:
        request = work_service_pb2.AcquireLeaseRequest(resource=resource, holder=holder)
        request.ttl.FromSeconds(ttl_s)
        fence: common_pb2.Fence = (await self.call(self.work.AcquireLease, request)).lease.fence
        return fence


@contextlib.asynccontextmanager
async def connected(public: str, runtime: str) -> AsyncIterator[Rig]:
    """The stubs of a catalog that runs already."""
    async with connect(public, retry=False) as public_channel, connect(runtime, retry=False) as runtime_channel:
        yield Rig(public_channel, runtime_channel, public_address=public, runtime_address=runtime)


@contextlib.asynccontextmanager
async def running_catalog(server: EtcdServer | EtcdCluster, **changes: Any) -> AsyncIterator[Rig]:
    """A catalog in this process, and its stubs."""
    values = {"etcd": server.settings(), "grace_s": 0.1, "reap_interval_s": 0.5, "tick_interval_s": 0.2} | changes
    settings = CatalogSettings(**values)
    async with (
        running("catalog", settings, lambda: catalog(settings)) as addresses,
        connected(addresses.public, addresses.runtime) as rig,
    ):
        yield rig


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class CatalogProcess:
    """A catalog in a process of its own; ``kill`` and ``start`` again keep its addresses."""

    def __init__(self, etcd: EtcdServer | EtcdCluster, log: Path, **environ: str) -> None:
        self._etcd = etcd
        self._log = log
        self._environ = environ
        self._public, self._runtime = f"127.0.0.1:{_free_port()}", f"127.0.0.1:{_free_port()}"
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start and wait until it answers."""
        self._process = self._spawn()
        async with asyncio.timeout(30), self.rig() as rig:
            while True:
                try:
                    await rig.call(rig.base_models.ListBaseModels, base_model_service_pb2.ListBaseModelsRequest(), 1.0)
                except MintError:
                    assert self._process.poll() is None, self._log.read_text()[-2000:]
                    await asyncio.sleep(0.05)
                else:
                    return

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                dying_with_parent(
                    [
                        *(sys.executable, "-m", "mint_catalog", "--listen", self._public),
                        *("--runtime-listen", self._runtime, "--reap-interval-s", "0.5"),
                        *("--etcd.endpoints", json.dumps(self._etcd.endpoints)),
                    ]
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._environ},
            )

    def rig(self) -> contextlib.AbstractAsyncContextManager[Rig]:
        return connected(self._public, self._runtime)

    @property
    def pid(self) -> int:
        """Its process id; 0 while it does not run."""
        return self._process.pid if self._process else 0

    def wait_for_death(self) -> int:
        """Wait until it has ended by itself; its exit code."""
        assert self._process is not None
        return self._process.wait(15)

    def send(self, signal_number: int) -> None:
        """Signal it, and do not wait."""
        assert self._process is not None, "the catalog is not running"
        self._process.send_signal(signal_number)

    def stop(self, signal_number: int = signal.SIGKILL) -> int:
        """Signal it and wait; its exit code."""
        if self._process is None:
            return 0
        self._process.send_signal(signal_number)
        code = self._process.wait(15)
        self._process = None
        return code
