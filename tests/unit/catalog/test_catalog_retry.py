"""Runs that failed for good: how they become dead letters, are found, and are tried again."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace

import pytest
from unit.catalog.catalog_lab import POLICY, TENANT, Lab, digest_of

from mint_catalog.model.records import BlobRef, BlobState, PolicyQuota, PolicyState, TrainingState
from mint_catalog.model.run_records import Run, RunState
from mint_catalog.storage.requests import Request
from mint_catalog.storage.store import Put
from mint_catalog.work.queue import Outcome
from mint_core.errors import BlobMissing, InvalidArgument, NotFound, RequestIdReused, ResourceExhausted, WrongState
from mint_core.names import BlobName, RunName

R1 = RunName("acme", "r1")
RETRIABLE = Outcome(RunState.FAILED, "UNAVAILABLE: no trainer", retriable=True)
FINAL = Outcome(RunState.FAILED, "INVALID_FIELD: line 3")


async def fail(lab: Lab, outcome: Outcome = RETRIABLE) -> Run:
    """Claim the next run and let it fail."""
    claim, fence = await lab.claimed()
    return await lab.queue.finish(claim.run.name, fence, outcome)


async def dead_letter(lab: Lab) -> Run:
    """A run that failed three times, having saved a state in its first attempt."""
    await lab.policy()
    await lab.run(continue_from_latest=True)
    _, fence = await lab.claimed()
    state = TrainingState(
        step=4,
        weights_key="tenants/acme/states/w",
        weights=BlobRef(digest_of("w"), 1),
        optimizer_key="tenants/acme/states/o",
        optimizer=BlobRef(digest_of("o"), 1),
    )
    await lab.queue.commit_state(R1, fence, state)
    await lab.queue.finish(R1, fence, RETRIABLE)
    await fail(lab)
    return await fail(lab)


async def test_a_run_that_failed_too_often_is_a_dead_letter_and_starts_anew_when_retried() -> None:
    lab = Lab()
    dead = await dead_letter(lab)
    assert (dead.state, dead.dead_letter, dead.num_failures, dead.num_attempts) == (RunState.FAILED, True, 3, 3)
    assert dead.end_time is not None
    assert await lab.claim() is None
    queued = await lab.runs.retry(R1, "the trainer is back", "ada")
    assert (queued.state, queued.dead_letter, queued.num_failures) == (RunState.QUEUED, False, 0)
    assert (queued.error, queued.end_time, queued.worker) == ("", None, "")
    assert (queued.events[-1].kind, queued.events[-1].message) == ("retried", "by ada: the trainer is back")
    claim, fence = await lab.claimed()
    assert claim.run.num_attempts == 4, "what an earlier attempt left behind is still looked for"
    assert claim.run.latest_training_state == dead.latest_training_state
    assert claim.run.latest_training_state is not None
    assert claim.run.latest_training_state.step == 4
    assert claim.run.initial_training_state is None, "where it started from stays as it was"
    requeued = await lab.queue.finish(R1, fence, RETRIABLE)
    assert (requeued.state, requeued.num_failures) == (RunState.QUEUED, 1)


async def test_a_failure_for_good_is_retried_too_but_is_no_dead_letter() -> None:
    lab = Lab()
    await lab.policy()
    await lab.run()
    assert not (await fail(lab, FINAL)).dead_letter
    queued = await lab.runs.retry(R1, "", "ada")
    assert queued.events[-1].message == "by ada"
    assert (await lab.claimed())[0].run.name == R1


async def test_only_failed_runs_of_a_living_active_policy_are_retried() -> None:
    lab = Lab()
    with pytest.raises(NotFound):
        await lab.runs.retry(R1, "", "ada")
    await lab.policy()
    await lab.run()
    with pytest.raises(WrongState, match="is QUEUED: only a FAILED run"):
        await lab.runs.retry(R1, "", "ada")
    await fail(lab, FINAL)
    with pytest.raises(InvalidArgument):
        await lab.runs.retry(R1, "two\nlines", "ada")
    ref, head = lab.tables.policy(POLICY), await lab.policies.get(POLICY)
    await lab.store.txn([], [Put(ref.key, ref.codec.encode(replace(head, state=PolicyState.PAUSED)))])
    with pytest.raises(WrongState, match="PAUSED"):
        await lab.runs.retry(R1, "", "ada")
    await lab.store.txn([], [Put(ref.key, ref.codec.encode(head))])
    blob_ref = lab.tables.blob(BlobName("acme", digest_of("{}")))
    blob = blob_ref.codec.decode((await lab.store.get([blob_ref.key])).values[0])
    await lab.store.txn([], [Put(blob_ref.key, blob_ref.codec.encode(replace(blob, state=BlobState.CONDEMNED)))])
    with pytest.raises(BlobMissing):
        await lab.runs.retry(R1, "", "ada")
    await lab.policies.delete(POLICY)
    with pytest.raises(NotFound):
        await lab.runs.retry(R1, "", "ada")
    await lab.policy()
    with pytest.raises(NotFound, match="another one of its name"):
        await lab.runs.retry(R1, "", "ada")
    assert (await lab.runs.get(R1)).state is RunState.FAILED


async def test_a_retried_run_is_an_open_one_again_and_the_quota_counts_it() -> None:
    lab = Lab()
    await lab.policy()
    await lab.run("r1")
    await fail(lab, FINAL)
    ref, head = lab.tables.policy(POLICY), await lab.policies.get(POLICY)
    bounded = replace(head, quota=PolicyQuota(max_open_runs=1))
    await lab.store.txn([], [Put(ref.key, ref.codec.encode(bounded))])
    await lab.run("r2")
    with pytest.raises(ResourceExhausted, match="1 open runs"):
        await lab.runs.retry(R1, "", "ada")
    await lab.runs.cancel(RunName("acme", "r2"), "")
    assert (await lab.runs.retry(R1, "", "ada")).state is RunState.QUEUED


async def test_the_same_retry_fifty_times_is_one() -> None:
    lab = Lab()
    await dead_letter(lab)

    def request(request_id: str, payload: bytes = b"x") -> Request | None:
        return Request.of(tenant="acme", principal="ada", method="RetryRun", request_id=request_id, payload=payload)

    first = str(uuid.uuid4())
    answers = await asyncio.gather(*(lab.runs.retry(R1, "again", "ada", request(first)) for _ in range(50)))
    assert len({answer.mod_revision for answer in answers}) == 1
    assert [event.kind for event in answers[0].events].count("retried") == 1
    claim, fence = await lab.claimed()
    await lab.queue.finish(R1, fence, FINAL)
    assert await lab.runs.retry(R1, "again", "ada", request(first)) == answers[0], "the answer of then, and no effect"
    assert await lab.claim() is None
    with pytest.raises(RequestIdReused):
        await lab.runs.retry(R1, "other", "ada", request(first, b"y"))
    assert claim.run.num_attempts == 4


async def test_runs_are_listed_by_state_and_as_dead_letters() -> None:
    lab = Lab()
    await dead_letter(lab)
    await lab.run("r2")
    await fail(lab, FINAL)
    await lab.run("r3")
    await lab.claimed()
    await lab.run("r4")

    async def ids(state: RunState = RunState.UNSPECIFIED, *, dead: bool = False) -> list[str]:
        page = await lab.runs.list(TENANT, page_size=0, page_token="", state=state, dead_letter=dead)
        return sorted(run.name.run for run in page.records)

    assert await ids() == ["r1", "r2", "r3", "r4"]
    assert await ids(RunState.FAILED) == ["r1", "r2"]
    assert await ids(dead=True) == ["r1"]
    assert await ids(RunState.QUEUED) == ["r4"]
    assert await ids(RunState.RUNNING, dead=True) == []
    first = await lab.runs.list(TENANT, page_size=1, page_token="", state=RunState.FAILED)
    with pytest.raises(InvalidArgument, match="page_token"):
        await lab.runs.list(TENANT, page_size=1, page_token=first.next_page_token, state=RunState.QUEUED)
