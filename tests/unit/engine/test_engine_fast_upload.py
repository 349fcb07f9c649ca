"""The way of a packed adapter into a slot, against numbers put together one by one. That SGLang itself would write the
same is asked of the running engine, at every start and in the integration tests."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mint_core.errors import FailedPrecondition, InvalidArgument
from mint_engine.sglang_plugin import fast_upload, upload_check
from mint_engine.sglang_plugin.fast_upload import (
    SlotWriter,
    around_clear_slot,
    around_load_lora_weights,
    around_load_to_slot,
    plan_of,
    set_fast_upload,
)
from mint_engine.sglang_plugin.slot_map import Bank, SlotMap, SlotPlan

NUM_SLOTS, RANK, EXPERTS = 3, 4, 2


def bank(name: str, parts: tuple[str, ...], outputs: tuple[int, ...], inputs: int, *, experts: bool = False) -> Bank:
    front = (NUM_SLOTS, EXPERTS) if experts else (NUM_SLOTS,)
    offsets = tuple(sum(outputs[:place]) for place in range(len(outputs) + 1))
    lora_a = torch.zeros(*front, len(parts) * RANK, inputs)
    return Bank(name, 0, lora_a, torch.zeros(*front, offsets[-1], RANK), parts, offsets)


@pytest.fixture
def slot_map() -> SlotMap:
    attention, experts = "model.layers.0.self_attn", "model.layers.1.block_sparse_moe.experts"
    return SlotMap(
        [
            bank(f"{attention}.qkv_proj", ("q_proj", "k_proj", "v_proj"), (6, 4, 4), 8),
            bank(f"{attention}.o_proj", ("o_proj",), (8,), 6),
            bank(f"{attention}.fused_qkv_a_proj_with_mqa", ("q_a_proj", "kv_a_proj_with_mqa"), (3, 5), 8),
            bank("model.layers.0.mlp.gate_up_proj", ("gate_proj", "up_proj"), (6, 6), 8),
            bank(f"{experts}.gate_up_proj", ("gate_proj", "up_proj"), (6, 6), 8, experts=True),
            bank(f"{experts}.down_proj", ("down_proj",), (8,), 6, experts=True),
        ]
    )


@pytest.fixture
def writer(slot_map: SlotMap) -> SlotWriter:
    return SlotWriter(slot_map, num_slots=NUM_SLOTS, max_rank=RANK, used_slots=frozenset())


def weights_of(
    slot_map: SlotMap, rank: int, *, seed: int = 0, leave_out: frozenset[str] = frozenset()
) -> dict[str, Tensor]:
    """A whole adapter without the parts ``leave_out``."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for each in slot_map.banks:
        for place, part in enumerate(each.parts):
            front = (EXPERTS,) if each.has_experts else ()
            outputs = each.offsets[place + 1] - each.offsets[place]
            if part not in leave_out:
                name = f"base_model.model.{each.module_of(part)}"
                shape_a, shape_b = (*front, rank, each.lora_a.shape[-1]), (*front, outputs, rank)
                found[f"{name}.lora_A.weight"] = torch.randn(shape_a, generator=generator)
                found[f"{name}.lora_B.weight"] = torch.randn(shape_b, generator=generator)
    return found


def planned(slot_map: SlotMap, weights: dict[str, Tensor], rank: int, scaling: float = 1.0) -> SlotPlan:
    plan = slot_map.plan(weights, rank=rank, scaling=scaling)
    assert isinstance(plan, SlotPlan), plan
    return plan


def contents(each: Bank, weights: dict[str, Tensor], rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """What a slot of a bank holds, row by row, as SGLang's kernels look at it: [E, rows, in] and [E, out, RANK]."""
    num_experts = EXPERTS if each.has_experts else 1
    lora_a = torch.zeros(num_experts, len(each.parts) * RANK, each.lora_a.shape[-1])
    lora_b = torch.zeros(num_experts, each.offsets[-1], RANK)
    for place, part in enumerate(each.parts):
        name = f"base_model.model.{each.module_of(part)}"
        if f"{name}.lora_A.weight" not in weights:
            continue
        for expert in range(num_experts):
            a, b = weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]
            if each.has_experts:
                a, b = a[expert if len(a) > 1 else 0], b[expert if len(b) > 1 else 0] * scaling
            row = place * (RANK if each.has_experts else rank)
            lora_a[expert, row : row + rank] = a
            lora_b[expert, each.offsets[place] : each.offsets[place + 1], :rank] = b
    return lora_a, lora_b


def assert_holds(slot_map: SlotMap, slot: int, weights: dict[str, Tensor], rank: int, scaling: float) -> None:
    for each in slot_map.banks:
        lora_a, lora_b = contents(each, weights, rank, scaling)
        assert torch.equal(each.lora_a[slot], lora_a.view_as(each.lora_a[slot])), each.name
        assert torch.equal(each.lora_b[slot], lora_b.view_as(each.lora_b[slot])), each.name


@pytest.mark.parametrize("seed", range(4))
def test_slot_is_exactly_its_adapter_through_evictions_of_mixed_ranks(
    slot_map: SlotMap, writer: SlotWriter, seed: int
) -> None:
    draw = random.Random(seed)
    inside: dict[int, tuple[dict[str, Tensor], int, float]] = {}
    for turn in range(17):
        slot, rank, scaling = draw.randrange(NUM_SLOTS), draw.randint(1, RANK), draw.choice((1.0, 0.5, 1.7))
        missing = draw.choice(([], ["k_proj"], ["up_proj"], ["o_proj", "down_proj"], ["q_proj", "k_proj", "v_proj"]))
        weights = weights_of(slot_map, rank, seed=turn, leave_out=frozenset(missing))
        writer.write(slot, planned(slot_map, weights, rank, scaling))
        inside[slot] = (weights, rank, scaling)
        if draw.random() < 0.2:
            writer.clear(slot)
            inside[slot] = ({}, 1, 1.0)
        for other, content in inside.items():
            assert_holds(slot_map, other, *content)


def test_matrix_of_all_experts_is_given_to_each(slot_map: SlotMap, writer: SlotWriter) -> None:
    weights = weights_of(slot_map, 3)
    for name in weights:
        if ".experts." in name and ("down_proj.lora_B" in name or ("down_proj" not in name and "lora_A" in name)):
            weights[name] = weights[name][:1].clone()
    writer.write(1, planned(slot_map, weights, 3, 0.5))
    assert_holds(slot_map, 1, weights, 3, 0.5)


def test_narrow_types_are_scaled_in_their_own_type_and_then_widened(slot_map: SlotMap, writer: SlotWriter) -> None:
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in weights_of(slot_map, 2).items()}
    writer.write(0, planned(slot_map, weights, 2, 1.7))
    name = "base_model.model.model.layers.1.mlp.experts.down_proj.lora_B.weight"
    assert torch.equal(slot_map.banks[-1].lora_b[0][..., :2], (weights[name] * 1.7).float())


@pytest.mark.parametrize(
    ("part", "side", "shape"),
    [
        ("layers.0.self_attn.q_proj", "A", (3, 8)),
        ("layers.0.self_attn.q_proj", "B", (7, 2)),
        ("layers.0.self_attn.o_proj", "A", (2, 7)),
        ("layers.0.self_attn.o_proj", "A", (1, 2, 6)),
        ("layers.1.mlp.experts.up_proj", "A", (3, 2, 8)),
        ("layers.1.mlp.experts.up_proj", "B", (2, 2, 6)),
        ("layers.1.mlp.experts.down_proj", "B", (8, 2)),
    ],
)
def test_misfit_is_named_before_a_slot_is_touched(
    slot_map: SlotMap, part: str, side: str, shape: tuple[int, ...]
) -> None:
    weights = weights_of(slot_map, 2)
    weights[f"base_model.model.model.{part}.lora_{side}.weight"] = torch.zeros(shape)
    with pytest.raises(InvalidArgument, match=rf"{part}.*lora_{side}.*{shape[0]}"):
        slot_map.plan(weights, rank=2, scaling=1.0)


def test_rank_above_the_slots_and_half_a_module_are_refused(slot_map: SlotMap) -> None:
    with pytest.raises(InvalidArgument, match="rank of at most 4"):
        slot_map.plan(weights_of(slot_map, 5), rank=5, scaling=1.0)
    weights = weights_of(slot_map, 2)
    del weights["base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight"]
    with pytest.raises(InvalidArgument, match="o_proj has one of lora_A and lora_B only"):
        slot_map.plan(weights, rank=2, scaling=1.0)


def test_adapters_of_one_layout_are_arranged_once_and_hold_their_own_numbers(
    slot_map: SlotMap, writer: SlotWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    arranged: list[int] = []
    arrange = slot_map._arrange
    monkeypatch.setattr(slot_map, "_arrange", lambda weights, rank: (arranged.append(rank), arrange(weights, rank))[1])
    for turn in range(3):
        weights = weights_of(slot_map, 2, seed=turn, leave_out=frozenset({"k_proj"}))
        plan = slot_map.plan(weights, rank=2, scaling=0.5, layout="one")
        assert isinstance(plan, SlotPlan), plan
        writer.write(0, plan)
        assert_holds(slot_map, 0, weights, 2, 0.5)
    assert arranged == [2]
    # The rank comes from elsewhere: with another one the same layout does not fit.
    with pytest.raises(InvalidArgument, match="need"):
        slot_map.plan(weights, rank=3, scaling=0.5, layout="one")


def test_layouts_that_were_refused_or_forgotten_are_looked_at_again(slot_map: SlotMap) -> None:
    strange = {**weights_of(slot_map, 2), "lm_head.lora_A.weight": torch.zeros(2, 6)}
    for _ in range(2):
        assert "lm_head" in str(slot_map.plan(strange, rank=2, scaling=1.0, layout="strange"))
    weights = weights_of(slot_map, 2)
    for layout in range(40):
        assert isinstance(slot_map.plan(weights, rank=2, scaling=1.0, layout=layout), SlotPlan)


def test_what_the_map_does_not_know_is_left_to_sglang(slot_map: SlotMap) -> None:
    weights = weights_of(slot_map, 2)
    for name in ("base_model.model.model.layers.0.mlp.down_proj.lora_A.weight", "lm_head.lora_A.weight"):
        assert name in str(slot_map.plan({**weights, name: torch.zeros(2, 6)}, rank=2, scaling=1.0))
    assert "lacks ['v_proj']" in str(
        slot_map.plan(weights_of(slot_map, 2, leave_out=frozenset({"v_proj"})), rank=2, scaling=1.0)
    )


def test_broken_copy_leaves_a_slot_that_the_next_adapter_cleans(
    slot_map: SlotMap, writer: SlotWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the disk is gone")

    plan = planned(slot_map, weights_of(slot_map, RANK), RANK)
    with monkeypatch.context() as broken:
        broken.setattr(fast_upload, "_copy_scaled", fail)
        with pytest.raises(RuntimeError, match="disk"):
            writer.write(0, plan)
    weights = weights_of(slot_map, 1, seed=5)
    writer.write(0, planned(slot_map, weights, 1))
    assert_holds(slot_map, 0, weights, 1, 1.0)


def test_slot_that_sglang_filled_is_cleaned_wholly(slot_map: SlotMap, writer: SlotWriter) -> None:
    pool = SimpleNamespace(_mint_slot_writer=writer)

    def original(*_: Any) -> None:
        for each in slot_map.banks:
            each.lora_a[2].fill_(7)
            each.lora_b[2].fill_(7)

    around_load_to_slot(original, pool, "somebody", 2, SimpleNamespace(), [], None, None)
    assert slot_map.banks[0].lora_a[2].max() == 7
    weights = weights_of(slot_map, 1)
    adapter = SimpleNamespace(_mint_plan=planned(slot_map, weights, 1))
    around_load_to_slot(original, pool, "packed", 2, adapter, [], None, None)
    assert_holds(slot_map, 2, weights, 1, 1.0)
    around_load_to_slot(original, pool, "somebody", 2, SimpleNamespace(), [], None, None)
    around_clear_slot(lambda *_: pytest.fail("SGLang was asked"), pool, 2)
    assert_holds(slot_map, 2, {}, 1, 1.0)


def test_pool_without_a_map_is_left_to_sglang() -> None:
    asked: list[Any] = []
    around_clear_slot(lambda pool, slot: asked.append(slot), SimpleNamespace(), 1)
    around_load_to_slot(lambda *rest: asked.append(rest[2]), SimpleNamespace(), "uid", 2, SimpleNamespace(), [])
    assert asked == [1, 2]


def test_adapter_in_another_layout_and_a_switched_off_hook_take_sglangs_way(tmp_path: Path) -> None:
    manager = SimpleNamespace(memory_pool=SimpleNamespace(), loras={}, dtype=torch.float32)
    reference = SimpleNamespace(lora_path=str(tmp_path), lora_name="per expert", lora_id="1")
    loaded = SimpleNamespace(layers=[SimpleNamespace(weights={"q_proj.lora_B.weight": torch.ones(4, 2)})])
    asked: list[Any] = []

    def load(manager: Any, ref: Any) -> None:
        asked.append(ref)
        manager.loras[ref.lora_id] = loaded

    around_load_lora_weights(load, manager, reference)
    set_fast_upload(enabled=False)
    try:
        around_load_lora_weights(load, manager, reference)
    finally:
        set_fast_upload(enabled=True)
    assert asked == [reference, reference]
    assert manager.loras == {"1": loaded}
    assert plan_of(loaded) is None


@pytest.mark.parametrize("by_hook", [True, False])
def test_numbers_that_the_slots_cannot_hold_are_refused(tmp_path: Path, *, by_hook: bool) -> None:
    manager = SimpleNamespace(memory_pool=SimpleNamespace(), loras={}, dtype=torch.float16)
    reference = SimpleNamespace(lora_path=str(tmp_path), lora_name="large", lora_id="1")
    weights = {"base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight": torch.full((4, 2), -7e4)}
    if by_hook:
        save_file(weights, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text("{}")

    def load(manager: Any, ref: Any) -> None:
        assert not by_hook
        manager.loras[ref.lora_id] = SimpleNamespace(layers=[SimpleNamespace(weights=weights)])

    with pytest.raises(InvalidArgument, match=r"o_proj\.lora_B\.weight holds 70000.*float16.*65504"):
        around_load_lora_weights(load, manager, reference)
    assert manager.loras == {}


@pytest.mark.parametrize("rank", [1, 2])
def test_check_at_start_compares_bytes_whatever_lies_where(rank: int) -> None:
    rows = torch.randn(3, rank, 5)
    lora_b = rows.transpose(1, 2)[1]
    assert upload_check._same_bytes(lora_b, lora_b.clone(memory_format=torch.contiguous_format))
    assert not upload_check._same_bytes(lora_b, -lora_b)
    assert not upload_check._same_bytes(torch.zeros(5, rank), -torch.zeros(5, rank))


def test_check_at_start_accepts_the_upload_and_names_a_planted_bug(
    slot_map: SlotMap, writer: SlotWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reference(upload_check._Reference):
        """Filled by this test and not by SGLang, which is asked in the integration tests."""

        def upload(self, weights: dict[str, Tensor], rank: int, scaling: float) -> None:
            for each, copies in zip(self._banks, self._copies, strict=True):
                for copy, content in zip(copies, contents(each, weights, rank, scaling), strict=True):
                    copy.copy_(content.view_as(copy))

    empty = object()
    monkeypatch.setattr(upload_check, "_Reference", Reference)
    monkeypatch.setattr(upload_check, "_DTYPES", (torch.float32,))
    monkeypatch.setitem(sys.modules, "sglang.srt.lora.mem_pool", SimpleNamespace(EMPTY_SLOT=empty))
    pool = SimpleNamespace(
        _mint_slot_writer=writer,
        num_layer=1,
        A_buffer={each.name: [each.lora_a] for each in slot_map.banks},
        B_buffer={each.name: [each.lora_b] for each in slot_map.banks},
        buffer_id_to_uid=[None, empty, empty],
    )
    manager = SimpleNamespace(memory_pool=pool, lora_refs={}, loras={})
    scheduler = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager)))
    upload_check.check_upload(scheduler, ranks=[4, 1, 3, 2, 4], required=True)
    assert_holds(slot_map, 1, {}, 1, 1.0)
    with pytest.raises(FailedPrecondition, match=r"\['absent'\] are not loaded the fast way"):
        upload_check.check_upload(scheduler, ranks=[], mapped=["absent"])
    with monkeypatch.context() as broken:
        broken.setattr(fast_upload, "_copy_scaled", lambda target, source, scaling: target.copy_(source))
        with pytest.raises(FailedPrecondition, match=r"lora_B of .*\.experts\.(gate_up|down)_proj"):
            upload_check.check_upload(scheduler, ranks=[4, 1, 3, 2, 4], seed=1)
    with monkeypatch.context() as broken:
        # A module that the next adapter leaves alone keeps what was there.
        broken.setattr(fast_upload, "_zero", lambda *_: None)
        with pytest.raises(FailedPrecondition, match="differs from SGLang's own"):
            upload_check.check_upload(scheduler, ranks=[4, 1], seed=2)
    pool.buffer_id_to_uid = [None, "a", "b"]
    with pytest.raises(FailedPrecondition, match="needs an empty slot"):
        upload_check.check_upload(scheduler, ranks=[1])
    pool._mint_slot_writer = "several devices"
    upload_check.check_upload(scheduler, ranks=[1])
    with pytest.raises(FailedPrecondition, match="several devices"):
        upload_check.check_upload(scheduler, ranks=[1], required=True)
