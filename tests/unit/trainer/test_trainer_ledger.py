"""Step results that outlive their session: saved with its state, answered by the session made from it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from unit.trainer.trainer_lab import OPTIMIZER, MakeData

from mint_blobs import digest_bytes
from mint_blobs.memory import MemoryObjectStore
from mint_core.errors import BlobCorrupt, NotFound, RequestIdReused, WrongState
from mint_core.names import PolicyName, SessionName
from mint_lora import TensorFile, write_safetensors
from mint_trainer.base import ResidentBase
from mint_trainer.batch import BatchLimits
from mint_trainer.ledger import LedgerContents, RecordedStep, StepLedger
from mint_trainer.recipe import AdapterRecipe
from mint_trainer.session import StepResult
from mint_trainer.sessions import SessionLimits, Sessions
from mint_trainer.state import METADATA_KEY, Blob, SavedState
from mint_trainer.worker import TorchThread

NAME, OTHER, THIRD = (SessionName("acme", name) for name in ("s", "other", "third"))
POLICY = PolicyName("acme", "tone")
LIMITS = SessionLimits(max_sessions=8, max_waiting_steps=64, idle_ttl_s=600.0, num_kept_results=4)
RECIPE = AdapterRecipe(4, 8.0, ("q_proj", "v_proj"), init_seed=5)

Open = Callable[[int], Sessions]


@pytest.fixture
def store() -> MemoryObjectStore:
    return MemoryObjectStore()


@pytest.fixture
async def open_sessions(
    base_folder: Path, limits: BatchLimits, store: MemoryObjectStore, tmp_path: Path
) -> AsyncIterator[Open]:
    """``open_sessions(num_kept_results)``: a trainer of its own over the one store."""
    thread = TorchThread(1)
    yield lambda num_kept: Sessions(
        ResidentBase.load(base_folder, model_id="tiny"),
        store,
        thread,
        limits,
        replace(LIMITS, num_kept_results=num_kept),
        tmp_path,
    )
    thread.close()


@pytest.fixture
def sessions(open_sessions: Open) -> Sessions:
    return open_sessions(4)


async def steps(sessions: Sessions, name: SessionName, make_data: MakeData, *, first_seq: int = 1) -> list[StepResult]:
    """Three steps: cross-entropy with log-probabilities, PPO without, and the optimizer's."""
    run = sessions.forward_backward
    data = make_data(1)
    off_policy = [
        replace(d, behavior_logprobs=[-5.5] * len(d.tokens), advantages=[1.0] * len(d.tokens)) for d in make_data(2)
    ]
    return [
        await run(name, first_seq, b"1", data, "cross_entropy", {}, return_logprobs=True),
        await run(name, first_seq + 1, b"2", off_policy, "ppo", {}, return_logprobs=False),
        await sessions.optim_step(name, first_seq + 2, b"3", OPTIMIZER, 1.0),
    ]


async def begin(sessions: Sessions, make_data: MakeData) -> tuple[SavedState, list[StepResult]]:
    """A session with three steps, saved."""
    await sessions.create(NAME, POLICY, payload_digest=b"p", recipe=RECIPE)
    results = await steps(sessions, NAME, make_data)
    return await sessions.save_state(NAME, "", "r", 1), results


def timeless(results: list[StepResult]) -> list[StepResult]:
    return [replace(result, compute_ms=0.0) for result in results]


async def test_session_from_a_state_answers_for_the_saved_steps(
    sessions: Sessions, open_sessions: Open, make_data: MakeData
) -> None:
    saved, results = await begin(sessions, make_data)
    assert len(results[0].logprobs) == 3
    assert results[1].metrics.keys() == {"num_clipped", "behavior_kl"}
    assert results[2].compute_ms > 0
    restarted = open_sessions(4)
    view = await restarted.create(OTHER, POLICY, payload_digest=b"p", from_state=saved)
    assert (view.step, view.next_seq) == (1, 4)
    assert [restarted.step_result(OTHER, seq) for seq in (1, 2, 3)] == timeless(results)
    assert await steps(restarted, OTHER, make_data) == timeless(results)  # repeated, not run
    assert restarted.get(OTHER).step == 1
    with pytest.raises(RequestIdReused, match="seq 3 of tenants/acme/sessions/other has run with another payload"):
        await restarted.optim_step(OTHER, 3, b"x", OPTIMIZER, 1.0)
    with pytest.raises(WrongState, match=r"seq is 5 but the next step of .*other is 4"):
        await restarted.optim_step(OTHER, 5, b"5", OPTIMIZER, 1.0)
    with pytest.raises(NotFound, match="sessions/other/steps/4 has no stored result"):
        restarted.step_result(OTHER, 4)


async def test_same_steps_give_the_same_bytes_wherever_they_ran(
    sessions: Sessions, open_sessions: Open, make_data: MakeData
) -> None:
    saved, _ = await begin(sessions, make_data)
    restarted = open_sessions(4)
    await restarted.create(OTHER, POLICY, payload_digest=b"p", from_state=saved)
    at_once = await restarted.save_state(OTHER, "", "other", 1)
    assert (at_once.weights, at_once.optimizer) == (saved.weights, saved.optimizer)
    states = []
    for each, name in ((sessions, NAME), (restarted, OTHER)):
        await steps(each, name, make_data, first_seq=4)
        with pytest.raises(WrongState, match=r"seq 2 .* not kept any more \(the last 4 are\)"):
            await each.optim_step(name, 2, b"2", OPTIMIZER, 1.0)
        states.append(await each.save_state(name, "", name.session, 2))
    assert (states[0].weights, states[0].optimizer) == (states[1].weights, states[1].optimizer)
    third = open_sessions(1)
    assert (await third.create(THIRD, POLICY, payload_digest=b"p", from_state=states[0])).next_seq == 7
    assert third.step_result(THIRD, 6) == replace(sessions.step_result(NAME, 6), compute_ms=0.0)
    with pytest.raises(NotFound):
        third.step_result(THIRD, 5)


async def test_weights_alone_bring_no_steps(sessions: Sessions, make_data: MakeData) -> None:
    saved, _ = await begin(sessions, make_data)
    assert (
        await sessions.create(OTHER, POLICY, payload_digest=b"p", from_state=saved, weights_only=True)
    ).next_seq == 1
    with pytest.raises(NotFound):
        sessions.step_result(OTHER, 1)
    assert (await steps(sessions, OTHER, make_data))[2].step == 1


async def test_loading_a_state_leaves_the_steps_alone(sessions: Sessions, make_data: MakeData) -> None:
    saved, results = await begin(sessions, make_data)
    await sessions.create(OTHER, POLICY, payload_digest=b"q", recipe=RECIPE)
    assert (await sessions.load_state(OTHER, saved, weights_only=False)).next_seq == 1
    with pytest.raises(NotFound):
        sessions.step_result(OTHER, 1)
    await steps(sessions, NAME, make_data, first_seq=4)
    assert (await sessions.load_state(NAME, saved, weights_only=False)).next_seq == 7
    assert sessions.step_result(NAME, 3) == results[2]


async def rewritten(
    store: MemoryObjectStore,
    saved: SavedState,
    folder: Path,
    change: Callable[[dict[str, Any], dict[str, Any]], object],
) -> SavedState:
    """``saved`` with its optimizer object changed: ``change(document, tensors)``."""
    path = folder / "optimizer.safetensors"
    path.write_bytes(await store.get_bytes(saved.optimizer_key, max_bytes=1 << 30))
    file = TensorFile(path)
    document = json.loads(file.header.metadata[METADATA_KEY])
    tensors = {name: file.array(name).copy() for name in file.header.tensors}
    path.unlink()
    change(document, tensors)
    write_safetensors(path, tensors, {METADATA_KEY: json.dumps(document)})
    data = path.read_bytes()
    path.unlink()
    key = f"tenants/acme/states/tone/changed/{digest_bytes(data)[-16:]}/optimizer.safetensors"
    await store.put_bytes(key, data)
    return replace(saved, optimizer_key=key, optimizer=Blob(digest_bytes(data), len(data)))


async def test_state_of_before_steps_were_saved_is_read(
    sessions: Sessions, store: MemoryObjectStore, make_data: MakeData, tmp_path: Path
) -> None:
    saved, _ = await begin(sessions, make_data)

    def forget(document: dict[str, Any], tensors: dict[str, Any]) -> None:
        del document["ledger"], tensors["ledger/logprobs/1"]
        assert not any(name.startswith("ledger") for name in tensors)

    view = await sessions.create(
        OTHER, POLICY, payload_digest=b"p", from_state=await rewritten(store, saved, tmp_path, forget)
    )
    assert (view.step, view.next_seq) == (1, 1)


DAMAGES: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "ledger: Input should": lambda document, tensors: document.update(ledger=[]),
    "ledger.steps: Field required": lambda document, tensors: document["ledger"].pop("steps"),
    "ledger.next_seq: ": lambda document, tensors: document["ledger"].update(next_seq="4"),
    "ledger.next_seq: Input": lambda document, tensors: document["ledger"].update(next_seq=2**63),
    "ledger has 3 steps before seq 3": lambda document, tensors: document["ledger"].update(next_seq=3),
    "ledger.steps.0.payload_digest: ": lambda document, tensors: step_of(document).update(payload_digest="xy"),
    "ledger.steps.0.loss_sum: ": lambda document, tensors: step_of(document).update(loss_sum=float("nan")),
    "ledger.steps.0.step: ": lambda document, tensors: step_of(document).update(step=True),
    "ledger.steps.0.num_tokens: ": lambda document, tensors: step_of(document).update(num_tokens=-1),
    "ledger.steps.0.metrics: ": lambda document, tensors: step_of(document).update(metrics=None),
    "'ledger/logprobs/1' is F32 .31., expected F32 .30.": lambda document, tensors: step_of(document)[
        "num_logprobs"
    ].__setitem__(0, 4),
    "'ledger/logprobs/1' is absent": lambda document, tensors: tensors.pop("ledger/logprobs/1"),
    "'ledger/logprobs/1' is U8": lambda document, tensors: tensors.update(
        {"ledger/logprobs/1": tensors["ledger/logprobs/1"].astype("uint8")}
    ),
    "'ledger/logprobs/2' is absent": lambda document, tensors: document["ledger"].update(next_seq=5),
}


def step_of(document: dict[str, Any]) -> Any:
    return document["ledger"]["steps"][0]


@pytest.mark.parametrize("words", DAMAGES)
async def test_damaged_steps_are_refused_and_change_nothing(
    sessions: Sessions, store: MemoryObjectStore, make_data: MakeData, tmp_path: Path, words: str
) -> None:
    saved, results = await begin(sessions, make_data)
    damaged = await rewritten(store, saved, tmp_path, DAMAGES[words])
    with pytest.raises(BlobCorrupt, match=words):
        await sessions.create(OTHER, POLICY, payload_digest=b"p", from_state=damaged)
    before = await sessions.forward(NAME, make_data(3))
    await steps(sessions, NAME, make_data, first_seq=4)
    with pytest.raises(BlobCorrupt, match=words):
        await sessions.load_state(NAME, damaged, weights_only=False)
    assert (await sessions.forward(NAME, make_data(3))).loss_sum != before.loss_sum
    assert (await sessions.load_state(NAME, damaged, weights_only=True)).next_seq == 7
    assert (await sessions.create(OTHER, POLICY, payload_digest=b"p", from_state=saved)).next_seq == 4
    assert sessions.step_result(OTHER, 3) == timeless(results)[2]


def test_ledger_is_its_contents() -> None:
    ledger = StepLedger("s", 2)
    assert ledger.contents == LedgerContents(1, ())
    for seq in (1, 2, 3):
        ledger.record(seq, b"%d" % seq, StepResult(step=seq))
    contents = LedgerContents(4, tuple(RecordedStep(b"%d" % seq, StepResult(step=seq)) for seq in (2, 3)))
    assert ledger.contents == contents
    again = StepLedger("t", 2, contents)
    assert again.contents == contents
    assert again.result_of(3, b"3") == StepResult(step=3)
    assert again.result_of(4, b"4") is None
    again.record(4, b"4", StepResult(step=4))
    assert again.contents.next_seq == 5
    assert ledger.contents == contents
    assert StepLedger("u", 1, contents).contents == LedgerContents(4, contents.recorded[1:])
