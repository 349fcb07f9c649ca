"""A catalog full of policies: real blobs in a real object store, then policies by ImportPolicies."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from safetensors.numpy import save

from mint_api.runtime.v1 import publish_service_pb2, publish_service_pb2_grpc
from mint_api.v1 import base_model_service_pb2, base_model_service_pb2_grpc, common_pb2, revision_service_pb2
from mint_api.v1 import policy_service_pb2 as pb
from mint_api.v1 import policy_service_pb2_grpc as pb_grpc
from mint_blobs import ObjectStore
from mint_core.channel import call

__all__ = [
    "BASE",
    "TENANT",
    "Imported",
    "alias_name",
    "count_policies",
    "import_policies",
    "policy_name",
    "policy_request",
    "store_blobs",
]

TENANT = "tenants/bench"
BASE = "baseModels/bench"
_BASE_DIGEST = "sha256:" + hashlib.sha256(b"the benchmark's base model").hexdigest()
_UPLOADS = 16
"""Adapters on their way to the store at one time."""
_OWNERS = ("ada", "grace", "edsger", "barbara")
_TEAMS = ("search", "support", "coding", "legal", "translation")


def _policy_id(number: int) -> str:
    # As an owner's system would name them: without an order that a B-tree could profit from.
    return f"policy-{hashlib.blake2b(str(number).encode(), digest_size=6).hexdigest()}-{number}"


def policy_name(number: int) -> str:
    return f"{TENANT}/policies/{_policy_id(number)}"


def alias_name(number: int) -> str:
    return f"{policy_name(number)}/aliases/live"


def policy_request(number: int, blobs: list[common_pb2.BlobRef], *, num_revisions: int = 1) -> pb.CreatePolicyRequest:
    """How to create a policy with its adapters and the alias ``live`` on the first of them."""
    policy = pb.Policy(
        base_model=BASE,
        owner=_OWNERS[number % len(_OWNERS)],
        labels={"team": _TEAMS[number % len(_TEAMS)], "customer": f"c{number % 10_000}"},
        description=f"Tone of customer {number % 10_000}",
    )
    policy.lora.rank, policy.lora.alpha = 16, 32
    policy.lora.target_modules.extend(("q_proj", "k_proj", "v_proj", "o_proj"))
    request = pb.CreatePolicyRequest(parent=TENANT, policy_id=_policy_id(number), policy=policy, aliases={"live": 1})
    for index in range(num_revisions):
        revision = request.revisions.add(num_tensors=8, layout="packed.v1")
        revision.blob.CopyFrom(blobs[(number + index) % len(blobs)])
        revision.lineage.run, revision.lineage.step = f"{TENANT}/runs/r{number}", 100 * (index + 1)
        revision.lineage.code_version = "2026.11"
    return request


def _adapter(number: int) -> bytes:
    """A small real adapter: rank 2 on one module."""
    random = np.random.default_rng(number)
    tensors = {
        "base_model.model.layers.0.q_proj.lora_A.weight": random.standard_normal((2, 256), dtype=np.float32),
        "base_model.model.layers.0.q_proj.lora_B.weight": random.standard_normal((256, 2), dtype=np.float32),
    }
    return bytes(save(tensors))


async def store_blobs(
    public: grpc.aio.Channel,
    runtime: grpc.aio.Channel,
    store: ObjectStore,
    num_blobs: int,
    *,
    make: Callable[[int], bytes] = _adapter,
    base_digest: str = _BASE_DIGEST,
    read_back: bool = True,
    progress: Callable[[int], None] = lambda _: None,
) -> list[common_pb2.BlobRef]:
    """Distinct adapters, each staged, uploaded, read back and marked verified, and the base model they fit.

    Without ``read_back`` only the store itself has checked what it was given, against the upload's checksum.
    """
    base = base_model_service_pb2.BaseModel(name=BASE, digest=base_digest, architecture="bench")
    register = base_model_service_pb2_grpc.BaseModelServiceStub(public).RegisterBaseModel
    await call(register, base_model_service_pb2.RegisterBaseModelRequest(base_model=base))
    publish = publish_service_pb2_grpc.PublishServiceStub(runtime)
    await store.ensure_bucket()
    numbers = iter(range(num_blobs))
    found: dict[int, common_pb2.BlobRef] = {}

    async def one(number: int) -> common_pb2.BlobRef:
        data = make(number)
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        name = f"{TENANT}/blobs/{digest}"
        request = publish_service_pb2.StageBlobRequest(name=name, size_bytes=len(data))
        staged = (await call(publish.StageBlob, request)).blob
        await store.put_bytes(staged.object_key, data)
        if read_back:
            await store.verify(staged.object_key, digest=digest, size_bytes=len(data))
        verify = publish_service_pb2.VerifyBlobRequest(name=name, object_key=staged.object_key)
        blob: common_pb2.BlobRef = (await call(publish.VerifyBlob, verify)).blob.blob
        return blob

    async def worker() -> None:
        for number in numbers:
            found[number] = await one(number)
            progress(len(found))

    await asyncio.gather(*(worker() for _ in range(_UPLOADS)))
    return [found[number] for number in range(num_blobs)]


@dataclass(slots=True)
class Imported:
    """What an import did."""

    seconds: float
    catalog_revision: int


async def import_policies(
    channel: grpc.aio.Channel,
    numbers: range,
    blobs: list[common_pb2.BlobRef],
    *,
    batch: int = 500,
    in_flight: int = 4,
    num_revisions: int = 1,
    adjust: Callable[[pb.CreatePolicyRequest], None] = lambda _: None,
    progress: Callable[[int], None] = lambda _: None,
) -> Imported:
    """Create policies by one ImportPolicies stream; every item must succeed. ``adjust`` may change each request."""
    stub: Any = pb_grpc.PolicyServiceStub(channel)
    window = asyncio.Semaphore(in_flight)
    begun = time.perf_counter()
    num_created = revision = 0

    async def requests() -> AsyncIterator[pb.ImportPoliciesRequest]:
        for start in range(numbers.start, numbers.stop, batch):
            await window.acquire()
            items = range(start, min(start + batch, numbers.stop))
            wanted = [policy_request(each, blobs, num_revisions=num_revisions) for each in items]
            for request in wanted:
                adjust(request)
            message = pb.BatchCreatePoliciesRequest(parent=TENANT, requests=wanted)
            yield pb.ImportPoliciesRequest(sequence=start, batch=message)

    async for answer in stub.ImportPolicies(requests(), metadata=(("mint-principal", "bench"),)):
        window.release()
        failed = [status for status in answer.result.statuses if status.code]
        if failed:
            raise RuntimeError(f"{len(failed)} items of batch {answer.sequence} failed; the first: {failed[0]}")
        num_created += len(answer.result.statuses)
        revision = max(revision, answer.result.catalog_revision)
        progress(num_created)
    if num_created != len(numbers):
        raise RuntimeError(f"{num_created} of {len(numbers)} policies were created")
    return Imported(time.perf_counter() - begun, revision)


async def count_policies(channel: grpc.aio.Channel, *, page_size: int = 1000) -> int:
    """Walk over all policies."""
    stub: Any = pb_grpc.PolicyServiceStub(channel)
    request = pb.ListPoliciesRequest(parent=TENANT, page_size=page_size)
    num_policies = 0
    while True:
        page = await call(stub.ListPolicies, request)
        num_policies += len(page.policies)
        if not page.next_page_token:
            return num_policies
        request.page_token = page.next_page_token


def revision_name(number: int, revision: int = 1) -> str:
    return f"{policy_name(number)}/revisions/{revision}"


def get_revision(number: int) -> revision_service_pb2.GetRevisionRequest:
    """How to read a policy's first revision."""
    return revision_service_pb2.GetRevisionRequest(name=revision_name(number))
