"""What is refused before anybody is asked, and what goes over the wire."""

from __future__ import annotations

import pytest

from mint_api.v1 import inference_service_pb2 as pb
from mint_core.errors import InvalidArgument
from mint_core.names import AliasName, BaseModelName, RevisionName
from mint_inference.codec import decode_generate, decode_score, encode_header
from mint_inference.model import Header, Resolution, parse_model

ALIAS = "tenants/acme/policies/tone/aliases/live"
TEXT = pb.Prompt(text="Hello")


def chat(*turns: tuple[str, str]) -> pb.Prompt:
    messages = [pb.ChatMessage(role=role, content=content) for role, content in turns]
    return pb.Prompt(chat=pb.Chat(messages=messages))


def test_the_three_kinds_of_model() -> None:
    assert parse_model(ALIAS) == AliasName("acme", "tone", "live")
    assert parse_model("tenants/acme/policies/tone/revisions/3") == RevisionName("acme", "tone", 3)
    assert parse_model("baseModels/smol") == BaseModelName("smol")


@pytest.mark.parametrize(
    "model",
    [
        "",
        "acme/tone@live",
        "tenants/acme/policies/tone",
        "tenants/acme/policies/tone/aliases/../../x",
        "tenants/acme/policies/tone/aliases/UP",
        "tenants/acme/policies/tone/revisions/0",
        "tenants/acme/policies/tone/rollouts/1",
        "tenants/../policies/tone/aliases/live",
        "baseModels/",
        "x" * 10_000,
    ],
)
def test_bad_models_name_the_field(model: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        decode_generate(pb.GenerateRequest(model=model, prompt=TEXT))
    assert caught.value.field == "model"
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (pb.Prompt(), "prompt"),
        (pb.Prompt(text=""), "prompt.text"),
        (pb.Prompt(tokens=pb.TokenIds()), "prompt.tokens.ids"),
        (pb.Prompt(tokens=pb.TokenIds(ids=[3, -1])), "prompt.tokens.ids"),
        (chat(), "prompt.chat.messages"),
        (chat(("user", "")), "prompt.chat.messages"),
        (chat(("user", "hi"), ("tool", "x")), "prompt.chat.messages[1].role"),
    ],
)
def test_bad_prompts_name_the_field(prompt: pb.Prompt, field: str) -> None:
    for decode, request in (
        (decode_generate, pb.GenerateRequest(model=ALIAS, prompt=prompt)),
        (decode_score, pb.ScoreRequest(model=ALIAS, prompt=prompt)),
    ):
        with pytest.raises(InvalidArgument) as caught:
            decode(request)  # type: ignore[operator]
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        (pb.SamplingParams(max_new_tokens=-1), "sampling.max_new_tokens"),
        (pb.SamplingParams(max_new_tokens=2**31 - 1), "sampling.max_new_tokens"),
        (pb.SamplingParams(temperature=-0.1), "sampling.temperature"),
        (pb.SamplingParams(temperature=float("nan")), "sampling.temperature"),
        (pb.SamplingParams(temperature=float("inf")), "sampling.temperature"),
        (pb.SamplingParams(top_p=1.1), "sampling.top_p"),
        (pb.SamplingParams(top_k=-1), "sampling.top_k"),
        (pb.SamplingParams(stop=[""]), "sampling.stop[0]"),
        (pb.SamplingParams(stop=["a"] * 17), "sampling.stop"),
        (pb.SamplingParams(stop_token_ids=[5, -5]), "sampling.stop_token_ids[1]"),
    ],
)
def test_bad_sampling_names_the_field(sampling: pb.SamplingParams, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        decode_generate(pb.GenerateRequest(model=ALIAS, prompt=TEXT, sampling=sampling))
    assert caught.value.field == field


def test_the_tenant_is_the_names_own_and_the_given_one_counts_with_a_base_only() -> None:
    own = decode_generate(pb.GenerateRequest(model=ALIAS, prompt=TEXT, tenant="tenants/evil"))
    assert own.tenant == "tenants/acme"
    base = pb.GenerateRequest(model="baseModels/smol", prompt=TEXT, tenant="tenants/acme")
    assert decode_generate(base).tenant == "tenants/acme"
    for bad in ("", "acme", "tenants/.."):
        base.tenant = bad
        with pytest.raises(InvalidArgument) as caught:
            decode_generate(base)
        assert caught.value.field == "tenant"


def test_consistency() -> None:
    request = pb.GenerateRequest(model=ALIAS, prompt=TEXT)
    assert decode_generate(request).consistency.is_default
    request.consistency.strong = True
    assert decode_generate(request).consistency.strong
    request.consistency.min_catalog_revision = 7
    assert decode_generate(request).consistency.min_revision == 7
    request.consistency.min_catalog_revision = -7
    with pytest.raises(InvalidArgument):
        decode_generate(request)


def test_a_header_on_the_wire() -> None:
    resolution = Resolution(
        base_digest="b", base_model="baseModels/smol", revision="r", digest="d", size_bytes=9, stale=True
    )
    encoded = encode_header(Header(resolution, "engineReplicas/one", True, [1, 2]))
    assert encoded.resolution.blob.digest == "d"
    assert encoded.resolution.stale
    assert encoded.cold
    assert list(encoded.prompt_token_ids) == [1, 2]
    base = encode_header(Header(Resolution(base_digest="b"), "engineReplicas/one", False, []))
    assert not base.resolution.HasField("blob")
    assert base.resolution.revision == ""
