"""Saving and restoring: bit for bit, also in a fresh process, and never from a damaged or foreign state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from mint_blobs import digest_bytes
from mint_blobs.memory import MemoryObjectStore
from mint_core.errors import (
    AlreadyExists,
    BaseModelMismatch,
    BlobCorrupt,
    InvalidArgument,
    NotFound,
    Unavailable,
    WrongState,
)
from mint_core.names import BlobName, PolicyName, SessionName
from mint_lora import LAYOUT_PACKED, AdapterConfig, TensorFile, pack
from mint_lora.dtypes import from_float32
from mint_trainer.base import ResidentBase
from mint_trainer.batch import BatchLimits, Datum
from mint_trainer.choices import Dtype
from mint_trainer.ledger import LedgerContents
from mint_trainer.optimizer import AdamWConfig
from mint_trainer.recipe import AdapterRecipe
from mint_trainer.session import TrainingSession
from mint_trainer.sessions import SessionLimits, Sessions, StagedBlob
from mint_trainer.state import Blob, SavedState, StateReader, write_state
from mint_trainer.worker import TorchThread
from support.tiny_models import make_tiny_llama

OPTIMIZER = AdamWConfig(learning_rate=2e-2, weight_decay=0.05, max_grad_norm=1.0)
NAME = SessionName("acme", "s")
OTHER = SessionName("acme", "other")
POLICY = PolicyName("acme", "tone")
LIMITS = SessionLimits(max_sessions=8, max_waiting_steps=64, idle_ttl_s=600.0, num_kept_results=8)
DROPOUT = AdapterRecipe(4, 8.0, ("down_proj", "q_proj", "v_proj"), dropout=0.1, init_seed=5)

NewSession = Callable[[AdapterRecipe], TrainingSession]
MakeData = Callable[..., list[Datum]]


@pytest.fixture
def store() -> MemoryObjectStore:
    return MemoryObjectStore()


@pytest.fixture
async def sessions(
    base_folder: Path, limits: BatchLimits, store: MemoryObjectStore, tmp_path: Path
) -> AsyncIterator[Sessions]:
    thread = TorchThread(1)
    yield Sessions(ResidentBase.load(base_folder, model_id="tiny"), store, thread, limits, LIMITS, tmp_path)
    thread.close()
    assert list(tmp_path.iterdir()) == []  # nothing is left in the scratch folder


def train(session: TrainingSession, make_data: MakeData, first: int, last: int) -> list[object]:
    """Steps ``first`` to ``last`` (excluded) of one fixed run; each is two forward_backward and an optim_step."""
    outcomes: list[object] = []
    for step in range(first, last):
        for half in range(2):
            result = session.forward_backward(make_data(10 * step + half))
            outcomes.append((result.loss_sum, result.logprobs))
        outcomes.append(session.optim_step(OPTIMIZER, 0.5).grad_norm)
    return outcomes


def digests(session: TrainingSession, folder: Path) -> tuple[str, str]:
    folder.mkdir()
    files = write_state(session, LedgerContents(), folder)
    return files.weights.digest, files.optimizer.digest


async def begin(sessions: Sessions, make_data: MakeData, recipe: AdapterRecipe = DROPOUT) -> SavedState:
    """A session with one step done and saved."""
    await sessions.create(NAME, POLICY, payload_digest=b"p", recipe=recipe)
    await sessions.forward_backward(NAME, 1, b"1", make_data(1), "cross_entropy", {}, return_logprobs=False)
    await sessions.optim_step(NAME, 2, b"2", OPTIMIZER, 1.0)
    return await sessions.save_state(NAME, "", "r", 7)


async def test_continuing_after_restore_equals_never_having_stopped(
    sessions: Sessions, store: MemoryObjectStore, make_data: MakeData
) -> None:
    saved = await begin(sessions, make_data)
    assert saved.step == 1
    folder = "tenants/acme/states/tone/r/00000001-7"
    assert (saved.weights_key, saved.optimizer_key) == (
        f"{folder}/weights.safetensors",
        f"{folder}/optimizer.safetensors",
    )
    info = await store.head(saved.weights_key)
    assert info is not None
    assert (info.digest, info.size_bytes) == (saved.weights.digest, saved.weights.size_bytes)
    view = await sessions.create(OTHER, POLICY, payload_digest=b"p", from_state=saved)
    assert (view.recipe, view.step, view.next_seq) == (DROPOUT, 1, 3)
    results = []
    for name in (NAME, OTHER):
        step = await sessions.forward_backward(name, 3, b"a", make_data(2), "cross_entropy", {}, return_logprobs=True)
        done = await sessions.optim_step(name, 4, b"b", OPTIMIZER, 1.0)
        after = await sessions.save_state(name, "", name.session, 8)
        results.append((step.loss_sum, step.logprobs, done.grad_norm, done.step, after.weights, after.optimizer))
    assert results[0] == results[1]
    assert results[0][3] == 2


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "F32"), ("bfloat16", "BF16")])
async def test_a_state_for_export_is_the_weights_alone_in_the_bases_type(
    base_folder: Path,
    limits: BatchLimits,
    store: MemoryObjectStore,
    make_data: MakeData,
    tmp_path: Path,
    dtype: Dtype,
    stored: str,
) -> None:
    thread = TorchThread(1)
    base = ResidentBase.load(base_folder, model_id="tiny", dtype=dtype)
    sessions = Sessions(base, store, thread, limits, LIMITS, tmp_path)
    whole = await begin(sessions, make_data)
    saved = await sessions.save_state(NAME, "", "r", 7, for_export=True)
    assert (saved.weights_key, saved.optimizer_key) == ("tenants/acme/states/tone/r/00000001-7/export.safetensors", "")
    keys = [info.key async for info in store.list("tenants/acme/states/")]
    assert sorted(keys) == sorted([whole.optimizer_key, whole.weights_key, saved.weights_key])
    path, exported = tmp_path / "whole", tmp_path / "exported"
    await store.get_file(whole.weights_key, path, digest=whole.weights.digest)
    await store.get_file(saved.weights_key, exported, digest=saved.weights.digest)
    with TensorFile(path) as one, TensorFile(exported) as other:
        assert other.header.tensors.keys() == one.header.tensors.keys()
        config = AdapterConfig.from_metadata(other.header.metadata, file_name="exported")
        assert (config.dtype, config.layout) == (dtype, LAYOUT_PACKED)
        for name, info in other.header.tensors.items():
            assert info.dtype == stored
            assert np.array_equal(other.array(name), from_float32(one.array(name), stored))
    packed = pack(exported, tmp_path / "packed", source_digest=saved.weights.digest)
    assert (packed.path, packed.digest) == (exported, saved.weights.digest)
    assert pack(exported, tmp_path / "packed").digest == saved.weights.digest
    with pytest.raises(InvalidArgument, match="optimizer"):
        await sessions.load_state(NAME, saved, weights_only=False)
    for each in (path, exported, tmp_path / "packed"):
        each.unlink()
    thread.close()


async def test_a_state_for_export_is_stored_where_the_catalog_wants_its_blob(
    base_folder: Path, limits: BatchLimits, store: MemoryObjectStore, make_data: MakeData, tmp_path: Path
) -> None:
    asked: list[tuple[BlobName, int]] = []
    key = "tenants/acme/blobs/ab/1"

    async def stage_blob(name: BlobName, size_bytes: int) -> StagedBlob:
        asked.append((name, size_bytes))
        return StagedBlob(key, is_verified=len(asked) > 1)

    thread = TorchThread(1)
    base = ResidentBase.load(base_folder, model_id="tiny", dtype="bfloat16")
    sessions = Sessions(base, store, thread, limits, LIMITS, tmp_path, stage_blob)
    await begin(sessions, make_data)
    saved = await sessions.save_state(NAME, "", "r", 7, for_export=True)
    assert asked == [(BlobName("acme", saved.weights.digest), saved.weights.size_bytes)]
    info = await store.head(key)
    assert info is not None
    assert (saved.weights_key, info.digest) == (key, saved.weights.digest)
    await store.delete(key)
    assert await sessions.save_state(NAME, "", "r", 7, for_export=True) == saved
    assert await store.head(key) is None, "a verified blob was put again"
    with pytest.raises(InvalidArgument, match="training state"):
        await sessions.load_state(NAME, saved, weights_only=True)
    thread.close()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_restored_in_the_middle_of_gathering_in_a_fresh_process(
    base_folder: Path, new_session: NewSession, make_data: MakeData, tmp_path: Path, dropout: float
) -> None:
    recipe = replace(DROPOUT, dropout=dropout)
    uninterrupted = new_session(recipe)
    train(uninterrupted, make_data, 0, 2)
    middle = make_data(77)
    uninterrupted.forward_backward(middle)
    (tmp_path / "state").mkdir()
    files = write_state(uninterrupted, LedgerContents(), tmp_path / "state")
    expected_losses = train(uninterrupted, make_data, 2, 4)
    expected = digests(uninterrupted, tmp_path / "expected")
    uninterrupted.close()

    job = {
        "base": str(base_folder),
        "state": str(tmp_path / "state"),
        "out": str(tmp_path / "out"),
        "weights_digest": files.weights.digest,
        "steps": [[[vars_of(d) for d in make_data(10 * step + half)] for half in range(2)] for step in (2, 3)],
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, "-c", _CONTINUE, str(tmp_path / "job.json")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert tuple(answer["digests"]) == expected
    assert answer["losses"] == [each[0] for each in expected_losses if isinstance(each, tuple)]


def vars_of(datum: Datum) -> list[list[float]]:
    return [list(datum.tokens), list(datum.targets), list(datum.weights)]


_CONTINUE = """
import json, sys
from pathlib import Path
import mint_trainer.base
import torch
from mint_trainer.adapters import ResidentAdapters
from mint_trainer.base import ResidentBase
from mint_trainer.batch import BatchLimits, Datum
from mint_trainer.ledger import LedgerContents
from mint_trainer.optimizer import AdamWConfig
from mint_trainer.session import TrainingSession
from mint_trainer.state import Blob, SavedState, StateReader, write_state

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
job = json.loads(Path(sys.argv[1]).read_text())
base = ResidentBase.load(Path(job["base"]), model_id="tiny")
saved = SavedState("", 2, 1, "w", Blob(job["weights_digest"], 1), "o", Blob())
state = Path(job["state"])
reader = StateReader(saved, state / "weights.safetensors", state / "optimizer.safetensors")
limits = BatchLimits(base.vocab_size, max_datum_tokens=128, max_step_tokens=2048, micro_batch_tokens=96)
session = TrainingSession(base, ResidentAdapters(base), reader.recipe(), limits)
reader.restore(session)
losses = []
for halves in job["steps"]:
    for half in halves:
        losses.append(session.forward_backward([Datum(*each) for each in half]).loss_sum)
    session.optim_step(AdamWConfig(learning_rate=2e-2, weight_decay=0.05, max_grad_norm=1.0), 0.5)
out = Path(job["out"])
out.mkdir()
files = write_state(session, LedgerContents(), out)
print(json.dumps({"losses": losses, "digests": [files.weights.digest, files.optimizer.digest]}))
"""


async def test_saving_again_under_the_same_keys(sessions: Sessions, make_data: MakeData) -> None:
    saved = await begin(sessions, make_data)
    assert await sessions.save_state(NAME, "", "r", 7) == saved
    await sessions.forward_backward(NAME, 3, b"3", make_data(2), "cross_entropy", {}, return_logprobs=False)
    with pytest.raises(AlreadyExists):
        await sessions.save_state(NAME, "", "r", 7)  # same step, but a gradient is gathered
    other = await sessions.save_state(NAME, "", "r", 8)
    assert other.weights == saved.weights
    assert other.optimizer != saved.optimizer


async def test_load_into_a_session_takes_it_back(sessions: Sessions, make_data: MakeData) -> None:
    saved = await begin(sessions, make_data)
    before = await sessions.forward(NAME, make_data(5))
    await sessions.forward_backward(NAME, 3, b"3", make_data(2), "cross_entropy", {}, return_logprobs=False)
    await sessions.optim_step(NAME, 4, b"4", OPTIMIZER, 1.0)
    assert (await sessions.forward(NAME, make_data(5))).loss_sum != before.loss_sum
    view = await sessions.load_state(NAME, saved, weights_only=False)
    assert (view.step, view.next_seq) == (1, 5)  # the step goes back with the weights, seq belongs to the session
    assert (await sessions.forward(NAME, make_data(5))).logprobs == before.logprobs
    with pytest.raises(WrongState, match="no gradient"):
        await sessions.optim_step(NAME, 5, b"5", OPTIMIZER, 1.0)


async def test_weights_only_is_a_fresh_optimizer_on_saved_weights(sessions: Sessions, make_data: MakeData) -> None:
    saved = await begin(sessions, make_data)
    before = await sessions.forward(NAME, make_data(5))
    no_optimizer = replace(saved, optimizer_key="", optimizer=Blob())
    view = await sessions.create(OTHER, POLICY, payload_digest=b"p", from_state=no_optimizer, weights_only=True)
    assert (view.step, view.recipe) == (0, replace(DROPOUT, dropout=0.0, init_seed=0))
    assert (await sessions.forward(OTHER, make_data(5))).logprobs == before.logprobs
    assert (await sessions.load_state(NAME, saved, weights_only=True)).step == 0
    again = await sessions.save_state(NAME, "", "again", 1)
    assert again.weights == saved.weights
    assert again.optimizer != saved.optimizer


async def test_weights_object_is_a_peft_adapter_and_packs(
    base_folder: Path, new_session: NewSession, make_data: MakeData, tmp_path: Path
) -> None:
    recipe = AdapterRecipe(4, 8.0, ("down_proj", "q_proj"), use_rslora=True)
    session = new_session(recipe)
    train(session, make_data, 0, 1)
    files = write_state(session, LedgerContents(), tmp_path)
    with safe_open(files.weights_path, "pt") as opened:
        assert set(opened.keys()) == set(session.adapter.parameters)
        assert len(opened.metadata()) == 1
        config = AdapterConfig.from_metadata(opened.metadata(), file_name="weights")
        assert (config.base_model, config.base_digest, config.dtype) == ("tiny", session.base.digest, "float32")
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config.to_peft_config()))
    (folder / "adapter_model.safetensors").write_bytes(files.weights_path.read_bytes())
    plain = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, str(folder))
    datum = make_data(3, (20,))[0]
    with torch.no_grad():
        logits = model(torch.tensor([list(datum.tokens)])).logits[0]
    wanted = logits.log_softmax(-1)[torch.arange(20), torch.tensor(list(datum.targets))].tolist()
    assert list(session.forward([datum]).logprobs[0]) == pytest.approx(wanted, abs=1e-5)
    assert pack(files.weights_path, tmp_path / "packed.safetensors").config.rank == 4
    session.close()


def test_same_state_gives_the_same_bytes(new_session: NewSession, make_data: MakeData, tmp_path: Path) -> None:
    pair = [new_session(DROPOUT), new_session(DROPOUT)]
    for session in pair:
        train(session, make_data, 0, 1)
    assert digests(pair[0], tmp_path / "0") == digests(pair[1], tmp_path / "1")
    for session in pair:
        session.close()


async def corrupted(store: MemoryObjectStore, saved: SavedState, part: str, data: bytes) -> SavedState:
    """``saved`` with one object replaced by ``data`` under a true digest, as if a foreign writer had put it."""
    digest = digest_bytes(data)
    key = f"tenants/acme/states/tone/bad/{digest[-16:]}/{part}.safetensors"
    await store.put_bytes(key, data)
    return replace(saved, **{f"{part}_key": key, part: Blob(digest, len(data))})


@pytest.mark.parametrize("part", ["weights", "optimizer"])
async def test_damaged_states_are_refused_and_change_nothing(
    sessions: Sessions, store: MemoryObjectStore, make_data: MakeData, part: str
) -> None:
    saved = await begin(sessions, make_data)
    before = await sessions.forward(NAME, make_data(5))
    key = getattr(saved, f"{part}_key")
    size = getattr(saved, part).size_bytes
    good = await store.get_bytes(key, max_bytes=1 << 30)
    bad = [
        await corrupted(store, saved, part, good[:-8]),
        await corrupted(store, saved, part, good[:40]),
        await corrupted(store, saved, part, b"\x80\x04\x95" + good[3:]),
        await corrupted(store, saved, part, good.replace(b"layers.1", b"layers.9")),
        await corrupted(store, saved, part, good.replace(b'"mint.', b'"tinm.', 1)),
        replace(saved, **{part: Blob("sha256:" + "0" * 64, size)}),
        replace(saved, **{part: Blob(getattr(saved, part).digest, size - 1)}),
    ]
    for state in bad:
        with pytest.raises(BlobCorrupt):
            await sessions.load_state(NAME, state, weights_only=False)
        with pytest.raises(BlobCorrupt):
            await sessions.create(OTHER, POLICY, payload_digest=b"p", from_state=state)
    assert (await sessions.forward(NAME, make_data(5))).logprobs == before.logprobs
    assert (await sessions.load_state(NAME, saved, weights_only=False)).step == 1
    await sessions.create(OTHER, POLICY, payload_digest=b"p", from_state=saved)
    assert sum("lora_A" in name for name, _ in sessions.base.model.named_parameters()) == 2 * 6


async def test_states_that_do_not_belong_here(
    sessions: Sessions,
    store: MemoryObjectStore,
    limits: BatchLimits,
    make_data: MakeData,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    saved = await begin(sessions, make_data)
    await sessions.forward_backward(NAME, 3, b"3", make_data(2), "cross_entropy", {}, return_logprobs=False)
    await sessions.optim_step(NAME, 4, b"4", OPTIMIZER, 1.0)
    later = await sessions.save_state(NAME, "", "r2", 9)
    mixed = replace(later, optimizer_key=saved.optimizer_key, optimizer=saved.optimizer)
    with pytest.raises(InvalidArgument, match="belongs to the weights"):
        await sessions.load_state(NAME, mixed, weights_only=False)
    for recipe in (replace(DROPOUT, rank=8), replace(DROPOUT, alpha=9.0), replace(DROPOUT, target_modules=("q_proj",))):
        with pytest.raises(WrongState, match="create a session from the state instead"):
            await sessions.create(OTHER, POLICY, payload_digest=b"p", recipe=recipe, from_state=saved)
    with pytest.raises(InvalidArgument, match="tenant other") as caught:
        await sessions.create(
            SessionName("other", "s"), PolicyName("other", "p"), payload_digest=b"p", from_state=saved
        )
    assert caught.value.field == "from_state.weights_key"
    with pytest.raises(InvalidArgument) as caught:
        await sessions.load_state(NAME, replace(saved, optimizer=Blob("md5:1", 3)), weights_only=False)
    assert caught.value.field == "state.optimizer.digest"
    with pytest.raises(NotFound):
        await sessions.load_state(
            NAME, replace(saved, weights_key="tenants/acme/states/tone/r/gone"), weights_only=False
        )

    elsewhere = tmp_path_factory.mktemp("foreign")
    base = ResidentBase.load(make_tiny_llama(elsewhere / "base", seed=1), model_id="tiny")
    thread = TorchThread(1)
    foreign = Sessions(base, store, thread, limits, LIMITS, elsewhere)
    with pytest.raises(BaseModelMismatch, match="saved on the base sha256"):
        await foreign.create(NAME, POLICY, payload_digest=b"p", from_state=saved)
    with pytest.raises(BaseModelMismatch):
        await foreign.create(NAME, POLICY, payload_digest=b"p", from_state=saved, weights_only=True)
    thread.close()


async def test_store_away_while_saving_leaves_the_session_whole(
    sessions: Sessions, store: MemoryObjectStore, make_data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = await begin(sessions, make_data)

    async def away(*args: object, **kwargs: object) -> None:
        raise Unavailable("the object store is away")

    with monkeypatch.context() as patch:
        patch.setattr(store, "put_file", away)
        with pytest.raises(Unavailable):
            await sessions.save_state(NAME, "", "later", 1)
    again = await sessions.save_state(NAME, "", "later", 1)
    assert (again.weights, again.optimizer) == (saved.weights, saved.optimizer)


def test_reader_does_not_need_the_files_after_restore(
    new_session: NewSession, make_data: MakeData, tmp_path: Path
) -> None:
    session = new_session(DROPOUT)
    train(session, make_data, 0, 1)
    files = write_state(session, LedgerContents(), tmp_path)
    saved = SavedState("", 1, 1, "w", files.weights, "o", files.optimizer)
    restored = new_session(DROPOUT)
    StateReader(saved, files.weights_path, files.optimizer_path).restore(restored)
    for path in (files.weights_path, files.optimizer_path):
        path.write_bytes(b"\0" * path.stat().st_size)
    assert train(session, make_data, 1, 3) == train(restored, make_data, 1, 3)
    session.close()
    restored.close()
