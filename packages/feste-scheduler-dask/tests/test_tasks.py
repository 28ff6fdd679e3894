"""What runs where: users' Python on workers, everything else in the client."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import dask
import pytest

import feste
from feste.backend import Backend, operation
from feste.prompt import Prompt
from feste.testing import FakeBackend, FakeParams, fresh_draws

# Tasks are made inside the tests: workers know this module by no name, so they get them by value.


def test_users_python_runs_on_workers(client: Any) -> None:
    """Sync, async and process tasks run on workers; inline ones and operators on local values here."""

    @feste.task
    def sync(x: int) -> int:
        return os.getpid()

    @feste.task
    async def later(x: int) -> int:
        await asyncio.sleep(0)
        return os.getpid()

    @feste.task(executor="process")
    def apart(x: int) -> int:
        return os.getpid()

    @feste.task(executor="inline")
    def here(x: int) -> tuple[int, int]:
        return os.getpid(), x

    workers = set(client.run(os.getpid).values())
    nodes = [sync(1), sync(2), later(3), later(4), apart(5)]
    pids, (mine, seen) = feste.compute(nodes, here(sync(6)), scheduler=client)
    assert set(pids) <= workers
    assert os.getpid() not in workers
    assert (mine, seen in workers) == (os.getpid(), True)


def test_values_go_from_worker_to_worker(client: Any, tmp_path: Path, heavy: Any) -> None:
    """What only tasks on workers need never comes to the client."""
    log = tmp_path / "arrivals"
    made = heavy(log)

    @feste.task
    def make(n: int) -> Any:
        return made(n)

    @feste.task
    def add(*parts: Any) -> Any:
        return made(sum(p.number for p in parts))

    @feste.task
    def number(part: Any) -> int:
        return part.number

    parts = [make(i) for i in range(6)]
    total = number(add(add(*parts[:3]), add(*parts[3:]), add(*parts)))
    assert total.compute(scheduler=client) == 30
    arrived = log.read_text().split() if log.exists() else []
    assert str(os.getpid()) not in arrived


def test_operators_go_where_their_values_are(client: Any, tmp_path: Path, heavy: Any) -> None:
    """An operator on a result that is on a worker runs there; only its own result comes here."""
    log = tmp_path / "arrivals"
    made = heavy(log)

    @feste.task
    def make(n: int) -> Any:
        return [made(n), n]

    assert (make(4)[1] + 1).compute(scheduler=client) == 5
    assert str(os.getpid()) not in (log.read_text() if log.exists() else "").split()


def test_arrays_travel_beside_the_pickle(client: Any) -> None:
    """A NumPy array goes from task to task and to the user, and can be written to on arrival."""
    numpy = pytest.importorskip("numpy")

    @feste.task
    def make(n: int) -> Any:
        import numpy

        return {"array": numpy.arange(n)}

    @feste.task
    def double(*given: Any) -> Any:
        for one in given:
            one["array"] *= 2
        return given[0]

    result = double(make(1000), make(10)).compute(scheduler=client)
    assert (result["array"] == 2 * numpy.arange(1000)).all()
    result["array"][0] = 5


def test_what_stays_here_gets_values(client: Any) -> None:
    """Prompts, requests and inline tasks are given values, wherever these were computed."""
    llm = FakeBackend()

    @feste.task
    def word(n: int) -> str:
        return f"word {n}"

    @feste.task(executor="inline")
    def tell(*given: Any) -> str:
        return repr(given)

    prompt = Prompt("{% for w in words %}{{ w }} {% endfor %}")
    words = [word(i) for i in range(3)]
    answer = llm.chat(prompt(words=words))
    direct = llm.complete(words[0], FakeParams(max_tokens=5))
    told = tell({"k": words}, answer)
    results = feste.compute(told, direct, scheduler=client)
    asked = {str(r.body.get("prompt") or r.body["messages"][0]["content"]) for r in llm.requests}
    assert asked == {"word 0 word 1 word 2 ", "word 0"}
    assert results[0] == f"({{'k': ['word 0', 'word 1', 'word 2']}}, {answer.compute()!r})"


def test_a_value_comes_here_once(client: Any, tmp_path: Path, heavy: Any) -> None:
    """However many prompts need a result, and the user too, it is fetched one time."""
    log = tmp_path / "arrivals"
    made = heavy(log)

    @feste.task
    def make(n: int) -> Any:
        return made(n)

    @feste.task(executor="inline")
    def use(part: Any, i: int) -> int:
        return int(part.number) + i

    part = make(7)
    results = feste.compute(part, [use(part, i) for i in range(20)], scheduler=client)
    assert results[1] == [7 + i for i in range(20)]
    assert log.read_text().split() == [str(os.getpid())]


def test_async_tasks_of_a_worker_share_a_loop(client: Any) -> None:
    """In each worker there is one loop for users' tasks, so they may share sessions and locks."""

    @feste.task
    async def loop(x: int) -> tuple[int, int]:
        return os.getpid(), id(asyncio.get_running_loop())

    seen = set(feste.compute([loop(i) for i in range(12)], scheduler=client)[0])
    assert len(seen) == len({pid for pid, _ in seen})


def test_tasks_have_readable_unique_names(client: Any) -> None:
    """On Dask's side a task is named after its function; computing a node again makes a new one."""

    @feste.task
    def who_am_i() -> str:
        import distributed

        return str(distributed.get_worker().get_current_task())

    node = who_am_i()
    names = [node.compute(scheduler=client) for _ in range(2)]
    assert len(set(names)) == 2
    assert {distributed_name(n) for n in names} == {"who_am_i"}


def distributed_name(key: str) -> str:
    from dask.utils import key_split

    return str(key_split(key))


def test_annotations_of_dask_hold(client: Any) -> None:
    """`dask.annotate` around a computation says on which workers it runs."""

    @feste.task
    def where(x: int) -> int:
        return os.getpid()

    for address, pid in client.run(os.getpid).items():
        with dask.annotate(workers=[address]):
            pids = feste.compute([where(i) for i in range(4)], scheduler=client)[0]
        assert set(pids) == {pid}


def test_nodes_keep_values_not_references(client: Any) -> None:
    """What a node keeps after a run is a value that a later run, here or there, can use."""
    llm = FakeBackend()

    @feste.task(emits=True)
    def agent(x: int) -> Any:
        return [llm.chat(f"about {x}"), number(x)]

    @feste.task
    def number(x: int) -> int:
        return x + 1

    for keep in ("all", "paid"):
        acted, kept = agent(1), llm.chat("kept")
        first = feste.compute(acted, kept, number(2), scheduler=client, keep=keep)
        sent = len(llm.requests)
        again = feste.compute(acted, kept, scheduler="local")
        assert again == first[:2]
        assert len(llm.requests) == sent


def test_requests_leave_from_the_client(client: Any) -> None:
    """Every request is sent by the client process: also of calls that tasks on workers return."""

    class WhoSends(Backend):
        @operation
        async def ask(self, prompt: str, params: FakeParams = FakeParams()) -> str:
            return f"{prompt} {os.getpid()}"

    backend = WhoSends()

    @feste.task(emits=True)
    def agent(n: int) -> Any:
        asked = backend.ask(f"emitted {n}")
        return [asked, agent.fn(n - 1)] if n else asked

    @feste.task
    def word(n: int) -> str:
        return f"word {n}"

    flat = str(feste.compute(agent(2), [backend.ask(word(i)) for i in range(3)], scheduler=client))
    assert flat.count(f" {os.getpid()}'") == 6


def test_emitted_calls_use_the_clients_that_are_here(client: Any) -> None:
    """A backend that a task took along comes back as what it was; an equal one is used for equal."""
    llm, twin = FakeBackend(), FakeBackend()

    @feste.task(emits=True)
    def ask(text: str) -> Any:
        return llm.chat(f"more of {text}")

    @feste.task(emits=True)
    def ask_anew(text: str) -> Any:
        return FakeBackend("other").chat(f"more of {text}")

    feste.compute([ask(twin.chat(f"topic {i}")) for i in range(5)], scheduler=client)
    assert (len(llm.requests), len(twin.requests)) == (5, 5)
    other = FakeBackend("other")
    feste.compute([ask_anew(other.chat(f"topic {i}")) for i in range(5)], scheduler=client)
    assert len(other.requests) == 10


def test_nodes_that_emitted_nodes_share_stay_one(client: Any) -> None:
    """What a task returns keeps its shape on the way: one call used three times is one draw."""

    def build() -> Any:
        fresh_draws()
        llm = FakeBackend()

        @feste.task
        def shout(text: str) -> str:
            return text.upper()

        @feste.task(emits=True)
        def agent(topic: str) -> Any:
            one, other = llm.chat(topic), llm.chat(topic)
            return {"raw": one, "loud": [shout(one), shout(shout(one))], "other": other}

        return agent(llm.chat("topic"))

    local = build().compute()
    remote = build().compute(scheduler=client)
    assert remote == local
    assert remote["loud"][0] == remote["loud"][1] == remote["raw"].upper() != remote["other"]


def test_tasks_see_changes_of_globals_between_runs(client: Any) -> None:
    """A task is sent anew for each run: it sees what its function's globals and closures are then."""
    factor = 2

    @feste.task
    def scale(x: int) -> int:
        return x * factor

    assert scale(3).compute(scheduler=client) == 6
    factor = 5
    assert scale(3).compute(scheduler=client) == 15


def test_runs_at_the_same_time_share_what_is_under_way(client: Any, tmp_path: Path) -> None:
    """Two runs that hold one node of a task with effects run it once, and both get its value."""
    log = tmp_path / "ran"

    @feste.task
    def effect(x: int) -> int:
        import time

        with log.open("a") as file:
            file.write("x")
        time.sleep(0.3)
        return x

    @feste.task
    def plus(x: int, y: int) -> int:
        return x + y

    node = effect(1)

    async def both() -> Any:
        runs = [feste.acompute(plus(node, i), node, scheduler=client) for i in range(3)]
        return await asyncio.gather(*runs)

    assert asyncio.run(both()) == [(1, 1), (2, 1), (3, 1)]
    assert log.read_text() == "x"


def test_chains_run_as_one_task(client: Any) -> None:
    """A chain goes to a worker as one task, also if one of its steps raises or returns nodes."""
    llm = FakeBackend()

    @feste.task
    def here(*pids: int) -> list[int]:
        return [*pids, os.getpid()]

    @feste.task
    def again(pids: list[int]) -> list[int]:
        return [*pids, os.getpid()]

    @feste.task
    def ask(pids: list[int]) -> Any:
        return [llm.chat("Hi"), llm.chat("Hi")]

    @feste.task
    def fail(value: Any) -> Any:
        raise ValueError("broken")

    @feste.task
    def refuse(value: Any) -> Any:
        raise feste.errors.InvalidRequest("refused") from KeyError("why")

    pids = feste.compute(again(again(here())), scheduler=client)[0]
    said = ask(again(here()))
    value = feste.compute(again(said), scheduler=client)[0]
    broken = fail(again(here()))
    with pytest.raises(feste.errors.RunFailed) as caught:
        feste.compute(again(broken), scheduler=client)
    (error,) = caught.value.errors
    with pytest.raises(feste.errors.RunFailed) as refused:
        feste.compute(again(refuse(here())), scheduler=client)

    assert len(set(pids)) == 1 and pids[0] != os.getpid()
    assert value[:2] == feste.compute(said)[0] and len(set(value[:2])) == 2
    assert (type(error.__cause__), error.origin) == (ValueError, broken._node.where)
    assert "in fail" in error.traceback  # type: ignore[attr-defined]
    assert caught.value.report.states == {"done": 2, "failed": 1, "skipped": 1}
    assert type(refused.value.errors[0]) is feste.errors.InvalidRequest
    assert type(refused.value.errors[0].__cause__) is KeyError
