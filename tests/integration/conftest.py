"""One installation over a tiny base for all integration tests that need everything."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.stack import Stack, running_stack
from support.tiny_models import make_tiny_llama


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Everything up, as ``mint up`` makes it."""
    base = make_tiny_llama(tmp_path_factory.mktemp("base") / "tiny-llama", seed=0)
    with running_stack(tmp_path_factory.mktemp("stack"), base) as running:
        yield running


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder for one test's files."""
    return tmp_path
