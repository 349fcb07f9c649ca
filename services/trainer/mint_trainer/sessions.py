"""All sessions of the process: created, stepped in order, saved, restored, expired.

Steps of one session run one after another, in the order in which they were asked for; steps of different sessions take
turns on the torch thread, and while one session's state travels to the object store the others go on computing. A
caller that goes away before its step starts takes the step with it; a step that has started is finished and its result
kept, so that a repeated call finds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mint_blobs import ObjectStore, state_keys
from mint_core import clock, failpoints, log
from mint_core.errors import (
    AlreadyExists,
    BaseModelMismatch,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from mint_core.names import BlobName, PolicyName, SessionName
from mint_trainer.adapters import ResidentAdapters
from mint_trainer.base import ResidentBase
from mint_trainer.batch import BatchLimits, Datum
from mint_trainer.ledger import LedgerContents, StepLedger
from mint_trainer.optimizer import AdamWConfig
from mint_trainer.recipe import AdapterRecipe
from mint_trainer.session import StepResult, TrainingSession
from mint_trainer.state import SavedState, StateReader, write_for_export, write_state
from mint_trainer.worker import Ticket, TorchThread

__all__ = ["SessionLimits", "SessionView", "Sessions", "StageBlob", "StagedBlob"]

_log = log.get_logger(__name__)
_STEP_COMPUTED = failpoints.declare("trainer.step_computed", "a step changed the session, its caller does not know yet")
_OPTIMIZER_STORED = failpoints.declare("trainer.optimizer_stored", "a state's optimizer is stored, its weights are not")
_STATE_STORED = failpoints.declare("trainer.state_stored", "a state is stored whole, its caller does not know yet")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """How much the process takes on."""

    max_sessions: int
    """Sessions that exist at the same time."""
    max_waiting_steps: int
    """Steps, saves and loads of all sessions that are running or waiting for their turn."""
    idle_ttl_s: float
    """A session without calls for so long is closed."""
    num_kept_results: int
    """Step results kept for each session."""


@dataclass(frozen=True, slots=True)
class SessionView:
    """What can be said about a session."""

    name: SessionName
    policy: PolicyName
    recipe: AdapterRecipe
    step: int
    """Optimizer steps done."""
    next_seq: int
    """What the next step must carry."""
    create_time_s: float
    """Since the epoch."""
    expire_time_s: float
    """Since the epoch; when it is closed if nobody calls."""


@dataclass(slots=True, eq=False)
class _Entry:
    name: SessionName
    policy: PolicyName
    payload_digest: bytes
    session: TrainingSession
    ledger: StepLedger
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    create_time_s: float = field(default_factory=clock.wall_s)
    last_used_s: float = field(default_factory=clock.monotonic_s)
    num_waiting: int = 0
    closed: bool = False


@dataclass(frozen=True, slots=True)
class StagedBlob:
    """Where the catalog wants the bytes of a blob."""

    object_key: str
    is_verified: bool
    """They are there already."""


StageBlob = Callable[[BlobName, int], Awaitable[StagedBlob]]
"""Asks the catalog for the object key of a blob of so many bytes."""


class Sessions:
    """The process's sessions. Every coroutine may be cancelled at any await without harm."""

    def __init__(
        self,
        base: ResidentBase,
        store: ObjectStore,
        thread: TorchThread,
        batch_limits: BatchLimits,
        limits: SessionLimits,
        scratch: Path,
        stage_blob: StageBlob | None = None,
    ) -> None:
        """With ``stage_blob``, what is saved for an export is stored where the blob is served from."""
        self.base = base
        self._stage_blob = stage_blob
        self._store = store
        self._thread = thread
        self._batch_limits = batch_limits
        self._limits = limits
        self._scratch = scratch
        self._adapters = ResidentAdapters(base)
        self._entries: dict[SessionName, _Entry] = {}
        self._creating = asyncio.Lock()
        self._num_waiting = 0

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Every name that a recipe's ``target_modules`` may have."""
        return self._adapters.targets

    # --- life of a session

    async def create(
        self,
        name: SessionName,
        policy: PolicyName,
        *,
        payload_digest: bytes,
        recipe: AdapterRecipe | None = None,
        from_state: SavedState | None = None,
        weights_only: bool = False,
        base_digest: str = "",
    ) -> SessionView:
        """Place a policy on the base, fresh from ``recipe`` or as saved; repeated with the same payload, a no-op.

        From a state the session goes on after the saved steps' seq and answers for them; with ``weights_only`` it
        begins at seq 1.

        Raises :class:`InvalidArgument`, :class:`AlreadyExists`, :class:`BaseModelMismatch`, :class:`BlobCorrupt`,
        :class:`NotFound` for a state that is not there and :class:`ResourceExhausted` when there is no room.
        """
        if policy.tenant != name.tenant:
            raise InvalidArgument(
                f"session.policy is {policy}: it belongs to another tenant than {name}", field="session.policy"
            )
        if base_digest and base_digest != self.base.digest:
            raise BaseModelMismatch(
                f"{policy} belongs to the base {base_digest}, but this trainer holds {self.base.digest}",
                metadata={"expected": base_digest, "actual": self.base.digest},
            )
        if recipe is None and from_state is None:
            raise InvalidArgument("session.lora is not set: give it, or from_state", field="session.lora")
        if from_state is not None:
            from_state.check(name.tenant, weights_only=weights_only, field="from_state")
        return await self._unharmed(
            lambda ticket: self._create(name, policy, payload_digest, recipe, from_state, weights_only, ticket)
        )

    async def _create(
        self,
        name: SessionName,
        policy: PolicyName,
        payload_digest: bytes,
        recipe: AdapterRecipe | None,
        from_state: SavedState | None,
        weights_only: bool,
        ticket: Ticket,
    ) -> SessionView:
        async with self._creating:
            existing = self._entries.get(name)
            if existing is not None:
                if existing.payload_digest != payload_digest:
                    raise AlreadyExists(
                        f"{name} exists and was created otherwise: close it, or choose another id",
                        metadata={"resource": str(name)},
                    )
                return self._view(existing)
            await self.expire_idle()
            if len(self._entries) >= self._limits.max_sessions:
                raise ResourceExhausted(
                    f"all {self._limits.max_sessions} sessions of this trainer are in use: close one, wait until one "
                    f"has been idle for {self._limits.idle_ttl_s:g} s, or raise max_sessions"
                )
            if from_state is None:
                assert recipe is not None  # create() checked it
                session, contents = await self._thread.run(partial(self._fresh, recipe), ticket), None
            else:
                async with self._fetched(from_state, weights_only) as reader:
                    session, contents = await self._thread.run(partial(self._restored, reader, recipe), ticket)
            ledger = StepLedger(str(name), self._limits.num_kept_results, contents)
            entry = _Entry(name, policy, payload_digest, session, ledger)
            self._entries[name] = entry
            return self._view(entry)

    def get(self, name: SessionName) -> SessionView:
        """Look at a session; :class:`NotFound` if there is none."""
        return self._view(self._entry(name))

    async def close(self, name: SessionName) -> None:
        """Finish its running step, refuse the waiting ones, free it; :class:`NotFound` if there is none."""
        entry = self._entry(name)
        await self._unharmed(lambda _: self._close(entry))

    async def expire_idle(self) -> int:
        """Close every session that was idle for too long; returns how many that were."""
        oldest_s = clock.monotonic_s() - self._limits.idle_ttl_s
        idle = [e for e in self._entries.values() if e.num_waiting == 0 and e.last_used_s <= oldest_s]
        for entry in idle:
            await self._close(entry)
            _log.info("session expired", extra={"fields": {"session": str(entry.name), "step": entry.session.step}})
        return len(idle)

    async def _close(self, entry: _Entry) -> None:
        entry.closed = True
        async with entry.lock:
            if self._entries.get(entry.name) is entry:
                del self._entries[entry.name]
                await self._thread.run(entry.session.close, Ticket())

    # --- steps

    async def forward(self, name: SessionName, data: Sequence[Datum], *, reference: bool = False) -> StepResult:
        """Log-probabilities and cross-entropy; takes its turn like a step but has no seq.

        With ``reference`` the base computes alone: the log-probabilities of a reference policy.
        """
        return await self._in_turn(name, partial(self._forward, data, reference))

    async def _forward(self, data: Sequence[Datum], reference: bool, entry: _Entry, ticket: Ticket) -> StepResult:
        return await self._thread.run(partial(entry.session.forward, data, reference=reference), ticket)

    async def forward_backward(
        self,
        name: SessionName,
        seq: int,
        payload_digest: bytes,
        data: Sequence[Datum],
        loss: str,
        loss_parameters: Mapping[str, float],
        *,
        return_logprobs: bool,
    ) -> StepResult:
        """Step ``seq``: see :meth:`TrainingSession.forward_backward` and :class:`StepLedger`."""

        def compute(session: TrainingSession) -> StepResult:
            return session.forward_backward(data, loss, loss_parameters, return_logprobs=return_logprobs)

        return await self._in_turn(name, partial(self._step, seq, payload_digest, compute))

    async def optim_step(
        self, name: SessionName, seq: int, payload_digest: bytes, config: AdamWConfig, gradient_scale: float
    ) -> StepResult:
        """Step ``seq``: see :meth:`TrainingSession.optim_step` and :class:`StepLedger`."""
        return await self._in_turn(
            name,
            partial(self._step, seq, payload_digest, lambda session: session.optim_step(config, gradient_scale)),
        )

    def step_result(self, name: SessionName, seq: int) -> StepResult:
        """The stored result of a step; :class:`NotFound` if it has not run or is not kept."""
        return self._entry(name).ledger.kept(seq)

    async def _step(
        self,
        seq: int,
        payload_digest: bytes,
        compute: Callable[[TrainingSession], StepResult],
        entry: _Entry,
        ticket: Ticket,
    ) -> StepResult:
        stored = entry.ledger.result_of(seq, payload_digest)
        if stored is not None:
            return stored
        result = await self._thread.run(partial(compute, entry.session), ticket)
        entry.ledger.record(seq, payload_digest, result)
        await _STEP_COMPUTED.reached()
        return result

    # --- state

    async def save_state(
        self, name: SessionName, run: str, run_id: str, fence: int, *, for_export: bool = False
    ) -> SavedState:
        """Store weights, optimizer and newest step results under the keys of (policy, ``run_id``, step, ``fence``).

        With ``for_export`` only the weights, in the base's compute type: nothing can be resumed from them. They go to
        the object key that the catalog has for a blob of these bytes, so that they need not be stored again.

        Raises :class:`AlreadyExists` if those keys hold another state and :class:`Unavailable` if the store is away.
        """
        if fence < 0:
            raise InvalidArgument(f"fence is {fence}: a fence token is never negative", field="fence")
        return await self._in_turn(
            name, partial(self._save_for_export if for_export else self._save, run, run_id, fence)
        )

    async def _save(self, run: str, run_id: str, fence: int, entry: _Entry, ticket: Ticket) -> SavedState:
        keys = state_keys(entry.policy, run_id, entry.session.step, fence)
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            files = await self._thread.run(
                partial(write_state, entry.session, entry.ledger.contents, Path(folder)), ticket
            )
            # The optimizer first: whoever finds weights finds the whole state.
            await self._store.put_file(keys.optimizer, files.optimizer_path, digest=files.optimizer.digest)
            await _OPTIMIZER_STORED.reached()
            await self._store.put_file(keys.weights, files.weights_path, digest=files.weights.digest)
        await _STATE_STORED.reached()
        return SavedState(
            run=run,
            step=entry.session.step,
            fence=fence,
            weights_key=keys.weights,
            weights=files.weights,
            optimizer_key=keys.optimizer,
            optimizer=files.optimizer,
        )

    async def _save_for_export(self, run: str, run_id: str, fence: int, entry: _Entry, ticket: Ticket) -> SavedState:
        step = entry.session.step
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            path = Path(folder) / "weights.safetensors"
            weights = await self._thread.run(partial(write_for_export, entry.session, path), ticket)
            if self._stage_blob is None:
                staged = StagedBlob(state_keys(entry.policy, run_id, step, fence).export, is_verified=False)
            else:
                staged = await self._stage_blob(BlobName(entry.policy.tenant, weights.digest), weights.size_bytes)
            if not staged.is_verified:
                await self._store.put_file(staged.object_key, path, digest=weights.digest)
        return SavedState(run=run, step=step, fence=fence, weights_key=staged.object_key, weights=weights)

    async def load_state(self, name: SessionName, saved: SavedState, *, weights_only: bool) -> SessionView:
        """Replace weights, optimizer, random state and step; the session's seq goes on as it was.

        Raises what :meth:`create` raises for a state, and :class:`WrongState` if the state's adapter is made otherwise.
        """
        saved.check(name.tenant, weights_only=weights_only, field="state")
        return await self._in_turn(name, partial(self._load, saved, weights_only))

    async def _load(self, saved: SavedState, weights_only: bool, entry: _Entry, ticket: Ticket) -> SessionView:
        async with self._fetched(saved, weights_only) as reader:
            await self._thread.run(partial(reader.restore, entry.session), ticket)
        return self._view(entry)

    @contextlib.asynccontextmanager
    async def _fetched(self, saved: SavedState, weights_only: bool) -> AsyncIterator[StateReader]:
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            weights_path = Path(folder) / "weights.safetensors"
            optimizer_path = None if weights_only else Path(folder) / "optimizer.safetensors"
            await self._store.get_file(
                saved.weights_key, weights_path, digest=saved.weights.digest, size_bytes=saved.weights.size_bytes
            )
            if optimizer_path is not None:
                await self._store.get_file(
                    saved.optimizer_key,
                    optimizer_path,
                    digest=saved.optimizer.digest,
                    size_bytes=saved.optimizer.size_bytes,
                )
            yield StateReader(saved, weights_path, optimizer_path)

    def _fresh(self, recipe: AdapterRecipe) -> TrainingSession:
        return TrainingSession(self.base, self._adapters, recipe, self._batch_limits)

    def _restored(self, reader: StateReader, recipe: AdapterRecipe | None) -> tuple[TrainingSession, LedgerContents]:
        session = self._fresh(recipe or reader.recipe())
        try:
            reader.restore(session)
            return session, reader.ledger()
        except BaseException:  # also when interrupted, the adapter leaves the base
            session.close()
            raise

    # --- turns

    def _entry(self, name: SessionName) -> _Entry:
        entry = self._entries.get(name)
        if entry is None or entry.closed:
            raise _no_session(name)
        entry.last_used_s = clock.monotonic_s()
        return entry

    async def _in_turn(self, name: SessionName, work: Callable[[_Entry, Ticket], Coroutine[Any, Any, T]]) -> T:
        entry = self._entry(name)
        if self._num_waiting >= self._limits.max_waiting_steps:
            raise Unavailable(
                f"{self._num_waiting} steps are waiting for this trainer, as many as max_waiting_steps allows; "
                "retry in a moment"
            )

        async def take_turn(ticket: Ticket) -> T:
            self._num_waiting += 1
            entry.num_waiting += 1
            try:
                async with entry.lock:  # asyncio's lock is fair: first come, first served
                    if entry.closed:
                        raise _no_session(name)
                    return await work(entry, ticket)
            finally:
                self._num_waiting -= 1
                entry.num_waiting -= 1
                entry.last_used_s = clock.monotonic_s()

        return await self._unharmed(take_turn)

    async def _unharmed(self, work: Callable[[Ticket], Coroutine[Any, Any, T]]) -> T:
        """Await ``work`` such that cancelling the caller voids its ticket but never stops it half-way."""
        ticket = Ticket.of_call()
        task = asyncio.ensure_future(work(ticket))
        # Without a caller there is nobody to take the error.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            ticket.cancel()
            raise

    def _view(self, entry: _Entry) -> SessionView:
        idle_s = clock.monotonic_s() - entry.last_used_s
        return SessionView(
            name=entry.name,
            policy=entry.policy,
            recipe=entry.session.recipe,
            step=entry.session.step,
            next_seq=entry.ledger.next_seq,
            create_time_s=entry.create_time_s,
            expire_time_s=clock.wall_s() + self._limits.idle_ttl_s - idle_s,
        )


def _no_session(name: SessionName) -> NotFound:
    return NotFound(
        f"{name} does not exist here: it was never created, was closed, expired, or the trainer restarted; "
        "create it, from its last saved state if there is one",
        metadata={"resource": str(name)},
    )
