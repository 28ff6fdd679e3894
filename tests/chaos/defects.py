"""Deliberate defects: each makes Feste wrong in one way, which a test has to notice.

``CHAOS_DEFECT=name pytest -p tests.chaos.defects ...`` runs tests of a broken Feste; the programs of
the chaos suite are broken with them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

__all__ = ["DEFECTS", "break_on_purpose"]

CORE, OPENAI = "packages/feste-core/tests", "packages/feste-backend-openai/tests"

#: What breaks Feste, by name, and the test that notices.
DEFECTS: dict[str, tuple[Callable[[], None], str]] = {}


def break_on_purpose() -> None:
    """Put the defect that the environment names into this process, if it names one."""
    if name := os.environ.get("CHAOS_DEFECT"):
        DEFECTS[name][0]()


def pytest_configure() -> None:
    """Break Feste before any test is collected."""
    break_on_purpose()


def noticed_by(test: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Note which test has to turn red.

    :param test: its name for pytest.
    """

    def note(defect: Callable[[], None]) -> Callable[[], None]:
        DEFECTS[defect.__name__] = defect, test
        return defect

    return note


# --- answers that were paid for -----------------------------------------------------------------------


@noticed_by(f"{CORE}/test_store_crash.py::test_nothing_goes_on_before_the_file_has_it")
def answers_are_used_before_they_are_kept() -> None:
    from feste.scheduler.journaling import Journaling

    def keep(self: Any, parcel: Any, answers: Any, response: Any, then: Any) -> None:
        then()
        self.ask(self._record(parcel, answers, response), lambda ok, value: None)

    Journaling.keep = keep


@noticed_by("tests/chaos/test_kills.py::test_nothing_is_ahead_of_the_store")
def requests_are_sent_before_they_are_noted() -> None:
    from feste.scheduler.journaling import Journaling

    intend = Journaling.intend

    def early(self: Any, parcel: Any) -> None:
        intend(self, parcel)
        self.brain.attempts.launch(parcel)

    def noted(self: Any, ticket: int, ok: bool, value: Any) -> None:
        self.intending.pop(ticket).number = value

    Journaling.intend, Journaling._on_intended = early, noted


@noticed_by("tests/chaos/test_kills.py::test_a_rerun_sends_nothing")
def kept_answers_are_bought_again() -> None:
    from feste.scheduler.journaling import Journaling

    def found(self: Any, run: Any, i: int, request: Any, found: Any) -> None:
        self.brain.calls.buy(run, i, request)

    Journaling.found = found


@noticed_by(f"{CORE}/test_store_mishaps.py::test_what_is_committed_is_on_the_disk")
def commits_do_not_wait_for_the_disk() -> None:
    from feste.store import opening, writer

    connect = writer.connect_for_writing

    def hasty(path: Any) -> Any:
        conn = connect(path)
        conn.execute("PRAGMA synchronous = OFF")
        return conn

    opening.connect_for_writing = writer.connect_for_writing = hasty


@noticed_by(f"{CORE}/test_store_damage.py::test_a_flipped_bit_is_noticed_and_costs_one_row")
def seals_are_not_looked_at() -> None:
    from feste.store import schema

    schema.is_good = lambda table, values: True


@noticed_by(f"{CORE}/test_request.py::test_what_decides_the_answer_decides_the_key")
def an_answer_of_one_endpoint_serves_another() -> None:
    from feste.backend import request

    def text(self: Any) -> str:
        return request.canonical([self.plugin, self.operation, self.parser, self.body])

    request.Request.text = property(text)


@noticed_by(f"{OPENAI}/test_mishaps.py")
def answers_of_a_list_are_taken_in_their_order() -> None:
    from feste.backend.openai import answers

    answers._by_index = lambda payload, field, count: answers._list(payload, field)[:count]


# --- requests and money -------------------------------------------------------------------------------


@noticed_by("tests/chaos/test_outages.py::test_a_provider_that_always_fails_is_hardly_asked")
def the_sdk_tries_again_too() -> None:
    from feste.backend.openai import sending

    sending._OPTIONS["max_retries"] = 2


@noticed_by("tests/chaos/test_kills.py::test_a_run_that_nothing_disturbs")
def ten_times_as_much_is_in_flight() -> None:
    from feste.scheduler.admission.slots import Slots

    count = Slots.count
    Slots.count = lambda self, rate: 10 * count(self, rate)


@noticed_by(f"{CORE}/test_outages.py::test_a_refusal_of_all_calls_is_confirmed_once")
def a_refused_key_is_tried_again() -> None:
    from feste.scheduler.admission.outages import Outages

    Outages.refused = lambda self, parcel, error: False


@noticed_by(f"{CORE}/test_budget.py::test_the_cap_holds_over_sockets")
def the_budget_is_looked_at_afterwards() -> None:
    from feste.scheduler.admission import spending

    spending._bound = lambda parcel, budget: 0.0


@noticed_by(f"{CORE}/test_on_error.py::test_each_failure_costs_what_needs_it_and_no_more")
def one_failure_takes_the_rest() -> None:
    from feste.scheduler.lifecycle import Lifecycle

    fail = Lifecycle.fail

    def gather(self: Any, run: Any, *told: Any, **more: Any) -> None:
        fail(self, run, *told, **more)
        self.brain.stop(run)

    Lifecycle.fail = gather


# --- keys and templates -------------------------------------------------------------------------------


@noticed_by(f"{OPENAI}/test_failures.py")
def errors_keep_the_exceptions_of_the_sdk() -> None:
    from feste.backend.openai import sending

    failure = sending.failure

    def keep(error: Exception, **more: Any) -> Any:
        made = failure(error, **more)
        made.__cause__ = error
        return made

    sending.failure = keep


@noticed_by(f"{CORE}/test_prompt.py::test_no_way_out_of_the_sandbox")
def templates_run_in_a_plain_environment() -> None:
    from feste.prompt import sandbox

    sandbox._Sandbox.is_safe_attribute = lambda self, obj, attr, value: True


# --- time ---------------------------------------------------------------------------------------------


@noticed_by("tests/chaos/test_clocks.py")
def waits_are_measured_by_the_wall_clock() -> None:
    time.monotonic = partial(lambda: time.time())
