"""What can be set about a runs worker."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from mint_blobs import ObjectStoreSettings
from mint_core.config import ServiceSettings

__all__ = ["RunsSettings"]


class RunsSettings(ServiceSettings):
    """Settings of the runs process, section ``runs``."""

    section: ClassVar[str] = "runs"

    base_model: str = "baseModels/default"
    """Name of the base model whose runs this worker claims; its registered digest must be the folder's."""

    base_model_path: Path
    """Local Hugging Face folder of the base model; only its tokenizer and chat template are loaded."""

    catalog_address: str
    """host:port or unix:PATH of the catalog's public services."""

    catalog_runtime_address: str
    """host:port or unix:PATH of the catalog's services for our own processes."""

    trainer_address: str
    """host:port or unix:PATH of the trainer."""

    exporter_runtime_address: str
    """host:port or unix:PATH of the exporter's services for our own processes."""

    inference_address: str = ""
    """host:port or unix:PATH of inference, which samples for GRPO and evaluation; SFT alone needs none."""

    remote_scorers: dict[str, str] = Field(default_factory=dict)
    """Scorers behind gRPC (``mint.v1.ScorerService``), name to host:port or unix:PATH; they win over installed ones.

    Recipes can only name them. A tenant who could give an address would make this worker, which stands inside the
    operator's network, call anything there, and would read the answers as rewards and errors."""

    object_store: ObjectStoreSettings = ObjectStoreSettings()
    """Where data sets are read from and rollout batches are kept."""

    max_concurrent_runs: int = Field(default=4, ge=1, le=64)
    """Runs in progress at the same time; the steps of one wait while the trainer computes another's."""

    max_concurrent_samples: int = Field(default=64, ge=1, le=1024)
    """Completions that one run asks inference for at the same time."""

    sample_timeout_s: float = Field(default=900.0, gt=0)
    """How long one completion may take before it is asked for again."""

    record_routed_experts: bool = True
    """Keep with every sample the experts that its tokens went to, where the base routes. Its engines need
    ``return_routed_experts``; false is for engines that cannot tell."""

    replay_routed_experts: bool = False
    """Send the recorded experts to the trainer with each update: for a trainer that replays them."""

    lease_ttl_s: float = Field(default=30.0, ge=2, le=3600)
    """Time to live of a policy's lease after its last renewal: how long the runs of a dead worker stand still."""

    lease_margin_s: float = Field(default=5.0, gt=0)
    """Work stops this long before an unrenewed lease ends; covers the drift between two machines' clocks."""

    claim_wait_s: float = Field(default=20.0, gt=0)
    """How long one question for a run waits at the catalog; half of lease_ttl_s if that is less."""

    report_interval_s: float = Field(default=0.25, gt=0)
    """Progress is written at most this often."""

    patience_s: float = Field(default=300.0, gt=0)
    """How long trainer, exporter, inference or object store may be away before an attempt is given up."""

    drain_timeout_s: float = Field(default=60.0, gt=0)
    """After SIGTERM, how long a run gets to finish its step, save its state and be given back."""

    scratch_path: Path | None = None
    """Folder for data sets and rollout batches on their way; none takes the system's temporary folder."""

    @model_validator(mode="after")
    def _margin_fits(self) -> Self:
        if self.lease_margin_s > self.lease_ttl_s / 2:
            raise ValueError(
                f"lease_margin_s is {self.lease_margin_s}: at most half of lease_ttl_s, which is {self.lease_ttl_s}"
            )
        return self

    @model_validator(mode="after")
    def _replay_has_a_record(self) -> Self:
        if self.replay_routed_experts and not self.record_routed_experts:
            raise ValueError(
                "replay_routed_experts is true and record_routed_experts is false: nothing is replayed that was not "
                "recorded; set both or neither"
            )
        return self
