"""Who keeps a slot and who waits, pass by pass, over batches that only know their requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from mint_core.errors import FailedPrecondition
from mint_engine.sglang_plugin import slot_turns
from mint_engine.sglang_plugin.slot_turns import (
    after_collect_inflight_reqs,
    after_is_fully_idle,
    around_get_next_batch_to_run,
    set_slot_turns,
)


@dataclass(eq=False)
class FakeRequest:
    lora_id: str | None
    num_new: int
    output_ids: list[int] = field(default_factory=list)
    origin_input_ids: tuple[int, ...] = (1, 2, 3)

    @property
    def sampling_params(self) -> SimpleNamespace:
        return SimpleNamespace(max_new_tokens=self.num_new)

    def finished(self) -> bool:
        return len(self.output_ids) >= self.num_new


class FakeBatch:
    def __init__(self, requests: list[FakeRequest], *, is_extend: bool = False) -> None:
        self.reqs = requests
        self.batch_is_full = False
        self.chunked_req = None
        self.forward_mode = SimpleNamespace(is_extend=lambda: is_extend)
        self.sampling_info = SimpleNamespace(penalizer_orchestrator=SimpleNamespace(is_required=False))
        self.model_config = SimpleNamespace(vocab_size=8)

    def is_empty(self) -> bool:
        return not self.reqs

    def filter_batch(self, keep_indices: list[int] | None = None) -> None:
        if keep_indices is None:
            self.reqs = [each for each in self.reqs if not each.finished()]
        else:
            self.reqs = [self.reqs[row] for row in keep_indices]

    def merge_batch(self, other: FakeBatch) -> None:
        self.reqs = self.reqs + other.reqs


class FakeScheduler:
    """The loop around the hook: prompts are taken while slots are free, every pass brings each request one token."""

    def __init__(self, *, num_slots: int = 2, passes: int = 3, pool_tokens: int = 10_000) -> None:
        self.max_loras_per_batch = num_slots
        self.enable_overlap = False
        self.chunked_req = None
        self.waiting_queue: list[FakeRequest] = []
        self.running, self.last = FakeBatch([]), None
        self.pool_tokens = pool_tokens
        self.token_to_kv_pool_allocator = SimpleNamespace(available_size=lambda: self.pool_tokens - self._num_held())
        self.tree_cache = SimpleNamespace(evictable_size=lambda: 0)
        self.num_rows = 100
        self.requests: list[FakeRequest] = []
        set_slot_turns(self, passes=passes)

    def get_num_allocatable_reqs(self, num_running: int, running_batch: FakeBatch) -> int:
        return self.num_rows - sum(bool(each.output_ids) and not each.finished() for each in self.requests)

    def add(self, lora_id: str | None, num_new: int) -> FakeRequest:
        request = FakeRequest(lora_id, num_new)
        self.requests.append(request)
        self.waiting_queue.append(request)
        return request

    def step(self) -> list[str | None]:
        """One pass; the adapters in it."""
        self.running, batch = around_get_next_batch_to_run(
            FakeScheduler.get_next_batch_to_run, self, running_batch=self.running, last_batch=self.last
        )
        adapters = {each.lora_id for each in batch.reqs}
        assert len(adapters) <= self.max_loras_per_batch
        for request in batch.reqs:
            request.output_ids.append(0)
        self.last = batch
        return sorted(adapters, key=str)

    def get_next_batch_to_run(self, running_batch: FakeBatch, last_batch: FakeBatch | None) -> Any:
        if last_batch is not None and last_batch.forward_mode.is_extend():
            last_batch.filter_batch()
            if running_batch.is_empty():
                running_batch = last_batch
            else:
                running_batch.merge_batch(last_batch)
        num_before = len(running_batch.reqs)
        running_batch.filter_batch()
        if len(running_batch.reqs) < num_before:
            running_batch.batch_is_full = False
        adapters = {each.lora_id for each in running_batch.reqs}
        new: list[FakeRequest] = []
        for request in self.waiting_queue:
            fits = len(adapters | {request.lora_id}) <= self.max_loras_per_batch
            if fits and not running_batch.batch_is_full and len(new) < self.get_num_allocatable_reqs(0, running_batch):
                adapters.add(request.lora_id)
                new.append(request)
        self.waiting_queue = [each for each in self.waiting_queue if each not in new]
        if new:
            return running_batch, FakeBatch(new, is_extend=True)
        running_batch.forward_mode = SimpleNamespace(is_extend=lambda: False)
        return running_batch, running_batch

    def _num_held(self) -> int:
        under_way = [each for each in self.requests if each.output_ids and not each.finished()]
        return sum(len(each.origin_input_ids) + len(each.output_ids) for each in under_way)


@pytest.fixture(autouse=True)
def take_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without SGLang there is no state of a sampler to copy."""

    def split(batch: FakeBatch, adapter: str | None) -> FakeBatch:
        taken = FakeBatch([each for each in batch.reqs if each.lora_id == adapter])
        batch.reqs = [each for each in batch.reqs if each.lora_id != adapter]
        return taken

    monkeypatch.setattr(slot_turns, "_take_out", split)


def run_to_the_end(scheduler: FakeScheduler, *, most_passes: int = 1000) -> int:
    for count in range(1, most_passes + 1):
        scheduler.step()
        if all(each.finished() for each in scheduler.requests):
            return count
    raise AssertionError(f"{[(each.lora_id, len(each.output_ids)) for each in scheduler.requests]}")


def test_who_finds_a_free_slot_disturbs_nobody() -> None:
    scheduler = FakeScheduler(num_slots=3)
    for adapter in ("a", "b", None):
        scheduler.add(adapter, 10)
    assert scheduler.step() == [None, "a", "b"]
    assert all(scheduler.step() == [None, "a", "b"] for _ in range(9))


def test_newcomer_waits_for_a_turn_and_not_for_an_end() -> None:
    scheduler = FakeScheduler(passes=3)
    for adapter in ("a", "b"):
        scheduler.add(adapter, 100)
    for _ in range(5):
        scheduler.step()
    short = scheduler.add("c", 2)
    assert scheduler.step() == ["c"], "its prompt runs at once, both had their turn"
    scheduler.step()
    assert short.finished()
    assert [len(each.output_ids) for each in scheduler.requests[:2]] != [100, 100]
    run_to_the_end(scheduler)


def test_nobody_leaves_before_the_end_of_a_turn() -> None:
    scheduler = FakeScheduler(passes=6)
    for adapter in ("a", "b"):
        scheduler.add(adapter, 100)
    scheduler.step()
    scheduler.add("c", 2)
    passes = [scheduler.step() for _ in range(7)]
    assert passes[:5] == [["a", "b"]] * 5
    assert ["c"] in passes


@pytest.mark.parametrize("num_adapters", [3, 5, 9])
def test_everybody_gets_the_same_share(num_adapters: int) -> None:
    scheduler = FakeScheduler(num_slots=2, passes=3, pool_tokens=10**6)
    for number in range(num_adapters):
        scheduler.add(f"{number}", 10_000)
    for _ in range(100 * num_adapters):
        scheduler.step()
    shares = [len(each.output_ids) for each in scheduler.requests]
    assert min(shares) > 0.8 * max(shares)


def test_new_request_goes_before_those_set_aside_lately() -> None:
    scheduler = FakeScheduler(num_slots=1, passes=4)
    for adapter in ("a", "b"):
        scheduler.add(adapter, 100)
    for _ in range(6):
        scheduler.step()
    assert [each.lora_id for each in scheduler.mint_slot_turns.requests] == ["a"]
    scheduler.add("c", 100)
    order = [scheduler.step()[0] for _ in range(12)]
    assert order.index("c") < order.index("a")


def test_new_requests_without_end_starve_nobody() -> None:
    scheduler = FakeScheduler(num_slots=2, passes=2)
    first = scheduler.add("first", 50)
    for number in range(400):
        if number % 4 == 0:
            scheduler.add(f"{number}", 6)
        scheduler.step()
        if first.finished():
            return
    raise AssertionError(f"{len(first.output_ids)} tokens after 400 passes")


def test_requests_of_one_adapter_stay_together_even_if_one_comes_while_the_others_are_aside() -> None:
    scheduler = FakeScheduler(num_slots=1, passes=2)
    scheduler.add("a", 30)
    for _ in range(4):
        scheduler.step()
    scheduler.add("b", 30)
    scheduler.step()
    assert [each.lora_id for each in scheduler.mint_slot_turns.requests] == ["a"]
    scheduler.add("a", 30)
    run_to_the_end(scheduler)
    assert all(len(each.output_ids) == 30 for each in scheduler.requests)


def test_new_request_that_takes_the_slot_of_those_aside_brings_them_along() -> None:
    scheduler = FakeScheduler(num_slots=1, passes=2)
    scheduler.add("a", 30)
    for _ in range(4):
        scheduler.step()
    scheduler.add("b", 1)
    scheduler.add("a", 30)
    scheduler.step()
    assert [each.lora_id for each in scheduler.mint_slot_turns.requests] == ["a"]
    # b has ended; the slot goes to whoever SGLang takes, and both requests of a go on in it.
    scheduler.step()
    scheduler.step()
    assert scheduler.mint_slot_turns.requests == []
    run_to_the_end(scheduler)


def test_nobody_is_taken_who_would_not_fit_beside_those_aside() -> None:
    scheduler = FakeScheduler(passes=2, pool_tokens=120)
    for adapter in ("a", "b", "c", "d"):
        scheduler.add(adapter, 40)
    while not all(each.finished() for each in scheduler.requests):
        scheduler.step()
        assert scheduler._num_held() <= scheduler.pool_tokens


def test_full_batch_lets_those_aside_go_on() -> None:
    scheduler = FakeScheduler(passes=2)
    for adapter in ("a", "b", "c"):
        scheduler.add(adapter, 60)
    for _ in range(8):
        scheduler.step()
    assert scheduler.mint_slot_turns.requests
    scheduler.num_rows = 3
    late = scheduler.add("d", 5)
    for _ in range(20):
        scheduler.step()
    assert not late.output_ids
    run_to_the_end(scheduler)


def test_batch_with_penalties_stays_whole() -> None:
    scheduler = FakeScheduler(passes=1)
    for adapter in ("a", "b"):
        scheduler.add(adapter, 20)
    for _ in range(3):
        scheduler.step()
    scheduler.running.sampling_info.penalizer_orchestrator.is_required = True
    late = scheduler.add("c", 5)
    for _ in range(10):
        scheduler.step()
    assert not late.output_ids
    run_to_the_end(scheduler)


def test_sglang_learns_of_requests_aside() -> None:
    scheduler = FakeScheduler(passes=2)
    first, second, third = (scheduler.add(adapter, 60) for adapter in ("a", "b", "c"))
    for _ in range(6):
        scheduler.step()
    aside = set(scheduler.mint_slot_turns.requests)
    assert aside
    assert after_collect_inflight_reqs({first}, scheduler) == {first} | aside
    assert after_is_fully_idle(True, scheduler) is False
    run_to_the_end(scheduler)
    assert after_collect_inflight_reqs(set(), scheduler) == set()
    assert after_is_fully_idle(True, scheduler) is True
    assert after_is_fully_idle(False, scheduler) is False
    assert all(len(each.output_ids) == 60 for each in (first, second, third))


def test_turns_are_refused_where_scheduling_overlaps() -> None:
    scheduler = FakeScheduler(passes=0)
    scheduler.enable_overlap = True
    set_slot_turns(scheduler, passes=0)
    with pytest.raises(FailedPrecondition, match="4 passes"):
        set_slot_turns(scheduler, passes=4)


def test_hooks_change_nothing_where_turns_are_off() -> None:
    for scheduler in (FakeScheduler(passes=0), SimpleNamespace()):
        assert after_collect_inflight_reqs(set(), scheduler) == set()
        assert after_is_fully_idle(True, scheduler) is True
