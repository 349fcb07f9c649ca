"""``mint.runtime.v1.EngineService``: decode, one call, encode."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import grpc

from mint_api.runtime.v1 import engine_service_pb2 as pb
from mint_api.runtime.v1 import engine_service_pb2_grpc as pb_grpc
from mint_api.v1 import inference_service_pb2 as inference_pb
from mint_core import calls
from mint_core.errors import InvalidArgument
from mint_core.names import TenantName
from mint_engine.adapter_engine import Delta, FinishReason, Sampling
from mint_engine.host import EngineHost, Generation, Started
from mint_engine.prompts import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from mint_engine.replica import Replica

__all__ = ["EngineServicer"]

_DEFAULT_MAX_NEW_TOKENS = 128
_FINISH_REASONS: dict[FinishReason, inference_pb.FinishReason.ValueType] = {
    "stop": inference_pb.FINISH_REASON_STOP,
    "length": inference_pb.FINISH_REASON_LENGTH,
    "abort": inference_pb.FINISH_REASON_ABORT,
}


class EngineServicer(pb_grpc.EngineServiceServicer):
    """The RPCs over one host."""

    def __init__(self, host: EngineHost, replica: Replica, *, max_generate_s: float) -> None:
        self._host = host
        self._replica = replica
        self._max_generate_s = max_generate_s

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        generation = Generation(
            prompt=_decode_prompt(request.prompt),
            tenant=_decode_tenant(request.tenant),
            digest=request.digest,
            base=request.base,
            sampling=_decode_sampling(request.sampling),
            with_logprobs=request.return_logprobs,
            with_routed_experts=request.return_routed_experts,
        )
        async with contextlib.aclosing(self._host.generate(generation, timeout_s=self._timeout_s())) as items:
            async for item in items:
                yield self._encode(item)

    async def Score(self, request: pb.ScoreRequest, context: grpc.aio.ServicerContext) -> pb.ScoreResponse:
        generation = Generation(
            prompt=_decode_prompt(request.prompt),
            tenant=_decode_tenant(request.tenant),
            digest=request.digest,
            base=request.base,
        )
        scored = await self._host.score(generation, timeout_s=self._timeout_s())
        return pb.ScoreResponse(token_ids=scored.token_ids, logprobs=scored.logprobs)

    async def LoadAdapter(
        self, request: pb.LoadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.LoadAdapterResponse:
        outcome = await self._host.load(
            request.digest, request.folder, into_slot=request.into_slot, pinned=request.pinned
        )
        return pb.LoadAdapterResponse(already_resident=outcome.already_resident, load_ms=outcome.load_ms)

    async def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.UnloadAdapterResponse:
        await self._host.unload(request.digest)
        return pb.UnloadAdapterResponse()

    async def UnpinAdapter(
        self, request: pb.UnpinAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.UnpinAdapterResponse:
        self._host.unpin(request.digest)
        return pb.UnpinAdapterResponse()

    async def GetResidency(
        self, request: pb.GetResidencyRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetResidencyResponse:
        adapters = [
            pb.ResidentAdapter(
                digest=resident.digest,
                num_references=resident.num_references,
                pinned=resident.pinned,
                rank=resident.rank,
            )
            for resident in self._host.residents()
        ]
        return pb.GetResidencyResponse(
            adapters=adapters,
            engine_replica=self._replica.describe(),
            num_running=self._host.num_running,
            adapters_to_load=self._replica.to_load,
        )

    async def FlushPrefixCache(
        self, request: pb.FlushPrefixCacheRequest, context: grpc.aio.ServicerContext
    ) -> pb.FlushPrefixCacheResponse:
        await self._host.flush_prefix_cache()
        return pb.FlushPrefixCacheResponse()

    async def Drain(self, request: pb.DrainRequest, context: grpc.aio.ServicerContext) -> pb.DrainResponse:
        self._host.begin_drain()
        return pb.DrainResponse(engine_replica=self._replica.describe(), num_running=self._host.num_running)

    async def Undrain(self, request: pb.UndrainRequest, context: grpc.aio.ServicerContext) -> pb.UndrainResponse:
        self._host.end_drain()
        return pb.UndrainResponse(engine_replica=self._replica.describe())

    def _timeout_s(self) -> float:
        remaining_s = calls.remaining_s()
        return self._max_generate_s if remaining_s is None else min(remaining_s, self._max_generate_s)

    def _encode(self, item: Started | Delta) -> pb.GenerateResponse:
        if isinstance(item, Delta):
            return pb.GenerateResponse(chunk=_encode_chunk(item))
        started = pb.GenerateStarted(prompt_token_ids=item.prompt_token_ids, num_running=self._host.num_running)
        return pb.GenerateResponse(started=started)


def _decode_tenant(name: str) -> str:
    return str(TenantName.parse(name, field="tenant"))


def _decode_prompt(prompt: inference_pb.Prompt) -> Prompt:
    match prompt.WhichOneof("content"):
        case "text":
            return TextPrompt(prompt.text)
        case "chat":
            return ChatPrompt(tuple(ChatMessage(turn.role, turn.content) for turn in prompt.chat.messages))
        case "tokens":
            return TokenPrompt(tuple(prompt.tokens.ids))
    raise InvalidArgument("prompt is empty; set one of text, chat and tokens", field="prompt")


def _decode_sampling(sampling: inference_pb.SamplingParams) -> Sampling:
    return Sampling(
        max_new_tokens=sampling.max_new_tokens or _DEFAULT_MAX_NEW_TOKENS,
        temperature=sampling.temperature,
        top_p=sampling.top_p or 1.0,
        top_k=sampling.top_k,
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        seed=sampling.seed if sampling.HasField("seed") else None,
    )


def _encode_chunk(item: Delta) -> inference_pb.GeneratedChunk:
    chunk = inference_pb.GeneratedChunk(text=item.text, token_ids=item.token_ids, logprobs=item.logprobs)
    if item.finish is not None:
        chunk.finish_reason = _FINISH_REASONS[item.finish.reason]
        chunk.num_prompt_tokens = item.finish.num_prompt_tokens
        chunk.num_completion_tokens = item.finish.num_completion_tokens
        chunk.routed_experts = item.finish.routed_experts
    return chunk
