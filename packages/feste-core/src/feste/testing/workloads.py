"""Graphs on which batching policies differ: calls of several kinds behind work of uneven length.

Each function takes a random generator and a :class:`Kit` and returns the nodes to compute. The calls of
one kind may share requests. The durations of the work are lognormal; a scheduler can only know their
means.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import feste
from feste.backend import BatchRule, Latency, Limits, Operation, Profile
from feste.backend.request import Request
from feste.prompt import Prompt
from feste.scheduler.brain import Brain
from feste.testing.fake_backend import FakeBackend, FakeParams
from feste.testing.virtual_clock import VirtualClock

__all__ = ["WORKLOADS", "Kit", "WideBackend", "Workload", "simulate"]

#: The seconds of a request besides its calls, and of each call in it.
BASE, SLOPE = 0.5, 0.002


class WideBackend(FakeBackend):
    """A :class:`FakeBackend` whose requests take any number of calls.

    >>> WideBackend().complete.max_items
    1000000
    """

    complete = Operation(
        prepare=FakeBackend._prepare_complete,
        send=FakeBackend._send,
        parse=FakeBackend._parse_text,
        batch=BatchRule(
            "prompt", "prompt", 1_000_000, pack=FakeBackend._pack, unpack=FakeBackend._unpack
        ),
    )


class Kit:
    """Makes the nodes of a workload, and knows how long each piece of work takes.

    :param llm: the backend; its ``complete`` is called.
    """

    def __init__(self, llm: FakeBackend) -> None:
        self.llm = llm
        #: The mean seconds of each kind of work, by name.
        self.means: dict[str, float] = {}
        self.calls = 0
        self._works: dict[str, Any] = {}
        self._texts = Prompt("{{ number }}{% for part in parts %} {{ part }}{% endfor %}")

    def work(self, mean: float, seconds: float, *parts: Any) -> Any:
        """Return a node of Python work.

        :param mean: what a scheduler may know, in seconds.
        :param seconds: how long it takes.
        :param parts: what it needs.
        """
        name = f"work_{mean:g}"
        if name not in self._works:

            def work(seconds: float, parts: Sequence[Any]) -> str:
                return str(len(parts))

            work.__name__ = work.__qualname__ = name
            self._works[name] = feste.task(pure=True)(work)
            self.means[name] = mean
        self.calls += 1  # so that no two are equal
        return self._works[name](seconds + 1e-12 * self.calls, list(parts))

    def call(self, kind: str, *parts: Any) -> Any:
        """Return a call.

        :param kind: calls of one kind may share requests.
        :param parts: what it needs.
        """
        self.calls += 1
        params = FakeParams(max_tokens=1 + ord(kind[0]))
        return self.llm.complete(self._texts(number=self.calls, parts=list(parts)), params)


Workload = Callable[[random.Random, Kit], list[Any]]


def _uneven(rng: random.Random, mean: float, sigma: float) -> float:
    return mean * math.exp(rng.gauss(-sigma * sigma / 2, sigma))


def two_stages(rng: random.Random, kit: Kit) -> list[Any]:
    """64 times: work, a call, work, a call of another kind."""
    made = []
    for _ in range(64):
        first = kit.call("a", kit.work(0.2, _uneven(rng, 0.2, 0.8)))
        made.append(kit.call("b", kit.work(0.2, _uneven(rng, 0.2, 0.8), first)))
    return made


def map_reduce(rng: random.Random, kit: Kit) -> list[Any]:
    """64 calls after work, then calls that merge four each until one is left."""
    left = [kit.call("m", kit.work(0.2, _uneven(rng, 0.2, 0.8))) for _ in range(64)]
    while len(left) > 1:
        left = [kit.call("r", *left[i : i + 4]) for i in range(0, len(left), 4)]
    return left


def ragged(rng: random.Random, kit: Kit) -> list[Any]:
    """32 chains of one to eight calls of one kind, with work before each."""
    made = []
    for _ in range(32):
        last: list[Any] = []
        for _ in range(rng.randint(1, 8)):
            last = [kit.call("a", kit.work(0.2, _uneven(rng, 0.2, 0.8), *last))]
        made += last
    return made


def crossed(rng: random.Random, kit: Kit) -> list[Any]:
    """32 chains of two calls, half of them in the opposite order of kinds."""
    made = []
    for i in range(32):
        last: list[Any] = []
        for kind in "ab" if i % 2 else "ba":
            last = [kit.call(kind, kit.work(0.2, _uneven(rng, 0.2, 0.8), *last))]
        made += last
    return made


def tree_of_thought(rng: random.Random, kit: Kit) -> list[Any]:
    """Four levels of three proposals for each thought, each of them then judged."""
    made: list[Any] = []
    level: list[list[Any]] = [[]]
    for _ in range(4):
        level = [
            [kit.call("e", kit.call("p", kit.work(0.05, _uneven(rng, 0.05, 0.8), *thought)))]
            for thought in level
            for _ in range(3)
        ]
        made += [one for thought in level for one in thought]
    return made


def straggler(rng: random.Random, kit: Kit) -> list[Any]:
    """64 pipelines of two calls; the work before one of them takes 20 s."""
    made = []
    for i in range(64):
        seconds = 20.0 if i == 0 else 0.1 + 0.1 * rng.random()
        first = kit.call("a", kit.work(20.0 if i == 0 else 0.15, seconds))
        made.append(kit.call("b", kit.work(0.1, 0.1, first)))
    return made


def retrieval(rng: random.Random, kit: Kit) -> list[Any]:
    """40 questions: embed, search, three extracts, a synthesis, a verdict."""
    made = []
    for _ in range(40):
        vector = kit.call("e", kit.work(0.05, _uneven(rng, 0.05, 0.5)))
        found = kit.work(0.3, _uneven(rng, 0.3, 1.0), vector)
        extracts = [kit.call("x", found) for _ in range(3)]
        made.append(kit.call("j", kit.call("s", *extracts)))
    return made


def random_graph(rng: random.Random, kit: Kit, size: int = 300) -> list[Any]:
    """Calls of four kinds and work, with up to three inputs among the last 60 nodes."""
    made: list[Any] = []
    needed: set[int] = set()
    for i in range(size):
        wanted = rng.choice([0, 1, 1, 2, 2, 3]) if i > 10 else 0
        chosen = rng.sample(range(max(0, i - 60), i), min(wanted, i)) if i else []
        needed.update(chosen)
        parts = [made[j] for j in chosen]
        if rng.random() < 0.4:
            made.append(kit.work(0.2, _uneven(rng, 0.2, 0.8), *parts))
        else:
            made.append(kit.call(rng.choice("abcd"), *parts))
    return [node for i, node in enumerate(made) if i not in needed]


#: All workloads by name.
WORKLOADS: dict[str, Workload] = {
    one.__name__: one
    for one in (
        two_stages,
        map_reduce,
        ragged,
        crossed,
        tree_of_thought,
        straggler,
        retrieval,
        random_graph,
    )
}


def simulate(
    workload: Workload,
    seed: int,
    *,
    noise: float = 0.15,
    limits: Limits | None = None,
    base: float = BASE,
    slope: float = SLOPE,
    **settings: Any,
) -> VirtualClock:
    """Run a workload on the virtual clock, with unlimited places for its work.

    :param workload: one of :data:`WORKLOADS`.
    :param seed: the seed of the durations.
    :param noise: the standard deviation of the logarithm of a request's duration.
    :param limits: the backend's limits; None lets any number of requests be in flight.
    :param base: the seconds of a request besides its calls.
    :param slope: the seconds of each call in it.
    :param settings: the settings of the run.
    :returns: the clock at the end: its ``now`` is the makespan, its ``sent`` the requests.

    >>> alone = simulate(two_stages, 1, optimize={"batch": False})
    >>> shared = simulate(two_stages, 1)
    >>> len(alone.sent), len(alone.sent) > 2.5 * len(shared.sent)
    (128, True)
    """
    known = Profile(latency=Latency(base=base, item=slope))
    llm = WideBackend(limits=limits or Limits(concurrency=1_000_000), profile=known)
    kit = Kit(llm)
    rng = random.Random(seed)
    nodes = workload(rng, kit)
    luck = random.Random(seed)

    def request_seconds(request: Request) -> float:
        sure = base + slope * request.items
        return sure * math.exp(luck.gauss(-noise * noise / 2, noise)) if noise else sure

    def task_seconds(task: Any) -> float:
        is_work = task.stage == "run" and task.node.op.name in kit.means
        return float(task.args[0]) if is_work else 0.0

    brain = Brain(seed=seed)
    for name, mean in kit.means.items():
        for _ in range(50):
            brain.durations.note(name, mean)
    clock = VirtualClock(
        llm.answer,
        request_seconds=request_seconds,
        task_seconds=task_seconds,
        places=1_000_000,
        brain=brain,
    )
    given = dict(settings)
    switches = given.pop("optimize", {})
    optimize = {"fuse": False, **switches} if isinstance(switches, dict) else switches
    clock.compute(nodes, optimize=optimize, **given)
    return clock
