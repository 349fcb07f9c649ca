"""More adapters at work than slots: they take turns (AROUND ``Scheduler.get_next_batch_to_run``).

Without this hook a request whose adapter finds every slot taken waits until all requests of another adapter have ended,
however long those are; its first token comes after somebody else's last. Here an adapter that has had its turn leaves
its slot while others wait: its requests are set aside as they are, with their keys and values in the pool, and go on
when its turn comes again. Whoever waits is served in the order in which they began to wait, so every wait is bounded by
the turns of those before; new requests have a head start of a few turns, for whoever waits for a first token waits
harder than who waits for the next. (Round robin, as time-sharing has it; Kleinrock, *Queueing Systems*, volume II,
chapter 4.) No pass mixes more adapters than there are slots.

A batch that was set aside counts nowhere in SGLang, so two more hooks tell of it: aborts look at
``Scheduler.collect_inflight_reqs``, and a scheduler with such batches is not idle. While some are set aside, a new
request is taken only if all of them and it fit the key-value pool to their ends, so none is ever recomputed for this.

Counts passes and no time: tensor-parallel ranks see the same requests at the same pass and decide alike. Needs SGLang's
scheduling without overlap, where a batch has its tokens before the next one is chosen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from mint_core.errors import FailedPrecondition

__all__ = [
    "SET_SLOT_TURNS_METHOD",
    "SlotTurns",
    "after_collect_inflight_reqs",
    "after_is_fully_idle",
    "around_get_next_batch_to_run",
    "set_slot_turns",
]

SET_SLOT_TURNS_METHOD = "mint_set_slot_turns"
"""Method that the plugin adds to SGLang's scheduler: :func:`set_slot_turns`."""

_STATE = "mint_slot_turns"
_HEAD_START = 2
"""Turns that who is set aside lets pass before new requests no longer go first."""


@dataclass(frozen=True, slots=True)
class _SetAside:
    """The requests of one adapter between two turns."""

    batch: Any
    since: int


class SlotTurns:
    """Whose turn it is in one scheduler. Adapters are SGLang's ids, ``None`` the base, which takes a slot like any."""

    def __init__(self, passes: int) -> None:
        self._passes = passes
        self._now = 0
        self._turn_began: dict[Hashable, int] = {}
        self._new_since: dict[Hashable, int] = {}
        self._set_aside: dict[Hashable, _SetAside] = {}

    @property
    def requests(self) -> list[Any]:
        """Those set aside."""
        return [request for each in self._set_aside.values() for request in each.batch.reqs]

    def next_batches(self, scheduler: Any, running: Any, last: Any) -> tuple[Any, Any]:
        """What shall run instead of ``running`` and ``last``, with as many adapters at most as there are slots.

        ``last`` is the batch of the last pass; SGLang joins one with prompts in it to ``running`` only after this.
        """
        self._now += 1
        prompts_of_last = last.reqs if last is not None and last.forward_mode.is_extend() else ()
        chunked = () if scheduler.chunked_req is None else (scheduler.chunked_req,)
        # In the order of the batches, as everything here: sets are in another order on every rank.
        seated = _adapters([*prompts_of_last, *chunked, *running.reqs])
        self._turn_began = {each: self._turn_began.get(each, self._now) for each in seated}
        for adapter in [each for each in seated if each in self._set_aside]:
            # A new request of the adapter got a slot meanwhile, and that serves the others too.
            running = self._with_set_aside(running, adapter)
        waiting = self._in_order(self._newcomers(scheduler, running, seated, [*running.reqs, *prompts_of_last]))
        num_free = max(scheduler.max_loras_per_batch - len(seated), 0)
        leaving: list[Hashable] = []
        if len(waiting) > num_free and not chunked and (last is None or last.chunked_req is None):
            running, last = _joined(running, last)
            if _can_be_split(running):
                leaving = self._leaving(len(waiting) - num_free)
        returning = [each for each in waiting[: num_free + len(leaving)] if each in self._set_aside]
        for adapter in leaving:
            self._set_aside[adapter] = _SetAside(_take_out(running, adapter), self._now)
        for adapter in returning:
            running = self._with_set_aside(running, adapter)
        return running, last

    def _with_set_aside(self, running: Any, adapter: Hashable) -> Any:
        batch = self._set_aside.pop(adapter).batch
        if running.is_empty():
            return batch
        running.merge_batch(batch)
        return running

    def _newcomers(self, scheduler: Any, running: Any, seated: list[Hashable], under_way: list[Any]) -> list[Hashable]:
        """Adapters of requests in SGLang's queue that have no slot and could run if they had one."""
        requests = [each for each in scheduler.waiting_queue if each.lora_id not in seated]
        if running.batch_is_full or scheduler.get_num_allocatable_reqs(len(running.reqs), running_batch=running) <= 0:
            requests = []
        elif requests and not self._fit(scheduler, requests[0], under_way):
            requests = []
            if self._set_aside:
                # SGLang does not know what those need who are set aside. The flag falls when a request ends.
                running.batch_is_full = True
        adapters = dict.fromkeys(each.lora_id for each in requests if each.lora_id not in self._set_aside)
        self._new_since = {each: self._new_since.get(each, self._now) for each in adapters}
        return list(adapters)

    def _fit(self, scheduler: Any, newcomer: Any, under_way: list[Any]) -> bool:
        """Whether everybody under way, those set aside and ``newcomer`` fit the pool to their ends."""
        num_tokens = sum(_num_to_come(each) for each in [*under_way, *self.requests] if not each.finished())
        num_tokens += len(newcomer.origin_input_ids) + _num_to_come(newcomer)
        pool, cache = scheduler.token_to_kv_pool_allocator, scheduler.tree_cache
        return bool(num_tokens <= pool.available_size() + cache.evictable_size())

    def _in_order(self, newcomers: Iterable[Hashable]) -> list[Hashable]:
        """Everybody without a slot, who is next first."""
        since = {adapter: self._new_since[adapter] for adapter in newcomers}
        head_start = _HEAD_START * self._passes
        since.update((adapter, each.since + head_start) for adapter, each in self._set_aside.items())
        return sorted(since, key=lambda adapter: since[adapter])

    def _leaving(self, num_wanted: int) -> list[Hashable]:
        """Up to ``num_wanted`` adapters that have had their turn, the longest first."""
        due = [each for each, began in self._turn_began.items() if self._now - began >= self._passes]
        return sorted(due, key=lambda each: self._turn_began[each])[:num_wanted]


def set_slot_turns(scheduler: Any, *, passes: int) -> None:
    """Let adapters take turns of ``passes``; 0 switches it off."""
    if passes and scheduler.enable_overlap:
        raise FailedPrecondition(
            f"adapters cannot take turns of {passes} passes while SGLang overlaps scheduling; start the engine with "
            "disable_overlap_schedule"
        )
    setattr(scheduler, _STATE, SlotTurns(passes) if passes else None)


def around_get_next_batch_to_run(
    original: Callable[..., Any], scheduler: Any, running_batch: Any, last_batch: Any
) -> Any:
    """Choose who keeps a slot, then go on as SGLang does."""
    turns = getattr(scheduler, _STATE, None)
    if turns is not None:
        running_batch, last_batch = turns.next_batches(scheduler, running_batch, last_batch)
    return original(scheduler, running_batch=running_batch, last_batch=last_batch)


def after_collect_inflight_reqs(result: set[Any], scheduler: Any) -> set[Any]:
    """Requests set aside are under way: an abort finds them, and ends them when their turn comes."""
    turns = getattr(scheduler, _STATE, None)
    return result if turns is None else result | set(turns.requests)


def after_is_fully_idle(result: bool, scheduler: Any, *_: Any, **__: Any) -> bool:
    """A scheduler with requests set aside is not idle."""
    turns = getattr(scheduler, _STATE, None)
    return result and (turns is None or not turns.requests)


def _adapters(requests: Iterable[Any]) -> list[Hashable]:
    """Each once, in the order of ``requests``, of which those that have ended count no more."""
    return list(dict.fromkeys(each.lora_id for each in requests if not each.finished()))


def _num_to_come(request: Any) -> int:
    return int(request.sampling_params.max_new_tokens) - len(request.output_ids)


def _joined(running: Any, last: Any) -> tuple[Any, Any]:
    """``running`` with the requests whose prompts the last pass computed, as SGLang would join them, and what is left
    to join. No prompt is half computed."""
    if last is None or not last.forward_mode.is_extend():
        return running, last
    num_before = len(last.reqs)
    last.filter_batch()
    if len(last.reqs) < num_before:
        running.batch_is_full = False
    if last.is_empty() or last is running:
        return running, None
    if running.is_empty():
        return last, None
    running.merge_batch(last)
    return running, None


def _can_be_split(batch: Any) -> bool:
    """Penalties keep what they counted per batch, and SGLang cannot take that apart."""
    return not batch.is_empty() and not batch.sampling_info.penalizer_orchestrator.is_required


def _take_out(batch: Any, adapter: Hashable) -> Any:
    """Take the requests of ``adapter`` out of ``batch`` and return them as a batch of their own."""
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    taken = copy.copy(batch)
    # A copy shares this, and SGLang changes it in place.
    taken.sampling_info = SamplingBatchInfo.from_schedule_batch(taken, taken.model_config.vocab_size)
    taken.batch_is_full = False
    # Those that have ended stay: SGLang takes in more when it sees them leave.
    belongs = [each.lora_id == adapter and not each.finished() for each in batch.reqs]
    taken.filter_batch(keep_indices=[row for row, own in enumerate(belongs) if own])
    batch.filter_batch(keep_indices=[row for row, own in enumerate(belongs) if not own])
    return taken
