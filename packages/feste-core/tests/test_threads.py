"""Many threads of the user's at once: each gets its own values, all share one driver and one gate."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import feste
from feste import context
from feste.backend import Limits
from feste.errors import InvalidRequest, RunFailed
from feste.scheduler.driver import driver
from feste.testing import FakeBackend, FakeParams

THREADS = 50
LONG = 60.0
GREEDY = FakeParams(temperature=0.0)


@feste.task
def increment(x: int) -> int:
    return x + 1


def at_once(what: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """Call a function from many threads that all start together; return what each got."""
    together = threading.Barrier(count)

    def begin(i: int) -> Any:
        together.wait(LONG)
        return what(i)

    with ThreadPoolExecutor(count) as pool:
        return [future.result(LONG) for future in [pool.submit(begin, i) for i in range(count)]]


def test_each_thread_gets_its_own_values() -> None:
    """Fifty graphs computed at once: no value crosses from one to another."""
    llm = FakeBackend(model="threads")

    def build(i: int) -> list[Any]:
        mine = [increment(1000 * i + k) for k in range(20)]
        return [mine, llm.complete(f"thread {i}", GREEDY), llm.embed(f"thread {i}")]

    got = at_once(lambda i: feste.compute(build(i))[0])

    for i, (numbers, _, _) in enumerate(got):
        assert numbers == [1000 * i + k + 1 for k in range(20)]
    assert got == [feste.compute(build(i))[0] for i in range(THREADS)]
    assert len({text for _, text, _ in got}) == THREADS


def test_the_first_runs_of_a_process_may_come_all_at_once() -> None:
    """One driver is made for all of them, also when nobody has computed before."""
    code = """if True:
        import threading
        together = threading.Barrier(20)
        got = []

        def work(i):
            together.wait()
            import feste
            got.append(feste.task(abs)(-i).compute())

        threads = [threading.Thread(target=work, args=(i,)) for i in range(20)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(sorted(got) == list(range(20)))
        print(sum(t.name == "feste-brain" for t in threading.enumerate()))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG, check=False
    )

    assert (done.stdout, done.stderr) == ("True\n1\n", "")


def test_a_failure_in_one_thread_is_that_threads() -> None:
    """Runs fail by themselves: others that run at the same time do not hear of it."""
    llm = FakeBackend(model="threads-fail", fail={"odd": InvalidRequest("odd ones are refused")})

    def work(i: int) -> str:
        try:
            return str(llm.chat(f"{'odd' if i % 2 else 'even'} {i}").compute())
        except RunFailed as error:
            assert error.report.states == {"failed": 1}
            return "failed"

    got = at_once(work)

    assert [text == "failed" for text in got] == [i % 2 == 1 for i in range(THREADS)]


def test_each_thread_has_its_own_last_report_and_overlays() -> None:
    """``last_report`` and ``with context.set(...)`` belong to the thread."""

    def work(i: int) -> tuple[int, str]:
        with context.set(on_error="return" if i % 2 else "stop"):
            feste.compute([increment(k) for k in range(i + 1)])
            report = feste.last_report()
            assert report is not None
            return report.nodes, context.get("on_error")

    got = at_once(work)

    assert got == [(i + 1, "return" if i % 2 else "stop") for i in range(THREADS)]
    assert context.get("on_error") == "raise"


def test_one_limit_holds_for_all_threads() -> None:
    """The gate is the process's: many threads together keep to the account's concurrency."""
    llm = FakeBackend(model="threads-limit", latency=0.002, limits=Limits(concurrency=3))

    at_once(lambda i: feste.compute([llm.chat(f"{i}.{k}") for k in range(3)]), 20)

    assert len(llm.requests) == 60
    assert llm.peak <= 3


def test_threads_that_come_and_go_leave_nothing() -> None:
    """Threads of the user's own are not kept by Feste when they end."""
    before = set(threading.enumerate())

    at_once(lambda i: increment(i).compute())

    left = {t for t in threading.enumerate() if t not in before}
    assert {t.name for t in left if not t.name.startswith("feste-")} == set()
    assert driver().brain.runs == []
