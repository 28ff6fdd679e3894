"""Results one by one on a cluster: values of workers come here as they end."""

from __future__ import annotations

from typing import Any

import pytest

import feste
from feste.errors import RunFailed
from feste.testing import FakeBackend

# Tasks are made inside the tests: workers know this module by no name, so they get them by value.


def test_as_completed_map_and_stream(client: Any) -> None:
    """Values are values, not references, whether workers or the client made them."""

    @feste.task
    def double(x: Any) -> Any:
        return 2 * x

    llm = FakeBackend()
    nodes = [double(1), llm.chat("a"), double(double(3))]
    wanted = feste.compute(nodes, scheduler=client)[0]

    pairs = list(feste.as_completed(nodes, scheduler=client))
    mapped = list(feste.map(lambda i: [double(i)], range(9), window=3, scheduler=client))
    text = "".join(feste.stream(double(llm.chat("b")), scheduler=client))

    assert {id(node): value for node, value in pairs} == {
        id(node): value for node, value in zip(nodes, wanted, strict=True)
    }
    assert mapped == [[2 * i] for i in range(9)]
    assert text == 2 * text[: len(text) // 2]


def test_a_task_that_items_share_runs_once(client: Any, tmp_path: Any) -> None:
    """Its result stays on the workers while the map needs it."""
    path = tmp_path / "ran"

    @feste.task
    def load() -> str:
        with path.open("a") as file:
            file.write("x")
        return "table"

    @feste.task
    def look(table: str, i: int) -> Any:
        if i == 3:
            raise ValueError(i)
        return table, i

    table = load()
    got = []
    with pytest.raises(RunFailed, match="1 result failed"):
        for value in feste.map(lambda i: look(table, i), range(300), window=20, scheduler=client):
            got.append(value)

    assert got == [("table", i) for i in range(300) if i != 3]
    assert path.read_text() == "x"
