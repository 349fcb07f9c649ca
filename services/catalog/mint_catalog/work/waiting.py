"""Where a queued run waits.

A run that may be claimed lies in the lane of its tenant and priority, at the same place each time it comes back. One
whose next attempt has to wait lies by time in ``delayed``; a claim that finds its time passed moves it to its lane.
Both places follow from the run's record, and an entry tells all that a claim has to know without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from mint_catalog.model.keys import Keys
from mint_catalog.model.run_records import Run
from mint_catalog.model.tables import Tables
from mint_catalog.storage.draft import Draft
from mint_catalog.storage.store import KeyValue, Put
from mint_core.names import BaseModelName, PolicyName, RunName

__all__ = ["Waiting", "dequeue", "enqueue", "leased_resource", "time_us_of", "woken"]

_EVALUATION = "evaluation"


@dataclass(frozen=True, slots=True)
class Waiting:
    """What an entry of a lane tells."""

    run: RunName
    policy: PolicyName
    resource: PolicyName | RunName
    """What its claim will lease."""

    @classmethod
    def of(cls, keys: Keys, entry: KeyValue) -> Waiting:
        run = keys.run_name(entry.key)
        policy_id, _, kind = entry.value.decode().partition("/")
        policy = PolicyName(run.tenant, policy_id)
        return cls(run, policy, run if kind == _EVALUATION else policy)


def leased_resource(run: Run) -> PolicyName | RunName:
    """What a worker leases to work on the run: its policy, or, for an evaluation, which changes no policy, the run."""
    return run.name if run.evaluation is not None else PolicyName.parse(run.policy)


def time_us_of(time: datetime | None) -> int:
    """Microseconds since the epoch; 0 for no time."""
    return round(time.timestamp() * 1e6) if time else 0


def _queued_key(keys: Keys, base_model: BaseModelName, run: Run) -> bytes:
    return keys.queued(base_model, run.name, priority=run.priority, create_time_us=time_us_of(run.create_time))


def enqueue(draft: Draft, tables: Tables, base_model: str, run: Run) -> None:
    """Let the run wait for a worker, first until its ``not_before_time`` if it has one."""
    keys, base = tables.keys, BaseModelName.parse(base_model)
    policy = PolicyName.parse(run.policy).policy
    value = policy if run.evaluation is None else f"{policy}/{_EVALUATION}"
    if run.not_before_time is not None:
        key = keys.delayed(base, run.name, time_us=time_us_of(run.not_before_time))
        draft.put_bytes(key, f"{run.priority} {time_us_of(run.create_time)} {value}".encode())
        return
    draft.put_bytes(_queued_key(keys, base, run), value.encode())
    # Written each time, also when it is there: whoever removes the key of an empty lane compares its revision.
    draft.put_bytes(keys.lane(base, run.name.tenant, priority=run.priority), b"")


def dequeue(draft: Draft, tables: Tables, base_model: str, run: Run) -> None:
    """Take a queued run's entry away, wherever it lies."""
    keys, base = tables.keys, BaseModelName.parse(base_model)
    draft.delete_key(_queued_key(keys, base, run))
    if run.not_before_time is not None:
        draft.delete_key(keys.delayed(base, run.name, time_us=time_us_of(run.not_before_time)))


def woken(keys: Keys, base_model: BaseModelName, delayed: KeyValue) -> tuple[Put, Put]:
    """What a ``delayed`` entry becomes when its time has passed: the entry in its lane, and the lane's own key."""
    run = keys.run_name(delayed.key)
    priority, create_time_us, value = delayed.value.decode().split(" ")
    queued = keys.queued(base_model, run, priority=int(priority), create_time_us=int(create_time_us))
    return Put(queued, value.encode()), Put(keys.lane(base_model, run.tenant, priority=int(priority)), b"")
