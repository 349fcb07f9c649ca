"""What the plugin decides without SGLang: versions, entry points, prefetch and guard."""

from __future__ import annotations

import importlib.metadata
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from mint_core.errors import FailedPrecondition
from mint_engine.sglang_plugin import hooks, import_gaps, launch, quiet_loads, version
from mint_engine.sglang_plugin.residency_guard import before_prepare_lora_batch
from mint_engine.sglang_plugin.slot_prefetch import INTO_SLOT, after_load_lora_adapter


def test_another_sglang_is_refused_by_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "version", lambda _: "0.5.24")
    with pytest.raises(FailedPrecondition, match=r"fits sglang 0\.5\.23 and found 0\.5\.24"):
        version.check_sglang_version()


def test_absent_sglang_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(version, "version", absent)
    with pytest.raises(FailedPrecondition, match="not installed"):
        version.check_sglang_version()


def test_project_declares_the_entry_points() -> None:
    launch.check_entry_points()


def test_missing_entry_point_and_exclusion_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    with pytest.raises(FailedPrecondition, match="leaves out mint_cpu"):
        launch.check_entry_points()
    monkeypatch.delenv("SGLANG_PLUGINS")
    monkeypatch.setattr(launch, "entry_points", lambda group: ())
    with pytest.raises(FailedPrecondition, match="install MinT"):
        launch.check_entry_points()


def test_failed_hook_ends_a_scheduler_process_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise FailedPrecondition("a hook is missing")

    monkeypatch.setitem(sys.modules, "sglang.srt.managers.scheduler", SimpleNamespace())
    monkeypatch.setattr(hooks, "apply_hooks", fail)
    with pytest.raises(SystemExit) as raised:
        hooks.register()
    assert raised.value.code == 78
    assert capsys.readouterr().err == "mint-engine: a hook is missing\n"


def test_processes_that_do_not_schedule_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sglang.srt.managers.scheduler", raising=False)
    monkeypatch.setattr(hooks, "apply_hooks", lambda: pytest.fail("hooks were applied"))
    hooks.register()


def test_every_hook_has_its_own_target() -> None:
    assert len({hook.target for hook in hooks.HOOKS}) == len(hooks.HOOKS)
    assert all(hook.target.startswith("sglang.srt.") for hook in hooks.HOOKS)


def test_missing_kernel_says_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sgl_kernel", raising=False)
    monkeypatch.setattr(import_gaps.importlib.util, "find_spec", lambda _: None)
    import_gaps.provide_sgl_kernel()
    module = sys.modules.pop("sgl_kernel")
    with pytest.raises(NotImplementedError, match=r"sgl_kernel\.rmsnorm"):
        module.rmsnorm()
    assert not hasattr(module, "__wrapped__")


def test_guard_stops_a_batch_whose_adapter_has_no_slot() -> None:
    manager = SimpleNamespace(
        memory_pool=SimpleNamespace(uid_to_buffer_id={"a": 0, None: 1}),
        lora_refs={"b": SimpleNamespace(lora_name="sha256:b")},
        attn_dp_enabled=False,
    )
    before_prepare_lora_batch(manager, SimpleNamespace(lora_ids=["a", None]))
    with pytest.raises(RuntimeError, match="sha256:b"):
        before_prepare_lora_batch(manager, SimpleNamespace(lora_ids=["a", "b"]))


class Manager:
    """As much of SGLang's LoRA manager as a prefetch sees: 3 slots."""

    enable_lora_overlap_loading = attn_dp_enabled = False

    def __init__(self, *slots: str | None) -> None:
        self.lora_refs = {uid: SimpleNamespace(lora_name=uid, lora_path=uid) for uid in "abcn"}
        self.loras: dict[str, object] = dict.fromkeys("abcn")
        self.memory_pool = SimpleNamespace(
            max_loras_per_batch=3,
            uid_to_buffer_id={uid: place for place, uid in enumerate(slots)},
            eviction_policy=SimpleNamespace(remove=lambda uid: None),
        )
        self.fetched: list[tuple[set[str | None], set[str | None]]] = []
        self.unloaded: list[str] = []
        self.misfit = False

    def validate_lora_batch(self, ids: set[str | None]) -> bool:
        return len(ids) <= 3

    def fetch_new_loras(self, new: set[str | None], running: set[str | None]) -> None:
        if self.misfit:
            raise AssertionError("buffer shape does not match")
        self.fetched.append((new, running))

    def unload_lora_adapter(self, ref: Any) -> None:
        self.unloaded.append(ref.lora_name)


def prefetch(manager: Manager, *, asked: bool = False, running: tuple[str | None, ...] = ()) -> Any:
    batch = SimpleNamespace(reqs=[SimpleNamespace(lora_id=uid) for uid in running])
    scheduler = SimpleNamespace(
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager)),
        running_batch=batch,
        last_batch=None,
        chunked_req=None,
    )
    request = SimpleNamespace(lora_id="n", lora_name="n", rid=INTO_SLOT if asked else None)
    result = SimpleNamespace(success=True, error_message=None, loaded_adapters={})
    return after_load_lora_adapter(result, scheduler, request)


@pytest.mark.parametrize(
    ("slots", "asked", "running", "fetched"),
    [
        ((), False, (), True),
        ((None, "a"), False, (), True),
        (("a", "b"), False, (), False),
        ((None, "a", "b"), False, (), False),
        ((None, "a", "b"), True, (), True),
        ((None, "a", "b"), True, (None, "a"), True),
        ((None, "a", "b"), True, (None, "a", "b"), False),
        (("a", "b", "c"), True, ("a", "gone"), True),
    ],
)
def test_slot_is_filled_when_free_or_asked_for_and_never_taken_from_a_running_batch(
    slots: tuple[str | None, ...], asked: bool, running: tuple[str | None, ...], fetched: bool
) -> None:
    manager = Manager(*slots)
    assert prefetch(manager, asked=asked, running=running).success
    assert bool(manager.fetched) == fetched
    if fetched:
        assert manager.fetched == [({"n"}, set(running) - {"gone"})]


def test_misfit_undoes_the_load() -> None:
    manager = Manager()
    manager.misfit = True
    result = prefetch(manager)
    assert not result.success
    assert "does not fit" in result.error_message
    assert manager.unloaded == ["n"]


def test_loads_and_unloads_skip_the_lines_and_keep_the_results() -> None:
    class Unnamed:
        def __str__(self) -> str:
            pytest.fail("the reference was written out for a log")

    manager = SimpleNamespace(
        _load_lora_adapter=lambda ref: ("loaded", ref), _unload_lora_adapter=lambda ref: ("unloaded", ref)
    )
    ref = Unnamed()
    assert quiet_loads.load_lora_adapter(manager, ref) == ("loaded", ref)
    assert quiet_loads.unload_lora_adapter(manager, ref) == ("unloaded", ref)
