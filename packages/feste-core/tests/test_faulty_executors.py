"""An executor that does what no executor may costs its own runs, with an error that names it."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest

import feste
from feste.errors import FesteError, PluginError, PluginWarning, RunFailed
from feste.scheduler import LocalExecutor, Reporter
from feste.scheduler.driver import driver
from feste.testing import FakeBackend


@feste.task
def shout(text: str) -> str:
    return f"{text}!"


def bad(*args: Any, **kwargs: Any) -> Any:
    raise OSError("no hands")


def cancelled(*args: Any) -> Any:
    raise asyncio.CancelledError


def leaving(*args: Any) -> Any:
    raise SystemExit(3)


def answers(value: Any) -> Any:
    return lambda self, *args: value


class Telling(LocalExecutor):
    """An executor whose reports can be spoilt."""

    spoil: Callable[..., tuple[Any, ...]]
    what = "done"

    def start(self, report: Reporter) -> None:
        spoil, what = type(self).spoil, self.what

        class Spoilt(Reporter):
            def done(self, *given: Any) -> None:
                super().done(*spoil(*given) if what == "done" else given)

            def done_together(self, outcomes: Any) -> None:
                spoilt = [spoil(*o) for o in outcomes] if what == "done" else outcomes
                super().done_together(spoilt)

            def sent(self, *given: Any) -> None:
                super().sent(*spoil(*given) if what == "sent" else given)

            def free(self, *given: Any) -> None:
                super().free(*spoil(*given) if what == "free" else given)

        super().start(Spoilt(report.put, report.executor))


def executor(**attributes: Any) -> type[LocalExecutor]:
    return type("Faulty", (LocalExecutor,), attributes)


def telling(what: str, spoil: Callable[..., tuple[Any, ...]]) -> type[LocalExecutor]:
    return type("Faulty", (Telling,), {"what": what, "spoil": staticmethod(spoil)})


class Collapsing(LocalExecutor):
    """An executor that says it broke, with an error of Python's."""

    def call(self, where: str, chunk: list[Any]) -> None:
        self._report.broken(ValueError("plain"))  # type: ignore[arg-type]
        super().call(where, chunk)


class Returning(LocalExecutor):
    """An executor that returns what it was not given."""

    def call(self, where: str, chunk: list[Any]) -> None:
        self._report.returned(["task"])  # type: ignore[list-item]
        super().call(where, chunk)


def fetching(values: Any) -> type[LocalExecutor]:
    def fetch(self: Any, handle: int, refs: Any) -> None:
        self._report.fetched(handle, values)

    return executor(remote=True, fetch=fetch)


FAULTY: dict[str, tuple[type[LocalExecutor], str]] = {
    "call": (executor(call=bad), "Faulty raised in call: OSError: no hands ("),
    "send": (executor(send=bad), "Faulty raised in send: OSError: no hands ("),
    "place": (executor(place=bad), "Faulty raised in place: OSError: no hands ("),
    "place none": (executor(place=answers(None)), "Faulty answers None for place"),
    "capacity": (executor(capacity=bad), "Faulty raised in capacity: OSError: no hands ("),
    "place cancelled": (executor(place=cancelled), "Faulty raised in place: CancelledError"),
    "capacity cancelled": (executor(capacity=cancelled), "Faulty raised in capacity: Cancelled"),
    "capacity exit": (executor(capacity=leaving), "Faulty raised in capacity: SystemExit: 3 ("),
    "capacity bool": (executor(capacity=answers(True)), "Faulty answers True for capacity"),
    "capacity none": (executor(capacity=answers(None)), "Faulty answers None for capacity"),
    "chunk_seconds": (executor(chunk_seconds=bad), "Faulty raised in chunk_seconds: OSError"),
    "chunk_seconds nan": (
        executor(chunk_seconds=answers(float("nan"))),
        "Faulty answers nan for chunk_seconds",
    ),
    "window": (executor(window=property(bad)), "Faulty raised in window: OSError: no hands ("),
    "window text": (executor(window="4"), "Faulty answers '4' for window"),
    "done": (
        telling("done", lambda task, ok, value, *more: (task, False, ValueError("plain"), *more)),
        "Faulty reported done with ValueError('plain'), which is no error of Feste",
    ),
    "done when": (
        telling("done", lambda task, ok, value, seconds, *more: (task, ok, value, None)),
        "Faulty reported done with seconds=None",
    ),
    "done garbage": (
        telling("done", lambda task, *more: ("task", *more)),
        "Faulty reported done with what Feste cannot handle: AttributeError: 'str' object",
    ),
    "done nothing": (
        telling("done", lambda task, ok, value, *more: (task, ok, None, *more)),
        "Faulty reported done with what Feste cannot handle: AttributeError: 'NoneType' object",
    ),
    "free": (
        telling("free", lambda where, chunk: ("elsewhere", chunk)),
        "Faulty reported free for a chunk in 'elsewhere' that was given to it in 'quick'",
    ),
    "returned": (
        Returning,
        "Returning reported returned with what Feste cannot handle: AttributeError: 'str' object",
    ),
    "fetched few": (
        fetching([]),
        "Faulty reported fetched with what Feste cannot handle: ValueError: zip()",
    ),
    "fetched none": (
        fetching(None),
        "Faulty reported fetched with what Feste cannot handle: TypeError: 'NoneType' object",
    ),
    "sent": (
        telling("sent", lambda handle, ok, value, *more: (handle, True, "text", *more)),
        "Faulty reported sent with 'text', which is no Response",
    ),
    "not sent": (
        telling("sent", lambda handle, ok, value, *more: (handle, False, ValueError("x"), *more)),
        "Faulty reported sent with ValueError('x'), which is no error of Feste",
    ),
    "sent where": (
        telling("sent", lambda handle, ok, value, seconds: (handle, ok, value, seconds, 7)),
        "Faulty reported sent with worker=7",
    ),
    "broken": (Collapsing, "Collapsing reported broken with ValueError('plain')"),
}


@pytest.fixture
def another() -> Iterator[list[Any]]:
    """A run on another executor that goes on meanwhile, and what became of it."""
    results: list[Any] = []
    go = threading.Event()

    @feste.task
    def wait() -> str:
        assert go.wait(30)
        return "went on"

    thread = threading.Thread(target=lambda: results.extend(feste.compute(shout(wait()))))
    thread.start()
    yield results
    go.set()
    thread.join()
    assert results == ["went on!"]


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_executor_costs_its_own_runs(name: str, another: list[Any]) -> None:
    """The error names the executor and what it did; runs on other executors, and later ones, go on."""
    kind, said = FAULTY[name]
    brain = driver().brain
    nodes = [shout(FakeBackend().chat(f"{name} {i}")) for i in range(3)]
    with warnings.catch_warnings(), pytest.raises(RunFailed) as failed:
        warnings.simplefilter("error", PluginWarning)
        feste.compute(nodes, scheduler=kind)

    error = failed.value.errors[0]
    assert f"the executor {kind.__module__}.{said}" in error.message
    assert driver().brain is brain, "the scheduler broke"
    assert not any(run.executor.__class__ is kind for run in brain.runs)


@pytest.mark.parametrize("name", ["call", "send"])
def test_what_raised_leaves_no_place_taken(name: str) -> None:
    """An executor whose method raises now and then takes as much work afterwards as before."""
    raises = [True] * 40

    def method(self: Any, *given: Any) -> None:
        if raises and given[0] != "quick":
            raises.pop()
            raise OSError("no hands")
        getattr(LocalExecutor, name)(self, *given)

    kind = executor(**{name: method})
    llm = FakeBackend()
    while raises:
        with pytest.raises(RunFailed):
            feste.compute([shout(llm.chat(f"{i}")) for i in range(20)], scheduler=kind)

    assert len(feste.compute([shout(llm.chat(f"{i}")) for i in range(20)], scheduler=kind)[0]) == 20


@pytest.mark.parametrize("kind", ["single", "list"])
def test_a_paid_answer_survives_a_wrong_report_of_it(kind: str) -> None:
    """What the executor says of its seconds ends the run; a later one need not buy the answer again."""
    llm = FakeBackend()
    nodes = [llm.chat("Hi")] if kind == "single" else [llm.embed(f"{i}") for i in range(10)]
    spoil = telling("sent", lambda handle, ok, value, seconds: (handle, ok, value, None))
    with pytest.raises(RunFailed, match="seconds=None"):
        feste.compute(nodes, scheduler=spoil)
    feste.compute(nodes)

    assert len(llm.requests) == 1


def test_numbers_of_numpy_are_numbers() -> None:
    """What an executor answers and reports may come from a computation with arrays."""
    spoil = telling(
        "done", lambda task, ok, value, seconds: (task, ok, value, numpy.float32(seconds))
    )
    kind = type(
        "Counting",
        (spoil,),
        {
            "capacity": answers(numpy.uint8(4)),
            "chunk_seconds": answers(numpy.float32(0.5)),
            "window": numpy.int64(2),
        },
    )
    llm = FakeBackend()
    results = feste.compute([shout(llm.chat(f"{i}")) for i in range(9)], scheduler=kind)[0]

    assert len(results) == 9


@pytest.mark.parametrize("method", ["stale", "close"])
def test_an_executor_that_cannot_be_closed_harms_no_later_run(method: str) -> None:
    """It is told in a warning, which names it, while another executor is looked up."""
    attributes: dict[str, Any] = {"stale": True, "close": bad}
    if method == "stale":
        attributes = {"stale": property(bad)}
    feste.compute(shout("a"), scheduler=executor(**attributes))
    with pytest.warns(PluginWarning, match=f"Faulty raised in {method}: OSError: no hands"):
        results = feste.compute(shout("b"))

    assert results == ("b!",)


def test_an_executor_whose_fetch_raises() -> None:
    """The values that it does not bring are lost, and nobody waits for them."""
    kind = executor(remote=True, fetch=bad)
    with pytest.raises(RunFailed) as failed:
        feste.compute(shout("a"), scheduler=kind)

    assert "Faulty raised in fetch: OSError: no hands" in str(failed.value.errors[0])


def test_a_release_that_raises_is_told_once_its_run_is_over() -> None:
    """No run is left that it could fail, so it is a warning."""

    class Clinging(LocalExecutor):
        remote = True

        def release(self, ref: Any) -> None:
            raise OSError("it stays")

    error: FesteError = PluginError("")
    try:
        feste.compute(shout(shout("a")), scheduler=Clinging, optimize={"fuse": False})
    except RunFailed as failed:
        error = failed.errors[0]

    assert "Clinging raised in release: OSError: it stays" in str(error)


def test_what_is_reported_twice_counts_once() -> None:
    """A second report of a task or a request changes nothing, and no run waits for itself."""

    class Twice(Reporter):
        def done(self, *given: Any) -> None:
            super().done(*given)
            super().done(*given)

        def done_together(self, outcomes: Any) -> None:
            super().done_together([*outcomes, *outcomes])

        def sent(self, *given: Any) -> None:
            super().sent(*given)
            super().sent(*given)

    class Stuttering(LocalExecutor):
        def start(self, report: Reporter) -> None:
            super().start(Twice(report.put, report.executor))

    llm = FakeBackend()
    nodes = [shout(llm.chat("a")), *[llm.chat(f"{i}") for i in range(3)], llm.embed("b")]
    results = feste.compute(nodes, scheduler=Stuttering, deadline=20)[0]

    assert results == feste.compute(nodes)[0]
    assert len(llm.requests) == 5
