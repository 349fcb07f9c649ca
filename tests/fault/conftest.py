"""Installations over a tiny base for the faults; each test leaves them healthy."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support import fault_scorers
from support.conductor import Conductor, armed, conducting
from support.loader_node import Materials, make_materials
from support.scorer_packages import write_scorer_package
from support.stack import Stack, running_stack
from support.tiny_models import make_tiny_llama
from support.weed import WeedServer, running_weed

LEASE_TTL_S = 5
POINTS = (
    *(f"runs.{point}" for point in ("sampling", "sampled", "scored", "persisted", "stepped", "saved", "committed")),
    *(f"runs.{point}" for point in ("exported", "promoted", "loaded")),
    *(f"trainer.{point}" for point in ("step_computed", "optimizer_stored")),
    *(f"exporter.{point}" for point in ("packed", "uploaded", "published")),
    *(f"catalog.{point}" for point in ("publish.before", "publish.after", "alias.before", "alias.after")),
    *(f"loader.{point}" for point in ("loading", "loaded")),
    *(f"engine.{point}" for point in ("loaded", "generating")),
)
"""Every process of the armed installation stops at these, and goes on unless a test holds it."""


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base") / "tiny-llama", seed=0)


@pytest.fixture(scope="session")
def stack(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Everything up, as ``mint up`` makes it."""
    with running_stack(tmp_path_factory.mktemp("stack"), base) as running:
        yield running


@pytest.fixture(scope="session")
def armed_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """State directory of the armed installation."""
    return tmp_path_factory.mktemp("armed")


@pytest.fixture(scope="session")
def permanent_conductor(armed_state: Path) -> Iterator[Conductor]:
    """Of the armed installation, from before its start to after its end: whoever stops must go on."""
    with conducting(armed_state / "logs") as conductor:
        yield conductor


@pytest.fixture
def conductor(permanent_conductor: Conductor) -> Iterator[Conductor]:
    """For one test, which may fail and leave somebody standing."""
    yield permanent_conductor
    permanent_conductor.release()


@pytest.fixture(scope="session")
def armed_stack(
    base: Path, armed_state: Path, permanent_conductor: Conductor, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """Everything up with all failpoints of a GRPO step armed, leases that end soon and a scorer that misbehaves."""
    scorers = tmp_path_factory.mktemp("scorers")
    write_scorer_package(
        scorers,
        package="mint_fault_scorers",
        source=Path(fault_scorers.__file__).read_text(),
        entry_points={fault_scorers.SCORER: "mint_fault_scorers:make_fault_scorer"},
    )
    environ = armed(POINTS) | {
        "PYTHONPATH": str(scorers),
        "MINT_RUNS_LEASE_TTL_S": str(LEASE_TTL_S),
        "MINT_RUNS_LEASE_MARGIN_S": "1",
        # Deaths of the worker are what is wanted here; each costs its run a claim, and must not cost it minutes.
        "MINT_CATALOG_MAX_RUN_ATTEMPTS": "100",
        "MINT_CATALOG_RUN_RETRY_BACKOFF_MAX_S": "1",
    }
    with running_stack(armed_state, base, environ=environ) as running:
        yield running


@pytest.fixture(scope="session")
def loader_weed() -> Iterator[WeedServer]:
    """An object store for loaders without the rest of an installation."""
    with running_weed() as server:
        yield server


@pytest.fixture(scope="session")
def loader_materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    return make_materials(tmp_path_factory.mktemp("materials"), num_adapters=6)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder for one test's files."""
    return tmp_path
