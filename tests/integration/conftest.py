"""One installation over a tiny base for all integration tests that need everything, and an exporter's house."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from support.etcd import running_etcd
from support.exporter_house import House, exporter_house
from support.stack import Stack, running_stack
from support.tiny_models import make_tiny_llama
from support.weed import WeedServer, running_weed


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Everything up, as ``mint up --metrics`` makes it."""
    base = make_tiny_llama(tmp_path_factory.mktemp("base") / "tiny-llama", seed=0)
    with running_stack(tmp_path_factory.mktemp("stack"), base, "--metrics") as running:
        yield running


@pytest.fixture(scope="session")
def house_weed() -> Iterator[WeedServer]:
    """The object store of ``house``."""
    with running_weed() as server:
        yield server


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def house(house_weed: WeedServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    """An exporter over a catalog, etcd and a store. Its processes take seconds to start: tests share them, and their
    event loop (``loop_scope="session"``), and leave them running."""
    with running_etcd() as etcd:
        async with exporter_house(tmp_path_factory.mktemp("house"), etcd, house_weed) as made:
            yield made


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder for one test's files."""
    return tmp_path
