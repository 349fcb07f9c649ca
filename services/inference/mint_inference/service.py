"""``mint.v1.InferenceService``: decode, one call, encode."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import cast

import grpc

from mint_api.v1 import inference_service_pb2 as pb
from mint_api.v1 import inference_service_pb2_grpc as pb_grpc
from mint_inference.codec import decode_generate, decode_score, encode_header
from mint_inference.generation import Generation
from mint_inference.model import Header

__all__ = ["InferenceServicer"]


class InferenceServicer(pb_grpc.InferenceServiceServicer):
    """The RPCs over one :class:`Generation`."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def Generate(
        self, request: pb.GenerateRequest, _context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        async with contextlib.aclosing(self._generation.generate(decode_generate(request))) as parts:
            async for part in parts:
                if isinstance(part, Header):
                    yield pb.GenerateResponse(header=encode_header(part))
                else:
                    yield pb.GenerateResponse(chunk=cast("pb.GeneratedChunk", part))

    async def Score(self, request: pb.ScoreRequest, _context: grpc.aio.ServicerContext) -> pb.ScoreResponse:
        header, scored = await self._generation.score(decode_score(request))
        return pb.ScoreResponse(header=encode_header(header), logprobs=scored.logprobs)
