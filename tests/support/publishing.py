"""Short ways for tests to get policies with revisions into a running installation."""

from __future__ import annotations

import json
from pathlib import Path

from mint_api.runtime.v1 import exporter_service_pb2, exporter_service_pb2_grpc
from mint_api.v1 import inference_service_pb2, revision_service_pb2
from mint_client import Generation, MintClient
from mint_core.channel import call
from support.stack import Stack, fresh_id, write_random_adapter

PROMPT = "The capital of France is"
GREEDY = inference_service_pb2.SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)


async def create_policy(stack: Stack, client: MintClient, *, tenant: str = "acme") -> str:
    """A fresh policy over the stack's base; its name."""
    created = await client.policies.create(tenant, fresh_id("policy"), base_model=stack.base_model)
    return created.name


async def import_revision(stack: Stack, client: MintClient, policy: str, folder: Path) -> revision_service_pb2.Revision:
    """Upload a PEFT folder and publish it as the policy's next revision."""
    weights = await client.blobs.upload(policy.split("/")[1], folder / "adapter_model.safetensors")
    request = exporter_service_pb2.ImportRevisionRequest(
        policy=policy, weights=weights, adapter_config_json=(folder / "adapter_config.json").read_text()
    )
    async with stack.channel("exporter") as channel:
        stub = exporter_service_pb2_grpc.ExporterServiceStub(channel)
        response = await call(stub.ImportRevision, request, timeout_s=60)
    revision: revision_service_pb2.Revision = response.revision
    return revision


async def serve_random_adapter(
    stack: Stack, client: MintClient, work: Path, *, seed: int, tenant: str = "acme", scale: float = 0.05
) -> tuple[str, revision_service_pb2.Revision]:
    """A fresh policy whose ``live`` names a random adapter; the policy's name and the revision."""
    policy = await create_policy(stack, client, tenant=tenant)
    folder = write_random_adapter(work / fresh_id("adapter"), stack.base, seed=seed, scale=scale)
    revision = await import_revision(stack, client, policy, folder)
    await client.aliases.promote(f"{policy}/aliases/live", revision.number, reason="test")
    return policy, revision


async def answer(client: MintClient, model: str, prompt: str = PROMPT, *, sticky_key: str = "") -> Generation:
    """A short greedy completion with log-probabilities."""
    return await client.generate_text(
        model, prompt, sampling=GREEDY, return_logprobs=True, tenant="tenants/acme", sticky_key=sticky_key
    )


def write_sft_data(path: Path, num_examples: int = 24) -> Path:
    """A small JSONL of prompts and completions."""
    lines = [
        json.dumps({"prompt": f"Say {i}", "completion": f"The answer is {i * 7 % 10}"}) for i in range(num_examples)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path
