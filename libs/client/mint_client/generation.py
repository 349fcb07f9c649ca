"""Generation: what may be a prompt, and a whole answer gathered from its stream."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Mapping, Sequence

from mint_api.v1 import common_pb2, inference_service_pb2
from mint_core.errors import Internal, InvalidArgument

__all__ = ["Generation", "PromptLike", "as_prompt", "gather"]

PromptLike = str | Sequence[int] | Sequence[Mapping[str, str]] | inference_service_pb2.Prompt
"""Text, token ids, chat messages (``{"role": …, "content": …}``), or the message itself."""


@dataclasses.dataclass(frozen=True, slots=True)
class Generation:
    """The whole answer of one generation."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Natural logarithm, one for each token; empty unless asked for."""
    finish_reason: str
    """``stop``, ``length`` or ``abort``."""
    revision: str
    """The revision that generated all of it (a revision name); empty when the base was asked."""
    digest: str
    """Digest of that revision's blob; empty when the base was asked."""
    canary: bool
    """Whether the alias's canary was chosen."""
    stale: bool
    """Whether the alias was resolved from a cache past its staleness bound."""
    engine_replica: str
    cold: bool
    """Whether the adapter had to be loaded first."""
    prompt_token_ids: tuple[int, ...]
    """The prompt as the engine saw it."""
    num_prompt_tokens: int
    num_completion_tokens: int
    routed_experts: bytes
    """int32 ``[num_tokens - 1, num_layers, top_k]`` little-endian; empty unless asked for."""
    numerics: common_pb2.Numerics
    """Arithmetic of the engine that generated."""
    header_s: float
    """Seconds from the call to the header: the adapter is in the engine by then."""
    first_token_s: float
    """Seconds from the call to the first chunk with a token."""
    total_s: float
    """Seconds from the call to the end of the stream."""


def as_prompt(prompt: PromptLike) -> inference_service_pb2.Prompt:
    """Make the request's message of what people write. Raises :class:`InvalidArgument` for anything else."""
    if isinstance(prompt, inference_service_pb2.Prompt):
        return prompt
    if isinstance(prompt, str):
        return inference_service_pb2.Prompt(text=prompt)
    ids = [item for item in prompt if isinstance(item, int)]
    if ids and len(ids) == len(prompt):
        return inference_service_pb2.Prompt(tokens=inference_service_pb2.TokenIds(ids=ids))
    turns = [item for item in prompt if isinstance(item, Mapping) and set(item) == {"role", "content"}]
    if turns and len(turns) == len(prompt):
        messages = [inference_service_pb2.ChatMessage(role=turn["role"], content=turn["content"]) for turn in turns]
        return inference_service_pb2.Prompt(chat=inference_service_pb2.Chat(messages=messages))
    raise InvalidArgument(
        "prompt is neither text, nor token ids, nor chat messages with exactly role and content", field="prompt"
    )


async def gather(responses: AsyncIterator[inference_service_pb2.GenerateResponse]) -> Generation:
    """Read a stream to its end."""
    start_s = time.perf_counter()
    header: inference_service_pb2.GenerationHeader | None = None
    last = inference_service_pb2.GeneratedChunk()
    text: list[str] = []
    token_ids: list[int] = []
    logprobs: list[float] = []
    header_s = first_token_s = 0.0
    async for response in responses:
        if response.WhichOneof("content") == "header":
            header, header_s = response.header, time.perf_counter() - start_s
            continue
        last = response.chunk
        if last.token_ids and not token_ids:
            first_token_s = time.perf_counter() - start_s
        text.append(last.text)
        token_ids.extend(last.token_ids)
        logprobs.extend(last.logprobs)
    if header is None:
        raise Internal("the generation ended without its first message, which names the revision")
    return Generation(
        text="".join(text),
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
        finish_reason=inference_service_pb2.FinishReason.Name(last.finish_reason)
        .removeprefix("FINISH_REASON_")
        .lower(),
        revision=header.resolution.revision,
        digest=header.resolution.blob.digest,
        canary=header.resolution.canary,
        stale=header.resolution.stale,
        engine_replica=header.engine_replica,
        cold=header.cold,
        prompt_token_ids=tuple(header.prompt_token_ids),
        num_prompt_tokens=last.num_prompt_tokens,
        num_completion_tokens=last.num_completion_tokens,
        routed_experts=last.routed_experts,
        numerics=header.numerics,
        header_s=header_s,
        first_token_s=first_token_s,
        total_s=time.perf_counter() - start_s,
    )
