"""SGLang by itself over many adapters, in a process of its own: its own LRU, each adapter a folder on the disk.

Run by ``JsonChild("bench.support.bare_sglang", …)``. Its host pool and slots are as many as MinT's engine has. An
adapter that it evicted it reads again from its folder by itself, when it is asked for. Requests are made in its own
process, without gRPC or HTTP. Without a GPU it needs MinT's plugin to compute adapters at all; the uploads are its own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from bench.support.asking import Answer, Request, at_a_time
from bench.support.json_child import answer_lines
from mint_engine.sglang_settings import SglangSettings, engine_arguments

__all__ = ["BareSglang"]

_SELF_CHECK_TIMEOUT_MS = 60_000
_REQUEST_TIMEOUT_S = 120.0


class BareSglang:
    """One engine."""

    def start(self, base: str, folders: list[str], settings: dict[str, Any], num_threads: int) -> None:
        """Start it and tell it all adapters, the last ones of which stay loaded."""
        from mint_engine.sglang_plugin.launch import launch_engine
        from mint_engine.sglang_plugin.version import runs_without_gpu

        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        arguments = engine_arguments(
            Path(base), SglangSettings.model_validate(settings), without_gpu=runs_without_gpu()
        )
        self._engine = launch_engine(
            arguments, fast_upload=False, slot_turn_passes=0, self_check_timeout_ms=_SELF_CHECK_TIMEOUT_MS
        )
        self._num_new_tokens = 0
        for number, folder in enumerate(folders):
            result = self._engine.load_lora_adapter(str(number), folder)
            if not result.success:
                raise RuntimeError(f"SGLang did not load {folder}: {result.error_message}")

    def ask(self, requests: list[tuple[int, list[int]]], num_new_tokens: int, num_callers: int) -> dict[str, Any]:
        """Closed loop over requests, each a policy's number and a prompt."""
        self._num_new_tokens = num_new_tokens
        wanted = [Request(policy, prompt) for policy, prompt in requests]
        asked = self._engine.loop.run_until_complete(at_a_time(self._generate, wanted, num_callers))
        return dataclasses.asdict(asked)

    async def _generate(self, request: Request) -> AsyncIterator[Answer]:
        sampling = {"max_new_tokens": self._num_new_tokens, "temperature": 0, "ignore_eos": True}
        num_seen = 0
        async with asyncio.timeout(_REQUEST_TIMEOUT_S):
            outputs = await self._engine.async_generate(
                input_ids=request.prompt, sampling_params=sampling, lora_path=str(request.policy), stream=True
            )
            async for output in outputs:
                num_tokens = output["meta_info"]["completion_tokens"]
                yield Answer(num_tokens - num_seen)
                num_seen = num_tokens

    def stop(self) -> None:
        self._engine.shutdown()


def main() -> None:
    bare = BareSglang()
    answer_lines({"start": bare.start, "ask": bare.ask, "stop": bare.stop})


if __name__ == "__main__":
    main()
