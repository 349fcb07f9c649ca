"""The catalog behind the Protocol of this room."""

from __future__ import annotations

import grpc

from mint_api.runtime.v1 import publish_service_pb2 as publish_pb
from mint_api.runtime.v1 import publish_service_pb2_grpc as publish_grpc
from mint_api.runtime.v1 import work_service_pb2 as work_pb
from mint_api.runtime.v1 import work_service_pb2_grpc as work_grpc
from mint_api.v1 import base_model_service_pb2 as base_pb
from mint_api.v1 import base_model_service_pb2_grpc as base_grpc
from mint_api.v1 import common_pb2 as common_pb
from mint_api.v1 import policy_service_pb2 as policy_pb
from mint_api.v1 import policy_service_pb2_grpc as policy_grpc
from mint_api.v1 import revision_service_pb2 as revision_pb
from mint_api.v1 import revision_service_pb2_grpc as revision_grpc
from mint_core.channel import call
from mint_core.errors import NotFound
from mint_core.names import BaseModelName, BlobName, PolicyName, RevisionName, TenantName
from mint_exporter.model import BlobRecord, Fence, PolicyBase, Publication, Published, RevisionBlob

__all__ = ["CatalogClient"]


class CatalogClient:
    """A :class:`~mint_exporter.model.Catalog` over its public and its runtime channel."""

    def __init__(self, public: grpc.aio.Channel, runtime: grpc.aio.Channel, *, timeout_s: float = 15.0) -> None:
        self._policies = policy_grpc.PolicyServiceStub(public)
        self._base_models = base_grpc.BaseModelServiceStub(public)
        self._revisions = revision_grpc.RevisionServiceStub(public)
        self._publish = publish_grpc.PublishServiceStub(runtime)
        self._work = work_grpc.WorkServiceStub(runtime)
        self._timeout_s = timeout_s

    async def policy_base(self, policy: PolicyName) -> PolicyBase:
        request = policy_pb.GetPolicyRequest(name=str(policy))
        found: policy_pb.Policy = (await call(self._policies.GetPolicy, request, timeout_s=self._timeout_s)).policy
        return PolicyBase(BaseModelName.parse(found.base_model).base_model, found.base_digest)

    async def architecture(self, base_model: str) -> str:
        request = base_pb.GetBaseModelRequest(name=str(BaseModelName(base_model)))
        response: base_pb.GetBaseModelResponse = await call(
            self._base_models.GetBaseModel, request, timeout_s=self._timeout_s
        )
        return response.base_model.architecture

    async def revision_blob(self, name: RevisionName) -> RevisionBlob:
        request = revision_pb.GetRevisionRequest(name=str(name))
        response: revision_pb.GetRevisionResponse = await call(
            self._revisions.GetRevision, request, timeout_s=self._timeout_s
        )
        found = response.revision
        return RevisionBlob(name, found.blob.digest, found.blob.size_bytes, found.object_key)

    async def holds(self, policy: PolicyName, fence: Fence) -> bool:
        request = work_pb.ListLeasesRequest(parent=str(TenantName(policy.tenant)))
        response: work_pb.ListLeasesResponse = await call(self._work.ListLeases, request, timeout_s=self._timeout_s)
        return any(each.resource == str(policy) and each.fence.token == fence.token for each in response.leases)

    async def get_blob(self, name: BlobName) -> BlobRecord | None:
        request = publish_pb.GetBlobRequest(name=str(name))
        try:
            response = await call(self._publish.GetBlob, request, timeout_s=self._timeout_s)
        except NotFound:
            return None
        return _record(response.blob)

    async def stage_blob(self, name: BlobName, size_bytes: int) -> BlobRecord:
        request = publish_pb.StageBlobRequest(name=str(name), size_bytes=size_bytes)
        return _record((await call(self._publish.StageBlob, request, timeout_s=self._timeout_s)).blob)

    async def verify_blob(self, name: BlobName, object_key: str) -> BlobRecord:
        request = publish_pb.VerifyBlobRequest(name=str(name), object_key=object_key)
        return _record((await call(self._publish.VerifyBlob, request, timeout_s=self._timeout_s)).blob)

    async def publish(
        self, policy: PolicyName, publication: Publication, fence: Fence | None, request_id: str
    ) -> Published:
        request = publish_pb.PublishRevisionRequest(
            parent=str(policy),
            revision=_revision(publication),
            fence=common_pb.Fence(resource=fence.resource, token=fence.token) if fence else None,
            request_id=request_id,
            unfenced=fence is None,
        )
        response: publish_pb.PublishRevisionResponse = await call(
            self._publish.PublishRevision, request, timeout_s=self._timeout_s
        )
        return Published(response.revision, response.catalog_revision)


def _record(record: publish_pb.BlobRecord) -> BlobRecord:
    return BlobRecord(
        name=BlobName.parse(record.name),
        size_bytes=record.blob.size_bytes,
        object_key=record.object_key,
        is_verified=record.state == publish_pb.BLOB_STATE_VERIFIED,
    )


def _revision(publication: Publication) -> revision_pb.Revision:
    config, lineage, signature = publication.config, publication.lineage, publication.signature
    return revision_pb.Revision(
        blob=common_pb.BlobRef(digest=publication.blob.digest, size_bytes=publication.size_bytes),
        base_digest=config.base_digest,
        lora=common_pb.LoraConfig(
            rank=config.rank,
            alpha=config.alpha,
            target_modules=config.target_modules,
            use_rslora=config.use_rslora,
        ),
        num_tensors=publication.num_tensors,
        layout=config.layout,
        lineage=revision_pb.Lineage(
            parent_revision=lineage.parent_revision,
            run=lineage.run,
            step=lineage.step,
            data_digest=lineage.data_digest,
            code_version=lineage.code_version,
            recipe=lineage.recipe,
        ),
        signature=(
            common_pb.AdapterSignature(key_id=signature.key_id, value=signature.value)
            if signature is not None
            else None
        ),
    )
