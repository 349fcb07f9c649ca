"""What every recipe that trains shares: the newest committed state, and sessions that go on from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from mint_api.v1 import common_pb2
from mint_core import failpoints
from mint_core.errors import Unavailable
from mint_runs.attempt import Attempt
from mint_runs.step_session import SessionLost, StepSession

__all__ = ["STEPPED", "Training"]

STEPPED = failpoints.declare("runs.stepped", "an optimizer step is done, its state is not saved")

_MAX_LOST_SESSIONS = 3


class Training:
    """One attempt's training, over sessions when the trainer loses one."""

    def __init__(self, attempt: Attempt, *, num_steps: int) -> None:
        self._attempt = attempt
        self._num_steps = num_steps
        self.state: common_pb2.TrainingState | None = None
        """Newest committed state of this run."""
        if attempt.run.HasField("latest_training_state"):
            self.state = attempt.run.latest_training_state

    async def run(self, work: Callable[[StepSession], Awaitable[None]]) -> None:
        """Do ``work`` in a session; from the newest state again when the trainer has lost it."""
        lost_at: list[int] = []
        while True:
            try:
                async with await self._open() as session:
                    await work(session)
                    return
            except SessionLost as lost:
                saved_step = self.state.step if self.state else 0
                lost_at = [*(step for step in lost_at if step == saved_step), saved_step]
                if len(lost_at) > _MAX_LOST_SESSIONS:
                    raise Unavailable(
                        f"the trainer lost this run's session {len(lost_at)} times after step {saved_step}: {lost}"
                    ) from lost
                self._attempt.reporter.event(
                    "session_lost", f"the trainer lost the session; going on from the state after step {saved_step}"
                )

    async def save(self, session: StepSession) -> common_pb2.TrainingState:
        """Store the session's state and make it current."""
        attempt = self._attempt
        attempt.lease.check()
        state = await session.save_state(run=attempt.run.name, fence=attempt.fence.token)
        # Once the state is current no attempt does its steps again: what they came to is told before.
        await attempt.reporter.deliver(patience_s=attempt.settings.patience_s)
        await attempt.commit(state)
        self.state = state
        return state

    async def _open(self) -> StepSession:
        run, policy = self._attempt.run, self._attempt.policy
        initial = run.initial_training_state if run.HasField("initial_training_state") else None
        session = await StepSession.open(
            self._attempt.client.sessions,
            self._attempt.tenant,
            self._attempt.next_session_id(),
            policy=run.policy,
            base_digest=policy.base_digest,
            lora=None if self.state or initial else policy.lora,
            from_state=self.state or initial,
            # A new run counts its own steps and starts with fresh moments; its attempts continue with theirs.
            weights_only=self.state is None and initial is not None,
            patience_s=self._attempt.settings.patience_s,
        )
        if session.start_step:
            self._attempt.reporter.event("resumed", f"goes on after step {session.start_step} of {self._num_steps}")
        return session
