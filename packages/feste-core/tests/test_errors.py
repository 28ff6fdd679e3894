"""Errors are one tree of plain data: they pickle, say where and what to do, and hold no SDK object."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest

import feste
from feste import errors
from feste.errors import (
    CallError,
    FesteError,
    InvalidRequest,
    NodeError,
    RateLimited,
    RunFailed,
    RunInterrupted,
    UpstreamFailed,
    suggest,
)

KINDS = [
    kind
    for kind in vars(errors).values()
    if inspect.isclass(kind) and kind.__module__ == errors.__name__
]
RAISED = [kind for kind in KINDS if not issubclass(kind, Warning)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_public_and_in_the_tree(kind: type) -> None:
    """Each class is in ``__all__``, has a docstring, and derives from one of three roots."""
    roots = (FesteError, errors.FesteWarning, RunInterrupted)

    assert kind.__name__ in errors.__all__
    assert kind.__doc__
    assert issubclass(kind, roots)


@pytest.mark.parametrize("kind", RAISED)
def test_the_tree_in_the_documentation_is_the_real_one(kind: type) -> None:
    """The drawing at the head of the module names each class that can be raised."""
    assert re.search(rf"\b{kind.__name__}\b", errors.__doc__ or "")


@pytest.mark.parametrize("kind", RAISED)
@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_errors_pickle_and_copy_whole(kind: type[FesteError], again: object) -> None:
    """What is known of an error survives a pickle: text, place, and all that was added later."""
    error = kind("it broke")
    error.origin = "app.py:3"
    error.note = {"more": 1}  # type: ignore[attr-defined]
    back = again(error)  # type: ignore[operator]

    assert type(back) is kind
    assert back.args == ("it broke",)
    assert vars(back) == vars(error)
    assert str(back) == str(error)


def test_the_place_is_part_of_the_text() -> None:
    """An error with a place says it; one without says only its message, or at least its kind."""
    assert str(FesteError("it broke", origin="app.py:3")) == "it broke (at app.py:3)"
    assert str(FesteError("it broke")) == "it broke"
    assert str(FesteError()) == "FesteError"


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        ("ConfigError", ValueError),
        ("UnknownName", LookupError),
        ("ParameterError", TypeError),
        ("PlainDataError", TypeError),
        ("LazyValueError", TypeError),
        ("BlockingCallError", RuntimeError),
        ("NestedRunError", RuntimeError),
        ("UngatedCall", RuntimeError),
    ],
)
def test_errors_are_also_what_python_would_raise(kind: str, builtin: type) -> None:
    """Code that catches the builtin kind of a mistake catches Feste's."""
    assert issubclass(getattr(errors, kind), builtin)


def test_an_interrupted_run_passes_except_exception() -> None:
    """Ctrl-C is no FesteError: ``except Exception`` must not swallow it."""
    assert issubclass(RunInterrupted, KeyboardInterrupt)
    assert not issubclass(RunInterrupted, Exception)


@pytest.mark.parametrize(
    ("kind", "billed"),
    [
        ("Rejected", "no"),
        ("InvalidRequest", "no"),
        ("RateLimited", "no"),
        ("Unreachable", "no"),
        ("CallTimeout", "unknown"),
        ("ConnectionLost", "unknown"),
        ("WorkerLost", "unknown"),
        ("MalformedResponse", "yes"),
        ("CountMismatch", "yes"),
    ],
)
def test_an_error_knows_whether_it_was_paid(kind: str, billed: str) -> None:
    """A refusal is free, a lost answer may be billed, a bad answer is; who knows better says so."""
    assert getattr(errors, kind)("x").billed == billed
    assert getattr(errors, kind)("x", billed="yes").billed == "yes"


def test_a_call_error_keeps_the_facts_of_the_reply() -> None:
    """Status, code, request and the time to wait are fields, not text to be parsed."""
    error = CallError("no", status=429, code="slow", request_id="r1", retry_after=2.5)
    back = pickle.loads(pickle.dumps(error))

    assert (back.status, back.code, back.request_id, back.retry_after) == (429, "slow", "r1", 2.5)


def test_a_failed_run_shows_the_first_errors_and_counts_the_others() -> None:
    """The text of RunFailed stays short, however many calls failed; all errors are in it."""
    failed = RunFailed("9 of 9 failed", errors=[NodeError(f"e{i}") for i in range(9)])
    lines = str(failed).splitlines()

    assert lines[0] == "9 of 9 failed"
    assert lines[1:4] == ["  NodeError: e0", "  NodeError: e1", "  NodeError: e2"]
    assert lines[4:] == ["  ... and 6 more kinds in .errors"]
    assert len(failed.errors) == 9


def test_a_failed_run_says_which_rows_failed() -> None:
    """Equal errors are counted together, with the places in .partial where they stand."""
    bad = [InvalidRequest("no", origin="job.py:9") for _ in range(5)]
    rows = ["fine", *bad, {"a": UpstreamFailed("not run", roots=[bad[0]])}]
    where = {f"[0][{i}]": rows[i] for i in range(1, 6)} | {"[0][6]['a']": rows[-1]["a"]}  # type: ignore[index]
    failed = RunFailed("6 of 7 results failed", partial=(rows,), errors=bad, places=where)

    assert str(failed).splitlines()[1:] == [
        "  6 x InvalidRequest: no (at job.py:9)",
        "    at partial[0][1], partial[0][2], partial[0][3] and 3 more",
    ]
    assert failed.places["[0][6]['a']"] is rows[-1]["a"]  # type: ignore[index]


def test_a_copy_of_an_error_needs_no_constructor() -> None:
    """A plugin's class may take what it likes; its copy is equal, and its own object."""

    class Gone(InvalidRequest):
        def __init__(self, message: str, code: int) -> None:
            super().__init__(message, status=410)
            self.number = code

    one = Gone("gone", 7)
    two = one.copy()

    assert type(two) is Gone and two is not one
    assert (str(two), two.status, two.number) == ("gone", 410, 7)


@pytest.mark.parametrize("wait", [-1.0, 1e10, float("inf"), float("nan")])
def test_no_provider_is_believed_every_wait(wait: float) -> None:
    """A wait that is no number of seconds up to a day is none."""
    assert RateLimited("slow", retry_after=wait).retry_after is None


def test_a_skipped_node_names_its_roots() -> None:
    """UpstreamFailed holds the errors that are the reason, also after a pickle."""
    root = NodeError("it broke", node="f-1")
    error = UpstreamFailed("g was not run", node="g-1", roots=[root])
    back = pickle.loads(pickle.dumps(error))

    assert (back.node, [r.node for r in back.roots]) == ("g-1", ["f-1"])


def test_a_run_failed_pickles_with_partial_results_and_report() -> None:
    """A RunFailed of a real run crosses a process border with all that it holds."""

    @feste.task
    def fine() -> int:
        return 1

    @feste.task
    def broken() -> int:
        raise ValueError("it broke")

    with pytest.raises(RunFailed) as caught:
        feste.compute(fine(), broken())
    back = pickle.loads(pickle.dumps(caught.value))

    assert back.partial[0] == 1
    assert back.partial[1].cause_type == "ValueError"
    assert back.report.states == {"done": 1, "failed": 1}
    assert str(back) == str(caught.value)


@pytest.mark.parametrize(
    ("name", "known", "said"),
    [
        ("egaer", ["eager", "keep"], " Did you mean 'eager'?"),
        ("zzz", ["keep", "eager"], " Known: eager, keep."),
        ("zzz", [], " None are installed."),
        ("", ["eager"], " Known: eager."),
    ],
)
def test_suggestions(name: str, known: list[str], said: str) -> None:
    """The nearest name, else all of them in order, else that there are none."""
    assert suggest(name, known) == said
