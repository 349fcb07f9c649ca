"""The engine contract asked of the fake, so that what other unit tests rely on is what real engines do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mint_core.base_model import digest_of_folder
from mint_engine.adapter_folder import AdapterRules
from mint_engine.base_geometry import BaseGeometry
from mint_engine.host import EngineHost, adapter_checker
from support.engine_contract import EngineContract, Rig
from support.fake_engine import FAKE_LIMITS, FakeEngine, FakePrompts
from support.serving_adapters import ServingAdapter, make_serving_adapter
from support.tiny_models import make_tiny_llama

Files = tuple[Path, Path, list[ServingAdapter], ServingAdapter, ServingAdapter]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("engine")
    base, adapters = make_tiny_llama(folder / "base"), folder / "adapters"
    made = [make_serving_adapter(base, adapters, folder / "work", seed=seed, rank=2 + seed) for seed in range(4)]
    foreign = make_serving_adapter(base, adapters, folder / "work", seed=8, base_digest="sha256:" + "0" * 64)
    high = make_serving_adapter(base, adapters, folder / "work", seed=9, rank=9)
    return base, adapters, made, foreign, high


@pytest.fixture
async def rig(files: Files) -> AsyncIterator[Rig]:
    base, folder, adapters, foreign, high = files
    engine = FakeEngine()
    rules = AdapterRules(
        base_digest=digest_of_folder(base, use_cache=False).digest,
        geometry=BaseGeometry.from_folder(base),
        max_lora_rank=FAKE_LIMITS.max_lora_rank,
        target_modules=FAKE_LIMITS.target_modules,
    )
    host = EngineHost(engine, FakePrompts(), adapter_checker(folder, rules), call_timeout_s=5)
    yield Rig(host, adapters, foreign, high)
    await host.close()
    assert engine.num_running == 0
    assert {resident.digest for resident in host.residents()} == engine.loaded.keys()


class TestFakeEngine(EngineContract):
    pass
