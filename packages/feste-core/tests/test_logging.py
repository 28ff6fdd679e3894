"""What Feste logs: runs, requests, closed gates; no words of prompts or answers, and no handler of its own."""

from __future__ import annotations

import logging
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import feste
from feste.backend import Backend, Limits, operation
from feste.errors import InvalidRequest, RateLimited, ServerError
from feste.events import EVENTS
from feste.scheduler import logs
from feste.testing import FakeBackend, FakeParams

SECRET = "sk-canary-0123456789"
PROMPT = "the prompt that nobody may read"


class Throttles(Backend):
    """Refuses the first requests for their rate."""

    limits = Limits(concurrency=4)

    def __init__(self, refusals: int = 3) -> None:
        self.left = refusals

    @operation
    async def say(self, prompt: str) -> str:
        if self.left:
            self.left -= 1
            raise RateLimited("slow down", status=429, retry_after=0.02)
        return prompt


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == level]


def test_a_run_is_two_lines(caplog: pytest.LogCaptureFixture) -> None:
    """At INFO: its start with its size, its end with its states, failures, requests and tokens."""
    llm = FakeBackend(fail={"bad": InvalidRequest("no")})
    with caplog.at_level(logging.INFO, "feste"):
        feste.compute(llm.chat("good"), llm.chat("bad"), on_error="return")

    start, end = lines(caplog, logging.INFO)
    assert re.fullmatch(r"run-\d+ started: 2 nodes, 2 calls", start)
    assert re.fullmatch(
        r"run-\d+ ended after \d+\.\d\d s: 1 done, 1 failed; failures: 1 InvalidRequest; 2 requests; "
        r"\d tokens in, 4 out",
        end,
    )
    assert {r.name for r in caplog.records} == {"feste.scheduler"}


def test_each_request_is_a_line_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    """With its model, calls, attempt, times, tokens, waits, and what went wrong."""
    with caplog.at_level(logging.DEBUG, "feste"):
        feste.compute(Throttles(1).say("hello"))

    one, two = lines(caplog, logging.DEBUG)
    assert re.fullmatch(
        r"run-\d+: request \d+ of throttles.say: 1 call, attempt 1, \d\.\d{3} s(, \w+ \d\.\d{3} s)*, "
        r"RateLimited 429, billed: no",
        one,
    )
    assert ", attempt 2, " in two and ", retry 0." in two


def test_a_closed_gate_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """However many requests are refused together; nothing else is logged at this level."""
    with caplog.at_level(logging.WARNING, "feste"):
        llm = Throttles()
        feste.compute([llm.say(f"{i}") for i in range(4)])

    told = lines(caplog, logging.WARNING)
    assert told and all(
        re.fullmatch(r"run-\d+: nothing is sent to throttles for 0\.\d s: rate limit", line)
        for line in told
    )
    assert len(told) <= 3  # three refusals may come one after the other
    assert [r.levelno for r in caplog.records] == [logging.WARNING] * len(told)


def test_damaged_answers_are_a_warning_of_the_store(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, restart: Any
) -> None:
    """They are bought again, and that is told."""
    path = tmp_path / "runs.db"
    feste.compute(FakeBackend().chat("hello"), store=str(path))
    restart()
    feste.store.close()
    with closing(sqlite3.connect(path)) as file, file:
        file.execute("UPDATE answers SET response = 'x' || response")
    with caplog.at_level(logging.WARNING, "feste"):
        feste.compute(FakeBackend().chat("hello"), store=str(path))

    (record,) = caplog.records
    assert record.name == "feste.store"
    assert record.getMessage().endswith(": 1 stored answer damaged, and so not used")


def test_no_prompt_no_answer_no_key_at_any_level(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where errors quote them."""
    monkeypatch.setenv("LOGS_KEY", SECRET)
    bad = InvalidRequest(f"{PROMPT} was refused for {SECRET}")
    llm = FakeBackend(fail={"bad": bad, "busy": ServerError(f"{SECRET} {PROMPT}")})
    feste.task(lambda: None)

    @feste.task
    def breaks(text: str) -> str:
        raise ValueError(text)

    with caplog.at_level(0):
        answer = llm.chat(PROMPT)
        feste.compute(answer, llm.chat(f"bad {PROMPT}"), breaks(answer), on_error="return")
        with feste.context.set(eager=True):
            llm.chat(PROMPT, FakeParams(max_tokens=3))

    text = "\n".join(str(vars(record)) for record in caplog.records if "feste" in record.name)
    assert "InvalidRequest" in text
    assert PROMPT not in text and SECRET not in text and str(answer.compute()) not in text


def test_names_cannot_forge_lines(caplog: pytest.LogCaptureFixture) -> None:
    """What a model is called is shown, whatever it holds."""
    with caplog.at_level(logging.DEBUG, "feste"):
        FakeBackend("m\n2026-01-01 ERROR forged\x1b[2J").chat("hello").compute()

    assert all("\n" not in r.getMessage() and "\x1b" not in r.getMessage() for r in caplog.records)


def run_alone(code: str) -> subprocess.CompletedProcess[str]:
    prelude = """if True:
        import logging
        import feste
        from feste.backend import Backend, operation
        from feste.errors import RateLimited

        class Throttles(Backend):
            left = 1

            @operation
            async def say(self, prompt: str) -> str:
                if self.left:
                    self.left = 0
                    raise RateLimited("slow down", retry_after=0.02)
                return prompt
    """
    return subprocess.run(
        [sys.executable, "-c", prelude + code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_without_logging_nothing_is_written_and_no_event_is_made() -> None:
    """No handler is installed, and none that Python would use instead gets a line."""
    done = run_alone("""
        from feste.scheduler import logs
        print(Throttles().say("hello").compute(), logs.wanted())
        print([logging.getLogger(n).handlers for n in ("", "feste", "feste.scheduler")])
    """)

    assert done.stdout == "hello set()\n[[], [], []]\n"
    assert done.stderr == ""


def test_ordinary_logging_gets_the_lines() -> None:
    """``basicConfig`` is all that a program needs."""
    done = run_alone("""
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
        print(Throttles().say("hello").compute())
    """)

    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == [
        "INFO feste.scheduler run-1 started",
        "WARNING feste.scheduler run-1",
        *re.findall(r"INFO feste\.scheduler run-1 ended after [\d.]+ s", done.stderr),
    ]


@pytest.mark.parametrize(
    ("level", "wanted"),
    [
        (logging.CRITICAL, set()),
        (logging.WARNING, {"gate_closed", "run_finished"}),
        (logging.INFO, {"gate_closed", "run_finished", "run_started"}),
        (logging.DEBUG, {"gate_closed", "run_finished", "run_started", "request_finished"}),
    ],
)
def test_only_what_is_logged_is_made(
    level: int, wanted: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A level that is off costs no event; nodes and starts of requests are never logged."""
    with caplog.at_level(level, "feste"):
        assert logs.wanted() == wanted
    assert wanted <= {event.name for event in EVENTS}


def test_a_handler_that_raises_harms_no_run() -> None:
    """It is told on stderr; the run and later runs go on, and end."""
    done = run_alone("""
        class Breaks(logging.Handler):
            def emit(self, record):
                raise RuntimeError("the disk is full")

        logging.getLogger("feste").addHandler(Breaks())
        logging.getLogger("feste").setLevel(logging.DEBUG)

        class Ear:
            @feste.hookimpl
            def feste_run_finished(self, event):
                print(event.run)

        from feste.plugins import registry

        registry().manager.register(Ear())
        print(Throttles().say("hello").compute(), feste.task(abs)(-6).compute())
    """)

    assert done.stdout == "run-1\nrun-2\nhello 6\n"
    assert "RuntimeError: the disk is full" in done.stderr
