"""`mint generate`: ask a policy."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated, Any

import typer

from mint_api.v1 import inference_service_pb2
from mint_cli.endpoints import find_endpoints, state_dir
from mint_cli.options import InferenceOption, JsonOption, StateDirOption
from mint_cli.output import print_json
from mint_cli.references import model_name, tenant_id
from mint_client import Generation, MintClient, PromptLike
from mint_core.errors import InvalidArgument

__all__ = ["generate"]


def generate(
    model: Annotated[str, typer.Argument(help="tenant/policy[@alias|@number], or baseModels/NAME.")],
    prompt: Annotated[str, typer.Argument(help="What to continue; - reads it from standard input.")],
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a user's message.")] = False,
    system: Annotated[str, typer.Option(help="System message, with --chat.")] = "",
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the sampler.")] = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Return log-probabilities, with --json.")] = False,
    sticky_key: Annotated[str, typer.Option(help="Key of the canary split.")] = "",
    tenant: Annotated[str, typer.Option(help="Tenant on whose behalf a base model is asked.")] = "default",
    inference: InferenceOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Generate with the revision an alias points at, or with a numbered one."""
    name = model_name(model)
    if system and not chat:
        raise InvalidArgument("--system goes with --chat only", field="system")
    if stream and json_output:
        raise InvalidArgument("--stream and --json exclude each other: a document is printed when it is whole")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise InvalidArgument("prompt is empty", field="prompt")
    content: PromptLike = text
    if chat:
        content = [{"role": "system", "content": system}] if system else []
        content = [*content, {"role": "user", "content": text}]
    sampling = inference_service_pb2.SamplingParams(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    endpoints = find_endpoints(state_dir(state_path), inference=inference, needed=("inference",))
    arguments: dict[str, Any] = {
        "sampling": sampling,
        "return_logprobs": logprobs,
        "sticky_key": sticky_key,
        "tenant": f"tenants/{tenant_id(tenant)}",
    }

    async def whole() -> Generation:
        async with MintClient(endpoints) as client:
            return await client.generate_text(name, content, **arguments)

    async def streamed() -> None:
        async with MintClient(endpoints) as client:
            async for response in client.generate(name, content, **arguments):
                print(response.chunk.text, end="", flush=True)
        print()

    if stream:
        asyncio.run(streamed())
        return
    answer = asyncio.run(whole())
    if not json_output:
        print(answer.text)
        return
    print_json(
        {
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "revision": answer.revision,
            "digest": answer.digest,
            "canary": answer.canary,
            "stale": answer.stale,
            "engine_replica": answer.engine_replica,
            "cold": answer.cold,
            "num_prompt_tokens": answer.num_prompt_tokens,
            "num_completion_tokens": answer.num_completion_tokens,
            "prompt_token_ids": list(answer.prompt_token_ids),
            "token_ids": list(answer.token_ids),
            "logprobs": list(answer.logprobs),
            "first_token_ms": answer.first_token_s * 1000.0,
            "total_ms": answer.total_s * 1000.0,
        }
    )
