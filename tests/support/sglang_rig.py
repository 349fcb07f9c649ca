"""The real engine over a tiny base, for tests: started once, emptied between tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import warnings
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mint_core.base_model import digest_of_folder
from mint_engine.adapter_folder import AdapterRules
from mint_engine.base_geometry import BaseGeometry
from mint_engine.host import EngineHost, HostState, adapter_checker
from mint_engine.prompts import HuggingFacePrompts
from mint_engine.sglang_engine import SglangEngine, socket_files
from mint_engine.sglang_plugin.upload_check import UPLOAD_CHECK_METHOD
from mint_engine.sglang_settings import SglangSettings

__all__ = ["SglangRig", "running_sglang"]


@dataclass(frozen=True)
class SglangRig:
    """A started engine and a way to put fresh hosts over it."""

    engine: SglangEngine
    prompts: HuggingFacePrompts
    base: Path
    adapter_dir: Path
    process_ids: frozenset[int]

    @contextlib.asynccontextmanager
    async def host(self, *, call_timeout_s: float = 30) -> AsyncIterator[EngineHost]:
        """A host without residents; what it loaded is unloaded again."""
        rules = AdapterRules(
            base_digest=digest_of_folder(self.base, use_cache=False).digest,
            geometry=BaseGeometry.from_folder(self.base),
            max_lora_rank=self.engine.limits.max_lora_rank,
            target_modules=self.engine.limits.target_modules,
            spreads_shared_experts=self.engine.limits.spreads_shared_experts,
        )
        host = EngineHost(
            self.engine, self.prompts, adapter_checker(self.adapter_dir, rules), call_timeout_s=call_timeout_s
        )
        try:
            yield host
        finally:
            if self.engine.failure is None and host.state is not HostState.SICK:
                for resident in host.residents():
                    resident.pinned = False
                    await host.unload(resident.digest)
                await self.engine.flush_prefix_cache()

    async def check_upload(self, *, ranks: Sequence[int], seed: int = 0, mapped: Sequence[str] = ()) -> None:
        """Have the scheduler compare the fast upload with SGLang's own, and say that ``mapped`` came the fast way."""
        await asyncio.to_thread(
            self.engine._engine.collective_rpc,
            UPLOAD_CHECK_METHOD,
            ranks=list(ranks),
            seed=seed,
            required=True,
            mapped=list(mapped),
        )


@contextlib.asynccontextmanager
async def running_sglang(base: Path, adapter_dir: Path, settings: SglangSettings) -> AsyncIterator[SglangRig]:
    """Start SGLang in this process, one thread per kernel, and end its processes afterwards."""
    os.environ["OMP_NUM_THREADS"] = "1"
    engine = SglangEngine(base, settings)
    try:
        with warnings.catch_warnings():
            # SGLang warns of every accelerator this machine does not have.
            warnings.simplefilter("ignore")
            await engine.start()
            prompts = HuggingFacePrompts(base, vocab_size=engine.limits.vocab_size)
        files = socket_files(engine._engine)
        assert files
        yield SglangRig(engine, prompts, base, adapter_dir, engine.process_ids)
        prompts.close()
    finally:
        await engine.close()
    assert not [file for file in files if file.exists()]
