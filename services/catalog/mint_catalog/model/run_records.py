"""Records of training runs and their recipes, with the field names of the public messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from typing import TypeAlias

from mint_catalog.model.records import BlobRef, TrainingState
from mint_core.names import RunName

__all__ = [
    "DpoRecipe",
    "EvaluationRecipe",
    "GroupAdvantage",
    "GrpoRecipe",
    "LossFunction",
    "OptimizerConfig",
    "Recipe",
    "Run",
    "RunEvent",
    "RunProgress",
    "RunState",
    "RunStep",
    "SftRecipe",
    "TokenWeighting",
]


class RunState(IntEnum):
    UNSPECIFIED = 0
    QUEUED = 1
    RUNNING = 2
    CANCELLING = 3
    SUCCEEDED = 4
    FAILED = 5
    CANCELLED = 6

    @property
    def ended(self) -> bool:
        """Whether nothing will happen to the run any more."""
        return self >= RunState.SUCCEEDED

    @property
    def claimed(self) -> bool:
        """Whether a worker holds the run."""
        return self in (RunState.RUNNING, RunState.CANCELLING)


class GroupAdvantage(IntEnum):
    UNSPECIFIED = 0
    STANDARDIZED = 1
    CENTERED = 2


class TokenWeighting(IntEnum):
    UNSPECIFIED = 0
    TOKEN_MEAN = 1
    SEQUENCE_MEAN = 2
    FIXED_LENGTH = 3


class LossFunction(IntEnum):
    UNSPECIFIED = 0
    CROSS_ENTROPY = 1
    IMPORTANCE_SAMPLING = 2
    PPO = 3
    CISPO = 4
    DRO = 5


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    learning_rate: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    num_warmup_steps: int = 0


@dataclass(frozen=True, slots=True)
class SftRecipe:
    train_data: BlobRef | None = None
    eval_data: BlobRef | None = None
    num_steps: int = 0
    batch_size: int = 0
    max_tokens: int = 0
    optimizer: OptimizerConfig | None = None
    seed: int = 0
    save_every_steps: int = 0
    eval_every_steps: int = 0


@dataclass(frozen=True, slots=True)
class GrpoRecipe:
    prompts: BlobRef | None = None
    scorer: str = ""
    num_steps: int = 0
    num_prompts_per_step: int = 0
    group_size: int = 0
    max_new_tokens: int = 0
    temperature: float = 0.0
    optimizer: OptimizerConfig | None = None
    clip_epsilon: float = 0.0
    kl_coefficient: float = 0.0
    seed: int = 0
    scorer_options: Mapping[str, str] = field(default_factory=dict)
    scorer_timeout_s: float = 0.0
    advantage: GroupAdvantage = GroupAdvantage.UNSPECIFIED
    weighting: TokenWeighting = TokenWeighting.UNSPECIFIED
    loss: LossFunction = LossFunction.UNSPECIFIED
    clip_epsilon_high: float = 0.0
    sequence_level_ratio: bool = False
    max_staleness: int = 0
    promote_every_steps: int = 0
    stop: tuple[str, ...] = ()
    rollout_ttl_s: int = 0


@dataclass(frozen=True, slots=True)
class DpoRecipe:
    train_data: BlobRef | None = None
    num_steps: int = 0
    batch_size: int = 0
    beta: float = 0.0
    optimizer: OptimizerConfig | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class EvaluationRecipe:
    revision: str = ""
    data: BlobRef | None = None
    scorer: str = ""
    max_new_tokens: int = 0
    scorer_options: Mapping[str, str] = field(default_factory=dict)
    scorer_timeout_s: float = 0.0
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()


Recipe: TypeAlias = SftRecipe | GrpoRecipe | DpoRecipe | EvaluationRecipe


@dataclass(frozen=True, slots=True)
class RunProgress:
    step: int = 0
    num_steps: int = 0
    loss: float = 0.0
    eval_loss: float = 0.0
    num_tokens: int = 0
    tokens_per_s: float = 0.0
    saved_step: int = 0
    update_time: datetime | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunStep:
    step: int = 0
    time: datetime | None = None
    loss: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    mod_revision: int = 0


@dataclass(frozen=True, slots=True)
class RunEvent:
    time: datetime | None = None
    kind: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    name: RunName
    policy: str = ""
    sft: SftRecipe | None = None
    grpo: GrpoRecipe | None = None
    dpo: DpoRecipe | None = None
    evaluation: EvaluationRecipe | None = None
    continue_from_latest: bool = False
    publish: bool = False
    promote_alias: str = ""
    priority: int = 0
    state: RunState = RunState.UNSPECIFIED
    progress: RunProgress | None = None
    events: tuple[RunEvent, ...] = ()
    num_attempts: int = 0
    worker: str = ""
    error: str = ""
    published_revision: str = ""
    initial_training_state: TrainingState | None = None
    latest_training_state: TrainingState | None = None
    create_time: datetime | None = None
    end_time: datetime | None = None
    policy_uid: str = ""
    finished_fence: int = 0
    dead_letter: bool = False
    not_before_time: datetime | None = None
    num_failures: int = 0
    mod_revision: int = 0

    @property
    def recipe(self) -> Recipe | None:
        """The one recipe that is set."""
        return self.sft or self.grpo or self.dpo or self.evaluation
