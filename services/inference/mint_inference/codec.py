"""Requests into checked calls, answers into messages."""

from __future__ import annotations

from typing import cast

from mint_api.v1 import alias_service_pb2 as alias_pb
from mint_api.v1 import common_pb2
from mint_api.v1 import inference_service_pb2 as pb
from mint_core.errors import InvalidArgument
from mint_core.names import BaseModelName, TenantName
from mint_inference.model import Call, Consistency, Header, Model, Resolution, parse_model
from mint_inference.validation import check_chat, check_prompt_kind, check_sampling, check_text, check_tokens

__all__ = ["decode_generate", "decode_score", "encode_header"]


def decode_generate(request: pb.GenerateRequest) -> Call:
    """Everything that can be wrong without asking anybody is found here."""
    model = parse_model(request.model)
    _check_prompt(request.prompt)
    sampling = request.sampling
    check_sampling(
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
    )
    return Call(
        model=model,
        tenant=_tenant(model, request.tenant),
        prompt=request.prompt,
        sampling=sampling,
        return_logprobs=request.return_logprobs,
        return_routed_experts=request.return_routed_experts,
        sticky_key=request.sticky_key,
        consistency=_consistency(request.consistency),
    )


def decode_score(request: pb.ScoreRequest) -> Call:
    model = parse_model(request.model)
    _check_prompt(request.prompt)
    return Call(
        model=model,
        tenant=_tenant(model, request.tenant),
        prompt=request.prompt,
        sticky_key=request.sticky_key,
        consistency=_consistency(request.consistency),
    )


def encode_header(header: Header) -> pb.GenerationHeader:
    return pb.GenerationHeader(
        resolution=_encode_resolution(header.resolution),
        engine_replica=header.replica,
        cold=header.cold,
        prompt_token_ids=header.prompt_token_ids,
        numerics=cast("common_pb2.Numerics | None", header.numerics),
    )


def _check_prompt(prompt: pb.Prompt) -> None:
    kind = prompt.WhichOneof("content")
    check_prompt_kind(kind)
    if kind == "text":
        check_text(prompt.text)
    elif kind == "tokens":
        check_tokens(prompt.tokens.ids)
    else:
        messages = prompt.chat.messages
        check_chat([each.role for each in messages], [each.content for each in messages])


def _tenant(model: Model, tenant: str) -> str:
    if not isinstance(model, BaseModelName):
        return str(TenantName(model.tenant))
    if not tenant:
        raise InvalidArgument(
            "tenant is empty: with a base model name the tenant on whose behalf it is asked, as tenants/{tenant}",
            field="tenant",
        )
    return str(TenantName.parse(tenant, field="tenant"))


def _consistency(consistency: common_pb2.Consistency) -> Consistency:
    if consistency.min_catalog_revision < 0:
        raise InvalidArgument(
            f"consistency.min_catalog_revision is {consistency.min_catalog_revision}: send what a write returned",
            field="consistency.min_catalog_revision",
        )
    return Consistency(strong=consistency.strong, min_revision=consistency.min_catalog_revision)


def _encode_resolution(resolution: Resolution) -> alias_pb.Resolution:
    encoded = alias_pb.Resolution(
        revision=resolution.revision,
        object_key=resolution.object_key,
        base_model=resolution.base_model,
        base_digest=resolution.base_digest,
        canary=resolution.canary,
        stale=resolution.stale,
        catalog_revision=resolution.catalog_revision,
    )
    if resolution.digest:
        encoded.blob.digest = resolution.digest
        encoded.blob.size_bytes = resolution.size_bytes
    if resolution.signature is not None:
        encoded.signature.key_id = resolution.signature.key_id
        encoded.signature.value = resolution.signature.value
    return encoded
