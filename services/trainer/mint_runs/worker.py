"""Claims runs, does them under their policy's lease, ends them."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import socket
from dataclasses import dataclass
from typing import Any

from mint_api.runtime.v1 import work_service_pb2
from mint_api.v1 import policy_service_pb2, run_service_pb2
from mint_blobs import ObjectStore
from mint_client import MintClient
from mint_client.runtime import ExporterClient, WorkClient
from mint_core import calls, clock, failpoints, log
from mint_core.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    LeaseLost,
    MintError,
    NotFound,
    OutOfRange,
    PermissionDenied,
    Unauthenticated,
    Unimplemented,
)
from mint_runs.attempt import Attempt, RunCancelled, RunDrained
from mint_runs.lease import HeldLease
from mint_runs.patience import patiently
from mint_runs.progress import Reporter
from mint_runs.recipes import RECIPES, Recipe
from mint_runs.settings import RunsSettings
from mint_runs.tokenization import BaseTokenizer

__all__ = ["Worker", "is_retriable"]

_log = log.get_logger(__name__)

_CLAIMED = failpoints.declare("runs.claimed", "a run is claimed, nothing is done yet")
_FINISHED = failpoints.declare("runs.finished", "the run has ended in the catalog")

_FINAL = (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    Unauthenticated,
    Unimplemented,
)
_PRINCIPAL = "runs"


def is_retriable(error: MintError) -> bool:
    """Whether another attempt may succeed: what the run itself is or asks for will not change, all else may."""
    return not isinstance(error, _FINAL)


@dataclass(frozen=True, slots=True)
class _Ending:
    state: run_service_pb2.RunState.ValueType
    error: str = ""
    retriable: bool = False
    published_revision: str = ""


class Worker:
    """Does up to ``max_concurrent_runs`` runs at a time until it is drained."""

    def __init__(
        self,
        settings: RunsSettings,
        *,
        client: MintClient,
        work: WorkClient,
        exporter: ExporterClient,
        store: ObjectStore,
        tokenizer: BaseTokenizer,
    ) -> None:
        self._settings = settings
        self._client = client
        self._work = work
        self._exporter = exporter
        self._store = store
        self._tokenizer = tokenizer
        self._draining = asyncio.Event()
        self._name = f"{socket.gethostname()[:20].lower()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._claims = itertools.count(1)

    async def run(self) -> None:
        """Claim and do runs until :meth:`drain`."""
        with calls.inbound_call(_PRINCIPAL, None):
            await asyncio.gather(*(self._loop() for _ in range(self._settings.max_concurrent_runs)))

    def drain(self) -> None:
        """Claim no more; runs in progress stop at their next step, saved and given back."""
        self._draining.set()

    async def _loop(self) -> None:
        pause_s = 0.0
        while not self._draining.is_set():
            try:
                claimed = await self._unless_draining(self._claim())
                if claimed is not None:
                    await self._attempt(claimed)
                pause_s = 0.0
            except MintError as error:
                pause_s = min(5.0, max(0.5, pause_s * 2))
                _log.warning("claiming failed", extra={"fields": {"error": str(error), "pause_s": pause_s}})
            except Exception:  # noqa: BLE001 - a bug in doing one run must not end the worker
                # The lease ends by itself, and the run is claimed again.
                pause_s = 5.0
                _log.exception("an attempt broke off")
            if pause_s:
                await self._unless_draining(asyncio.sleep(pause_s))

    async def _unless_draining(self, doing: Any) -> Any:
        """What ``doing`` gives, or None if the worker is drained first."""
        task = asyncio.ensure_future(doing)
        drained = asyncio.ensure_future(self._draining.wait())
        try:
            await asyncio.wait({task, drained}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            await _cancel(task, drained)

    async def _claim(self) -> work_service_pb2.ClaimRunResponse | None:
        # A name of its own for each claim: an answer that was lost on its way must never be taken for a later one.
        holder = f"{self._name}-{next(self._claims)}"
        settings = self._settings
        # Less than a lease lives without renewals: else a stopped worker's open questions would be given its own run.
        wait_s = min(settings.claim_wait_s, settings.lease_ttl_s / 2)
        try:
            return await self._work.claim_run(holder, settings.base_model, ttl_s=settings.lease_ttl_s, wait_s=wait_s)
        except DeadlineExceeded:
            return None

    # One attempt

    async def _attempt(self, claimed: work_service_pb2.ClaimRunResponse) -> None:
        run, fence = claimed.run, claimed.lease.fence
        _log.info("claimed", extra={"fields": {"run": run.name, "fence": fence.token, "attempt": run.num_attempts}})
        await _CLAIMED.reached()
        try:
            lease = await self._hold(claimed)
            reporter = Reporter(
                lambda progress, events, steps: self._work.report_run(
                    run.name, fence, progress=progress, events=events, steps=steps
                ),
                interval_s=self._settings.report_interval_s,
            )
            attempt = Attempt(
                run=run,
                policy=policy_service_pb2.Policy(),
                fence=fence,
                lease=lease,
                client=self._client,
                work=self._work,
                exporter=self._exporter,
                store=self._store,
                tokenizer=self._tokenizer,
                reporter=reporter,
                settings=self._settings,
                draining=self._draining,
            )
            ending = await self._do(attempt)
            await self._finish(attempt, ending)
        except LeaseLost as error:
            _log.warning("lease lost", extra={"fields": {"run": run.name, "error": error.message}})

    async def _hold(self, claimed: work_service_pb2.ClaimRunResponse) -> HeldLease:
        """Renew at once: when exactly the claim was made while the call waited, only the catalog knows."""
        fence = claimed.lease.fence
        sent_at_s = clock.boottime_s()
        await self._work.renew_lease(fence)
        return HeldLease(
            fence.resource,
            lambda timeout_s: self._work.renew_lease(fence, timeout_s=timeout_s),
            watch=lambda: self._work.watch_lease(fence),
            ttl_s=self._settings.lease_ttl_s,
            margin_s=self._settings.lease_margin_s,
            acquired_at_s=sent_at_s,
        )

    async def _do(self, attempt: Attempt) -> _Ending:
        """Run the recipe while the lease is kept and progress is sent. Raises :class:`LeaseLost`."""
        recipe = asyncio.ensure_future(self._recipe(attempt))
        keeper = asyncio.ensure_future(attempt.lease.keep())
        sender = asyncio.ensure_future(attempt.reporter.run())
        try:
            await asyncio.wait({recipe, keeper, sender}, return_when=asyncio.FIRST_COMPLETED)
            for ended in (keeper, sender):
                if ended.done():
                    ended.result()  # raises LeaseLost
            return await self._told(attempt, recipe.result(), keeper)
        except LeaseLost as error:
            attempt.lease.lose(error.message)
            raise
        finally:
            await _cancel(recipe, keeper, sender)

    async def _told(self, attempt: Attempt, ending: _Ending, keeper: asyncio.Future[None]) -> _Ending:
        """``ending``, once the last progress is written: a run that has ended keeps what it showed then.

        Waits for the catalog as other calls do, for as long as the lease is held. Raises :class:`LeaseLost`.
        """
        last = asyncio.ensure_future(attempt.reporter.deliver(patience_s=self._settings.patience_s))
        try:
            await asyncio.wait({last, keeper}, return_when=asyncio.FIRST_COMPLETED)
            if keeper.done():
                keeper.result()  # raises LeaseLost
            last.result()
        except LeaseLost:
            raise
        except MintError as error:
            return _failed(attempt, error)
        finally:
            await _cancel(last)
        return ending

    async def _recipe(self, attempt: Attempt) -> _Ending:
        run = attempt.run
        try:
            attempt.policy = await patiently(
                "catalog", lambda: self._client.policies.get(run.policy), patience_s=self._settings.patience_s
            )
            outcome = await _recipe_of(run)(attempt)
        except RunCancelled:
            return _Ending(run_service_pb2.RUN_STATE_CANCELLED)
        except RunDrained:
            attempt.reporter.event("drained", "the worker goes away; the state is saved and the run given back")
            return _Ending(
                run_service_pb2.RUN_STATE_QUEUED,
                error="the worker was drained; the run goes on from its saved state",
                published_revision=attempt.published_revision,
            )
        except LeaseLost:
            raise
        except MintError as error:
            _log.warning("run failed", extra={"fields": {"run": run.name, "reason": error.reason, "error": str(error)}})
            return _failed(attempt, error)
        except Exception:  # noqa: BLE001 - a bug: the run's owner gets an id, the log has the rest
            error_id = secrets.token_hex(8)
            _log.exception("run broke off", extra={"fields": {"run": run.name, "error_id": error_id}})
            return _Ending(
                run_service_pb2.RUN_STATE_FAILED,
                error=f"INTERNAL: a bug in the runs worker, error id {error_id}; its log has the details",
                retriable=True,
                published_revision=attempt.published_revision,
            )
        return _Ending(run_service_pb2.RUN_STATE_SUCCEEDED, published_revision=outcome.published_revision)

    async def _finish(self, attempt: Attempt, ending: _Ending) -> None:
        name = attempt.run.name
        attempt.lease.check()
        try:
            await patiently(
                "catalog",
                lambda: self._work.finish_run(
                    name,
                    attempt.fence,
                    ending.state,
                    error=ending.error,
                    retriable=ending.retriable,
                    published_revision=ending.published_revision,
                ),
                patience_s=attempt.lease.remaining_s,
            )
        except LeaseLost:
            raise
        except MintError as error:
            # Left as it is: the lease ends, and the run is claimed again from its latest state.
            _log.warning("run not ended", extra={"fields": {"run": name, "error": str(error)}})
            return
        await _FINISHED.reached()
        state = run_service_pb2.RunState.Name(ending.state)
        _log.info("ended", extra={"fields": {"run": name, "state": state, "error": ending.error}})


def _recipe_of(run: run_service_pb2.Run) -> Recipe:
    kind = run.WhichOneof("recipe") or ""
    if kind not in RECIPES:
        raise Unimplemented(
            f"the recipe of {run.name} is {kind or 'absent'}: this worker does {', '.join(sorted(RECIPES))}"
        )
    return RECIPES[kind]


def _failed(attempt: Attempt, error: MintError) -> _Ending:
    return _Ending(
        run_service_pb2.RUN_STATE_FAILED,
        error=f"{error.reason}: {error.message}",
        retriable=is_retriable(error),
        published_revision=attempt.published_revision,
    )


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel and wait, whatever they end with: the caller has decided already."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
