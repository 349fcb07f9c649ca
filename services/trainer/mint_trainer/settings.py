"""What can be set about a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from mint_blobs import ObjectStoreSettings
from mint_core.config import ServiceSettings
from mint_trainer.choices import Attention, Dtype

__all__ = ["TrainerSettings"]


class TrainerSettings(ServiceSettings):
    """Settings of the trainer process, section ``trainer``."""

    section: ClassVar[str] = "trainer"

    base_model: str = "baseModels/default"
    """Name of the base model in the catalog; its registered digest must be the folder's."""

    base_model_path: Path
    """Local Hugging Face folder of the base model: config.json and safetensors weights."""

    catalog_address: str
    """host:port or unix:PATH of the catalog, asked once at start for the base model's digest."""

    catalog_runtime_address: str = ""
    """host:port or unix:PATH of the catalog's services for our own processes: weights saved for an export are stored
    as the blob that is served. Empty stores them among the states, and the exporter stores them once more."""

    catalog_timeout_s: float = Field(default=60.0, gt=0)
    """How long to wait at start for a catalog that is not there yet."""

    object_store: ObjectStoreSettings = ObjectStoreSettings()
    """Where states are saved."""

    scratch_path: Path | None = None
    """Folder for states on their way to and from the object store; none takes the system's temporary folder."""

    dtype: Dtype = "float32"
    """Compute type of the base; adapters are float32 in any case."""

    attention: Attention = "sdpa"
    """Attention implementation of transformers."""

    num_threads: int = Field(default=2, ge=1)
    """Threads inside one torch kernel. Results are reproducible bit for bit under the same number."""

    default_target_modules: tuple[str, ...] = (
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    )
    """What a recipe without targets adapts, as far as the base has it."""

    max_sessions: int = Field(default=64, ge=1)
    """Sessions that exist at the same time."""

    max_waiting_steps: int = Field(default=256, ge=1)
    """Steps of all sessions that are running or waiting for their turn."""

    session_ttl_s: float = Field(default=3600.0, gt=0)
    """A session without calls for so long is closed; what it has not saved is gone."""

    num_kept_results: int = Field(default=64, ge=1)
    """Step results kept for each session and saved with its state, for callers whose answer was lost."""

    max_datum_tokens: int = Field(default=8192, ge=1)
    """Longest sequence; the base's own context length if that is shorter."""

    max_step_tokens: int = Field(default=131_072, ge=1)
    """Tokens of one step."""

    micro_batch_tokens: int = Field(default=2048, ge=1)
    """Padded tokens computed at once. Memory grows with it; results are reproducible bit for bit under the same."""

    share_prefixes: bool = True
    """Whether tokens with which consecutive data of a step begin alike are computed once, where the base can do so and
    the recipe has no dropout. Results are reproducible bit for bit under the same; the other differs by rounding."""
