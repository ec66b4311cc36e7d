from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving import RunningServer, running_server


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running_server() as server:
        yield server


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningServer]:
    """One server for tests that leave it as it was."""
    with running_server() as server:
        yield server
