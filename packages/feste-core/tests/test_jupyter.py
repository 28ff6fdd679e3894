"""A real Jupyter kernel: cells compute, ``await`` works at the top level, results show as HTML."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ipykernel")
client = pytest.importorskip("jupyter_client")

LONG = 60.0

SETUP = """
import asyncio, os, time
import feste
from feste.testing import FakeBackend

llm = FakeBackend(model="jupyter")

@feste.task
def increment(x):
    return x + 1
"""


class Notebook:
    """A notebook on a kernel of its own."""

    def __init__(self) -> None:
        self.manager = client.KernelManager(kernel_name="python3")
        self.manager.start_kernel()
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=LONG)

    def start(self, code: str) -> str:
        """Run a cell without waiting for it."""
        name: str = self.client.execute(code)
        return name

    def finish(self, name: str) -> dict[str, Any]:
        """Wait for a cell: its text, its results by media type, the name of its error."""
        told: dict[str, Any] = {"stdout": "", "stderr": "", "data": {}, "error": "", "shown": []}
        while True:
            message = self.client.get_iopub_msg(timeout=LONG)
            if message["parent_header"].get("msg_id") != name:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                told[content["name"]] += content["text"]
            elif kind in ("display_data", "update_display_data") and content.get("transient"):
                told["shown"].append((content["transient"]["display_id"], content["data"]))
            elif kind in ("execute_result", "display_data"):
                told["data"] |= content["data"]
            elif kind == "error":
                told["error"] = content["ename"]
                told["traceback"] = "\n".join(content["traceback"])
            elif kind == "status" and content["execution_state"] == "idle":
                return told

    def cell(self, code: str) -> dict[str, Any]:
        """Run a cell."""
        return self.finish(self.start(code))

    def value(self, code: str) -> Any:
        """Run a cell that ends with an expression; return what it shows."""
        told = self.cell(code)
        assert told["error"] == "", told
        return told["data"].get("text/plain")

    def wait_for(self, code: str) -> None:
        """Wait for the text that a running cell prints."""
        deadline = time.monotonic() + LONG
        while time.monotonic() < deadline:
            message = self.client.get_iopub_msg(timeout=LONG)
            if message["msg_type"] == "stream" and code in message["content"]["text"]:
                return
        raise AssertionError(f"{code!r} was not printed")

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def notebook() -> Iterator[Notebook]:
    book = Notebook()
    try:
        assert book.cell(SETUP)["error"] == ""
        yield book
    finally:
        book.close()


def test_cells_compute_one_after_the_other(notebook: Notebook) -> None:
    """Inside the kernel's running loop a blocking compute works, cell after cell."""
    assert notebook.value("feste.compute([increment(i) for i in range(3)])[0]") == "[1, 2, 3]"
    assert notebook.value("node = llm.chat('hello'); node.compute() == node.compute()") == "True"
    assert notebook.value("increment(node.compute().count(':')).compute()") == "2"
    assert notebook.value("feste.last_report().states") == "{'done': 1}"


def test_nodes_are_awaited_at_the_top_level(notebook: Notebook) -> None:
    """``await node`` and ``await feste.acompute(...)`` in a cell, after blocking ones and before."""
    assert notebook.value("await increment(1)") == "2"
    assert notebook.value("await feste.acompute(increment(1), [increment(2)])") == "(2, [3])"
    assert notebook.value("await asyncio.gather(*[increment(i) for i in range(5)])") == (
        "[1, 2, 3, 4, 5]"
    )
    assert notebook.value("increment(2).compute()") == "3"


def test_results_come_one_by_one_in_cells(notebook: Notebook) -> None:
    """Blocking in the kernel's running loop, and with ``async for`` at the top level."""
    streamed = "''.join(feste.stream(llm.chat('tell'))).count(':')"
    awaited = "got = []\nasync for value in feste.map(increment, range(5), window=2):\n    got.append(value)"

    assert notebook.value(streamed) == "1"
    assert notebook.value("sorted(v for _, v in feste.as_completed([increment(1), 7]))") == "[2, 7]"
    assert notebook.value(f"{awaited}\ngot") == "[1, 2, 3, 4, 5]"
    assert notebook.value("list(feste.map(increment, range(3)))") == "[1, 2, 3]"


def test_eager_mode_in_a_cell(notebook: Notebook) -> None:
    """A whole notebook may run eagerly."""
    code = "with feste.context.set(eager=True):\n    value = increment(llm.chat('x').count(':'))"

    assert notebook.value(f"{code}\nvalue") == "2"


def test_progress_does_not_break_the_notebook(notebook: Notebook) -> None:
    """With the bar asked for, the values come as ever, and nothing is printed as an error."""
    told = notebook.cell(
        "feste.compute([FakeBackend(model='jupyter', latency=0.3).chat('slow')], progress=True); 5"
    )

    assert told["error"] == "" and told["data"]["text/plain"] == "5"
    assert "Traceback" not in told["stderr"]
    assert notebook.cell("feste.compute(increment(1))")["stderr"] == ""


def test_progress_is_a_line_that_moves_and_ends(notebook: Notebook) -> None:
    """One line of the cell is updated until all is done; it needs no widgets and warns of nothing."""
    told = notebook.cell(
        "slow = FakeBackend(model='jupyter', latency=0.3)\n"
        "one = slow.chat('first')\n"
        "_ = feste.compute(slow.chat(one), [slow.complete('x')], progress=True)"
    )
    lines = [data["text/plain"] for _, data in told["shown"]]

    assert (told["error"], told["stderr"], told["stdout"]) == ("", "", "")
    assert len({name for name, _ in told["shown"]}) == 1
    assert "0/3 calls, " in lines[0] and " in flight" in lines[0]
    assert any("2/3 calls" in line for line in lines)
    assert "3/3 calls, 12 tokens out, cost unknown" in lines[-1]
    assert '<progress value="3" max="3">' in told["shown"][-1][1]["text/html"]


def test_the_last_report_is_that_of_the_last_cell(notebook: Notebook) -> None:
    """A cell with ``await`` is a task with a context of its own; the next cell asks for its report."""
    notebook.cell("feste.compute([increment(i) for i in range(3)])")
    notebook.cell("await feste.acompute([increment(i) for i in range(5)])")
    assert notebook.value("feste.last_report().nodes") == "5"
    notebook.cell("async for _ in feste.map(increment, range(7)):\n    pass")
    assert notebook.value("feste.last_report().nodes") == "7"
    assert notebook.value("feste.compute(increment(1))[0], feste.last_report().nodes") == "(2, 1)"


def test_pictures_are_shown(notebook: Notebook, tmp_path: Path) -> None:
    """``visualize`` and the timeline as the last line of a cell are pictures, not their source."""
    graph = notebook.cell("llm.chat('hello').visualize()")["data"]
    mermaid = notebook.cell(f"llm.chat('hello').visualize({str(tmp_path / 'a.mmd')!r})")["data"]

    assert graph["image/svg+xml"].startswith("<svg")
    assert graph["text/plain"].startswith("<SVG picture of ")
    assert mermaid["text/vnd.mermaid"] == mermaid["text/plain"]
    assert mermaid["text/plain"].startswith("flowchart")
    notebook.cell("feste.compute(llm.chat('again'))")
    assert "image/svg+xml" in notebook.cell("feste.last_report().timeline()")["data"]
    assert notebook.value("feste.context.set(on_error='raise')") == "context.set(on_error='raise')"


def test_plans_and_reports_are_html(notebook: Notebook) -> None:
    """``explain`` and ``last_report`` show as pages of their own in a notebook."""
    plan = notebook.cell("feste.explain([llm.complete(f'{i}') for i in range(40)])")["data"]
    report = notebook.cell("feste.compute(llm.chat('hello')); feste.last_report()")["data"]

    assert "40 calls" in plan["text/html"] or "40" in plan["text/html"]
    assert "<table" in report["text/html"] and "<svg" in report["text/html"]


def test_functions_of_a_cell_run_in_other_processes(notebook: Notebook) -> None:
    """What a cell defines travels by value."""
    code = """
@feste.task(executor="process")
def elsewhere(x):
    return os.getpid(), increment.fn(x)

pid, value = elsewhere(1).compute()
(pid != os.getpid(), value)
"""
    assert notebook.value(code) == "(True, 2)"


def test_a_failure_is_shown_and_the_kernel_goes_on(notebook: Notebook) -> None:
    """The cell ends with RunFailed, which names the cell's line."""
    told = notebook.cell("increment('a').compute()")

    assert told["error"] == "RunFailed"
    assert "TypeError" in told["traceback"]
    assert notebook.value("increment(1).compute()") == "2"


def test_interrupting_a_cell_stops_the_run(notebook: Notebook) -> None:
    """The stop button ends the run with RunInterrupted; the next cell computes."""
    name = notebook.start(
        """
import feste._compute
feste._compute.steps.GRACE = 0.1

@feste.task
async def forever():
    print("begun", flush=True)
    await asyncio.sleep(600)

forever().compute()
"""
    )
    notebook.wait_for("begun")
    notebook.manager.interrupt_kernel()
    told = notebook.finish(name)

    assert told["error"] == "RunInterrupted"
    assert notebook.value("increment(1).compute()") == "2"
