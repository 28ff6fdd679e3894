"""A store with Dask: the client keeps the answers, and runs here and there replay each other's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import feste
from feste import context, errors
from feste.backend import Request, Response
from feste.prompt import Prompt
from feste.testing import FakeBackend

numbered = 0


class Counter(FakeBackend):
    """Answers every request with a new number, so that replayed and bought answers differ."""

    plugin = "counter"

    def answer(self, request: Request) -> Response:
        global numbered
        response = super().answer(request)
        answers = []
        for text in response.payload["answers"]:
            numbered += 1
            answers.append(f"#{numbered} {text}")
        return Response({"answers": answers}, response.usage)


@feste.task
def shout(text: str) -> str:
    return text.upper()


@feste.task(emits=True)
def agent(llm: Any, text: str) -> Any:
    return [llm.chat(f"{text}?") for _ in range(2)]


@feste.task(once=True)
def note(path: str, text: str) -> dict[str, Any]:
    with open(path, "a") as file:
        file.write(f"{os.getpid()} {text}\n")
    return {"noted": text, "by": os.getpid()}


def program(llm: Any, notes: Path) -> list[Any]:
    replies = [shout(llm.chat("Name a fruit.")) for _ in range(3)]
    merged = llm.complete(Prompt("Merge {{ all }}")(all=replies))
    return [replies, agent(llm, merged), note(str(notes), merged)]


@pytest.mark.parametrize("first", ["local", "dask"])
def test_runs_here_and_there_replay_each_other(
    first: str, client: Any, tmp_path: Path, restart: Callable[[], None]
) -> None:
    """Nothing is bought again, and the task with `once=True` ran once, in the client."""
    notes = tmp_path / "notes.txt"
    with context.set(store=tmp_path / "runs.db"):
        order = [client, "local"] if first == "dask" else ["local", client]
        values = feste.compute(program(Counter(), notes), scheduler=order[0])
        bought = numbered
        for scheduler in order[::-1]:
            restart()
            assert feste.compute(program(Counter(), notes), scheduler=scheduler) == values
            report = feste.last_report()
            assert report is not None and not report.requests
            assert report.states["replayed"] == 7
        with context.set(eager=True):
            restart()
            assert feste.compute(program(Counter(), notes)) == values
    assert numbered == bought
    assert notes.read_text().startswith(f"{os.getpid()} ") and notes.read_text().count("\n") == 1


def test_a_task_that_runs_once_stays_out_of_workers_of_plain_dask(
    client: Any, tmp_path: Path
) -> None:
    """Dask by itself would run it where no store is."""
    node = note(str(tmp_path / "notes.txt"), "x")
    with (
        context.set(store=tmp_path / "runs.db"),
        pytest.raises(errors.UngatedCall, match="once=True"),
    ):
        client.compute(node).result()
    assert not (tmp_path / "notes.txt").exists()
