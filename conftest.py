"""Makes the Python blocks of the documents into tests, and keeps tests on this machine.

The blocks of one document share one namespace and run in order; ``<!-- skip: next -->`` above a
block leaves it out. Clients of providers that a document makes without a ``base_url`` talk to a
simulated provider on loopback.
"""

import functools
import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sybil import Sybil
from sybil.integration.pytest import SybilItem
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

LOCAL = {"127.0.0.1", "::1", "localhost", "0.0.0.0"}  # noqa: S104 - to connect to, not to listen on

collect_ignore = ["noxfile.py", "docs/conf.py"]

WIRES = ["feste.backend.openai.testing:OpenAIWire", "feste.backend.cohere.testing:CohereWire"]


@functools.cache
def provider() -> Any:
    """The simulated provider that the documents talk to; it ends with this process."""
    from feste.testing import SimServer

    return SimServer([wire for wire in WIRES if installed(wire.partition(":")[0])]).start()


def installed(module: str) -> bool:
    """Tell whether a module is there: some sessions have one backend only, or none."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def enter_document(namespace: dict[str, Any]) -> None:
    """Point clients of providers to the simulated one."""
    if not any(installed(wire.partition(":")[0]) for wire in WIRES):
        return
    url = provider().url
    os.environ.update(OPENAI_BASE_URL=f"{url}/v1", CO_API_URL=url)


def leave_document(namespace: dict[str, Any]) -> None:
    """Forget the simulated provider again."""
    for name in ("OPENAI_BASE_URL", "CO_API_URL"):
        os.environ.pop(name, None)


_from_the_example = SybilItem._traceback_filter


def _traceback(self: SybilItem, excinfo: Any) -> Any:
    """Show any failure: Sybil expects all of them to come from the example's own code."""
    try:
        return _from_the_example(self, excinfo)
    except IndexError:  # a warning that was turned into an error after the example, for one
        return excinfo.traceback


SybilItem._traceback_filter = _traceback

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    path=str(Path(__file__).parent),
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
    setup=enter_document,
    teardown=leave_document,
).pytest()


def pytest_configure() -> None:
    """Close the network, and drop the keys and settings of whoever runs the tests."""
    for method in ("connect", "connect_ex"):
        setattr(socket.socket, method, _only_local(getattr(socket.socket, method)))
    with suppress(ImportError):  # some sessions do without it
        from hypothesis import settings

        # a busy machine fails no test; CHAOS=full is the long form
        examples = 2000 if os.environ.get("CHAOS") == "full" else 100
        # and a failure says how it is run again
        settings.register_profile("feste", deadline=None, max_examples=examples, print_blob=True)
        settings.load_profile("feste")
    os.environ["COLUMNS"] = "80"  # texts are as wide as the terminal
    for name in list(os.environ):
        if name.startswith(("FESTE_", "OPENAI_", "CO_API_")):
            del os.environ[name]


@pytest.fixture(autouse=True)
def stores_closed() -> Iterator[None]:
    """Close the stores that a test has opened."""
    yield
    _close_stores()


@pytest.fixture
def restart() -> Callable[[], None]:
    """Forget what a new process would not know: which draws were made, which answers taken."""
    from feste.testing import fresh_draws

    fresh_draws()
    return fresh_draws


def _close_stores() -> None:
    opened = sys.modules.get("feste.store.opened")
    if opened is not None:
        opened.forget_claims()


def _only_local(connect: Any) -> Any:
    def guarded(self: socket.socket, address: Any) -> Any:
        # A datagram socket is connected to ask for the machine's own address; nothing is sent.
        remote = isinstance(address, tuple) and address[0] not in LOCAL
        if remote and self.type != socket.SOCK_DGRAM:
            raise RuntimeError(f"a test connects to {address!r}; tests use servers on 127.0.0.1")
        return connect(self, address)

    return guarded
