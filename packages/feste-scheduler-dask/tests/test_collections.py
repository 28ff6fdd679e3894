"""Lazy values as Dask collections on a real cluster, without Feste's scheduler."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from typing import Any

import dask
import distributed
import pytest
from dask.graph_manipulation import bind, checkpoint, clone, wait_on

import feste
from feste.errors import RunFailed, UngatedCall
from feste.testing import FakeBackend, FakeParams, fresh_draws


def free() -> Any:
    """Nodes that cost nothing: sync and async tasks, operators, a task that returns nodes."""

    @feste.task
    def plus(a: int, b: int) -> int:
        return a + b

    @feste.task
    async def later(value: Any) -> Any:
        await asyncio.sleep(0)
        return [value]

    @feste.task(emits=True)
    def grow(n: int) -> Any:
        return {"n": plus(n, 1), "more": grow(n - 1) if n else later("end")}

    one = plus(1, 2)
    return later(one)[0] * 2, grow(2), [plus(one, one)]


@pytest.fixture
def threads(new_cluster: Callable[..., Any]) -> Iterator[Any]:
    """A client of a cluster of threads in this process: it may pay."""
    with (
        new_cluster(1, threads=4, processes=False) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


def test_free_nodes_run_on_any_cluster(client: Any) -> None:
    """client.compute and dask.compute run what costs nothing on workers, and give the same."""
    expected = feste.compute(*free())
    first, second, third = free()
    futures = client.compute([first, second, *third])
    assert client.gather(futures) == [*expected[:2], *expected[2]]
    with client.as_current():
        assert dask.compute(*free()) == expected
        assert feste.compute(*dask.persist(*free())) == expected
        assert dask.delayed(lambda *values: values)(*free()).compute() == expected
    assert feste.compute(*free(), scheduler=client.get) == expected


def test_paid_calls_do_not(client: Any) -> None:
    """A paid call on a worker refuses, and names the way to run it, wherever it hides."""
    llm = FakeBackend()

    @feste.task(emits=True)
    def buy(text: str) -> Any:
        return {"bought": FakeBackend().chat(text)}

    batch = [llm.complete(f"{i}") for i in range(3)]
    with client.as_current():
        for node in (llm.chat("x"), buy("x"), batch, dask.delayed(list)(batch)):
            with pytest.raises(UngatedCall, match=r'feste.compute\(..., scheduler="dask"\)'):
                dask.compute(node)
    with pytest.raises(UngatedCall):
        client.compute(llm.chat("x")).result()
    with pytest.raises(RunFailed) as caught:
        feste.compute(llm.chat("x"), scheduler=client.get)
    assert isinstance(caught.value.errors[0], UngatedCall)
    assert not llm.requests


def test_threads_of_this_process_may_pay(threads: Any) -> None:
    """On a cluster inside this process calls go through its gate, once, and keep their answers."""

    def build() -> tuple[FakeBackend, list[Any]]:
        fresh_draws()
        llm = FakeBackend()

        @feste.task
        def join(*parts: Any) -> str:
            return "|".join(map(str, parts))

        words = [llm.complete(f"word {i}") for i in range(4)]
        alike = [llm.chat("alike") for _ in range(2)]
        sure = [llm.chat("sure", FakeParams(temperature=0)) for _ in range(2)]
        return llm, [join(*words), join(alike[1], alike[0]), *sure]

    _, nodes = build()
    expected = feste.compute(*nodes)
    llm, nodes = build()
    assert tuple(threads.gather(threads.compute(nodes))) == expected
    bought = len(llm.requests)
    assert tuple(threads.gather(threads.compute(nodes))) == expected
    assert feste.compute(*nodes) == expected
    assert len(llm.requests) == bought


def test_persisted_nodes_are_values(client: Any) -> None:
    """client.persist gives the node with its value, which every run takes; a paid call refuses."""

    @feste.task
    def plus(a: int, b: int) -> int:
        return a + b

    one = client.persist(plus(1, 2))
    two, three = client.persist([plus(one, 1), plus(one, 2)])
    assert feste.compute(one, plus(two, three), scheduler=client) == (3, 9)
    assert plus(one, two).compute() == 7
    assert plus(client.compute(plus(4, 4)), 1).compute(scheduler=client) == 9
    llm = FakeBackend()
    with pytest.raises(UngatedCall):
        client.persist(llm.chat("x"))
    assert not llm.requests


def test_graph_manipulation_on_a_cluster(client: Any) -> None:
    """What only waits for a node works, and is refused a paid call; what would copy one says so."""

    @feste.task
    def plus(a: int, b: int) -> int:
        return a + b

    llm = FakeBackend()
    with client.as_current():
        assert dask.compute(bind(dask.delayed(int)(3), plus(1, 2))) == (3,)
        assert dask.compute(checkpoint(plus(1, 2), plus(3, 4))) == (None,)
        for waiting in (bind(dask.delayed(int)(3), llm.chat("x")), checkpoint(llm.chat("x"))):
            with pytest.raises(UngatedCall):
                dask.compute(waiting)
        for copy in (clone, wait_on, lambda node: bind(node, plus(1, 2))):
            with pytest.raises(NotImplementedError, match="build the lazy value anew"):
                copy(plus(1, 2))
    assert not llm.requests


def test_collections_on_the_cluster_are_inputs(client: Any) -> None:
    """A Dask collection that lives on a cluster is computed there, and its value given to the node."""

    @feste.task
    def tell(value: Any, other: Any) -> str:
        return f"{value} {other}"

    with client.as_current():
        there = dask.delayed(os.getpid)().persist()
        bag = dask.delayed(sum)([1, 2, 3])
        told = tell(there, {"bag": [bag]}).compute()
        again = tell(there, bag).compute(scheduler="dask")
    pid = told.split()[0]
    assert int(pid) in client.run(os.getpid).values()
    assert told == f"{pid} {{'bag': [6]}}"
    assert again == f"{pid} 6"
