"""One tiny random Llama for the whole test session, and sessions on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mint_trainer.base  # noqa: F401  # makes transformers importable everywhere, so before tiny_models

# isort: split
import pytest
import torch

from mint_trainer.adapters import ResidentAdapters
from mint_trainer.base import ResidentBase
from mint_trainer.batch import BatchLimits, Datum
from mint_trainer.recipe import AdapterRecipe
from mint_trainer.session import TrainingSession
from support.tiny_models import make_tiny_llama

TARGETS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    num_threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("trainer-base") / "llama")


@pytest.fixture(scope="module")
def base(base_folder: Path) -> ResidentBase:
    return ResidentBase.load(base_folder, model_id="tiny")


@pytest.fixture(scope="module")
def adapters(base: ResidentBase) -> ResidentAdapters:
    return ResidentAdapters(base)


@pytest.fixture
def limits(base: ResidentBase) -> BatchLimits:
    return BatchLimits(base.vocab_size, max_datum_tokens=128, max_step_tokens=2048, micro_batch_tokens=96)


@pytest.fixture
def recipe() -> AdapterRecipe:
    return AdapterRecipe(rank=4, alpha=8.0, target_modules=TARGETS, init_seed=1)


@pytest.fixture
def new_session(
    base: ResidentBase, adapters: ResidentAdapters, limits: BatchLimits
) -> Callable[[AdapterRecipe], TrainingSession]:
    return lambda recipe: TrainingSession(base, adapters, recipe, limits)


@pytest.fixture
def make_data(base: ResidentBase) -> Callable[..., list[Datum]]:
    """``make_data(seed, lengths)``: random sequences whose first third has weight 0."""

    def make(seed: int, lengths: tuple[int, ...] = (5, 17, 9)) -> list[Datum]:
        generator = torch.Generator().manual_seed(seed)
        data = []
        for length in lengths:
            ids = torch.randint(0, base.vocab_size, (length + 1,), generator=generator).tolist()
            weights = torch.rand(length, generator=generator)
            weights[: length // 3] = 0.0
            data.append(Datum(ids[:-1], ids[1:], weights.tolist()))
        return data

    return make
