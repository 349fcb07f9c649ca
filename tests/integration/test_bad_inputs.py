"""Bad input gets the documented code and reason, costs nothing, and a good request works right after it."""

import json
import pickle
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mint_api.runtime.v1 import exporter_service_pb2, exporter_service_pb2_grpc, publish_service_pb2
from mint_api.runtime.v1 import publish_service_pb2_grpc as publish_grpc
from mint_api.v1 import (
    blob_service_pb2,
    blob_service_pb2_grpc,
    common_pb2,
    inference_service_pb2,
    policy_service_pb2_grpc,
    revision_service_pb2,
    run_service_pb2,
)
from mint_api.v1 import policy_service_pb2 as policy_pb
from mint_client import MintClient
from mint_core import errors
from mint_core.channel import call, connect
from support.publishing import answer, create_policy, import_revision, serve_random_adapter, write_sft_data
from support.stack import Stack, fresh_id, write_random_adapter


@dataclass
class Case:
    """What a bad input may touch."""

    stack: Stack
    client: MintClient
    policy: str
    """A policy that serves revision 1 by its alias ``live``."""
    work: Path


Bad = Callable[[Case], Awaitable[object]]


async def bad_policy_id(case: Case) -> object:
    return await case.client.policies.create("acme", "Not_An_Id!", base_model=case.stack.base_model)


async def path_traversal_in_name(case: Case) -> object:
    return await case.client.policies.get("tenants/acme/policies/../../etc/passwd")


async def path_traversal_id(case: Case) -> object:
    return await case.client.policies.create("..", "x", base_model=case.stack.base_model)


async def name_taken(case: Case) -> object:
    return await case.client.policies.create("acme", case.policy.split("/")[3], base_model=case.stack.base_model)


async def request_id_reused(case: Case) -> object:
    request_id = str(uuid.uuid4())
    for _ in range(2):
        await case.client.policies.create(
            "acme", fresh_id("p"), base_model=case.stack.base_model, request_id=request_id
        )
    raise AssertionError("the second payload was taken")


async def bad_request_id(case: Case) -> object:
    return await case.client.policies.create("acme", fresh_id("p"), base_model=case.stack.base_model, request_id="nope")


async def foreign_base(case: Case) -> object:
    return await case.client.policies.create("acme", fresh_id("p"), base_model="baseModels/unknown")


async def bad_rank(case: Case) -> object:
    lora = common_pb2.LoraConfig(rank=100_000)
    return await case.client.policies.create("acme", fresh_id("p"), base_model=case.stack.base_model, lora=lora)


async def stale_etag(case: Case) -> object:
    read = await case.client.policies.get(case.policy)
    read.description = "changed"
    await case.client.policies.update(read, ["description"])
    return await case.client.policies.update(read, ["description"])


async def immutable_field(case: Case) -> object:
    return await case.client.policies.update(
        policy_pb.Policy(name=case.policy, base_model="baseModels/x"), ["base_model"]
    )


async def unknown_policy(case: Case) -> object:
    return await case.client.policies.get("tenants/acme/policies/unknown")


async def unknown_alias(case: Case) -> object:
    return await answer(case.client, f"{case.policy}/aliases/unknown")


async def unknown_revision(case: Case) -> object:
    return await answer(case.client, f"{case.policy}/revisions/999")


async def another_tenants_policy(case: Case) -> object:
    return await answer(case.client, case.policy.replace("tenants/acme", "tenants/other") + "/aliases/live")


async def promote_unknown_revision(case: Case) -> object:
    return await case.client.aliases.promote(f"{case.policy}/aliases/live", 999)


async def promote_stale_etag(case: Case) -> object:
    return await case.client.aliases.promote(f"{case.policy}/aliases/live", 1, etag="12345")


async def nothing_to_roll_back_to(case: Case) -> object:
    return await case.client.aliases.rollback(f"{case.policy}/aliases/live")


async def oversize_prompt(case: Case) -> object:
    return await answer(case.client, f"{case.policy}/aliases/live", "word " * 5000)


async def empty_prompt(case: Case) -> object:
    return await answer(case.client, f"{case.policy}/aliases/live", "")


async def bad_temperature(case: Case) -> object:
    sampling = inference_service_pb2.SamplingParams(temperature=-1)
    return await case.client.generate_text(f"{case.policy}/aliases/live", "x", sampling=sampling)


async def token_outside_vocabulary(case: Case) -> object:
    return await case.client.generate_text(f"{case.policy}/aliases/live", [1, 10_000_000])


async def oversize_message(case: Case) -> object:
    async with connect(case.stack.address("catalog"), max_message_bytes=64 * 1024 * 1024) as channel:
        stub = policy_service_pb2_grpc.PolicyServiceStub(channel)
        return await call(stub.GetPolicy, policy_pb.GetPolicyRequest(name="x" * 9 * 1024 * 1024))


async def pickle_instead_of_safetensors(case: Case) -> object:
    folder = write_random_adapter(case.work / "pickle", case.stack.base)
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps({"weights": [1, 2, 3]}, protocol=4))
    return await import_revision(case.stack, case.client, case.policy, folder)


async def truncated_blob(case: Case) -> object:
    folder = write_random_adapter(case.work / "truncated", case.stack.base)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return await import_revision(case.stack, case.client, case.policy, folder)


async def adapter_for_other_geometry(case: Case) -> object:
    other = case.work / "other-base"
    other.mkdir()
    config = json.loads((case.stack.base / "config.json").read_text()) | {"hidden_size": 128}
    (other / "config.json").write_text(json.dumps(config))
    folder = write_random_adapter(case.work / "geometry", other)
    policy = await create_policy(case.stack, case.client)
    revision = await import_revision(case.stack, case.client, policy, folder)
    return await answer(case.client, revision.name)


async def bytes_without_their_digest(case: Case) -> object:
    name = "tenants/acme/blobs/sha256:" + "0" * 64
    async with connect(case.stack.address("exporter")) as channel:
        announcement = blob_service_pb2.UploadAnnouncement(name=name, size_bytes=5)
        requests = [
            blob_service_pb2.UploadBlobRequest(announcement=announcement),
            blob_service_pb2.UploadBlobRequest(chunk=blob_service_pb2.BlobChunk(offset=0, data=b"hello")),
        ]
        return await call(blob_service_pb2_grpc.BlobServiceStub(channel).UploadBlob, iter(requests))


async def publish_absent_blob(case: Case) -> object:
    read = await case.client.revisions.get(f"{case.policy}/revisions/1")
    revision = revision_service_pb2.Revision(
        blob=common_pb2.BlobRef(digest="sha256:" + "1" * 64, size_bytes=5),
        base_digest=read.base_digest,
        lora=read.lora,
        num_tensors=read.num_tensors,
        layout=read.layout,
    )
    async with case.stack.channel("catalog") as channel:
        request = publish_service_pb2.PublishRevisionRequest(parent=case.policy, revision=revision, unfenced=True)
        return await call(publish_grpc.PublishServiceStub(channel).PublishRevision, request)


async def publish_for_foreign_base(case: Case) -> object:
    read = await case.client.revisions.get(f"{case.policy}/revisions/1")
    revision = revision_service_pb2.Revision()
    revision.CopyFrom(read)
    revision.base_digest = "sha256:" + "2" * 64
    async with case.stack.channel("catalog") as channel:
        request = publish_service_pb2.PublishRevisionRequest(parent=case.policy, revision=revision, unfenced=True)
        return await call(publish_grpc.PublishServiceStub(channel).PublishRevision, request)


async def export_under_a_fence_that_never_was(case: Case) -> object:
    request = exporter_service_pb2.ExportRequest(
        policy=case.policy,
        training_state=common_pb2.TrainingState(
            run="tenants/acme/runs/none",
            step=1,
            fence=1,
            weights_key="tenants/acme/states/none/weights.safetensors",
            weights=common_pb2.BlobRef(digest="sha256:" + "3" * 64, size_bytes=5),
        ),
        fence=common_pb2.Fence(resource=case.policy, token=1),
    )
    async with case.stack.channel("exporter") as channel:
        return await call(exporter_service_pb2_grpc.ExporterServiceStub(channel).Export, request)


async def run_over_missing_data(case: Case) -> object:
    sft = run_service_pb2.SftRecipe(
        train_data=common_pb2.BlobRef(digest="sha256:" + "4" * 64, size_bytes=10), num_steps=1
    )
    return await case.client.runs.create("acme", run_service_pb2.Run(policy=case.policy, sft=sft))


async def run_of_no_steps(case: Case) -> object:
    data = await case.client.blobs.upload("acme", write_sft_data(case.work / "data.jsonl"))
    sft = run_service_pb2.SftRecipe(train_data=data, num_steps=0)
    return await case.client.runs.create("acme", run_service_pb2.Run(policy=case.policy, sft=sft))


async def bad_page_token(case: Case) -> object:
    async with connect(case.stack.address("catalog")) as channel:
        stub = policy_service_pb2_grpc.PolicyServiceStub(channel)
        return await call(
            stub.ListPolicies, policy_pb.ListPoliciesRequest(parent="tenants/acme", page_token="no token")
        )


CASES: list[tuple[Bad, type[errors.MintError]]] = [
    (bad_policy_id, errors.InvalidArgument),
    (path_traversal_in_name, errors.InvalidArgument),
    (path_traversal_id, errors.InvalidArgument),
    (name_taken, errors.AlreadyExists),
    (request_id_reused, errors.RequestIdReused),
    (bad_request_id, errors.InvalidArgument),
    (foreign_base, errors.NotFound),
    (bad_rank, errors.InvalidArgument),
    (stale_etag, errors.EtagMismatch),
    (immutable_field, errors.InvalidArgument),
    (unknown_policy, errors.NotFound),
    (unknown_alias, errors.NotFound),
    (unknown_revision, errors.NotFound),
    (another_tenants_policy, errors.NotFound),
    (promote_unknown_revision, errors.NotFound),
    (promote_stale_etag, errors.EtagMismatch),
    (nothing_to_roll_back_to, errors.WrongState),
    (oversize_prompt, errors.InvalidArgument),
    (empty_prompt, errors.InvalidArgument),
    (bad_temperature, errors.InvalidArgument),
    (token_outside_vocabulary, errors.InvalidArgument),
    (oversize_message, errors.ResourceExhausted),
    (pickle_instead_of_safetensors, errors.InvalidArgument),
    (truncated_blob, errors.InvalidArgument),
    (adapter_for_other_geometry, errors.FailedPrecondition),
    (bytes_without_their_digest, errors.DigestMismatch),
    (publish_absent_blob, errors.BlobMissing),
    (publish_for_foreign_base, errors.BaseModelMismatch),
    (export_under_a_fence_that_never_was, errors.LeaseLost),
    (run_over_missing_data, errors.BlobMissing),
    (run_of_no_steps, errors.InvalidArgument),
    (bad_page_token, errors.InvalidArgument),
]


@pytest.mark.parametrize(("bad", "expected"), CASES, ids=[bad.__name__ for bad, _ in CASES])
async def test_a_bad_input_is_refused_and_costs_nothing(
    stack: Stack, work: Path, bad: Bad, expected: type[errors.MintError]
) -> None:
    async with stack.client() as client:
        policy, revision = await serve_random_adapter(stack, client, work, seed=3)
        before = await answer(client, f"{policy}/aliases/live")
        with pytest.raises(expected) as caught:
            await bad(Case(stack, client, policy, work))
        assert caught.value.reason == expected.reason
        assert caught.value.message
        assert "Traceback" not in caught.value.message
        after = await answer(client, f"{policy}/aliases/live")
        assert (after.digest, after.token_ids) == (revision.blob.digest, before.token_ids)
        assert [r.number async for r in client.revisions.list(policy)] == [1]


async def test_a_bad_data_line_fails_the_run_and_names_the_line(stack: Stack, work: Path) -> None:
    path = write_sft_data(work / "data.jsonl", 4)
    path.write_text(path.read_text() + '{"prompt": "no completion"}\n')
    async with stack.client() as client:
        policy = await create_policy(stack, client)
        data = await client.blobs.upload("acme", path)
        sft = run_service_pb2.SftRecipe(train_data=data, num_steps=2, batch_size=2)
        queued = await client.runs.create("acme", run_service_pb2.Run(policy=policy, sft=sft, publish=True))
        run = await client.runs.wait(queued.name)
        assert run.state == run_service_pb2.RUN_STATE_FAILED
        assert "INVALID_FIELD" in run.error
        assert "line 5" in run.error
        assert [r async for r in client.revisions.list(policy)] == []
        path.write_text("\n".join(path.read_text().splitlines()[:4]) + "\n")
        sft.train_data.CopyFrom(await client.blobs.upload("acme", path))
        queued = await client.runs.create("acme", run_service_pb2.Run(policy=policy, sft=sft, publish=True))
        assert (await client.runs.wait(queued.name)).state == run_service_pb2.RUN_STATE_SUCCEEDED
