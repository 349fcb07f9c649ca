"""Rollout batches as files: every batch comes back as it was, and damage is found whatever it is."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mint_api.v1 import common_pb2
from mint_core.errors import BlobCorrupt, InvalidArgument, WrongState
from mint_lora import TensorFile, TensorSource, write_safetensors
from mint_runs.rollouts.batch import RolloutBatch, RolloutGroup, RolloutSample
from mint_runs.rollouts.codec import METADATA_KEY, read_batch, write_batch

floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def samples(draw: st.DrawFn, num_prompt_tokens: int, routed: tuple[int, int, int] | None) -> RolloutSample:
    token_ids = draw(st.lists(st.integers(0, 200_000), max_size=5))
    reward = draw(st.none() | floats32)
    experts = None
    if routed is not None:
        num_layers, top_k, num_experts = routed
        shape = (num_prompt_tokens + len(token_ids) - 1, num_layers, top_k)
        values = draw(
            st.lists(st.integers(0, num_experts - 1), min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))
        )
        experts = np.array(values, dtype=np.int32).reshape(shape)
    return RolloutSample(
        token_ids=tuple(token_ids),
        logprobs=tuple(draw(floats32) for _ in token_ids),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        text=draw(st.text(max_size=6)),
        reward=reward,
        error="" if reward is not None else draw(st.text(max_size=6)),
        routed_experts=experts,
    )


@st.composite
def batches(draw: st.DrawFn) -> RolloutBatch:
    routed = draw(st.none() | st.tuples(st.integers(1, 2), st.integers(1, 2), st.sampled_from([8, 300])))
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        prompt = draw(st.lists(st.integers(0, 70_000), min_size=1, max_size=4))
        members = draw(st.lists(samples(len(prompt), routed), max_size=3))
        groups.append(RolloutGroup(draw(st.integers(1, 10**6)), tuple(prompt), tuple(members)))
    return RolloutBatch(
        run="tenants/acme/runs/r1",
        step=draw(st.integers(1, 10**6)),
        revision="tenants/acme/policies/tone/revisions/3",
        revision_digest=f"sha256:{'b' * 64}",
        numerics=common_pb2.Numerics(base_digest="sha256:base", dtype="float32", engine_version="sglang 0.5.23"),
        temperature=draw(st.floats(0.1, 2)),
        groups=tuple(groups),
    )


def plain(batch: RolloutBatch) -> Any:
    """The batch with its arrays as lists, which compare."""
    return (
        batch.run,
        batch.step,
        batch.revision,
        batch.revision_digest,
        batch.numerics,
        batch.temperature,
        [
            (
                group.line,
                group.prompt_token_ids,
                [
                    (
                        sample.token_ids,
                        sample.logprobs,
                        sample.finish_reason,
                        sample.text,
                        sample.reward,
                        sample.error,
                        None if sample.routed_experts is None else sample.routed_experts.tolist(),
                    )
                    for sample in group.samples
                ],
            )
            for group in batch.groups
        ],
    )


def example(*, routed: bool = False, big: bool = False) -> RolloutBatch:
    def sample(reward: float | None, *token_ids: int) -> RolloutSample:
        experts = np.arange(2 * (1 + len(token_ids)), dtype=np.int32).reshape(-1, 1, 2) if routed else None
        logprobs = tuple(-0.5 for _ in token_ids)
        return RolloutSample(token_ids, logprobs, "stop", "Zoë", reward, "" if reward is not None else "why", experts)

    groups = (
        RolloutGroup(4, (1, 2), (sample(1.0, 5, 6, 70_000 if big else 7), sample(None, 8))),
        RolloutGroup(9, (3, 4), (sample(0.0, 9), sample(0.5, 10, 11))),
    )
    numerics = common_pb2.Numerics(base_digest="sha256:base", dtype="float32")
    return RolloutBatch(
        "tenants/acme/runs/r1", 2, "tenants/acme/policies/p/revisions/1", "sha256:c", numerics, 1.0, groups
    )


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=batches())
def test_a_batch_comes_back_as_it_was(tmp_path: Path, batch: RolloutBatch) -> None:
    path = tmp_path / "batch"
    first = write_batch(batch, path)
    back = read_batch(path, key="k")
    assert plain(back) == plain(batch)
    assert write_batch(back, path).digest == first.digest


@pytest.mark.parametrize(("big", "dtype"), [(False, "U16"), (True, "I32")])
def test_tensors_take_the_smallest_type(tmp_path: Path, big: bool, dtype: str) -> None:
    write_batch(example(routed=True, big=big), tmp_path / "batch")
    header = TensorFile(tmp_path / "batch").header
    assert header.tensors["token_ids"].dtype == dtype
    assert header.tensors["routed_experts"].dtype == "U8"
    assert header.tensors["logprobs"].shape == (7,)
    document = json.loads(header.metadata[METADATA_KEY])
    assert document["lines"] == [4, 9]
    assert document["errors"] == {"1": "why"}


def test_figures_of_a_batch() -> None:
    batch = example()
    assert (batch.num_samples, batch.num_tokens, batch.num_unscored) == (4, 7, 1)
    assert batch.reward_mean == pytest.approx(0.5)
    assert batch.reward_std == pytest.approx((0.5 / 3) ** 0.5)
    assert batch.entropy == pytest.approx(0.5)
    empty = RolloutBatch("r", 1, "v", "d", common_pb2.Numerics(), 1.0, (RolloutGroup(1, (1,), ()),))
    assert (empty.reward_mean, empty.reward_std, empty.entropy) == (0.0, 0.0, 0.0)


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    aborted = RolloutSample((1,), (0.0,), "abort", "", 0.0, "")
    group = RolloutGroup(1, (1,), (aborted,))
    with pytest.raises(InvalidArgument, match="ended by 'abort'"):
        write_batch(RolloutBatch("r", 1, "v", "d", common_pb2.Numerics(), 1.0, (group,)), tmp_path / "b")
    mixed = RolloutGroup(1, (1, 2), (*example(routed=True).groups[0].samples, *example().groups[0].samples))
    with pytest.raises(InvalidArgument, match="2 of 4 samples have routed experts"):
        write_batch(RolloutBatch("r", 1, "v", "d", common_pb2.Numerics(), 1.0, (mixed,)), tmp_path / "b")
    for expert in (-1, 1 << 16):
        routed = RolloutSample((1,), (0.0,), "stop", "", 0.0, "", np.array([[[expert]]], dtype=np.int32))
        group = RolloutGroup(1, (1,), (routed,))
        with pytest.raises(InvalidArgument, match=r"routed experts are .*: a batch holds those from 0 to 65535"):
            write_batch(RolloutBatch("r", 1, "v", "d", common_pb2.Numerics(), 1.0, (group,)), tmp_path / "b")


def damaged(tmp_path: Path, tensors: dict[str, Any], document: dict[str, Any] | str) -> Path:
    """The example's file with some tensors (None: left out) and metadata replaced."""
    path = tmp_path / "batch"
    write_batch(example(routed=True), path)
    file = TensorFile(path)
    kept: dict[str, Any] = {name: file.source(name) for name in file.header.tensors} | tensors
    text = document
    if isinstance(document, dict):
        text = json.dumps(json.loads(file.header.metadata[METADATA_KEY]) | document)
    target = tmp_path / "damaged"
    write_safetensors(
        target, {name: value for name, value in kept.items() if value is not None}, {METADATA_KEY: str(text)}
    )
    return target


@pytest.mark.parametrize(
    ("tensors", "document", "problem"),
    [
        ({"logprobs": None}, {}, "'logprobs' is absent"),
        ({"logprobs": np.zeros(7)}, {}, "'logprobs' is F64"),
        ({"logprobs": np.zeros((7, 1), np.float32)}, {}, "expected F32 of 1 dimensions"),
        ({"logprobs": np.zeros(6, np.float32)}, {}, "pieces of 'logprobs' do not cover its 6 elements"),
        ({"token_ends": np.array([3, 4, 5, 8])}, {}, "pieces of 'token_ids' do not cover"),
        ({"token_ends": np.array([4, 3, 5, 7])}, {}, "pieces of 'token_ids' do not cover"),
        ({"token_ends": np.array([-1, 4, 5, 7])}, {}, "pieces of 'token_ids' do not cover"),
        ({"sample_ends": np.array([2, 5])}, {}, "pieces of 'sample_ends' do not cover"),
        ({"sample_ends": np.array([4])}, {}, "not one group of samples for each prompt"),
        ({"rewards": np.zeros(3, np.float32)}, {}, "disagree on the number of samples: [3, 4]"),
        ({"rewards": np.array([1, np.nan, 0, 0], np.float32)}, {}, "a reward is not finite"),
        ({"finish_reasons": np.array([0, 1, 2, 0], np.uint8)}, {}, "finish reason is unknown"),
        ({"text": np.full(16, 0xFF, np.uint8)}, {}, "not UTF-8"),
        ({"routed_experts": np.zeros((3, 1, 2), np.uint8)}, {}, "pieces of 'routed_experts'"),
        ({"routed_experts": np.zeros((11, 2), np.uint8)}, {}, "of 3 dimensions"),
        ({}, {"lines": [4]}, "not one line number for each prompt"),
        ({}, {"lines": [4, "9"]}, "line numbers are no whole numbers"),
        ({}, {"run": 7}, "has no good run"),
        ({}, {"numerics": {"dtype": "float32"}}, "numerics are incomplete"),
        ({}, {"errors": {"0": 1}}, "numerics or errors are no texts"),
        ({}, "{", "is unreadable"),
        ({}, "[]", "is unreadable"),
    ],
)
def test_damage_is_found(tmp_path: Path, tensors: dict[str, Any], document: Any, problem: str) -> None:
    path = damaged(tmp_path, tensors, document)
    with pytest.raises(BlobCorrupt) as caught:
        read_batch(path, key="tenants/acme/rollouts/k")
    assert problem in caught.value.message
    assert caught.value.metadata == {"object_key": "tenants/acme/rollouts/k"}


def test_another_format_is_not_damage(tmp_path: Path) -> None:
    with pytest.raises(WrongState, match="rollout format 2"):
        read_batch(damaged(tmp_path, {}, {"format": 2}), key="k")


def test_no_byte_can_be_cut_or_added(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    write_batch(example(), path)
    whole = path.read_bytes()
    (header_bytes,) = struct.unpack("<Q", whole[:8])
    for broken in (whole[:-1], whole + b"\0", whole[: header_bytes // 2], b"", b"\x80\x04."):
        path.write_bytes(broken)
        with pytest.raises(BlobCorrupt, match="is not the rollout batch it should be"):
            read_batch(path, key="k")


def test_a_source_of_another_kind_is_read_too(tmp_path: Path) -> None:
    path = damaged(tmp_path, {"scored": TensorSource.of(np.array([True, True, False, False]))}, {})
    assert [sample.reward for sample in read_batch(path, key="k").samples()] == [1.0, 0.0, None, None]
