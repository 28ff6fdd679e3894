"""Deliberate defects: each makes Feste wrong in one way, which a test has to notice.

``CHAOS_DEFECT=name pytest -p tests.chaos.defects ...`` runs tests of a broken Feste; the programs of
the chaos suite are broken with them.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["CHAOS", "DEFECTS", "RERUN", "Defect", "break_on_purpose"]

CHAOS = "tests/chaos"
CORE, OPENAI = "packages/feste-core/tests", "packages/feste-backend-openai/tests"
RERUN = f"{CHAOS}/test_kills.py::test_a_rerun_sends_nothing"


class Defect(NamedTuple):
    """What breaks Feste, the test that notices, and a pattern of what its failure says."""

    put: Callable[[], None]
    test: str
    words: str


#: All defects, by name.
DEFECTS: dict[str, Defect] = {}


def break_on_purpose() -> None:
    """Put the defect that the environment names into this process, if it names one."""
    if name := os.environ.get("CHAOS_DEFECT"):
        DEFECTS[name].put()


def pytest_configure() -> None:
    """Break Feste before any test is collected."""
    break_on_purpose()


def noticed_by(test: str, words: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Note which test has to turn red.

    :param test: its name for pytest.
    :param words: a pattern of what its failure says.
    """

    def note(defect: Callable[[], None]) -> Callable[[], None]:
        DEFECTS[defect.__name__] = Defect(defect, test, words)
        return defect

    return note


# --- answers that were paid for -----------------------------------------------------------------------


@noticed_by(
    f"{CORE}/test_store_crash.py::test_nothing_goes_on_before_the_file_has_it",
    r"assert \[False, False\] == \[False, True\]",
)
def answers_are_used_before_they_are_kept() -> None:
    from feste.scheduler.journaling import Journaling

    def keep(self: Any, parcel: Any, answers: Any, response: Any, then: Any) -> None:
        then()
        self.ask(self._record(parcel, answers, response), lambda ok, value: None)

    Journaling.keep = keep


@noticed_by(
    f"{CHAOS}/test_kills.py::test_nothing_is_ahead_of_the_store",
    r"I4: \d+ requests are said to be on their way",
)
def requests_are_sent_before_they_are_noted() -> None:
    from feste.scheduler.journaling import Journaling

    intend = Journaling.intend

    def early(self: Any, parcel: Any) -> None:
        intend(self, parcel)
        self.brain.attempts.launch(parcel)

    def noted(self: Any, ticket: int, ok: bool, value: Any) -> None:
        self.intending.pop(ticket).number = value

    Journaling.intend, Journaling._on_intended = early, noted


@noticed_by(RERUN, "I1: acknowledged, but not in the results")
def kept_answers_are_bought_again() -> None:
    from feste.scheduler.journaling import Journaling

    def found(self: Any, run: Any, i: int, request: Any, found: Any) -> None:
        self.brain.calls.buy(run, i, request)

    Journaling.found = found


@noticed_by(
    f"{CORE}/test_store_mishaps.py::test_what_is_committed_is_on_the_disk",
    r"assert \(0,\) == \(2,\)",
)
def commits_do_not_wait_for_the_disk() -> None:
    from feste.store import opening, writer

    connect = writer.connect_for_writing

    def hasty(path: Any) -> Any:
        conn = connect(path)
        conn.execute("PRAGMA synchronous = OFF")
        return conn

    opening.connect_for_writing = writer.connect_for_writing = hasty


@noticed_by(
    f"{CORE}/test_store_damage.py::test_a_flipped_bit_is_noticed_and_costs_one_row",
    r"where False = all\(<generator object known\.",
)
def seals_are_not_looked_at() -> None:
    from feste.store import schema

    schema.is_good = lambda table, values: True


@noticed_by(
    f"{CORE}/test_request.py::test_what_decides_the_answer_decides_the_key",
    r"assert '(\w{64})' != '\1'",
)
def an_answer_of_one_endpoint_serves_another() -> None:
    from feste.backend import request

    def text(self: Any) -> str:
        return request.canonical([self.plugin, self.operation, self.parser, self.body])

    request.Request.text = property(text)


@noticed_by(f"{OPENAI}/test_mishaps.py", r"'p8:0'\}\] != \[\{.*'p0:0'")
def answers_of_a_list_are_taken_in_their_order() -> None:
    from feste.backend.openai import answers

    answers._by_index = lambda payload, field, count: answers._list(payload, field)[:count]


@noticed_by(RERUN, r"I3: \(run, call\) delivered more than once")
def tasks_are_run_twice() -> None:
    from feste.scheduler import work

    evaluate = work.evaluate

    def twice(*given: Any) -> Any:
        evaluate(*given)
        return evaluate(*given)

    work.evaluate = twice


# --- requests and money -------------------------------------------------------------------------------


@noticed_by(
    f"{CHAOS}/test_outages.py::test_a_provider_that_always_fails_is_hardly_asked",
    r"I6: (\d+) requests sent, \d+ came",
)
def the_sdk_tries_again_too() -> None:
    from feste.backend.openai import sending

    sending._OPTIONS["max_retries"] = 2


@noticed_by(
    f"{CHAOS}/test_kills.py::test_a_run_that_nothing_disturbs",
    r"I4: \d+ requests in flight, 32 are allowed",
)
def ten_times_as_much_is_in_flight() -> None:
    from feste.scheduler.admission.slots import Slots

    count = Slots.count
    Slots.count = lambda self, rate: 10 * count(self, rate)


@noticed_by(
    f"{CORE}/test_outages.py::test_a_refusal_of_all_calls_is_confirmed_once", "assert 300 == 2"
)
def a_refused_key_is_tried_again() -> None:
    from feste.scheduler.admission.outages import Outages

    Outages.refused = lambda self, parcel, error: False


@noticed_by(f"{CORE}/test_budget.py::test_the_cap_holds_over_sockets", r"assert \d+\.\d+ <= 5\.0")
def the_budget_is_looked_at_afterwards() -> None:
    from feste.scheduler.admission import spending

    spending._bound = lambda parcel, budget: 0.0


@noticed_by(
    f"{CORE}/test_on_error.py::test_each_failure_costs_what_needs_it_and_no_more",
    r"At index 0 diff: \[True, False, False, False, False, False, True, True",
)
def one_failure_takes_the_rest() -> None:
    from feste.scheduler.lifecycle import Lifecycle

    fail = Lifecycle.fail

    def gather(self: Any, run: Any, *told: Any, **more: Any) -> None:
        fail(self, run, *told, **more)
        self.brain.stop(run)

    Lifecycle.fail = gather


@noticed_by(RERUN, r"I6: billed \$[\d.]+, said from")
def tokens_are_half_as_dear() -> None:
    from feste.backend import Price

    dollars = Price.dollars
    Price.dollars = lambda self, *given, **more: dollars(self, *given, **more) / 2


# --- what is left -------------------------------------------------------------------------------------


@noticed_by(RERUN, r"I8: temporary files are left: \['tmp")
def a_temporary_file_is_left() -> None:
    from feste.store import opening

    connect = opening.connect_for_writing

    def leaving(path: Any) -> Any:
        os.close(tempfile.mkstemp()[0])
        return connect(path)

    opening.connect_for_writing = leaving


# --- keys and templates -------------------------------------------------------------------------------


@noticed_by(f"{OPENAI}/test_failures.py", r"BadRequestError\('Error code: 400 - bad'\) is None")
def errors_keep_the_exceptions_of_the_sdk() -> None:
    from feste.backend.openai import sending

    failure = sending.failure

    def keep(error: Exception, **more: Any) -> Any:
        made = failure(error, **more)
        made.__cause__ = error
        return made

    sending.failure = keep


@noticed_by(RERUN, "I7: the key was printed")
def the_key_is_logged() -> None:
    from feste.backend.openai import sending

    connected = sending._connected

    def telling(llm: Any) -> Any:
        logging.warning("asking with the key %s", llm.key())
        return connected(llm)

    sending._connected = telling


@noticed_by(
    f"{CORE}/test_prompt.py::test_no_way_out_of_the_sandbox", r'assert \'class\' not in "\[<class'
)
def templates_run_in_a_plain_environment() -> None:
    from feste.prompt import sandbox

    sandbox._Sandbox.is_safe_attribute = lambda self, obj, attr, value: True


# --- time ---------------------------------------------------------------------------------------------


@noticed_by(
    f"{CHAOS}/test_clocks.py",
    r"(I4: \d+ answers were made for nobody|I6: \d+ requests sent, \d+ came|assert \d+ >= 147)",
)
def waits_are_measured_by_the_wall_clock() -> None:
    before, now = time.time(), time.monotonic()

    def wall() -> float:
        nonlocal before, now
        last, before = before, time.time()
        now += max(0.0, before - last)  # it never goes back, or the test would wait for a day
        return now

    time.monotonic = wall
