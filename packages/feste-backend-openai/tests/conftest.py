"""What several tests of the backend share: a simulated provider for each module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from feste.testing import SimServer


@pytest.fixture(scope="module")
def shared() -> Iterator[SimServer]:
    """The provider, as the tests before have left it."""
    with SimServer("feste.backend.openai.testing:OpenAIWire") as server:
        yield server


@pytest.fixture
def server(shared: SimServer) -> SimServer:
    """The provider, as if it had just started."""
    shared.reset()
    return shared
