"""A call that fails at one backend is made at the next, by the ordinary way of all calls."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

import feste
from feste import context, errors
from feste.backend import FALL_BACK_ON, Backend, Operation, Params, Request, Response, operation
from feste.draw import Determinism
from feste.errors import ConfigError, ContentFiltered, ContextTooLong, RunFailed
from feste.prompt import Prompt
from feste.testing import FakeBackend, FakeParams, VirtualClock

EMPTY = ContextTooLong("does not fit")


class Other(Backend):
    """A backend with other parameters and other operations than the fake one."""

    class TalkParams(Params):
        temperature: float | None = None
        max_tokens: int | None = None
        voice: str | None = None
        model: str | None = None

    @operation
    async def complete(self, prompt: str, params: TalkParams = TalkParams()) -> str:
        return f"other: {prompt} {params}"


def broken(model: str = "big", error: errors.CallError = EMPTY, **options: Any) -> FakeBackend:
    """A backend that fails every call whose prompt holds "bad"."""
    return FakeBackend(model, fail={"bad": error}, **options)


def model_of(reply: Any) -> str:
    """Which of the fake models answered."""
    return str(reply).partition(":")[0]


def test_only_what_fails_is_asked_for_elsewhere() -> None:
    """Those that need the call wait for the answer of the next backend."""
    first, second = broken(), FakeBackend("small")
    llm = first.or_else(second)
    replies = [llm.chat("bad"), llm.chat("good")]
    merged = FakeBackend("last").chat(Prompt("{{ a }} {{ b }}")(a=replies[0], b=replies[1]))
    (bad, good), whole = feste.compute(replies, merged)
    assert [model_of(reply) for reply in (bad, good, whole)] == ["small", "big", "last"]
    assert (len(first.requests), len(second.requests)) == (2, 1)
    report = feste.last_report()
    assert report is not None
    assert report.states == {"done": 4}
    assert report.passed_on == {"fake.chat big: ContextTooLong": 1}
    assert "1 call passed on to the next backend by fake.chat big: ContextTooLong" in str(report)
    answered = {row.model: (row.calls, row.failed) for row in report.operations}
    assert answered == {"big": (1, 1), "small": (1, 0), "last": (1, 0)}
    assert llm.chat("good").compute() and feste.compute(replies)[0] == [bad, good]
    assert len(second.requests) == 1  # the nodes keep their answers


def test_chains_are_asked_in_order_and_the_last_error_is_the_calls() -> None:
    """Notes of the error tell what the others said."""
    asked = [broken("a"), broken("b", ContentFiltered("filtered")), broken("c", EMPTY)]
    chains = [
        asked[0].or_else(asked[1]).or_else(asked[2]),
        asked[0].or_else(asked[1], asked[2]),
        asked[0].or_else(asked[1].or_else(asked[2])),
    ]
    for count, llm in enumerate(chains, start=1):
        with pytest.raises(RunFailed) as failed:
            llm.chat("bad").compute()
        (error,) = failed.value.errors
        assert isinstance(error, ContextTooLong)
        assert (error.backend, error.model) == ("fake", "c")
        assert error.__notes__ == [
            "asked before: fake a: ContextTooLong: does not fit",
            "asked before: fake b: ContentFiltered: filtered",
        ]
        assert [len(backend.requests) for backend in asked] == [count] * 3


@pytest.mark.parametrize("error", [errors.InvalidRequest("bad n"), errors.MalformedResponse("?")])
def test_errors_of_the_program_stay_where_they_are(error: errors.CallError) -> None:
    """So do answers that were paid for; `on` can say otherwise."""
    second = FakeBackend("small")
    with pytest.raises(RunFailed):
        broken(error=error).or_else(second).chat("bad").compute()
    assert second.requests == []
    chosen = broken(error=error).or_else(second, on=(type(error), ContextTooLong))
    assert model_of(chosen.chat("bad").compute()) == "small"
    only = broken(error=EMPTY).or_else(second, on=ContentFiltered)
    with pytest.raises(RunFailed):
        only.chat("bad").compute()


def test_each_link_of_a_chain_has_its_own_errors() -> None:
    """A chain inside a chain keeps what was said of it."""
    last = FakeBackend("last")
    inner = broken("b", ContentFiltered("no")).or_else(last, on=ContentFiltered)
    assert model_of(broken("a").or_else(inner, on=ContextTooLong).chat("bad").compute()) == "last"
    inner = broken("b").or_else(last, on=ContentFiltered)
    with pytest.raises(RunFailed):
        broken("a").or_else(inner).chat("bad").compute()


def test_the_default_leaves_out_wrong_requests_and_stopped_ones() -> None:
    """Of all errors of calls, those that another provider may not give."""
    kinds = {
        name
        for name in errors.__all__
        if isinstance(kind := getattr(errors, name), type) and issubclass(kind, FALL_BACK_ON)
    }
    assert kinds >= {"RateLimited", "ServerError", "Unreachable", "CallTimeout", "AuthFailed"}
    assert kinds >= {"ConnectionLost", "ModelNotFound", "ContextTooLong", "ContentFiltered"}
    assert kinds.isdisjoint({"InvalidRequest", "Interrupted", "WorkerLost", "Rejected"})
    assert kinds.isdisjoint({"MalformedResponse", "CountMismatch", "CallError"})


@pytest.mark.parametrize("how", ["lazy", "eager"])
def test_lazy_and_eager_agree(how: str, restart: Any) -> None:
    """The next backend gives the answer that it would give if it were asked alone."""
    restart()
    alone = FakeBackend("small").chat("bad").compute()
    restart()
    with context.set(eager=how == "eager"):
        reply: Any = broken().or_else(FakeBackend("small")).chat("bad")
    assert (reply if how == "eager" else reply.compute()) == alone


def test_lists_are_formed_at_either_backend() -> None:
    """A list that fails is a list elsewhere, and single calls that fail together are one."""
    first, second = broken(error=ContentFiltered("no")), FakeBackend("small")
    llm = first.or_else(second)
    vectors, many = feste.compute(
        [llm.embed(f"bad {i}") for i in range(50)], [llm.complete(f"bad {i}") for i in range(20)]
    )
    assert [r.items for r in first.requests if r.operation == "embed"] == [50]
    assert [r.items for r in second.requests if r.operation == "embed"] == [50]
    passed = [r.items for r in second.requests if r.operation == "complete"]
    assert len(passed) == 2 and sum(passed) == 20  # at most 16 in each
    assert len({tuple(v) for v in vectors}) == 50 and len(set(many)) == 20
    assert {model_of(reply) for reply in many} == {"small"}


def test_no_lists_are_formed_where_they_are_switched_off() -> None:
    """The setting holds for the next backend, too."""
    second = FakeBackend("small")
    llm = broken().or_else(second)
    feste.compute([llm.complete(f"bad {i}") for i in range(4)], optimize={"batch": False})
    assert [r.items for r in second.requests] == [1] * 4


def test_a_seed_keeps_a_call_out_of_lists_there_too() -> None:
    """A server would use it once for a whole list."""
    second = FakeBackend("small")
    llm = broken().or_else(second)
    feste.compute([llm.complete(f"bad {i}", FakeParams(seed=7)) for i in range(3)])
    assert [r.items for r in second.requests] == [1, 1, 1]


class Short(FakeBackend):
    """A backend that knows before it sends anything that a prompt is too long."""

    def _prepare_short(self, prompt: str, params: FakeParams = FakeParams()) -> Request:
        if "bad" in prompt:
            raise errors.ContextTooLong("too long")
        return FakeBackend._prepare_complete(self, prompt, params)

    complete = Operation(
        prepare=_prepare_short,
        send=FakeBackend._send,
        parse=FakeBackend._parse_text,
        batch=FakeBackend.complete.rule,
    )


def test_a_call_that_fails_before_it_is_sent_leaves_its_list() -> None:
    """The list waits for it no longer, and does not take it to the wrong backend."""
    first, second = Short("big"), FakeBackend("small")
    llm = first.or_else(second)
    clock = VirtualClock(
        lambda r: (first if r.model == "big" else second).answer(r),
        task_seconds=lambda task: 1.0,
        places=2,
    )
    asked: list[tuple[str, str]] = []
    send = clock.hands.send

    def noted(handle: int, call: Any, request: Request, on_chunk: Any = None) -> None:
        asked.append((call.client.model, request.model))
        send(handle, call, request, on_chunk)

    clock.hands.send = noted  # type: ignore[method-assign]
    bad = llm.complete("bad")
    last = llm.complete(Prompt("after {{ x }}")(x=bad))  # so that it is more urgent than the others
    replies = clock.compute([bad, *(llm.complete(f"{i}") for i in range(40)), last])
    assert [model_of(reply) for reply in replies] == ["small"] + ["big"] * 41
    assert [r.items for _, r in clock.sent if r.model == "small"] == [1]
    assert set(asked) == {("big", "big"), ("small", "small")}
    assert asked[0] == ("small", "small")  # it does not wait for the list either


def test_a_group_that_forms_while_it_runs_does_not_hold_a_call_that_left() -> None:
    """With an objective that waits for all of a group: what it was asked elsewhere waits for none."""
    first, second, words = Short("big"), FakeBackend("small"), FakeBackend("word")
    llm = first.or_else(second)
    told = [
        llm.complete(Prompt("{{ which }} {{ w }}")(w=words.chat(f"{n} seconds"), which=which))
        for n, which in ((1, "bad"), (50, "good"), (80, "good"))
    ]

    def seconds(request: Request) -> float:
        said = str(request.body)
        return float(said.partition(" seconds")[0].split("'")[-1]) if "seconds" in said else 1.0

    clock = VirtualClock(
        lambda r: {"big": first, "small": second, "word": words}[r.model].answer(r),
        request_seconds=seconds,
    )
    replies = clock.compute(told, objective="cost")
    assert [model_of(reply) for reply in replies] == ["small", "big", "big"]
    assert [(at, r.model, r.items) for at, r in clock.sent[3:]] == [(1, "small", 1), (80, "big", 2)]


def test_parameters_are_translated_by_name() -> None:
    """What only the first has is an error before anything is sent, and tells what to do."""
    first, second = broken(), Other()
    llm = first.or_else(second)
    told = llm.complete("bad", FakeParams(max_tokens=5)).compute()
    assert told == "other: bad TalkParams(max_tokens=5)"
    assert llm.complete("bad").compute() == "other: bad TalkParams()"
    lazy = feste.task(lambda: 7)()
    assert llm.complete("bad", FakeParams(max_tokens=lazy)).compute().endswith("(max_tokens=7)")  # type: ignore[arg-type]
    sent = len(first.requests)
    for params in (FakeParams(n=2), FakeParams(model="big-2"), lazy):
        with pytest.raises(ConfigError, match=r"params=\(fake.FakeParams\(...\), other.TalkParams"):
            llm.complete("bad", params)
    assert len(first.requests) == sent
    each = (FakeParams(seed=1), Other.TalkParams(voice="low"))
    assert llm.complete("bad", each).compute() == "other: bad TalkParams(voice='low')"
    assert llm.complete("bad", params=each).compute() == "other: bad TalkParams(voice='low')"
    assert first.requests[-1].body["seed"] == 1
    with pytest.raises(ConfigError, match="3 params for 2 backends"):
        llm.complete("bad", (*each, each))
    with pytest.raises(ConfigError, match="TalkParams"):
        llm.complete("bad", each[::-1])


def test_a_client_has_the_operations_that_all_have() -> None:
    """And says which backend lacks one."""
    llm = FakeBackend().or_else(Other())
    assert hasattr(llm, "complete") and not hasattr(llm, "embed")
    with pytest.raises(AttributeError, match=r"embed: Other, which or_else\(\) names"):
        llm.embed("text")
    for wrong in (lambda: llm.or_else(), lambda: llm.or_else("gpt")):
        with pytest.raises(ConfigError, match="takes the backends to ask next"):
            wrong()
    for on in ((), (ValueError,), "all"):
        with pytest.raises(ConfigError, match="CallError"):
            llm.or_else(Other(), on=on)  # type: ignore[arg-type]
    assert repr(llm).endswith(".or_else(Other())")


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_fall_back_too(copied: Any) -> None:
    """Clients, their operations and their nodes."""
    llm = FakeBackend("big").or_else(Other())
    for twin in (copied(llm).complete, copied(llm.complete)):
        assert [type(call.client) for call, _ in twin.rest] == [Other]
        assert twin.client.model == "big"
    node: Any = copied(llm.complete("Hi", FakeParams(max_tokens=3)))
    assert repr(node._node.kwargs) == "{'params 1': TalkParams(max_tokens=3)}"


def test_missing_keys_of_all_backends_are_told_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fallback that cannot work is no fallback."""
    from feste.backend import Secret

    class Keyed(Other):
        def __init__(self, api_key: Secret) -> None: ...

    monkeypatch.delenv("KEY_OF_NOBODY", raising=False)
    first = FakeBackend()
    with pytest.raises(errors.MissingKey):
        first.or_else(Keyed(Secret("KEY_OF_NOBODY"))).complete("Hi").compute()
    assert first.requests == []


def test_a_plan_counts_what_it_sends_if_nothing_fails() -> None:
    """And tells what comes next otherwise; estimates are those of the first backend."""
    llm = FakeBackend("big")
    plain = feste.explain([llm.chat("one"), llm.chat("two")])
    planned = feste.explain(
        [
            chain.chat(t)
            for chain in [llm.or_else(FakeBackend("small"), Other2())]
            for t in ("one", "two")
        ]
    )
    assert (planned.requests, planned.at_least) == (plain.requests, plain.at_least) == (2, 2)
    assert (planned.input_tokens, planned.dollars) == (plain.input_tokens, plain.dollars)
    assert "or else fake small, other2" in str(planned)


class Other2(Other):
    chat = Other.complete


def test_greedy_calls_with_and_without_a_fallback_stay_two() -> None:
    """They are equal only as long as nothing fails."""
    first, zero = broken(), FakeParams(temperature=0)
    llm = first.or_else(FakeBackend("small"))
    other = first.or_else(FakeBackend("other"))
    calls = [client.chat("bad", zero) for client in (llm, llm, other, first)]
    assert feste.explain(calls).requests == 3
    one, two, three, four = feste.compute(calls, on_error="return")[0]
    assert one == two and [model_of(one), model_of(three)] == ["small", "other"]
    assert isinstance(four, ContextTooLong)


def test_stopped_runs_ask_nobody_else() -> None:
    """With on_error="stop" nothing new is sent once a call has failed for good."""
    second = FakeBackend("small")
    stopper = broken("stopper")
    chain = broken("a", latency=0.05).or_else(second)
    with pytest.raises(RunFailed) as failed:
        feste.compute([stopper.chat("bad"), chain.chat("bad")], on_error="stop")
    assert [type(error) for error in failed.value.partial[0]] == [ContextTooLong] * 2
    assert second.requests == []


def test_joined_runs_get_the_answer_of_whoever_gave_it() -> None:
    """Another run that holds the node waits, and asks nobody itself."""
    first, second = broken(latency=0.05), FakeBackend("small", latency=0.05)
    node = first.or_else(second).chat("bad")
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(node.compute())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and model_of(found[0]) == "small"
    assert (len(first.requests), len(second.requests)) == (1, 1)


def test_equal_calls_under_way_share_each_backend_they_ask() -> None:
    """Clients that are not equal share nothing: each asks for itself, and goes on by itself."""
    first, second = broken(latency=0.05), FakeBackend("small", latency=0.05)
    other, zero = FakeBackend("other"), FakeParams(temperature=0)
    nodes = [
        client.chat(Prompt("{{ w }}")(w=feste.task(lambda: "bad")()), zero)
        for client in (
            first.or_else(second),
            first.or_else(second),
            first.or_else(other),
            first,
        )
    ]
    values = feste.compute(nodes, on_error="return")[0]
    assert [model_of(value) for value in values[:3]] == ["small", "small", "other"]
    assert isinstance(values[3], ContextTooLong)
    assert [len(backend.requests) for backend in (first, second, other)] == [3, 1, 1]


def test_joined_runs_fail_once_all_were_asked() -> None:
    """The last backend is not asked again by each of them."""
    first, second = broken(latency=0.05), broken("small", latency=0.05)
    node = first.or_else(second).chat("bad")
    failed: list[Any] = []
    threads = [
        threading.Thread(target=lambda: failed.append(feste.compute(node, on_error="return")[0]))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(error) for error in failed] == [ContextTooLong] * 3
    assert (len(first.requests), len(second.requests)) == (1, 1)


class Unreadable(Backend):
    """A backend whose first answer cannot be parsed."""

    def __init__(self) -> None:
        self.sent = 0
        self.broken = 1

    def _prepare(self, prompt: str, params: FakeParams = FakeParams()) -> Request:
        return Request(self.plugin, "chat", self.endpoint, {"prompt": prompt})

    async def _send(self, request: Request, on_chunk: Any = None) -> Response:
        self.sent += 1
        return Response(f"answer {self.sent}")

    def _parse(self, response: Response, arguments: Any) -> str:
        self.broken -= 1
        if self.broken >= 0:
            raise ValueError("cannot read it")
        return str(response.payload)

    chat = Operation(prepare=_prepare, send=_send, parse=_parse)


def test_an_answer_of_the_next_backend_is_parsed_by_it_again() -> None:
    """A node keeps what was paid, and whose it is."""
    first, second = broken(), Unreadable()
    node = first.or_else(second).chat("bad")
    with pytest.raises(RunFailed):
        node.compute()
    assert node.compute() == "answer 1"
    assert (len(first.requests), second.sent) == (1, 1)


@pytest.mark.parametrize("cached", [False, True])
def test_a_rerun_replays_the_answer_of_the_backend_that_gave_it(
    cached: bool, tmp_path: Path, restart: Any
) -> None:
    """Nothing is bought at the first backend again, though it would answer now."""
    settings: dict[str, Any] = {"store": str(tmp_path / "runs.db")}
    if cached:
        settings["cache"] = str(tmp_path / "cache.db")

    def program(first: FakeBackend, second: FakeBackend, third: FakeBackend) -> list[Any]:
        llm = first.or_else(second, third)
        calls = [llm.chat("bad"), llm.chat("bad"), llm.embed("bad"), llm.chat("good")]
        return [str(value) for value in feste.compute(calls, **settings)[0]]

    answers = program(broken("a"), broken("b"), FakeBackend("c"))
    restart()
    models = [FakeBackend("a"), FakeBackend("b"), FakeBackend("c")]
    assert program(*models) == answers
    assert [len(model.requests) for model in models] == [0, 0, 0]
    report = feste.last_report()
    assert report is not None
    assert report.states == {"replayed": 4} and report.passed_on == {}


def test_what_another_program_bought_elsewhere_does_not_count(tmp_path: Path, restart: Any) -> None:
    """The first backend comes first: only its own earlier answer from elsewhere is replayed."""
    store = str(tmp_path / "runs.db")
    FakeBackend("b").chat("bad").compute(store=store)
    restart()
    first, second = FakeBackend("a"), FakeBackend("b")
    assert model_of(first.or_else(second).chat("bad").compute(store=store)) == "a"
    restart()
    dead = broken("c")  # once it has failed, such an answer is as good as any
    assert model_of(dead.or_else(second).chat("bad").compute(store=store)) == "b"
    assert second.requests == []


def test_a_rerun_goes_on_where_all_had_failed(tmp_path: Path, restart: Any) -> None:
    """The first backend is asked again, because nobody answered."""
    store = str(tmp_path / "runs.db")
    with pytest.raises(RunFailed):
        broken("a").or_else(broken("b")).chat("bad").compute(store=store)
    restart()
    first, second = FakeBackend("a"), FakeBackend("b")
    assert model_of(first.or_else(second).chat("bad").compute(store=store)) == "a"
    assert second.requests == []


def test_a_cache_alone_serves_tests(tmp_path: Path, restart: Any) -> None:
    """replay-only finds the answer of whichever backend gave it."""
    cache = str(tmp_path / "cache.db")
    said = broken("a").or_else(FakeBackend("b"), on=ContextTooLong).chat("bad").compute(cache=cache)
    restart()
    models = [FakeBackend("a"), FakeBackend("b")]
    node = models[0].or_else(models[1], on=ContextTooLong).chat("bad")
    assert node.compute(cache=cache, cache_mode="replay-only") == said
    with pytest.raises(RunFailed) as failed:
        other = models[0].or_else(models[1]).chat("unknown")
        other.compute(cache=cache, cache_mode="replay-only")
    assert isinstance(failed.value.errors[0], errors.CacheMiss)
    assert [len(model.requests) for model in models] == [0, 0]


@pytest.mark.parametrize(
    ("error", "attempts"), [(errors.ServerError("down"), 6), (errors.CallTimeout("late"), 2)]
)
def test_the_next_backend_is_asked_when_all_attempts_have_failed(
    error: errors.CallError, attempts: int
) -> None:
    """With its own attempts, at its own gate."""
    first, second = FakeBackend("a"), FakeBackend("b")

    def answer(request: Request) -> Response:
        if request.model == "a":
            raise error.copy()
        return second.answer(request)

    clock = VirtualClock(answer, seed=1)
    (reply,) = clock.compute(first.or_else(second).chat("Hi"))
    assert model_of(reply) == "b"
    assert [request.model for _, request in clock.sent] == ["a"] * attempts + ["b"]


def test_a_fake_backend_has_a_timeout() -> None:
    """Of one attempt, as others have; it changes no answer."""
    slow = FakeBackend("slow", latency=60, timeout=0.001)
    assert slow.config()["timeout"] == 0.001
    assert slow.identity == FakeBackend("slow", latency=60).identity
    with pytest.raises(errors.CallTimeout, match=r"0.001 seconds"):
        asyncio.run(slow.chat.send(slow.chat.prepare(["Hi", FakeParams()])))


def test_determinism_is_that_of_the_backend_that_is_asked() -> None:
    """Parameters for each backend may make the next one greedy."""
    llm = broken().or_else(FakeBackend("small"))
    each = (FakeParams(), FakeParams(temperature=0))
    node: Any = llm.chat("bad", each)
    assert node._node.determinism is Determinism.SAMPLE
    one, two = feste.compute(node, llm.chat("bad", each))
    assert one == two and model_of(one) == "small"


def test_nodes_that_tasks_return_fall_back_too() -> None:
    """Also inside a growing graph."""
    llm = broken().or_else(FakeBackend("small"))

    @feste.task(emits=True)
    def more(word: str) -> Any:
        return llm.chat(word)

    assert model_of(more("bad").compute()) == "small"


def test_a_rerun_finds_what_was_answered_after_garbage(tmp_path: Path, restart: Any) -> None:
    """The first backend garbles an answer, which is kept, and is down then; the second one answers."""
    first, second = FakeBackend("a"), FakeBackend("b")
    store = tmp_path / "answers.db"
    found = []
    for sent in (7, 0):
        restart()
        garbled = [Response({"garbled": 1})]

        def answer(request: Request, garbled: list[Response] = garbled) -> Response:
            if request.body["model"] == "b":
                return second.answer(request)
            if garbled:
                return garbled.pop()
            raise errors.ServerError("down")

        clock = VirtualClock(answer)
        found += clock.compute(first.or_else(second).chat("hi"), store=store, on_error="return")
        assert len(clock.sent) == sent

    assert model_of(found[0]) == "b"
    assert found[0] == found[1]
