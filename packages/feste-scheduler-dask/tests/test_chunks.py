"""Short tasks share a task of Dask, and none of them is worse off for it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import dask
import distributed
import pytest
from dask.utils import key_split

import feste
from feste.errors import ConfigError, NodeError, UpstreamFailed, WorkerLost
from feste.scheduler import Reporter
from feste.scheduler.dask import DaskExecutor
from feste.scheduler.dask.tasks.outcomes import Failed
from feste.scheduler.dask.tasks.refs import Ref, Result, lost
from feste.scheduler.driver import driver
from feste.testing import FakeBackend


def know(client: Any, *tasks: Any) -> None:
    """Let tasks be known as short ones with small results, as they are after some have run."""
    feste.compute(0, feste.task(abs)(-1), scheduler=client)
    for hands in driver()._executors.values():
        if isinstance(hands, DaskExecutor) and not hands.stale:
            hands._workers.known.sizes.update({task.name: 0 for task in tasks})
    driver().brain.dispatcher.cost.update({task.name: 1e-5 for task in tasks})


@pytest.fixture
def short(client: Any) -> Callable[..., None]:
    """Let tasks be known as short to the cluster of all tests."""
    return partial(know, client)


def test_tasks_known_as_short_share_one(client: Any) -> None:
    """Once some have run, many go together; they are named after their function all the same."""

    @feste.task
    def quick_one(x: int) -> tuple[int, str]:
        import distributed

        return x, str(distributed.get_worker().get_current_task())

    feste.compute([quick_one(i) for i in range(8)], scheduler=client)
    results = feste.compute([quick_one(i) for i in range(300)], scheduler=client)[0]

    keys = {key for _, key in results}
    assert [x for x, _ in results] == list(range(300))
    assert len(keys) < 100
    assert {key_split(key) for key in keys} == {"quick_one"}


def test_a_chain_of_short_tasks_is_one(client: Any, short: Any) -> None:
    """Tasks that need only the one before go with it, and get its value on the worker."""

    @feste.task
    def link(x: list[str]) -> list[str]:
        import distributed

        return [*x, str(distributed.get_worker().get_current_task())]

    node = link([])
    for _ in range(9):
        node = link(node)
    short(link)
    keys = node.compute(scheduler=client, optimize=False)
    assert len(keys) == 10
    assert len(set(keys)) < 5


def test_one_of_a_chunk_fails_alone(client: Any, short: Any) -> None:
    """Errors, and nodes that tasks return, concern their own task and what needs it."""
    llm = FakeBackend()

    @feste.task
    def mixed(x: int) -> Any:
        if x % 5 == 1:
            raise ValueError(x)
        if x % 5 == 2:
            return [llm.chat(f"about {x}"), x]
        return x

    @feste.task
    def after(x: Any) -> Any:
        return ["after", x]

    nodes = [after(mixed(i)) for i in range(20)]
    short(mixed, after)
    results = feste.compute(nodes, scheduler=client, on_error="return", optimize=False)[0]

    for i, result in enumerate(results):
        if i % 5 == 1:
            assert isinstance(result, UpstreamFailed)
            assert isinstance(result.roots[0].__cause__, ValueError)
            assert result.roots[0].__cause__.args == (i,)
        elif i % 5 == 2:
            assert result == ["after", [llm.chat(f"about {i}").compute(), i]]
        else:
            assert result == ["after", i]
    places = {r.roots[0].origin for r in results if isinstance(r, UpstreamFailed)}
    assert len(places) == 1


def test_one_that_cannot_be_sent_hurts_no_other(client: Any, short: Any) -> None:
    """An argument that does not pickle fails its own task."""

    @feste.task
    def same(x: Any) -> Any:
        return x

    short(same)
    nodes = [same(threading.Lock() if i == 5 else i) for i in range(10)]
    results = feste.compute(nodes, scheduler=client, on_error="return")[0]
    assert [type(r) for r in results] == [int] * 5 + [ConfigError] + [int] * 4


def test_one_that_cannot_come_here_is_still_a_value(client: Any, short: Any) -> None:
    """What does not pickle is a value for tasks on its worker, also if the client fetched its chunk."""

    @feste.task
    def lock_or_error(x: int) -> Any:
        import threading

        if x == 2:
            raise KeyError(x)
        return threading.Lock() if x == 3 else x

    @feste.task
    def is_lock(x: Any) -> bool:
        return not isinstance(x, int)

    short(lock_or_error, is_lock)
    made = [lock_or_error(i) for i in range(6)]
    values, locks = feste.compute(
        made, [is_lock(m) for m in made], scheduler=client, on_error="return", optimize=False
    )
    assert [type(r) for r in values] == [int, int, NodeError, NodeError, int, int]
    assert "cannot pickle" in str(values[3])
    assert [r for i, r in enumerate(locks) if i != 2] == [False, False, True, False, False]


def test_one_that_workers_cannot_read_hurts_no_other(
    client: Any, short: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An argument of a module that the workers lack fails its own task."""
    (tmp_path / "not_on_workers.py").write_text("class Here:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import not_on_workers  # type: ignore[import-not-found]

    @feste.task
    def kind(x: Any) -> str:
        return type(x).__name__

    given = [not_on_workers.Here() if i == 4 else i for i in range(8)]
    short(kind)
    results = feste.compute([kind(x) for x in given], scheduler=client, on_error="return")[0]
    assert [r for i, r in enumerate(results) if i != 4] == ["int"] * 7
    assert isinstance(results[4], NodeError)
    assert "not_on_workers" in str(results[4])


def test_one_that_kills_workers_hurts_no_other(new_cluster: Callable[..., Any]) -> None:
    """A chunk that was lost with its workers is run again one by one: the guilty one fails."""

    @feste.task
    def maybe_deadly(x: int) -> int:
        if x == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        new_cluster(1) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        know(client, maybe_deadly)
        nodes = [maybe_deadly(i) for i in range(5)]
        results = feste.compute(nodes, scheduler=client, on_error="return")[0]
    assert isinstance(results[2], WorkerLost)
    assert [r for i, r in enumerate(results) if i != 2] == [0, 1, 3, 4]


def test_what_waits_behind_a_long_task_goes_elsewhere(
    client: Any, short: Any, tmp_path: Path
) -> None:
    """A chunk gives back what it has not begun: here its first task waits for its last one."""
    mark = tmp_path / "last"

    @feste.task
    def first_or_last(x: int) -> int:
        deadline = time.monotonic() + 60
        while x == 0 and not mark.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if x == 7:
            mark.touch()
        return x

    short(first_or_last)
    nodes = [first_or_last(i) for i in range(8)]
    assert feste.compute(nodes, scheduler=client)[0] == list(range(8))


def test_what_was_given_back_is_not_run_twice(client: Any, short: Any, tmp_path: Path) -> None:
    """It runs elsewhere, also while its chunk ends."""
    log, last, go_on = (tmp_path / name for name in ("ran", "last", "go on"))

    @feste.task
    def waits(x: int) -> int:
        with log.open("a") as file:
            file.write(f"{x}\n")
        if x == 7:
            last.touch()
        deadline = time.monotonic() + 60
        while (x == 0 and not last.exists()) or (x == 7 and not go_on.exists()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return x

    @feste.task(executor="inline")
    def tell(x: int) -> None:
        go_on.touch()

    short(waits)
    nodes = [waits(i) for i in range(8)]
    feste.compute(nodes, tell(nodes[0]), scheduler=client)
    assert sorted(log.read_text().split()) == list("01234567")


def test_each_task_of_a_lost_chunk_has_an_error_of_its_own() -> None:
    """So each can say where its own task was called."""
    result = Result(None)  # type: ignore[arg-type]
    result.outcome = Failed(lost(None))
    assert Ref(result, 0).value is not Ref(result, 1).value


def test_results_that_were_large_stay_alone(client: Any, short: Any) -> None:
    """A task whose results were large before shares no task of Dask."""

    @feste.task
    def bulky(x: int) -> tuple[bytes, str]:
        import distributed

        return bytes(x), str(distributed.get_worker().get_current_task())

    short(bulky)
    feste.compute(bulky(100_000), scheduler=client)
    results = feste.compute([bulky(10) for _ in range(6)], scheduler=client)[0]
    assert len({key for _, key in results}) == 6


def test_results_that_share_a_task_are_small_together(client: Any, short: Any) -> None:
    """Many results of middling size are held and sent by the megabyte, not all as one."""

    @feste.task
    def middling(x: int) -> str:
        import distributed

        return str(distributed.get_worker().get_current_task())

    short(middling)
    for hands in driver()._executors.values():
        if isinstance(hands, DaskExecutor) and not hands.stale:
            hands._workers.known.sizes["middling"] = 60_000
    keys = feste.compute([middling(i) for i in range(60)], scheduler=client)[0]
    assert max(keys.count(key) for key in keys) == 1_048_576 // 60_000


def test_few_tasks_are_spread(client: Any, short: Any) -> None:
    """Work that takes longer than a millisecond shares a task only when every place has some."""

    @feste.task
    def some_ms(x: int) -> str:
        import distributed

        return str(distributed.get_worker().get_current_task())

    short(some_ms)
    driver().brain.dispatcher.cost["some_ms"] = 0.005
    keys = feste.compute([some_ms(i) for i in range(4)], scheduler=client)[0]
    assert len(set(keys)) == 4


def test_operators_of_a_chunk_stay_here(client: Any, short: Any) -> None:
    """Operators on values that are here run here, also beside tasks for workers."""
    here = os.getpid()

    class Local:
        def __init__(self, x: int) -> None:
            self.x = x
            self.lock = threading.Lock()  # so it could not be sent

        @property
        def pid(self) -> int:
            return os.getpid() + 0 * self.x

    @feste.task
    def remote(x: int) -> int:
        return os.getpid() + 0 * x

    @feste.task(executor="inline")
    def local(x: int) -> Local:
        return Local(x)

    short(remote)
    driver().brain.dispatcher.cost["getattr"] = 1e-5
    nodes = [n for i in range(6) for n in (local(i).pid, remote(i), remote(local(i).x))]
    pids = feste.compute(nodes, scheduler=client, optimize=False)[0]
    assert pids[::3] == [here] * 6
    assert here not in [*pids[1::3], *pids[2::3]]


# --- what workers tell ----------------------------------------------------------------------------


class Spy(DaskExecutor):
    """An executor whose reports are kept.

    :param client: the client.
    :param deaf: whether it hears nothing from workers.
    """

    def __init__(self, client: Any, deaf: bool = False) -> None:
        super().__init__(client)
        self.seen: list[Any] = []
        self.deaf = deaf

    def start(self, report: Reporter) -> None:
        def put(told: Any) -> None:
            self.seen.append(told)
            report.put(told)

        super().start(Reporter(put, report.executor))
        if self.deaf:
            self._workers._ends.notes.close()


def done(seen: list[Any]) -> list[tuple[Any, ...]]:
    """The ends of users' tasks on workers, as reported."""
    together = [o for r in seen if r[0] == "done_together" for o in r[2]]
    return [o for o in together if o[0].stage == "run" and type(o[0].node.op) is feste.delayed.Task]


def test_seconds_are_those_on_the_worker(client: Any) -> None:
    """Every task is reported with its worker and its own time there, not that of its queue."""

    @feste.task
    def nap(x: float) -> float:
        begun = time.perf_counter()
        time.sleep(x)
        return time.perf_counter() - begun

    spy = Spy(client)
    naps = feste.compute([nap(0.01 * (i % 2)) for i in range(60)], scheduler=spy)[0]
    ends = done(spy.seen)
    names = {str(n) for n in client.run(lambda dask_worker: dask_worker.name).values()}
    assert len(ends) == 60
    assert {worker for *_, worker in ends} <= names
    told = sorted(seconds for *_, seconds, _ in ends)
    # a task's own measure is inside the worker's, which is inside the time of the whole run
    assert all(t >= n for t, n in zip(told, sorted(naps), strict=True))
    assert sum(told) < sum(naps) + 60 * 0.01


def test_notes_may_be_lost(client: Any) -> None:
    """Without what workers tell, tasks are measured here, and each is alone."""

    @feste.task
    def unheard(x: int) -> str:
        import distributed

        return str(distributed.get_worker().get_current_task())

    spy = Spy(client, deaf=True)
    for _ in range(2):
        keys = feste.compute([unheard(i) for i in range(20)], scheduler=spy)[0]
        assert len(set(keys)) == 20
    ends = done(spy.seen)
    assert len(ends) == 40
    assert all(seconds > 0 and not worker for *_, seconds, worker in ends)


def test_a_closed_executor_hears_no_more(client: Any, until: Any) -> None:
    """The scheduler of Dask sends nothing to an executor that is closed."""

    hands = Spy(client)
    feste.compute(feste.task(abs)(-1), scheduler=hands)
    topic = hands._workers._ends.notes.topic

    def subscribers(dask_scheduler: Any) -> int:
        return len(dask_scheduler._broker._topics[topic].subscribers)

    assert client.run_on_scheduler(subscribers) == 1
    hands.close()
    assert until(lambda: client.run_on_scheduler(subscribers) == 0)
