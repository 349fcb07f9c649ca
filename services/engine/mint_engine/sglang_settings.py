"""What an operator can say about the embedded SGLang, and the arguments SGLang gets for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["DEFAULT_TARGET_MODULES", "SglangSettings", "engine_arguments"]

DEFAULT_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear modules of attention and of the MLP, dense or routed."""


class SglangSettings(BaseModel):
    """Size and arithmetic of one engine."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Compute type of the base. float32 for exact comparisons with training."""

    quantization: str = ""
    """SGLang's name of a quantization scheme; empty for none."""

    max_lora_rank: int = Field(default=16, ge=1, le=512)
    """Highest rank taken. Every slot is as large as this rank needs, so keep it tight."""

    target_modules: tuple[str, ...] = DEFAULT_TARGET_MODULES
    """Modules that slots are made for, by their last names."""

    num_slots: int = Field(default=8, ge=2)
    """Adapters, the base among them, that one batch can mix."""

    max_loaded_adapters: int = Field(default=64, ge=2)
    """Adapters in host memory; at least ``num_slots``."""

    fast_upload: bool = True
    """Without a GPU, map packed adapters and copy them into slots in large pieces; off takes SGLang's own way."""

    context_length: int = Field(default=0, ge=0)
    """Longest sequence in tokens; 0 takes the model's own."""

    max_total_tokens: int = Field(default=16_384, ge=64)
    """Tokens in the key-value pool; on a GPU 0 is not offered, name what memory allows."""

    max_running_requests: int = Field(default=64, ge=1)
    """Requests in one batch. Where the weights' way through memory decides, four times the requests cost little more
    time than one."""

    mem_fraction_static: float = Field(default=0.0, ge=0, lt=1)
    """Share of memory for weights and key-value pool; 0 takes 0.2 of the machine without a GPU and SGLang's choice
    with."""

    mixed_prefill: bool = False
    """Compute the prompts of new requests and the next tokens of running ones in one pass: more requests per second
    where they come one by one, and a little later a first token. Not beside ``return_routed_experts``, whose records
    were never compared there; SGLang itself computes apart whoever asks for log-probabilities."""

    slot_turn_passes: int = Field(default=0, ge=0)
    """Passes after which an adapter leaves its slot to one that waits for a slot, to go on when its turn comes again;
    0 lets it keep the slot until its requests end, however long others wait. Switches SGLang's overlapped scheduling
    off."""

    return_routed_experts: bool = False
    """Record the experts each token went to, for a base with routed experts."""

    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs the base is spread over."""

    attention_backend: str = ""
    """SGLang's name of an attention backend; empty takes torch's without a GPU and SGLang's choice with."""

    lora_backend: str = ""
    """SGLang's name of a LoRA backend; empty takes torch's without a GPU and SGLang's choice with."""

    start_timeout_s: float = Field(default=600.0, gt=0)
    """Limit for loading the base and starting all processes."""

    call_timeout_s: float = Field(default=30.0, gt=0)
    """Limit for one load, unload or flush; an engine that misses it is sick."""

    log_level: Literal["debug", "info", "warning", "error"] = "error"
    """What SGLang itself logs."""

    @model_validator(mode="after")
    def _records_stay_apart(self) -> Self:
        if self.mixed_prefill and self.return_routed_experts:
            raise ValueError(
                "mixed_prefill and return_routed_experts are both on, and recorded routing of mixed passes is not "
                "proven; switch one of them off"
            )
        return self


def engine_arguments(base_folder: Path, settings: SglangSettings, *, without_gpu: bool) -> dict[str, Any]:
    """Keyword arguments of ``sglang.Engine``."""
    arguments: dict[str, Any] = {
        "model_path": str(base_folder),
        "dtype": settings.dtype,
        "quantization": settings.quantization or None,
        "context_length": settings.context_length or None,
        "trust_remote_code": False,
        "tp_size": settings.tensor_parallel,
        "max_total_tokens": settings.max_total_tokens,
        "max_running_requests": settings.max_running_requests,
        "enable_lora": True,
        "max_lora_rank": settings.max_lora_rank,
        "lora_target_modules": sorted(settings.target_modules),
        "max_loras_per_batch": settings.num_slots,
        # One more than ours: an adapter is loaded before the one that makes room for it is forgotten.
        "max_loaded_loras": settings.max_loaded_adapters + 1,
        "lora_eviction_policy": "lru",
        # A weight without a slot fails the load instead of being left out.
        "lora_strict_loading": True,
        # Seeds per request work with this sampler only.
        "sampling_backend": "pytorch",
        "enable_mixed_chunk": settings.mixed_prefill,
        "enable_return_routed_experts": settings.return_routed_experts,
        "incremental_streaming_output": True,
        "skip_server_warmup": True,
        "log_level": settings.log_level,
        "watchdog_timeout": 300,
    }
    if settings.slot_turn_passes:
        arguments["disable_overlap_schedule"] = True
    if settings.mem_fraction_static:
        arguments["mem_fraction_static"] = settings.mem_fraction_static
    if settings.attention_backend:
        arguments["attention_backend"] = settings.attention_backend
    if settings.lora_backend:
        arguments["lora_backend"] = settings.lora_backend
    if without_gpu:
        defaults = {
            "device": "cpu",
            "attention_backend": "torch_native",
            "lora_backend": "torch_native",
            "disable_overlap_schedule": True,
            # max_total_tokens bounds the pool. SGLang takes this share of the memory that the whole machine has free,
            # before and after it loaded the weights, and gives up where another process took some meanwhile.
            "mem_fraction_static": 0.6,
            # Without it the idle scheduler spins and takes a core from everybody else.
            "sleep_on_idle": True,
        }
        arguments = defaults | arguments
    return arguments
