"""One generation call in SGLang's own words."""

from __future__ import annotations

import secrets
from typing import Any

from mint_engine.adapter_engine import GenerationCall

__all__ = ["request_arguments"]


def request_arguments(call: GenerationCall) -> dict[str, Any]:
    """Keyword arguments of SGLang's ``GenerateReqInput``."""
    sampling = call.sampling
    seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
    arguments: dict[str, Any] = {
        "rid": call.request_id,
        "input_ids": list(call.prompt_token_ids),
        "sampling_params": {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "stop": list(sampling.stop) or None,
            "stop_token_ids": list(sampling.stop_token_ids) or None,
            "ignore_eos": sampling.ignore_eos,
            # SGLang holds seeds as signed 64 bits.
            "sampling_seed": seed - (1 << 64) if seed >= 1 << 63 else seed,
            # The stop text stays in what SGLang returns and is cut by StopTextFilter: SGLang would cut it only where
            # the whole of it arrived at once.
            "no_stop_trim": bool(sampling.stop),
            "skip_special_tokens": True,
        },
        "cache_salt": call.cache_salt or None,
        "lora_path": call.digest,
        "return_logprob": call.with_logprobs or call.with_prompt_logprobs,
        "return_routed_experts": call.with_routed_experts,
        "stream": True,
    }
    if call.with_prompt_logprobs:
        arguments["logprob_start_len"] = 0
    return arguments
