"""A session at the trainer: steps in order, each safe to repeat, and a clear sign when the session is gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Self, TypeVar

from mint_api.v1 import common_pb2, run_service_pb2, session_service_pb2
from mint_client.sessions import Sessions
from mint_core import log
from mint_core.errors import MintError, NotFound, WrongState
from mint_runs.patience import patiently

__all__ = ["SessionLost", "StepSession"]

_log = log.get_logger(__name__)

_CLOSE_TIMEOUT_S = 5.0

T = TypeVar("T")


class SessionLost(Exception):
    """The trainer does not have the session any more: open another one from the newest saved state."""


class StepSession:
    """One session, made by :meth:`open`; leaving its block frees it at the trainer.

    Every call waits up to ``patience_s`` for a trainer that is away, repeating the step under the same seq, and raises
    :class:`SessionLost` when the trainer is there and the session is not.
    """

    def __init__(self, sessions: Sessions, session: session_service_pb2.Session, *, patience_s: float) -> None:
        self._sessions = sessions
        self._name = session.name
        self._next_seq = session.next_seq
        self._patience_s = patience_s
        self.start_step = session.step
        """Optimizer steps done when it was opened."""

    @classmethod
    async def open(
        cls,
        sessions: Sessions,
        tenant: str,
        session_id: str,
        *,
        policy: str,
        base_digest: str,
        lora: common_pb2.LoraConfig | None,
        from_state: common_pb2.TrainingState | None,
        weights_only: bool,
        patience_s: float,
    ) -> Self:
        """Place ``policy`` on the base; waits for a trainer that is away."""
        session = await patiently(
            "trainer",
            lambda: sessions.create(
                tenant,
                session_id,
                policy=policy,
                base_digest=base_digest,
                lora=lora,
                from_state=from_state,
                weights_only=weights_only,
            ),
            patience_s=patience_s,
        )
        return cls(sessions, session, patience_s=patience_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        # Nothing depends on it: an abandoned session expires at the trainer.
        with contextlib.suppress(MintError, TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._sessions.close(self._name)

    async def forward(
        self, data: Sequence[session_service_pb2.Datum], *, reference: bool = False
    ) -> session_service_pb2.StepResult:
        """Log-probabilities and cross-entropy, without gradients; with ``reference`` those of the base alone."""
        return await self._call(lambda: self._sessions.forward(self._name, data, reference=reference))

    async def forward_backward(
        self,
        data: Sequence[session_service_pb2.Datum],
        *,
        loss: common_pb2.LossFunction.ValueType = common_pb2.LOSS_FUNCTION_CROSS_ENTROPY,
        loss_parameters: Mapping[str, float] | None = None,
    ) -> session_service_pb2.StepResult:
        """Add the gradient of ``loss``, a sum over tokens."""
        seq = self._next_seq
        result = await self._call(
            lambda: self._sessions.forward_backward(self._name, seq, data, loss=loss, loss_parameters=loss_parameters)
        )
        self._next_seq = seq + 1
        return result

    async def optim_step(
        self, optimizer: run_service_pb2.OptimizerConfig, *, gradient_scale: float
    ) -> session_service_pb2.StepResult:
        """Apply the gathered gradient."""
        seq = self._next_seq
        result = await self._call(
            lambda: self._sessions.optim_step(self._name, seq, optimizer=optimizer, gradient_scale=gradient_scale)
        )
        self._next_seq = seq + 1
        return result

    async def save_state(self, *, run: str, fence: int) -> common_pb2.TrainingState:
        """Store weights and optimizer; nothing becomes current by it."""
        return await self._call(lambda: self._sessions.save_state(self._name, run=run, fence=fence))

    async def _call(self, make: Callable[[], Awaitable[T]]) -> T:
        try:
            return await patiently("trainer", make, patience_s=self._patience_s)
        except NotFound as error:
            raise SessionLost(error.message) from error
        except WrongState as error:
            # Our count and the trainer's differ: another session of this name, after a restart in between.
            if "next_seq" in error.metadata:
                raise SessionLost(error.message) from error
            raise
