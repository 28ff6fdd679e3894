"""A call falls back from one plugin's backend to another's, with their SDKs, over real sockets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import feste
from feste import errors
from feste.backend.cohere import ChatParams as CohereChatParams
from feste.backend.cohere import Cohere
from feste.backend.openai import ChatParams, OpenAI
from feste.testing import Fault, SimServer

WIRES = ["feste.backend.openai.testing:OpenAIWire", "feste.backend.cohere.testing:CohereWire"]


@pytest.fixture
def server() -> Iterator[SimServer]:
    with SimServer(WIRES) as made:
        yield made


@pytest.fixture
def backends(server: SimServer) -> tuple[OpenAI, Cohere]:
    return (
        OpenAI("gpt-sim", base_url=f"{server.url}/v1", api_key="sk-one"),
        Cohere("command-sim", base_url=server.url, api_key="co-two"),
    )


@pytest.mark.parametrize("status", [401, 402, 404])
def test_another_provider_answers(
    server: SimServer, backends: tuple[OpenAI, Cohere], status: int
) -> None:
    """Each is asked in its own form; the report tells who answered."""
    first, second = backends
    server.add(Fault(status=status, times=2))  # the second time it is sure
    first.or_else(second).chat("Hi", ChatParams(max_tokens=9)).compute()
    report = feste.last_report()
    assert report is not None
    rows = {(row.operation, row.model): (row.calls, row.failed) for row in report.operations}
    assert rows == {("openai.chat", "gpt-sim"): (0, 2), ("cohere.chat", "command-sim"): (1, 0)}
    assert [request.body["max_tokens"] for request in server.requests()] == [9, 9, 9]


def test_it_works_in_both_directions_and_with_tuples(
    server: SimServer, backends: tuple[OpenAI, Cohere]
) -> None:
    """Parameters that have another name there are given for each."""
    first, second = backends
    with pytest.raises(errors.ConfigError, match=r"openai.ChatParams\(...\), cohere.ChatParams"):
        first.or_else(second).chat("Hi", ChatParams(max_completion_tokens=9))
    assert server.requests() == []
    server.add(Fault(status=401, times=2))
    each = (CohereChatParams(k=3), ChatParams(max_completion_tokens=9))
    second.or_else(first).chat("Hi", each).compute()
    bodies = [request.body for request in server.requests()]
    assert bodies[0]["k"] == 3 and bodies[2]["max_completion_tokens"] == 9


def test_a_wrong_request_is_not_sent_elsewhere(
    server: SimServer, backends: tuple[OpenAI, Cohere]
) -> None:
    """It belongs to the program."""
    server.add(Fault(status=400))
    with pytest.raises(errors.RunFailed):
        backends[0].or_else(backends[1]).chat("Hi").compute()
    assert len(server.requests()) == 1
