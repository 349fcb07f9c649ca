"""The step API: one policy's place on the trainer's resident base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mint_api.v1 import common_pb2, run_service_pb2, session_service_pb2, session_service_pb2_grpc
from mint_client._calling import Connection
from mint_core.channel import call

__all__ = ["STEP_TIMEOUT_S", "Sessions"]

STEP_TIMEOUT_S = 900.0
"""Deadline of a computing call: a large batch on a processor without accelerator takes minutes, not seconds."""


class Sessions:
    """Calls of ``SessionService``; ``session`` is ``tenants/{t}/sessions/{s}``."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s

    @property
    def _stub(self) -> Any:
        return self._connection.stub(session_service_pb2_grpc.SessionServiceStub)

    async def create(
        self,
        tenant: str,
        session_id: str,
        *,
        policy: str,
        base_digest: str,
        lora: common_pb2.LoraConfig | None = None,
        from_state: common_pb2.TrainingState | None = None,
        weights_only: bool = False,
        timeout_s: float = 300.0,
    ) -> session_service_pb2.Session:
        """Place ``policy`` on the base: fresh by ``lora``, or from a saved state, whose steps' seq it goes on after."""
        request = session_service_pb2.CreateSessionRequest(
            parent=f"tenants/{tenant}",
            session_id=session_id,
            session=session_service_pb2.Session(policy=policy, lora=lora),
            from_state=from_state,
            base_digest=base_digest,
            weights_only=weights_only,
        )
        return (await call(self._stub.CreateSession, request, timeout_s=timeout_s)).session

    async def get(self, session: str) -> session_service_pb2.Session:
        request = session_service_pb2.GetSessionRequest(name=session)
        return (await call(self._stub.GetSession, request, timeout_s=self._timeout_s)).session

    async def close(self, session: str) -> None:
        request = session_service_pb2.CloseSessionRequest(name=session)
        await call(self._stub.CloseSession, request, timeout_s=self._timeout_s)

    async def forward(
        self,
        session: str,
        data: Sequence[session_service_pb2.Datum],
        *,
        reference: bool = False,
        timeout_s: float = STEP_TIMEOUT_S,
    ) -> session_service_pb2.StepResult:
        """Log-probabilities and cross-entropy, without gradients; with ``reference`` those of the base alone."""
        request = session_service_pb2.ForwardRequest(session=session, data=data, reference=reference)
        return (await call(self._stub.Forward, request, timeout_s=timeout_s)).result

    async def forward_backward(
        self,
        session: str,
        seq: int,
        data: Sequence[session_service_pb2.Datum],
        *,
        loss: common_pb2.LossFunction.ValueType = common_pb2.LOSS_FUNCTION_CROSS_ENTROPY,
        loss_parameters: Mapping[str, float] | None = None,
        return_logprobs: bool = False,
        timeout_s: float = STEP_TIMEOUT_S,
    ) -> session_service_pb2.StepResult:
        """Add the gradient of the loss, a sum over tokens, to the session's.

        ``loss_parameters`` are documented at ``ForwardBackwardRequest``; the result's ``metrics`` at ``StepResult``.
        """
        request = session_service_pb2.ForwardBackwardRequest(
            session=session,
            seq=seq,
            data=data,
            loss=loss,
            loss_parameters=loss_parameters,
            return_logprobs=return_logprobs,
        )
        return (await call(self._stub.ForwardBackward, request, timeout_s=timeout_s)).result

    async def optim_step(
        self,
        session: str,
        seq: int,
        *,
        optimizer: run_service_pb2.OptimizerConfig,
        gradient_scale: float,
        timeout_s: float = STEP_TIMEOUT_S,
    ) -> session_service_pb2.StepResult:
        """Apply the gathered gradient, multiplied by ``gradient_scale``, and clear it."""
        request = session_service_pb2.OptimStepRequest(
            session=session, seq=seq, optimizer=optimizer, gradient_scale=gradient_scale
        )
        return (await call(self._stub.OptimStep, request, timeout_s=timeout_s)).result

    async def save_state(
        self, session: str, *, run: str = "", fence: int = 0, for_export: bool = False, timeout_s: float = 300.0
    ) -> common_pb2.TrainingState:
        """Store weights, optimizer and newest step results under a unique key; nothing becomes current by it.

        With ``for_export`` only the weights, in the base's compute type: to be exported, not to be resumed from.
        """
        request = session_service_pb2.SaveStateRequest(session=session, run=run, fence=fence, for_export=for_export)
        return (await call(self._stub.SaveState, request, timeout_s=timeout_s)).state

    async def load_state(
        self, session: str, state: common_pb2.TrainingState, *, weights_only: bool = False, timeout_s: float = 300.0
    ) -> session_service_pb2.Session:
        """Replace the session's weights, optimizer, RNG and step by a saved state's."""
        request = session_service_pb2.LoadStateRequest(session=session, state=state, weights_only=weights_only)
        return (await call(self._stub.LoadState, request, timeout_s=timeout_s)).session

    async def get_step(self, session: str, seq: int) -> session_service_pb2.StepResult:
        """The stored result of a step."""
        request = session_service_pb2.GetStepRequest(name=f"{session}/steps/{seq}")
        return (await call(self._stub.GetStep, request, timeout_s=self._timeout_s)).result
