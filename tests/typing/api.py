"""The public interface as a user types it: read by type checkers in strict mode, never run."""

from __future__ import annotations

import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_type

from pydantic import BaseModel

import feste
from feste import ChatPrompt, FesteDelayed, Prompt, context
from feste.backend import (
    Backend,
    Call,
    Determinism,
    Limits,
    Message,
    Params,
    Reply,
    Secret,
    create,
    operation,
)
from feste.backend.cohere import Cohere
from feste.backend.openai import ChatParams, CompleteParams, EmbedParams, OpenAI
from feste.context import Setting
from feste.errors import CallError, FesteError, RunFailed
from feste.events import NodeFinished, RequestFinished, RunFinished, RunStarted
from feste.graph import FesteGraph
from feste.optimization import Level, Optimization, PassContext, Phase
from feste.prompt import FesteEnvironment
from feste.report import Explanation, RunReport
from feste.testing import FakeBackend, FakeParams

# --- tasks ------------------------------------------------------------------------------------------


@feste.task
def add(a: int, b: int) -> int:
    return a + b


@feste.task(pure=True, executor="process")
def shout(text: str) -> str:
    return text.upper()


@feste.task
async def fetch(url: str) -> bytes:
    return url.encode()


@feste.task(emits=True)
async def count(texts: Sequence[str]) -> dict[str, int]:
    return {text: len(text) for text in texts}


@feste.task
def branch(text: str) -> FesteDelayed[str]:
    return shout(text)


@feste.task(emits=True)
def maybe(text: str) -> FesteDelayed[str] | str:
    return shout(text) if text else text


@feste.task
async def later(text: str) -> FesteDelayed[str]:
    return shout(text)


def tasks() -> None:
    assert_type(add(1, 2), FesteDelayed[int])
    assert_type(add(add(1, 1), 2), FesteDelayed[int])  # a lazy value stands for its value
    assert_type(shout("a"), FesteDelayed[str])
    assert_type(fetch("a"), FesteDelayed[bytes])
    assert_type(count([shout("a"), "b"]), FesteDelayed[dict[str, int]])
    assert_type(branch("a"), FesteDelayed[str])  # a node that a task returns is resolved
    assert_type(maybe("a"), FesteDelayed[str])
    assert_type(later("a"), FesteDelayed[str])
    assert_type(feste.task(len)([1]), FesteDelayed[int])
    assert_type(add(1, 2).compute(), int)
    assert_type(fetch("a").compute(scheduler="local", on_error="return"), bytes)
    assert_type(branch("a").compute(), str)
    assert_type(list(feste.map(fetch, ["a"], ordered=False)), list[tuple[int, bytes]])
    assert_type("".join(feste.stream(shout("a"))), str)
    assert_type(add(1, 2).key, str)
    assert_type(add(1, 2).visualize("graph.svg"), str)


async def awaited() -> None:
    assert_type(await add(1, 2), int)
    assert_type(await fetch("a"), bytes)
    async for node, value in feste.as_completed([add(1, 2), add(3, 4)]):
        assert_type(node, FesteDelayed[int])
        assert_type(value, int)
    assert_type([v async for v in feste.map(fetch, ["a", "b"], window=2)], list[bytes])
    assert_type([p async for p in feste.stream(shout("a"))], list[str])
    assert_type(await feste.acompute(add(1, 2), [add(3, 4)], progress=False), tuple[Any, ...])


def operators() -> None:
    node = add(1, 2)
    total = (node + 1) * 2 - add(3, 4)
    swapped = 1 + node
    assert_type(-node, FesteDelayed[Any])
    assert_type(node + 1, FesteDelayed[Any])
    assert_type(2 * node, FesteDelayed[Any])
    assert_type(node < 3, FesteDelayed[Any])
    assert_type(count(["a"])["a"], FesteDelayed[Any])
    feste.compute(total, swapped, node == 3, node != 3, node >= 3, shout("a").strip().title())


# --- prompts ----------------------------------------------------------------------------------------


def prompts() -> None:
    ask = Prompt("About {{ topic }}", language="de", environment=FesteEnvironment())
    assert_type(ask(topic="poets"), FesteDelayed[str])
    assert_type(ask(topic=shout("poets")).compute(), str)
    assert_type(ask + "!", Prompt)
    assert_type("So: " + ask, Prompt)
    assert_type(ask + ask, Prompt)
    assert_type(len(ask), int)
    assert_type(ask.source, str)
    assert_type(ask.language, str)
    assert_type(ask.variables(), frozenset[str])
    assert_type(Prompt.from_file("ask.txt"), Prompt)
    talk = ChatPrompt(system="You are {{ who }}", user=ask)
    assert_type(talk(who="a poet", topic=shout("why")), FesteDelayed[list[dict[str, str]]])
    assert_type(talk(who="a poet", topic="why").compute(), list[dict[str, str]])


# --- backends ---------------------------------------------------------------------------------------


class Poem(BaseModel):
    title: str
    lines: list[str]


def openai() -> None:
    llm = OpenAI(model="m", api_key=Secret("MY_KEY"), limits=Limits(concurrency=8))
    ask, talk = Prompt("{{ x }}"), ChatPrompt(user="{{ x }}")
    history: list[Message] = [{"role": "user", "content": "Hi"}]
    assert_type(llm.chat("Hi"), FesteDelayed[Reply])
    assert_type(llm.chat(history), FesteDelayed[Reply])
    assert_type(llm.chat(ask(x=1), ChatParams(temperature=0, max_tokens=5)), FesteDelayed[Reply])
    assert_type(llm.chat(talk(x=llm.chat("Hi"))), FesteDelayed[Reply])
    assert_type(llm.chat(shout("Hi")), FesteDelayed[Reply])
    assert_type(llm.chat("Hi", output=Poem), FesteDelayed[Poem])
    assert_type(llm.chat("Hi", ChatParams(), output=Poem).compute().lines, list[str])
    assert_type(llm.complete("Hi", CompleteParams(max_tokens=5)), FesteDelayed[Reply])
    assert_type(llm.embed(ask(x=1)), FesteDelayed[array.array[float]])
    assert_type(llm.embed("Hi", EmbedParams(dimensions=8)).compute(), array.array[float])
    reply = llm.chat("Hi").compute()
    assert_type(reply.upper(), str)
    assert_type(reply.finish_reason, str | None)


def cohere() -> None:
    llm = Cohere(model="m")
    assert_type(llm.embed("Hi"), FesteDelayed[array.array[float]])
    feste.compute(llm.chat("Hi"), llm.generate(Prompt("{{ x }}")(x=1)))


def fake() -> None:
    llm = FakeBackend("m", latency=0.1)
    assert_type(llm.chat("Hi", FakeParams(seed=1)), FesteDelayed[Reply])
    assert_type(llm.complete(shout("Hi")).compute(), Reply)
    assert_type(llm.embed("Hi"), FesteDelayed[array.array[float]])
    texts: list[FesteDelayed[str]] = [
        llm.chat("Hi"),
        shout("Ho"),
    ]  # a Reply is a str, also a lazy one
    assert_type("".join(feste.stream(llm.chat("Hi"))), str)
    assert_type([text.compute() for text in texts], list[str])


# --- running ----------------------------------------------------------------------------------------


@dataclass
class Pair:
    left: FesteDelayed[int] | int
    right: FesteDelayed[str] | str


def running() -> None:
    values = feste.compute(add(1, 2), {"a": shout("b")}, Pair(add(1, 2), "x"), 3, keep="all")
    assert_type(values, tuple[Any, ...])
    explained = feste.explain(add(1, 2), [shout("a")], optimize={"batch": False})
    assert_type(explained, Explanation)
    assert_type(explained.requests, int)
    assert_type(explained.to_json(), dict[str, Any])
    report = feste.last_report()
    assert_type(report, RunReport | None)
    if report is not None:
        assert_type(report.nodes, int)
        assert_type(report.dollars, float | None)
        assert_type(feste.explain(add(1, 2), analyze=report).dollars.likely, float | None)
        assert_type(report.states, dict[str, int])
    graph, keys, repack = FesteGraph.collect(add(1, 2))
    assert_type(graph, FesteGraph)
    assert_type(keys, list[str])
    assert_type(repack([3]), tuple[Any, ...])


def failing() -> None:
    try:
        add(1, 2).compute()
    except RunFailed as error:
        assert_type(error.partial, tuple[Any, ...])
        assert_type(error.errors, tuple[FesteError, ...])
        assert_type(error.origin, str)
    except CallError as error:
        assert_type(error.status, int | None)


def settings() -> None:
    assert_type(context.set(eager=True), context.Layer)
    with context.set(scheduler="local", on_error="stop") as layer:
        assert_type(layer, context.Layer)
    assert_type(context.settings(keep="none"), context.Settings)
    context.get("keep")


# --- plugins ----------------------------------------------------------------------------------------


class EchoParams(Params):
    times: int = 1
    temperature: float | None = None


class Echo(Backend):
    def __init__(self, end: str = "!") -> None:
        self.end = end

    @operation
    async def complete(self, prompt: str, params: EchoParams = EchoParams()) -> str:
        return prompt * params.times + self.end

    @complete.batch(max_items=96)
    async def complete_many(self, prompts: list[str], params: EchoParams) -> list[str]:
        return [prompt * params.times + self.end for prompt in prompts]

    @operation
    def size(self, text: str) -> int:
        return len(text)

    @operation
    async def reply(self, text: str) -> Reply:
        return Reply(text, finish_reason="stop")

    @operation(determinism=Determinism.PURE)
    async def vector(self, text: str) -> list[float]:
        return [float(len(text))]

    @operation(determinism=Determinism.GREEDY)
    def words(self, text: str) -> list[str]:
        return text.split()


def third_party() -> None:
    echo = Echo("?")
    assert_type(echo, Echo)
    assert_type(echo.complete, Call[str])
    assert_type(echo.complete("a", EchoParams(times=2)), FesteDelayed[str])
    assert_type(echo.complete(shout("a")).compute(), str)
    assert_type(echo.size("a"), FesteDelayed[int])
    assert_type(echo.vector("a"), FesteDelayed[list[float]])
    assert_type(echo.words("a"), FesteDelayed[list[str]])
    assert_type(echo.reply("a"), FesteDelayed[Reply])
    named: Echo = create("echo", end="!")  # a name says nothing of the class
    assert_type(named.complete("a"), FesteDelayed[str])
    assert_type(create("echo").complete("a"), Any)


class Nothing:
    name = "nothing"

    def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
        cx.missed("there is nothing to do")
        return graph


class Later(Nothing):
    name = "later"
    level = Level.E0
    phase = Phase.PHYSICAL
    after = ("batch",)


def get(dsk: Mapping[str, Any], keys: Sequence[str]) -> list[Any]:
    return [dsk[key] for key in keys]


@feste.hookimpl
def feste_backends() -> dict[str, type[Backend] | str]:
    return {"echo": Echo, "other": "feste_other:Other"}


@feste.hookimpl
def feste_optimizations() -> list[Optimization]:
    return [Nothing(), Later()]


@feste.hookimpl
def feste_schedulers() -> dict[str, Any]:
    return {"mine": get}


@feste.hookimpl
def feste_settings() -> dict[str, Setting]:
    return {"echo_volume": Setting(5, int, "how loud the echo is")}


@feste.hookimpl
def feste_run_started(event: RunStarted) -> None:
    assert_type(event.nodes, int)


@feste.hookimpl
def feste_node_finished(event: NodeFinished) -> None:
    assert_type(event.to_json(), dict[str, Any])


@feste.hookimpl
def feste_request_finished(event: RequestFinished) -> None:
    assert_type(event.output_tokens, int | None)


@feste.hookimpl
def feste_run_finished(event: RunFinished) -> None:
    assert_type(event.states, dict[str, int])
