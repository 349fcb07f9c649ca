"""What becomes of a claimed run that its worker did not end: it waits for another one, or it is over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

from mint_catalog.model.records import now
from mint_catalog.model.run_records import Run, RunEvent, RunState
from mint_catalog.model.tables import Ref, Tables
from mint_catalog.storage.draft import Answer, Draft
from mint_catalog.work.runs import ended, with_events
from mint_catalog.work.waiting import enqueue

__all__ = ["Retries"]


@dataclass(frozen=True, slots=True)
class Retries:
    """How often, and after what pause, a run is tried again.

    ``max_attempts`` failures make it a dead letter; the first pause is ``backoff_s`` and each one after it twice as
    long, up to ``backoff_max_s``.
    """

    tables: Tables
    max_attempts: int
    backoff_s: float
    backoff_max_s: float

    def pause_s(self, num_failures: int) -> float:
        """Seconds after a run's ``num_failures``-th failure in which it is not claimed."""
        # No float is larger than 2.0**1023.
        return min(self.backoff_s * 2.0 ** min(num_failures - 1, 1000), self.backoff_max_s)

    def after_failure(self, draft: Draft, claim: Ref[bytes], run: Run, error: str) -> Answer[Run]:
        """Put a claimed run back into the queue after a pause; end it when it was cancelled or has failed too often.

        The claim and the run must have been fetched.
        """
        run = replace(run, num_failures=run.num_failures + 1)
        if run.state is not RunState.CANCELLING and run.num_failures >= self.max_attempts:
            draft.delete(claim)
            message = f"{error} (attempt {run.num_failures} of {self.max_attempts})"
            dead = ended(run, RunState.FAILED, kind="failed", message=message, error=message)
            return draft.put(self.tables.run(run.name), replace(dead, dead_letter=True))
        return self._put_back(draft, claim, run, error, self.pause_s(run.num_failures))

    def give_back(self, draft: Draft, claim: Ref[bytes], run: Run, message: str) -> Answer[Run]:
        """Put a claimed run back into the queue as if it had not been claimed; end it when it was cancelled."""
        return self._put_back(draft, claim, run, message, 0.0)

    def _put_back(self, draft: Draft, claim: Ref[bytes], run: Run, message: str, pause_s: float) -> Answer[Run]:
        _, _, base_model = (draft.get(claim) or b"").decode().partition("/")
        draft.delete(claim)
        ref = self.tables.run(run.name)
        if run.state is RunState.CANCELLING:
            return draft.put(ref, ended(run, RunState.CANCELLED, kind="cancelled", message=message))
        time = now()
        not_before_time = time + timedelta(seconds=pause_s) if pause_s else None
        run = replace(run, state=RunState.QUEUED, worker="", not_before_time=not_before_time)
        enqueue(draft, self.tables, f"baseModels/{base_model}", run)
        pause = f"; not claimed again for {pause_s:g} s" if pause_s else ""
        return draft.put(ref, with_events(run, RunEvent(time, "requeued", message + pause)))
