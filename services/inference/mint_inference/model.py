"""What inference speaks of, and what it needs from others."""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from mint_core.errors import InvalidArgument
from mint_core.names import AliasName, BaseModelName, RevisionName
from mint_core.signing import Signature
from mint_core.split import sees_canary

__all__ = [
    "AliasWord",
    "Call",
    "Catalog",
    "Chunk",
    "Consistency",
    "Engines",
    "Header",
    "Loaders",
    "Model",
    "Replica",
    "ReplicaState",
    "Residency",
    "Resolution",
    "Scored",
    "Split",
    "Started",
    "parse_model",
]

Model = AliasName | RevisionName | BaseModelName
"""What a client may name: an alias, a revision, or a base model to ask the base on purpose."""


def parse_model(name: str) -> Model:
    """Parse ``GenerateRequest.model``; :class:`InvalidArgument` names the three patterns."""
    for kind in (AliasName, RevisionName, BaseModelName):
        place = kind.pattern.split("/")
        parts = name.split("/")
        if len(parts) == len(place) and parts[0] == place[0] and (len(parts) == 2 or parts[4] == place[4]):
            return kind.parse(name, field="model")
    shown = repr(name if len(name) <= 120 else name[:120] + "…")
    raise InvalidArgument(
        f"model is {shown}: expected {AliasName.pattern}, {RevisionName.pattern} or {BaseModelName.pattern}",
        field="model",
    )


@dataclass(frozen=True, slots=True)
class Consistency:
    """How fresh an answer must be; neither field set means within the cache's staleness bound."""

    strong: bool = False
    min_revision: int = 0
    """At least this catalog revision."""

    @property
    def is_default(self) -> bool:
        return not self.strong and not self.min_revision


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a name means: enough to generate, and no more. For a base model ``revision`` and ``digest`` are empty."""

    base_digest: str
    base_model: str = ""
    revision: str = ""
    digest: str = ""
    size_bytes: int = 0
    object_key: str = ""
    canary: bool = False
    stale: bool = False
    catalog_revision: int = 0
    """The catalog revision the answer was read at."""
    split: Split | None = None
    """Set if it depends on the sticky key, which an alias with a canary looks at; then :meth:`of` tells the answer."""
    signature: Signature | None = None

    def of(self, sticky_key: str) -> Resolution:
        """The answer for a request with this sticky key; without one never the canary."""
        split = self.split
        if split is None:
            return self
        side = split.canary if sees_canary(split.weight, split.salt, sticky_key) else split.active
        return replace(side, stale=self.stale, catalog_revision=self.catalog_revision)


@dataclass(frozen=True, slots=True)
class Split:
    """How an alias splits requests between its active revision and its canary, as the catalog does."""

    weight: float
    salt: str
    active: Resolution
    canary: Resolution


@dataclass(frozen=True, slots=True)
class AliasWord:
    """One message of the alias watch: a move, a deletion (``resolution`` is None), or only (``name`` is None) word
    that nothing was missed up to ``catalog_revision``."""

    catalog_revision: int
    name: AliasName | None = None
    resolution: Resolution | None = None


class ReplicaState(enum.Enum):
    """What a replica says of itself."""

    READY = "ready"
    DRAINING = "draining"
    SICK = "sick"


@dataclass(frozen=True, slots=True)
class Replica:
    """One registered engine replica."""

    name: str
    """engineReplicas/{engine_replica}"""
    address: str
    loader_address: str
    base_model: str
    base_digest: str
    state: ReplicaState = ReplicaState.READY
    registered_at_s: float = 0.0
    """Seconds since the epoch; another value is another life of the engine, which begins empty."""
    numerics: object = field(default=None, compare=False)
    """Its arithmetic, handed to the client as it registered it."""
    max_running_requests: int = 0
    """Requests in one of its batches; 0 is not known."""
    num_slots: int = 0
    """Adapters, the base among them, that one batch can mix; 0 is not known."""


@dataclass(frozen=True, slots=True)
class Residency:
    """What a replica says of itself when it is asked."""

    digests: frozenset[str]
    """Adapters it holds."""
    num_running: int
    """Streams it runs, whoever's they are."""


@dataclass(frozen=True, slots=True)
class Call:
    """One checked request. ``prompt`` and ``sampling`` are handed to the engine as they came."""

    model: Model
    tenant: str
    """Resource name of the tenant: salt of the prefix cache, and whose copy of the blob is read."""
    prompt: object
    sampling: object = None
    return_logprobs: bool = False
    return_routed_experts: bool = False
    sticky_key: str = ""
    consistency: Consistency = field(default_factory=Consistency)


class Chunk(Protocol):
    """A piece of a completion, relayed as the engine sent it."""

    @property
    def finish_reason(self) -> int:
        """Not 0 on the last chunk."""
        ...

    @property
    def token_ids(self) -> Sequence[int]: ...


@dataclass(frozen=True, slots=True)
class Started:
    """The engine's first message: it holds the adapter and will generate with it."""

    prompt_token_ids: Sequence[int]
    num_running: int = 0
    """Streams it runs, this one included."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The engine's answer to a score."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]


@dataclass(frozen=True, slots=True)
class Header:
    """Who generates: true for everything that follows it."""

    resolution: Resolution
    replica: str
    cold: bool
    prompt_token_ids: Sequence[int]
    numerics: object = None
    """The replica's arithmetic, as it registered it."""


class Catalog(Protocol):
    """The catalog, as far as inference needs it."""

    async def resolve(
        self, name: AliasName | RevisionName, consistency: Consistency, *, timeout_s: float
    ) -> Resolution:
        """What a name means, for every sticky key."""
        ...

    def watch_aliases(self, *, after: int) -> AsyncGenerator[AliasWord, None]:
        """Words of all aliases after a catalog revision; 0 means from now. Raises :class:`RevisionCompacted`."""
        ...

    async def list_replicas(self, *, timeout_s: float) -> list[Replica]: ...

    async def base_digest(self, name: BaseModelName, *, timeout_s: float) -> str:
        """Digest of a base model; :class:`NotFound` if it is not registered."""
        ...


class Engines(Protocol):
    """Engines by replica. Raise the errors of ``EngineService``."""

    def generate(self, replica: Replica, call: Call, digest: str) -> AsyncGenerator[Started | Chunk, None]:
        """A :class:`Started`, then chunks; an empty digest asks the base. Closing the iterator cancels the call."""
        ...

    async def score(self, replica: Replica, call: Call, digest: str) -> Scored: ...

    async def residency(self, replica: Replica, *, timeout_s: float) -> Residency: ...


class Loaders(Protocol):
    """Loaders by replica. Raise the errors of ``LoaderService``."""

    async def ensure(self, replica: Replica, tenant: str, resolution: Resolution) -> bool:
        """Return when the replica's engine holds the adapter; whether it had to be loaded."""
        ...
