"""Ctrl-C while results come one by one: a stop with grace, then at once; nothing goes on behind it."""

from __future__ import annotations

import sys
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX here")

PRELUDE = """
import asyncio, os, sys, threading, time, signal
import feste, feste._compute.steps
signal.signal(signal.SIGINT, signal.default_int_handler)
from feste.backend import Backend, Limits, Operation, Request, Response
from feste.errors import RunInterrupted
from feste.scheduler.driver import driver

def say(*words): os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # a line at once

class Held(Backend):
    limits = Limits(concurrency=2)

    def _prepare(self, prompt: str):
        return Request(self.plugin, "ask", self.endpoint, {"prompt": prompt})

    async def _send(self, request, on_chunk=None):
        say("sent", request.body["prompt"])
        if on_chunk is not None:
            on_chunk("answer ")
        try:
            while not os.path.exists(sys.argv[1]):
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            say("cancelled", request.body["prompt"])
            raise
        return Response(f"answer {request.body['prompt']}")

    ask = Operation(prepare=_prepare, send=_send, parse=lambda self, response, _: response.payload)

def watch():
    while not any(run.stopping for run in driver().brain.runs):
        time.sleep(0.001)
    say("stopping")

threading.Thread(target=watch, daemon=True).start()
llm = Held()
forms = {
    "stream": lambda: feste.stream(llm.ask("0")),
    "as_completed": lambda: (v for _, v in feste.as_completed([llm.ask(str(i)) for i in range(6)])),
    "map": lambda: feste.map(llm.ask, "012345", window=3),
}
"""

READ = """
begun = time.monotonic()
try:
    for value in forms[sys.argv[2]]():
        say("got", value)
except RunInterrupted as stop:
    say("partial", *stop.partial)
    say("states", stop.report.states)
    say("message", stop)
say("left", len(driver().brain.runs))
"""


@pytest.fixture
def program(start: Any) -> Any:
    """A function that starts a program which begins with the prelude."""
    return lambda text, form: start(PRELUDE + text, form)


@pytest.mark.parametrize("form", ["stream", "as_completed", "map"])
def test_the_first_ctrl_c_lets_answers_land(program: Any, form: str) -> None:
    """Nothing new is sent; what was answered in the grace is in ``.partial``."""
    one = program(READ, form)
    one.until("got" if form == "stream" else "sent")
    one.interrupt()
    one.until("stopping")
    one.answer.touch()
    lines = one.end()

    partial = next(line for line in lines if line.startswith("partial"))
    sent = [line for line in lines if line.startswith("sent")]
    assert len(sent) == (1 if form == "stream" else 2)
    assert partial.count("answer") == (0 if form == "stream" else 2)
    assert "left 0" in lines
    assert not any(line.startswith("cancelled") for line in lines)
    assert (one.process.returncode, one.errors) == (0, "")


def test_the_second_ctrl_c_ends_at_once(program: Any) -> None:
    """However long the grace, a second Ctrl-C cancels what is in flight."""
    one = program("feste._compute.steps.GRACE = 3600.0\n" + READ, "map")
    one.until("sent", "sent")
    one.interrupt()
    one.until("stopping")
    one.interrupt()
    lines = one.end()

    assert sorted(line for line in lines if line.startswith("cancelled")) == [
        "cancelled 0",
        "cancelled 1",
    ]
    assert "left 0" in lines
    assert (one.process.returncode, one.errors) == (0, "")


def test_ctrl_c_in_the_body_of_the_loop_cancels_at_once(program: Any) -> None:
    """The loop is left by an exception of its own: its iterator is dropped, and the run with it."""
    one = program(
        """
def read():
    for piece in forms["stream"]():
        say("got", piece)
        time.sleep(3600)

try:
    read()
except KeyboardInterrupt:
    pass
while driver().brain.runs:
    time.sleep(0.001)
""",
        "stream",
    )
    one.until("got")
    one.interrupt()

    assert "cancelled 0" in one.end()
    assert (one.process.returncode, one.errors) == (0, "")
