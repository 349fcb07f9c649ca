"""SGLang behind the port: one ``sglang.Engine``, its processes, its adapters by digest.

SGLang's own conveniences are kept out of the way. It reloads an unloaded adapter by itself from ``lora_ref_cache``: the
entry goes with the unload. It evicts when more than ``max_loaded_loras`` are loaded: the host never loads more. It
installs signal handlers that kill the process tree, and its ``shutdown`` kills every child of this process: both are
replaced, since the process is ours and may have children SGLang does not know.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mint_core import log
from mint_core.errors import FailedPrecondition, Internal, InvalidArgument, MintError, Unavailable
from mint_engine.adapter_engine import Delta, EngineLimits, EngineNumerics, GenerationCall, Sampling
from mint_engine.sglang_output import OutputReader
from mint_engine.sglang_plugin.version import check_sglang_version, runs_without_gpu
from mint_engine.sglang_request import request_arguments
from mint_engine.sglang_settings import SglangSettings, engine_arguments

__all__ = ["SglangEngine", "socket_files"]

_SELF_CHECK_TIMEOUT_MS = 60_000
_JOIN_TIMEOUT_S = 10.0
_FLUSH_ATTEMPTS = 50
_FLUSH_PAUSE_S = 0.02
# SGLang keeps this many tokens of a request's longest length to itself (tp_worker: max_req_len - 5 for the prompt).
_PROMPT_RESERVE = 5
_IPC = "ipc://"

_log = log.get_logger(__name__)


class SglangEngine:
    """One SGLang engine with a resident base; fulfils :class:`mint_engine.adapter_engine.AdapterEngine`."""

    def __init__(self, base_folder: Path, settings: SglangSettings) -> None:
        self._base_folder = base_folder
        self._settings = settings
        self._engine: Any = None
        self._limits: EngineLimits | None = None
        self._version = ""
        self._failure: str | None = None
        self._closing = False
        self._processes: list[Any] = []
        self._receiver: asyncio.Task[None] | None = None
        # SGLang's processes die with the thread that started them (PR_SET_PDEATHSIG), so it must live as long as they.
        self._thread = ThreadPoolExecutor(1, "mint-sglang")

    @property
    def limits(self) -> EngineLimits:
        if self._limits is None:
            raise FailedPrecondition("the engine has not started; its limits are not known yet")
        return self._limits

    @property
    def numerics(self) -> EngineNumerics:
        return EngineNumerics("sglang", self._version, self._settings.dtype, self._settings.quantization)

    @property
    def process_ids(self) -> frozenset[int]:
        """SGLang's own processes, while it runs."""
        return frozenset(process.pid for process in self._processes)

    @property
    def failure(self) -> str | None:
        if self._failure is None and not self._closing:
            for process in self._processes:
                if not process.is_alive():
                    self._fail(f"SGLang process {process.pid} ended with exit code {process.exitcode}")
        return self._failure

    async def start(self) -> None:
        self._version = check_sglang_version()
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            # What SGLang's processes send their parent when they fail.
            loop.add_signal_handler(signal.SIGQUIT, self._fail, "a process of SGLang failed, see its log")
        before = set(multiprocessing.active_children())
        try:
            async with asyncio.timeout(self._settings.start_timeout_s):
                await loop.run_in_executor(self._thread, self._launch)
        except BaseException as error:
            self._processes = [process for process in multiprocessing.active_children() if process not in before]
            await self.close()
            if isinstance(error, MintError) or not isinstance(error, Exception):
                raise
            # Everything that can go wrong while SGLang starts ends the same way: there is no engine.
            raise FailedPrecondition(f"SGLang did not start on {self._base_folder}: {error}") from error
        self._processes = [process for process in multiprocessing.active_children() if process not in before]
        manager = self._engine.tokenizer_manager
        # What SGLang does on its first request, without its signal handlers.
        manager.event_loop = loop
        self._receiver = loop.create_task(self._receive())
        self._limits = self._read_limits(manager)

    async def close(self) -> None:
        self._closing = True
        if self._engine is not None:
            manager = self._engine.tokenizer_manager
            if manager is not None and manager._subprocess_watchdog is not None:
                await asyncio.to_thread(manager._subprocess_watchdog.stop)
        if self._receiver is not None:
            self._receiver.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._receiver
            self._receiver = None
        processes, self._processes = self._processes, []
        for process in processes:
            process.kill()
        for process in processes:
            await asyncio.to_thread(process.join, _JOIN_TIMEOUT_S)
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(_release, engine)
        with contextlib.suppress(ValueError, RuntimeError):
            asyncio.get_running_loop().remove_signal_handler(signal.SIGQUIT)
        self._thread.shutdown(wait=False)

    async def load(self, digest: str, folder: Path, *, into_slot: bool) -> None:
        from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput

        from mint_engine.sglang_plugin.slot_prefetch import INTO_SLOT

        request = LoadLoRAAdapterReqInput(
            lora_name=digest, lora_path=str(folder), pinned=False, rid=INTO_SLOT if into_slot else None
        )
        manager = self._manager()
        result = await manager.load_lora_adapter(request, None)
        if not result.success:
            if digest in manager.pending_lora_unloads:
                # Some rank took it: finish SGLang's own clean-up, or the name stays blocked.
                await self.unload(digest)
            raise InvalidArgument(f"SGLang refused adapter {digest}: {result.error_message}", field="digest")

    async def warm(self, digest: str) -> None:
        # One token that nobody reads: SGLang fills the slot for it.
        call = GenerationCall(
            request_id=f"warm-{os.urandom(8).hex()}",
            digest=digest,
            cache_salt="mint-warm-up",
            prompt_token_ids=[0],
            sampling=Sampling(max_new_tokens=1),
        )
        async for _ in self.generate(call):
            pass

    async def unload(self, digest: str) -> None:
        from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqInput

        manager = self._manager()
        result = await manager.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name=digest), None)
        if not result.success:
            raise Internal(f"SGLang could not unload adapter {digest}: {result.error_message}")
        # Else a later request by this name would make SGLang load the old folder again, unasked.
        manager.lora_ref_cache.pop(digest, None)

    async def generate(self, call: GenerationCall) -> AsyncGenerator[Delta]:
        manager = self._manager()
        if call.digest is not None and call.digest not in manager.lora_registry.get_all_adapters():
            raise Internal(f"adapter {call.digest} was to answer and SGLang does not have it")
        from sglang.srt.managers.io_struct import GenerateReqInput

        reader = OutputReader(call, decode_token=self._decode_token)
        stream = manager.generate_request(GenerateReqInput(**request_arguments(call)), None)
        try:
            async with contextlib.aclosing(stream) as outputs:
                async for output in outputs:
                    delta = reader.read(output)
                    if delta is not None:
                        yield delta
        except ValueError as error:
            # SGLang's word for "this request is wrong".
            raise InvalidArgument(f"SGLang refused the request: {error}") from error

    async def flush_prefix_cache(self) -> bool:
        manager = self._manager()
        for _ in range(_FLUSH_ATTEMPTS):
            if (await manager.flush_cache()).success:
                return True
            if manager.rid_to_state:
                break
            # The scheduler drops a finished or aborted request one step after its stream has ended here.
            await asyncio.sleep(_FLUSH_PAUSE_S)
        return False

    def _launch(self) -> None:
        """Start SGLang and prove the plugin, in the thread that keeps its processes alive."""
        from mint_engine.sglang_plugin.launch import launch_engine

        arguments = engine_arguments(self._base_folder, self._settings, without_gpu=runs_without_gpu())
        self._engine = launch_engine(
            arguments,
            fast_upload=self._settings.fast_upload,
            slot_turn_passes=self._settings.slot_turn_passes,
            self_check_timeout_ms=_SELF_CHECK_TIMEOUT_MS,
        )

    def _read_limits(self, manager: Any) -> EngineLimits:
        longest = manager.max_req_input_len + _PROMPT_RESERVE - 1
        settings = self._settings
        return EngineLimits(
            max_loaded_adapters=settings.max_loaded_adapters,
            num_slots=settings.num_slots,
            max_lora_rank=settings.max_lora_rank,
            target_modules=frozenset(settings.target_modules),
            context_length=manager.context_len,
            max_total_tokens=longest,
            max_prompt_tokens=manager.max_req_input_len - 1,
            vocab_size=manager.model_config.vocab_size,
            returns_routed_experts=settings.return_routed_experts,
            # SGLang's own upload would give such a matrix to the first expert only.
            spreads_shared_experts=settings.fast_upload and settings.tensor_parallel == 1 and runs_without_gpu(),
        )

    async def _receive(self) -> None:
        try:
            await self._engine.tokenizer_manager.handle_loop()
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001
            # Whatever ends the loop that reads SGLang's answers leaves every stream waiting.
            self._fail(f"reading SGLang's answers failed: {error!r}")

    def _manager(self) -> Any:
        if self._engine is None or self.failure is not None:
            raise Unavailable(self._failure or "the engine is not running", retry_after_s=5.0)
        return self._engine.tokenizer_manager

    def _decode_token(self, token_id: int) -> str:
        return str(self._manager().tokenizer.decode([token_id], skip_special_tokens=True))

    def _fail(self, why: str) -> None:
        if self._failure is None and not self._closing:
            self._failure = why
            _log.error("the engine failed", extra={"fields": {"why": why}})
            self._end_streams(why)

    def _end_streams(self, why: str) -> None:
        """Give every waiting stream the end that SGLang will not send any more."""
        states = {} if self._engine is None else self._engine.tokenizer_manager.rid_to_state
        for request_id, state in list(states.items()):
            reason = {"type": "abort", "status_code": 503, "message": why}
            meta = {"id": request_id, "finish_reason": reason, "prompt_tokens": 0, "completion_tokens": 0}
            state.out_list.append({"text": "", "output_ids": [], "meta_info": meta})
            state.finished = True
            state.event.set()


def socket_files(engine: Any) -> list[Path]:
    """Where SGLang's processes meet: files in the temporary folder that nobody else would remove."""
    names = (name for name in vars(engine.port_args).values() if isinstance(name, str))
    return [Path(name.removeprefix(_IPC)) for name in names if name.startswith(_IPC)]


def _release(engine: Any) -> None:
    """Close what SGLang leaves to the end of the process: its sockets with their contexts and files, and the loop of
    its thread."""
    manager = engine.tokenizer_manager
    contexts = {
        socket.context
        for socket in (engine.send_to_rpc, manager.recv_from_detokenizer, manager.send_to_scheduler)
        if socket is not None
    }
    for context in contexts:
        context.destroy(linger=0)
    for file in socket_files(engine):
        file.unlink(missing_ok=True)
    if not engine.loop.is_running():
        engine.loop.close()
