"""Dask collections and futures as inputs: computed on the cluster of the run, and left there."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import dask.bag
import distributed
import pytest

import feste
from feste.errors import ConfigError, NodeError, RunFailed, UpstreamFailed, WorkerLost
from feste.prompt import Prompt
from feste.testing import FakeBackend

# Functions are made inside the tests: workers know this module by no name, so they get them by value.


@pytest.fixture(scope="module")
def elsewhere(new_cluster: Callable[..., Any]) -> Iterator[Any]:
    """A client of another cluster: threads of this process."""
    with (
        new_cluster(1, threads=2, processes=False) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


def noted(path: Path) -> Callable[..., Any]:
    """A function that writes down the process of each of its calls."""

    def note(value: Any = None) -> Any:
        with path.open("a") as file:
            print(os.getpid(), file=file)
        return value

    return note


def pids(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()]


def of(client: Any) -> set[int]:
    return set(client.run(os.getpid).values())


def test_all_of_one_run_are_computed_together(client: Any, tmp_path: Path) -> None:
    """Collections of all kinds are computed in one go, on a cluster that is not Dask's default."""
    numpy = pytest.importorskip("numpy")
    import dask.array

    note = noted(tmp_path / "pids")
    shared = dask.delayed(note, pure=False)(3)
    made = [
        dask.bag.from_sequence([3]),
        shared + 1,
        dask.array.from_delayed(dask.delayed(numpy.array)([3, 5]), (2,), int),
        dask.bag.from_sequence([7, 8], npartitions=2),
        dask.delayed(os.getpid)(),
        shared * 2,
    ]

    @feste.task
    def tell(*values: Any) -> list[Any]:
        return [*map(str, values), os.getpid()]

    llm = FakeBackend()
    reply = llm.chat(Prompt("{{ a }} {{ b }}")(a=made[1], b={"in": made[3]}))
    told, _, given = feste.compute(tell(*made, made[1]), reply, made[1], scheduler=client)
    assert told[:4] == ["[3]", "4", "[3 5]", "[7, 8]"]
    assert {int(told[4]), told[7]} <= of(client)
    assert (told[5:7], given) == (["6", "4"], 4)
    assert llm.requests[0].body["messages"][0]["content"] == "4 {'in': [7, 8]}"
    (pid,) = pids(tmp_path / "pids")
    assert pid in of(client)


def test_a_cluster_that_is_started_computes_them(
    tmp_path: Path, disconnect: Callable[[], None]
) -> None:
    """With scheduler="dask" and no client, that is the cluster that the run starts."""
    value = dask.delayed(noted(tmp_path / "pids"))(1)
    tell = feste.task(lambda value: (value, os.getpid()))
    told, pid = tell(value).compute(scheduler="dask")
    disconnect()
    assert told == 1
    assert os.getpid() not in {pid, *pids(tmp_path / "pids")}


def test_values_stay_on_workers(client: Any, tmp_path: Path, heavy: Any) -> None:
    """A value that only tasks need never comes to the client; a prompt or the caller gets it."""
    path = tmp_path / "pids"
    path.touch()
    make = heavy(path)
    inputs = [dask.delayed(make)(1), client.submit(make, 2)]

    # of names that no other test has: results of small tasks may travel together
    @feste.task
    def pass_it(value: Any) -> Any:
        return value

    @feste.task
    def add_up(*values: Any) -> int:
        return int(sum(value.number for value in values))

    passed = [pass_it(value) for value in inputs]
    assert feste.compute(add_up(*passed), add_up(*inputs), scheduler=client) == (3, 3)
    assert os.getpid() not in pids(path)
    llm = FakeBackend()
    feste.compute(llm.chat(Prompt("{{ it }}")(it=str_of(inputs[1]))), scheduler=client)
    assert llm.requests[0].body["messages"][0]["content"] == "heavy 2"
    assert os.getpid() not in pids(path)
    assert feste.compute(inputs, scheduler=client)[0][1].number == 2
    assert os.getpid() in pids(path)


def node_of(value: Any) -> Any:
    return feste.task(lambda value: value)(value)


def str_of(value: Any) -> Any:
    return feste.task(str)(value)


def test_users_nodes_keep_values_only(client: Any) -> None:
    """After a run the nodes of the user hold no reference to a worker, whatever they keep."""
    node = node_of(dask.delayed(int)(3))
    for keep in ("paid", "all"):
        assert feste.compute(node, scheduler=client, keep=keep) == (3,)
    assert node._node.deps[0].value is feste.node.PENDING
    assert node.compute() == 3


def test_futures_are_inputs(client: Any, cluster: Any, elsewhere: Any, tmp_path: Path) -> None:
    """A future of the cluster is used where it is, through whichever client; others come by here."""
    note = noted(tmp_path / "pids")
    tell = feste.task(lambda *values: (values, os.getpid()))
    with distributed.Client(cluster, set_as_default=False) as second:
        futures = [client.submit(note, 1, pure=False), second.submit(note, 2, pure=False)]
        futures.append(elsewhere.submit(lambda: 3))
        node = tell(*futures, [futures[0]])
        values, pid = node.compute(scheduler=client)
        assert values == (1, 2, 3, [1])
        assert pid in of(client)
        assert len(pids(tmp_path / "pids")) == 2
        assert node.compute()[0] == (1, 2, 3, [1])
        with feste.context.set(eager=True):
            assert tell(futures[0], [futures[1]])[0] == (1, [2])
        assert futures[0].status == "finished"


def test_persisted_collections_are_used_as_they_are(client: Any, tmp_path: Path) -> None:
    """What lives on the cluster is not computed again."""
    there = client.persist(dask.delayed(noted(tmp_path / "pids"), pure=False)(5))
    tell = feste.task(lambda value: value)
    for _ in range(2):
        assert tell(there + 1).compute(scheduler=client) == 6
    assert len(pids(tmp_path / "pids")) == 1


def test_every_way_to_run_takes_them(client: Any) -> None:
    """as_completed, map, acompute and nodes that a task returns take collections as compute does."""
    double = feste.task(lambda x: (2 * x, os.getpid()))

    @feste.task(emits=True)
    def agent(n: int) -> Any:
        return [double(dask.delayed(int)(n))]

    def build(n: int) -> Any:
        return double(dask.delayed(int)(n))

    ran = [*feste.map(build, range(6), window=2, scheduler=client)]
    ran += [v for _, v in feste.as_completed([build(6), build(7)], scheduler=client)]
    ran += asyncio.run(feste.acompute(build(8), scheduler=client))
    ran += agent(9).compute(scheduler=client)
    assert sorted(v for v, _ in ran) == [2 * n for n in range(10)]
    assert {pid for _, pid in ran} <= of(client)


def test_a_failed_input_costs_what_needs_it(client: Any) -> None:
    """The error tells what was raised on the worker, and where it was given; all else is delivered."""

    def boom(text: str) -> None:
        raise KeyError(text)

    @feste.task
    def tell(value: Any) -> str:
        return str(value)

    bad = dask.delayed(boom)("oh")
    nodes = tell(bad), tell(dask.delayed(int)(4)), bad, FakeBackend().chat("Hi")
    first, second, third, reply = feste.compute(*nodes, scheduler=client, on_error="return")
    assert (second, bool(reply)) == ("4", True)
    assert isinstance(first, UpstreamFailed)
    for error in (first.roots[0], third):
        assert isinstance(error, NodeError)
        assert error.cause_type == "KeyError"
        assert "in boom" in error.traceback
        assert isinstance(error.__cause__, KeyError)
    assert "test_inputs.py" in first.roots[0].origin
    with pytest.raises(RunFailed, match="result failed") as caught:
        tell(bad).compute(scheduler=client)
    assert isinstance(caught.value.__cause__, NodeError)


def test_what_cannot_be_started_is_told(client: Any) -> None:
    """A collection that Dask cannot send to the cluster fails by itself, not those beside it."""
    bad = dask.delayed(threading.Lock())
    one, two = feste.compute(
        node_of(bad), node_of(dask.delayed(int)(4)), scheduler=client, on_error="return"
    )
    assert isinstance(one, UpstreamFailed)
    assert isinstance(one.roots[0], ConfigError)
    assert "Delayed" in str(one.roots[0])
    assert "lock" in str(one.roots[0])
    assert two == 4


def test_what_cannot_travel_is_told(client: Any) -> None:
    """A value that cannot leave its worker is an error where it is needed here, and never waited for."""
    lock = dask.delayed(threading.Lock)()
    (error,) = feste.compute(lock, scheduler=client, on_error="return")
    assert isinstance(error, NodeError)
    assert "cannot be sent" in str(error)


def test_an_input_that_kills_workers_fails(
    client: Any, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An input that no worker survives is lost, with what needs it; the run goes on."""
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 0)
    monkeypatch.setattr("feste.scheduler.dask.tasks.refs._TRIES_ALONE", 1)

    def deadly() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    one, two = feste.compute(
        node_of(dask.delayed(deadly)()), node_of(1), scheduler=client, on_error="return"
    )
    assert isinstance(one.roots[0], WorkerLost)
    assert "memory" in str(one.roots[0])
    assert two == 1


def test_a_cancelled_input_fails(client: Any, until: Callable[..., bool], tmp_path: Path) -> None:
    """A future that is cancelled, before or during the run, is told; nothing waits for it."""
    begun, go_on = tmp_path / "begun", tmp_path / "go on"
    before, during = (client.submit(hold(begun, go_on), pure=False) for _ in range(2))
    before.cancel()
    ended: list[Any] = []

    def run() -> None:
        nodes = node_of(before), node_of(during)
        ended.extend(feste.compute(*nodes, scheduler=client, on_error="return"))

    thread = threading.Thread(target=run)
    thread.start()
    assert until(begun.exists)
    during.cancel()
    thread.join(30)
    go_on.touch()
    assert [type(error.roots[0]) for error in ended] == [WorkerLost, WorkerLost]
    assert "cancelled" in str(ended[1])


def hold(begun: Path, go_on: Path) -> Callable[[], int]:
    """A function that returns when a file is there."""

    def wait() -> int:
        import time

        begun.touch()
        while not go_on.exists():
            time.sleep(0.01)
        return 1

    return wait


def test_a_client_that_closes_ends_the_wait(
    cluster: Any, until: Callable[..., bool], tmp_path: Path
) -> None:
    """A run that waits for an input ends with WorkerLost when its client is closed."""
    client = distributed.Client(cluster, set_as_default=False)
    begun, go_on = tmp_path / "begun", tmp_path / "go on"
    node = node_of(dask.delayed(hold(begun, go_on))())
    ended: list[Any] = []
    thread = threading.Thread(
        target=lambda: ended.extend(feste.compute(node, scheduler=client, on_error="return"))
    )
    thread.start()
    assert until(begun.exists)
    client.close()
    thread.join(30)
    go_on.touch()
    assert isinstance(ended[0].roots[0], WorkerLost)


def test_nothing_is_held_when_a_run_is_left(
    client: Any, until: Callable[..., bool], tmp_path: Path
) -> None:
    """A run that is stopped lets go of inputs under way, and of those that it had."""

    def held() -> list[str]:
        return [key for key in client.futures if str(key).startswith(("input-", "wait-"))]

    begun, go_on = tmp_path / "begun", tmp_path / "go on"
    nodes = [node_of(dask.delayed(hold(begun, go_on))()), node_of(dask.delayed(int)(2))]
    results = feste.as_completed(nodes, scheduler=client)
    assert next(results)[1] == 2
    results.close()
    assert until(lambda: not held())
    go_on.touch()


def test_what_is_known_is_told_before_anything_runs(client: Any, tmp_path: Path) -> None:
    """A mistake that can be found without the values is told before a collection is computed."""
    value = dask.delayed(noted(tmp_path / "pids"))(1)
    once = feste.task(once=True)(lambda value: value)
    for scheduler in (client, "local"):
        with pytest.raises(ConfigError, match="store"):
            once(value).compute(scheduler=scheduler)
    assert not (tmp_path / "pids").exists()


def test_dataframes_are_inputs(client: Any) -> None:
    """A Dask dataframe arrives as a pandas one."""
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    import dask.dataframe

    frame = dask.dataframe.from_pandas(pandas.DataFrame({"n": range(10)}), npartitions=3)
    total = feste.task(lambda frame, top: (type(frame).__name__, int(frame.n.sum()), int(top)))
    assert total(frame, frame.n.max()).compute(scheduler=client) == ("DataFrame", 45, 9)
