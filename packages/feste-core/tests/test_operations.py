"""Backends of one method: what a third party writes, and everything that can go wrong with it."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import inspect
import itertools
import pickle
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import cloudpickle
import pytest

import feste
from feste import context
from feste.backend import (
    Backend,
    BatchRule,
    Call,
    Limits,
    Operation,
    Params,
    Reply,
    Request,
    Response,
    SampleRule,
    Secret,
    Usage,
    create,
    operation,
)
from feste.backend.default_halves import _default_unpack, _outcomes
from feste.errors import (
    CallError,
    ConfigError,
    ConnectionLost,
    CountMismatch,
    InvalidRequest,
    LazyValueError,
    MalformedResponse,
    OutputMismatch,
    ParameterError,
    PlainDataError,
    PluginError,
    Rejected,
    RunFailed,
    ServerError,
    UnknownName,
)
from feste.scheduler.batching.batcher import unpack_response
from feste.testing import FakeBackend, FakeParams, fresh_draws


@feste.task(pure=True)
def same(value: Any) -> Any:
    return value


class EchoParams(Params):
    temperature: float | None = None
    suffix: str | None = None
    extra: dict[str, Any] | None = None


class Echo(Backend):
    """The backend of the read-me: one method, and one for many."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.singles: list[str] = []
        self.lists: list[list[str]] = []

    @operation
    async def complete(self, prompt: str, params: EchoParams = EchoParams()) -> str:
        """Say it again."""
        self.singles.append(prompt)
        return f"{prompt}{params.suffix or ''}"

    @complete.batch(max_items=96)
    async def complete_many(self, prompts: Sequence[str], params: EchoParams) -> Sequence[str]:
        self.lists.append(list(prompts))
        return [f"{p}{params.suffix or ''}" for p in prompts]


class Plain(Backend):
    """Sync, without parameters, without lists."""

    @operation
    def shout(self, text: str) -> str:
        return text.upper()

    @operation
    def join(self, first: str, second: str = "b", *, sep: str = "-") -> list[str]:
        return [first + sep + second]


def only_error(node: Any, **given: Any) -> Any:
    """The error that a call ends in."""
    with pytest.raises(RunFailed) as caught:
        node.compute(**given)
    (error,) = caught.value.errors
    return error


# --- halves that break ------------------------------------------------------------------------------


def half(**halves: Any) -> Any:
    """A backend that is sound but for some halves of its operation."""

    def prepare(self: Any, item: str) -> Request:
        return Request(self.plugin, "ask", "plugin:half", {"items": [item]})

    async def send(self: Any, request: Request, on_chunk: Any = None) -> Response:
        return Response({"items": request.body["items"]})

    def parse(self: Any, response: Response, arguments: Any) -> Any:
        return response.payload["items"][0]

    def pack(self: Any, requests: Sequence[Request]) -> Request:
        items = [r.body["items"][0] for r in requests]
        return replace(requests[0], body={"items": items})

    def unpack(self: Any, request: Request, response: Response) -> list[Response]:
        return [Response({"items": [item]}) for item in response.payload["items"]]

    given: Any = {"prepare": prepare, "pack": pack, **halves}
    rule = BatchRule("item", "items", 8, pack=given["pack"], unpack=unpack)
    ask = Operation(prepare=given["prepare"], send=send, parse=parse, batch=rule)
    return type("Half", (Backend,), {"ask": ask})()


def breaks(self: Any, item: Any) -> Any:
    raise KeyError("key sk-proj-1234567890")


def gives_nothing(self: Any, item: Any) -> Any:
    return None


@pytest.mark.parametrize("name", ["prepare", "pack"])
def test_a_half_that_raises_is_named_with_its_backend(name: str) -> None:
    """What a plugin raises is no error of a user's function: it says which half of what, and where."""
    llm = half(**{name: breaks})
    errors = feste.compute([llm.ask("a"), llm.ask("b")], on_error="return")[0]

    for error in errors:
        assert type(error) is PluginError
        assert error.message.startswith(f"{name} of half.ask raised KeyError: ")
        assert "test_operations.py:" in error.message and "sk-proj" not in error.message
        assert error.origin.startswith(__file__)
        assert type(error.__cause__) is KeyError


@pytest.mark.parametrize("name", ["prepare", "pack"])
def test_a_half_that_returns_no_request_is_named_with_its_backend(name: str) -> None:
    """As for `send`, which returns no Response."""
    llm = half(**{name: gives_nothing})
    errors = feste.compute([llm.ask("a"), llm.ask("b")], on_error="return")[0]

    assert {e.message for e in errors} == {f"{name} of half.ask returned NoneType, not a Request"}


def test_halves_that_do_not_break() -> None:
    """The backend of these tests is sound."""
    llm = half()

    assert feste.compute([llm.ask("a"), llm.ask("b")]) == (["a", "b"],)


def test_lists_of_an_operation_without_parameters_are_refused() -> None:
    """There is nothing that a list could be made of."""

    @operation
    def now(self: Any) -> str:
        return "noon"

    with pytest.raises(ConfigError, match=r"@now\.batch: now\(\) has no parameter"):

        @now.batch(max_items=8)
        def now_many(self: Any) -> list[str]:
            return []


# --- the limits of a backend ----------------------------------------------------------------------


class Limited(Echo):
    """A backend that keeps what it is given, as a constructor does without much thought."""

    limits = Limits(concurrency=3)

    def __init__(self, limits: Any = None) -> None:
        super().__init__()
        self.limits = limits


def test_no_limits_are_those_of_the_class() -> None:
    """`self.limits = limits`, whose default is None, leaves what the class says."""
    none = type("None_", (Echo,), {"limits": None, "__init__": lambda self: None})

    assert Limited().complete.limits == Limits(concurrency=3)
    assert Limited(Limits(concurrency=5)).complete.limits == Limits(concurrency=5)
    assert none().complete.limits == Limits()
    assert str(feste.explain(Limited().complete("a")))


@pytest.mark.parametrize("given", [{"concurrency": 3}, 5, "5", Limits])
def test_limits_that_are_none_are_told_where_the_backend_is_called(given: Any) -> None:
    """The error names the class and the form, on the user's line: nothing is planned or sent."""
    with pytest.raises(ConfigError, match=r"the backend Limited has limits=.*it takes Limits\("):
        Limited(given).complete("a")


def test_limits_that_cannot_be_read() -> None:
    """What a property raises is told with the name of its class."""

    class Remote(Plain):
        @property
        def limits(self) -> Limits:  # type: ignore[override]
            raise OSError("no file")

    with pytest.raises(PluginError, match="limits of the backend Remote raised OSError: no file"):
        Remote().shout("a")


# --- the smallest backends --------------------------------------------------------------------------


def test_one_method_is_a_backend() -> None:
    """Sync or async, with parameters or without: a call gives what the method returns."""
    echo, plain = Echo(), Plain()
    nodes = [
        echo.complete("a"),
        echo.complete("b", EchoParams(suffix="!")),
        echo.complete(prompt="c", params=EchoParams(suffix="?")),
        plain.shout("d"),
        plain.join("x"),
        plain.join("x", "y", sep="+"),
        plain.join(second="y", first="x"),
    ]

    assert feste.compute(nodes) == (["a", "b!", "c?", "D", ["x-b"], ["x+y"], ["x-y"]],)


def test_eager_calls_the_same_code() -> None:
    """In eager mode the call is answered where it is written."""
    with context.set(eager=True):
        assert Echo().complete("a", EchoParams(suffix="!")) == "a!"
        assert Plain().join("x", sep="+") == ["x+b"]


def test_200_calls_are_ceil_200_96_requests() -> None:
    """Calls written one by one reach the batched method as lists, in order, balanced."""
    echo = Echo()
    values = feste.compute([echo.complete(str(i)) for i in range(200)])[0]

    assert values == [str(i) for i in range(200)]
    assert sorted(map(len, echo.lists)) == [52, 52, 96]
    assert sorted(p for part in echo.lists for p in part) == sorted(values)
    assert echo.singles == []


@pytest.mark.parametrize(("limit", "requests"), [(1, 7), (2, 4), (7, 1), (1000, 1)])
def test_the_users_limit_of_items_holds(limit: int, requests: int) -> None:
    """``Limits(max_items=...)`` lowers the operation's own limit, and never raises it."""
    echo = Echo(Limits(max_items=limit))
    feste.compute([echo.complete(str(i)) for i in range(7)])

    assert len(echo.lists) + len(echo.singles) == requests
    assert all(len(part) <= limit for part in echo.lists)


def test_a_single_call_goes_to_the_single_method() -> None:
    """The batched method is for two and more."""
    echo = Echo()
    echo.complete("a").compute()

    assert (echo.singles, echo.lists) == (["a"], [])


def test_parameters_arrive_as_the_record_that_was_given() -> None:
    """The method gets its own class of parameters, with what was given and nothing else."""
    seen: list[Any] = []

    class Sub(EchoParams):
        top_k: int | None = None

    class Backend_(Backend):
        @operation
        async def one(self, prompt: str, params: EchoParams = EchoParams()) -> str:
            seen.append(params)
            return prompt

        @operation
        async def maybe(self, prompt: str, params: EchoParams | None = None) -> str:
            seen.append(params)
            return prompt

        @operation
        async def open(self, prompt: str, params: Any = Sub()) -> str:
            seen.append(params)
            return prompt

        @operation
        def must(self, prompt: str, params: EchoParams) -> str:
            seen.append(params)
            return prompt

    client, given = Backend_(), EchoParams(suffix="!", extra={"mode": "x", "depth": [1, 2]})
    for call in (client.one, client.maybe, client.must):
        call("a", given).compute()
    client.maybe("a").compute()
    client.open("a", Sub(top_k=3)).compute()

    assert seen == [given, given, given, None, Sub(top_k=3)]
    assert [type(p) for p in seen] == [EchoParams] * 3 + [type(None), Sub]


def test_a_local_class_of_parameters_needs_a_default() -> None:
    """A record is made again of JSON: its class is that of the annotation, else of the default."""

    class Local(Params):
        size: int | None = None

    class Backend_(Backend):
        @operation
        def one(self, prompt: str, params: Local = Local()) -> str:
            return f"{type(params).__name__} {params.size}"

        @operation
        def lost(self, prompt: str, params: Local) -> str:
            return "never"

    assert Backend_().one("a", Local(size=3)).compute() == "Local 3"
    with (
        context.set(eager=True),
        pytest.raises(ParameterError, match=r"write params: Local = Local"),
    ):
        Backend_().lost("a", Local(size=3))


def test_a_parameter_that_is_none_stays_none() -> None:
    """None means "not sent", whatever the default of the record is."""

    class Warm(Params):
        temperature: float | None = 0.7

    class Backend_(Backend):
        @operation
        def one(self, prompt: str, params: Warm = Warm()) -> str:
            return repr(params.temperature)

    one = Backend_().one
    assert feste.compute(one("a"), one("a", Warm(temperature=None))) == ("0.7", "None")


def test_a_new_optional_parameter_makes_no_new_draw() -> None:
    """What is not sent decides nothing: stored draws outlive an upgrade that adds parameters."""
    old: Any = type("P", (Params,), {"__annotations__": {"a": "int | None"}, "a": None})
    new: Any = type(
        "P",
        (Params,),
        {"__annotations__": {"a": "int | None", "b": "int | None"}, "a": None, "b": None},
    )

    assert old(a=1).__feste_fingerprint__() == new(a=1).__feste_fingerprint__()
    assert old(a=1).__feste_fingerprint__() != new(a=1, b=2).__feste_fingerprint__()


def test_sync_methods_run_side_by_side() -> None:
    """A sync method runs in a thread: one that waits does not hold up the others."""
    barrier = threading.Barrier(4, timeout=20)

    class Slow(Backend):
        @operation
        def wait(self, text: str) -> str:
            barrier.wait()
            return text

    slow = Slow()

    assert feste.compute([slow.wait(str(i)) for i in range(4)]) == (["0", "1", "2", "3"],)


def test_async_methods_run_side_by_side() -> None:
    """All of them on one loop, concurrently."""

    class Slow(Backend):
        def __init__(self) -> None:
            self.here = 0

        @operation
        async def wait(self, text: str) -> str:
            self.here += 1
            while self.here < 8:
                await asyncio.sleep(0)
            return text

    slow = Slow()

    assert len(feste.compute([slow.wait(str(i)) for i in range(8)])[0]) == 8


def test_warming_up_counts_into_no_time_limit() -> None:
    """It is done before the first request, in a thread, and not again."""
    warmed: list[str] = []

    class Cold(Backend):
        timeout = 0.1

        def warm_up(self) -> None:
            time.sleep(1.5)  # longer than a request gets, patience included
            warmed.append(threading.current_thread().name)

        @operation
        async def ask(self, text: str) -> str:
            return f"{text} {len(warmed)}"

    cold = Cold()

    assert feste.compute(cold.ask("first")) == ("first 1",)
    assert feste.compute(cold.ask("second")) == ("second 1",)
    assert warmed != [threading.main_thread().name]


def test_what_comes_during_the_warm_up_is_sent_in_order_after_it() -> None:
    """One warm-up serves all, however many requests wait for it."""
    warmed: list[str] = []
    sent: list[str] = []

    class Cold(Backend):
        def warm_up(self) -> None:
            warmed.append(threading.current_thread().name)
            time.sleep(0.05)  # the others arrive meanwhile

        @operation
        async def ask(self, text: str) -> str:
            sent.append(text)
            return text

    cold = Cold()
    texts = [str(i) for i in range(8)]

    assert feste.compute([cold.ask(text) for text in texts]) == (texts,)
    assert sent == texts
    assert len(warmed) == 1


def test_a_warm_up_that_fails_is_tried_once_for_all_that_wait() -> None:
    """All calls of a backend whose SDK is missing are told at once; the next run tries again."""
    warmed: list[str] = []
    together = threading.Event()

    class Broken(Backend):
        def warm_up(self) -> None:
            warmed.append("")
            together.wait(60)
            if len(warmed) == 1:
                raise ImportError("no SDK")

        @operation
        async def ask(self, text: str) -> str:
            return text

    broken = Broken()
    calls = [broken.ask(str(i)) for i in range(8)]
    threading.Timer(0.2, together.set).start()  # when all of them wait
    errors = feste.compute(calls, on_error="return")[0]

    assert {type(error) for error in errors} == {Rejected}
    assert all("ImportError: no SDK" in str(error) for error in errors)
    assert len(warmed) == 1
    assert feste.compute(calls)[0] == [str(i) for i in range(8)]
    assert len(warmed) == 2


def test_prompts_may_be_lazy_anywhere() -> None:
    """A node in an argument, alone or inside, is computed first."""
    plain = Plain()
    node = plain.join(plain.shout(same("a")), second=same("b"), sep=same("+") + "")

    assert node.compute() == ["A+b"]


def test_what_a_method_returns_is_plain_data() -> None:
    """Dataclasses become dicts, tuples lists; text of a subclass is text."""

    @dataclasses.dataclass
    class Answer:
        text: str
        marks: tuple[int, ...]

    class Backend_(Backend):
        @operation
        def one(self, what: str) -> Any:
            return {"answer": Answer("a", (1, 2)), "reply": Reply("b"), "none": None}[what]

    client = Backend_()
    answer, reply, none = feste.compute(
        client.one("answer"), client.one("reply"), client.one("none")
    )

    assert (answer, none) == ({"text": "a", "marks": [1, 2]}, None)
    assert (reply, type(reply)) == ("b", str)


# --- wrong calls ------------------------------------------------------------------------------------

echo = Echo()
WRONG: dict[str, tuple[Any, str]] = {
    "unknown": (
        lambda: echo.complete("a", parms=EchoParams()),
        "complete() has no parameter 'parms'. Did you mean 'params'?",
    ),
    "missing": (lambda: echo.complete(), "complete() needs 'prompt'"),
    "too many": (
        lambda: echo.complete("a", EchoParams(), 3),
        "complete() takes 2 positional arguments, not 3",
    ),
    "by name only": (
        lambda: Plain().join("a", "b", "c"),
        "join() takes 2 positional arguments, not 3",
    ),
    "twice": (lambda: echo.complete("a", prompt="b"), "complete() got 'prompt' twice"),
    "dict": (
        lambda: echo.complete("a", {"suffix": "!"}),
        "complete() takes params=EchoParams(...), not a dict",
    ),
    "none": (
        lambda: echo.complete("a", None),
        "complete() takes params=EchoParams(...), not a NoneType",
    ),
    "self": (lambda: echo.complete("a", self="b"), "complete() has no parameter 'self'"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("eager", [False, True])
def test_a_wrong_call_is_refused_at_the_users_line(name: str, eager: bool) -> None:
    """Unknown, missing, doubled parameters and wrong kinds: before anything is recorded or sent."""
    call, said = WRONG[name]
    with context.set(eager=eager), pytest.raises(ParameterError) as caught:
        call()

    assert said in str(caught.value)
    assert caught.value.origin == f"{__file__}:{call.__code__.co_firstlineno}" or (
        caught.value.origin == f"{__file__}:{call.__code__.co_firstlineno + 1}"
    )
    assert (echo.singles, echo.lists) == ([], [])


@pytest.mark.parametrize(
    "method",
    [
        lambda self, *prompts: None,
        lambda self, prompt, **more: None,
        lambda self, prompt, /: None,
    ],
)
def test_parameters_of_an_operation_have_names(method: Any) -> None:
    """Requests are data by name: a parameter without one is refused where it is declared."""
    with pytest.raises(ConfigError, match="must have a name"):
        operation(method)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"a", [object()], {1: "a"}, 3 + 4j])
def test_an_argument_that_is_no_plain_data_sends_nothing(value: Any) -> None:
    """A request is JSON: what cannot be is refused with the name of the parameter."""
    client = Echo()
    error = only_error(client.complete(value))

    assert type(error) is PlainDataError
    assert str(error).startswith("prompt")
    assert error.origin.startswith(__file__)
    assert (client.singles, client.lists) == ([], [])
    with context.set(eager=True), pytest.raises(PlainDataError):
        client.complete(value)


def test_the_name_of_a_node_is_refused_wherever_it_stands() -> None:
    """In any argument of any operation."""
    text = f"{same(1)!r}"
    for call in (
        lambda: Plain().shout(text),
        lambda: Plain().join("a", second=text),
        lambda: Plain().shout({"a": [text]}),  # type: ignore[arg-type]
    ):
        with pytest.raises(LazyValueError, match="the name of a lazy value"):
            call()


# --- wrong answers ----------------------------------------------------------------------------------


class Answers(Backend):
    """Answers with what it was given in Python, not as JSON."""

    answers: Any = None
    calls = 0

    @operation
    async def one(self, prompt: str) -> Any:
        type(self).calls += 1
        if isinstance(self.answers, Exception):
            raise self.answers
        return self.answers

    @operation
    async def some(self, prompt: str) -> Any:
        type(self).calls += 1
        return f"single {prompt}"

    @some.batch(max_items=10)
    async def some_many(self, prompts: Sequence[str]) -> Any:
        type(self).calls += 1
        if isinstance(self.answers, Exception):
            raise self.answers
        return self.answers(prompts) if callable(self.answers) else self.answers


_numbers = itertools.count()


def answering(answers: Any) -> Answers:
    """A client of a provider that nobody has learnt anything of."""

    class Fresh(Answers):
        plugin = f"fresh{next(_numbers)}"
        calls = 0

    client = Fresh()
    client.answers = answers
    return client


@pytest.mark.parametrize("answer", [object(), {1, 2}, b"a", [object()], {1: 2}, lambda: 1])
def test_an_answer_that_is_no_plain_data_is_malformed(answer: Any) -> None:
    """A reply of the wrong kind is paid and useless, and is told as such; it is not bought again."""
    client = answering(answer)
    error = only_error(client.one("a"))

    assert type(error) is OutputMismatch
    assert f"one of {client.plugin}: the reply" in str(error)
    assert (error.billed, error.backend, client.calls) == ("yes", client.plugin, 1)


def test_an_exception_of_the_method_fails_the_call() -> None:
    """Any exception becomes an error of the call, with the cause to look at; no retry, it is a bug."""
    cause = KeyError("choices", "x" * 1000)
    client = answering(cause)
    error = only_error(client.one("a"))

    assert type(error) is Rejected
    assert "KeyError: ('choices', 'xxx" in str(error)
    assert (error.billed, error.__cause__, client.calls) == ("unknown", cause, 1)


def test_errors_of_calls_pass_as_they_are() -> None:
    """A CallError raised by the method says itself what it is; Transient ones are tried again."""
    client = answering(InvalidRequest("too long", status=400))
    tries = iter([ServerError("down", retry_after=0.0)] * 2)

    class Flaky(Backend):
        @operation
        async def one(self, prompt: str) -> str:
            for error in tries:
                raise error
            return "at last"

    error = only_error(client.one("a"))

    assert (type(error), error.status, error.attempts, client.calls) == (InvalidRequest, 400, 1, 1)
    assert Flaky().one("a").compute() == "at last"


def test_a_feste_error_of_the_method_is_no_malformed_answer() -> None:
    """A missing key found by the method costs nothing and says so."""
    error = only_error(answering(feste.errors.MissingKey("MY_KEY is not set")).one("a"))

    assert type(error) is Rejected
    assert "MY_KEY is not set" in str(error)
    assert error.billed == "unknown"


def test_an_exception_in_the_list_fails_its_own_call() -> None:
    """Per item: a value or an exception; the others of the batch have their answers."""

    def answers(prompts: Sequence[str]) -> list[Any]:
        return [ValueError("bad one") if p == "b" else p.upper() for p in prompts]

    client = answering(answers)
    values = feste.compute([client.some(p) for p in "abc"], on_error="return")[0]

    assert (values[0], values[2]) == ("A", "C")
    assert type(values[1]) is Rejected
    assert "ValueError: bad one" in str(values[1])
    assert client.calls == 1


def test_errors_in_the_list_keep_what_they_know() -> None:
    """Kind and facts of an item's error survive, also of a plugin's own kind of error."""

    class Own(ConnectionLost):
        pass

    lost = Own("gone", status=502, code="x", request_id="r", billed="yes")
    refused = {
        "a": InvalidRequest("no", status=422, code="x", request_id="r"),
        "b": InvalidRequest(),
    }
    client = answering(lambda prompts: [refused.get(p, p) for p in prompts])
    values = feste.compute([client.some(p) for p in "abc"], on_error="return")[0]

    assert [type(v) for v in values] == [InvalidRequest, InvalidRequest, str]
    assert (values[0].status, values[0].code, values[0].request_id) == (422, "x", "r")
    payload = _outcomes([lost], client)
    request = Request("p", "some[]", "plugin:p", {})
    (back,) = _default_unpack(client, request, Response(payload))

    assert type(back) is ConnectionLost
    assert (back.status, back.code, back.request_id, back.billed) == (502, "x", "r", "yes")


@pytest.mark.parametrize("count", [0, 1, 2, 4, 30])
def test_a_wrong_count_falls_back_to_single_calls(count: int) -> None:
    """A list of the wrong length belongs to nobody: each call is asked alone, now and later."""
    client = answering(lambda prompts: ["?"] * count)
    first = feste.compute([client.some(p) for p in "abc"])[0]
    calls = client.calls
    second = feste.compute([client.some(p) for p in "def"])[0]

    assert first == ["single a", "single b", "single c"]
    assert calls == 4
    assert second == ["single d", "single e", "single f"]


@pytest.mark.parametrize("answer", ["abc", None, 5, {"a": 1, "b": 2, "c": 3}, b"abc"])
def test_a_list_must_be_a_list(answer: Any) -> None:
    """A text of the right length is no list of answers, nor is a dict."""
    client = answering(answer)
    values = feste.compute([client.some(p) for p in "abc"], on_error="return")[0]

    assert [type(v) for v in values] == [OutputMismatch] * 3
    assert all("it must return a list, not" in str(v) for v in values)


def test_one_bad_item_in_a_list_is_malformed() -> None:
    """An item that is no plain data is named by its place."""
    client = answering(lambda prompts: [*prompts[:-1], object()])
    values = feste.compute([client.some(p) for p in "abc"], on_error="return")[0]

    assert {type(v) for v in values} == {OutputMismatch}
    assert "the reply[2] is" in str(values[0])


def test_a_list_that_is_refused_is_taken_apart() -> None:
    """InvalidRequest for a whole list: one of its calls is bad, so each is asked alone."""
    client = answering(InvalidRequest("one of them"))
    values = feste.compute([client.some(p) for p in "abc"])[0]

    assert values == ["single a", "single b", "single c"]


def test_every_failed_call_has_an_error_of_its_own() -> None:
    """Members of a failed request do not share one error: each names its own call."""
    client = answering(RuntimeError("down"))
    nodes = [client.some(p) for p in "abc"]
    values = feste.compute(nodes, on_error="return")[0]

    assert len({id(v) for v in values}) == 3
    assert [v.node for v in values] == [n.key for n in nodes]


# --- the three halves -------------------------------------------------------------------------------


class Halves(Backend):
    """An operation made of its halves."""

    def __init__(self) -> None:
        self.sent: list[Request] = []

    def _prepare(self, text: str, *, n: int = 1) -> Request:
        """Ask for n answers."""
        return Request("halves", "ask", self.endpoint, {"text": text, "n": n})

    async def _send(self, request: Request, on_chunk: Any = None) -> Response:
        self.sent.append(request)
        return Response({"got": request.body}, Usage(3, 2))

    def _parse(self, response: Response, arguments: Any) -> list[str]:
        return [f"{response.payload['got']['text']} of {arguments['n']}"]

    ask = Operation(prepare=_prepare, send=_send, parse=_parse)


def test_an_operation_of_three_halves() -> None:
    """prepare makes data, send does the I/O, parse sees the answer and the arguments."""
    client = Halves()
    node = client.ask("a", n=2)

    assert node.compute() == ["a of 2"]
    assert client.sent[0].body == {"text": "a", "n": 2}
    assert client.sent[0].draws == (node._node.draw,)
    assert feste.last_report().operations[0].input_tokens == 3  # type: ignore[union-attr]


def test_an_operation_on_the_class_and_on_a_client() -> None:
    """The class has the Operation, a client its Call, one object per client."""
    client = Halves()

    assert isinstance(Halves.ask, Operation)
    assert isinstance(client.ask, Call)
    assert client.ask is client.ask
    assert Halves().ask is not client.ask
    assert client.ask.__doc__ == "Ask for n answers."
    assert Echo.complete.__doc__ == Echo().complete.__doc__ == "Say it again."
    assert repr(client.ask).startswith("<halves<plugin:halves")


def test_operations_are_inherited_and_overridden() -> None:
    """A subclass has its parent's operations, and may put its own in their place."""

    class Louder(Plain):
        @operation
        def shout(self, text: str) -> str:
            return text.upper() + "!"

    louder = Louder()

    assert feste.compute(louder.shout("a"), louder.join("x")) == ("A!", ["x-b"])
    assert (louder.plugin, Plain.plugin) == ("louder", "plain")


def test_parse_is_free_to_fail() -> None:
    """What parse raises is the call's error; it was paid, and is not bought again."""

    class Picky(Halves):
        def _parse(self, response: Response, arguments: Any) -> str:
            raise KeyError("text")

        ask = Operation(prepare=Halves._prepare, send=Halves._send, parse=_parse)

    client = Picky()
    error = only_error(client.ask("a"))

    assert type(error) is MalformedResponse
    assert "KeyError" in str(error)
    assert (error.billed, len(client.sent)) == ("yes", 1)


def test_unpack_must_give_one_outcome_a_call() -> None:
    """A rule that loses outcomes is noticed: the calls are sent one by one."""

    class Loses(Halves):
        def _pack(self, requests: Sequence[Request]) -> Request:
            body = {**requests[0].body, "text": [r.body["text"] for r in requests]}
            return dataclasses.replace(requests[0], body=body)

        def _unpack(self, request: Request, response: Response) -> list[Response]:
            return [response]

        ask = Operation(
            prepare=Halves._prepare,
            send=Halves._send,
            parse=Halves._parse,
            batch=BatchRule("text", "text", 10, pack=_pack, unpack=_unpack),
        )

    client = Loses()
    values = feste.compute([client.ask(t) for t in "abc"])[0]

    assert values == [["a of 1"], ["b of 1"], ["c of 1"]]
    assert [r.items for r in client.sent] == [3, 1, 1, 1]
    with pytest.raises(CountMismatch, match="1 outcomes for 3 items"):
        unpack_response(client.ask, client.sent[0], Response([]))


def test_a_list_of_the_wrong_count_is_not_bought_twice() -> None:
    """The calls of a list are sent one by one, also where sending it tells that answers are missing."""
    asked: list[int] = []

    class Miscounting(Backend):
        @operation
        async def ask(self, text: str) -> str:
            asked.append(1)
            return text.upper()

        @ask.batch(max_items=10)
        async def ask_many(self, texts: Sequence[str]) -> Sequence[str]:
            asked.append(len(texts))
            raise CountMismatch("2 answers came for 3")

    client = Miscounting()
    for _ in range(2):  # what was learnt of the server holds
        assert feste.compute([client.ask(t) for t in "abc"])[0] == ["A", "B", "C"]

    assert asked == [3] + [1] * 6


def test_what_a_backend_without_keys_has_in_memory_is_not_made_text() -> None:
    """A traceback is searched for keys; where there are none, nothing asks for the repr of variables."""
    asked: list[str] = []

    class Weights:
        def __repr__(self) -> str:
            asked.append("repr")
            return "gigabytes"

    class Keyless(Backend):
        @operation
        async def ask(self, text: str) -> str:
            weights = Weights()
            raise ValueError(f"{text} has {type(weights).__name__}")

    (got,) = feste.compute(Keyless().ask("a"), on_error="return")

    assert "a has Weights" in str(got) and asked == []


# --- clients ----------------------------------------------------------------------------------------


def test_a_backend_is_found_by_name() -> None:
    """``create`` makes a client with or without configuration."""
    assert isinstance(create("fake"), FakeBackend)
    assert create("fake", model="m").model == "m"  # type: ignore[attr-defined]


def test_an_unknown_backend_is_refused_with_the_nearest() -> None:
    """The message names what is near, and what to install."""
    with pytest.raises(UnknownName, match=r"no backend 'fakee'\. Did you mean 'fake'\?") as caught:
        create("fakee", model="m")

    assert "feste-backend-fakee installed?" in str(caught.value)


def test_configuration_that_nobody_takes_is_refused() -> None:
    """The smallest backend takes no configuration: a misspelt one is not swallowed."""
    with pytest.raises(TypeError, match="modle"):
        Plain(modle="x")  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Plain("x")  # type: ignore[call-arg]


class Configured(Backend):
    def __init__(self, model: str, *, depth: int = 1, tags: Sequence[str] = ()) -> None:
        self.model, self.depth, self.tags = model, depth, tags

    @operation
    def ask(self, text: str) -> str:
        return f"{self.model} {self.depth} {text}"


def test_configuration_is_what_was_given_by_name() -> None:
    """Positional or by keyword, the same configuration is the same client."""
    one, two = Configured("m", depth=2), Configured(depth=2, model="m")

    assert one.config() == two.config() == {"model": "m", "depth": 2}
    assert one.identity == two.identity
    assert one.token == two.token
    assert repr(one) == "Configured(model='m', depth=2)"
    assert Configured("m").identity != Configured("n").identity


@pytest.mark.parametrize(
    "again", [lambda c: pickle.loads(cloudpickle.dumps(c)), copy.copy, copy.deepcopy]
)
def test_clients_are_made_again_from_their_configuration(again: Any) -> None:
    """A pickle or a copy is a fresh client of equal configuration; calls go with their client."""
    client = again(Configured("m", depth=2))
    call = again(Configured("m", depth=3).ask)

    assert client.ask("a").compute() == "m 2 a"
    assert call.client.depth == 3


def test_dataclasses_can_be_backends() -> None:
    """Mutable or frozen, with equality and without a hash."""

    @dataclasses.dataclass
    class One(Backend):
        model: str = "one"

        @operation
        def ask(self, text: str) -> str:
            return f"{self.model} {text}"

    @dataclasses.dataclass(frozen=True)
    class Two(Backend):
        model: str = "two"

        @operation
        def ask(self, text: str) -> str:
            return f"{self.model} {text}"

    assert feste.compute(One("x").ask("a"), Two().ask("b")) == ("x a", "two b")
    assert One("x").config() == {"model": "x"}


def test_identity_holds_no_addresses() -> None:
    """Objects in a configuration count by their class: draws are the same in every process."""
    client = Configured("m", tags=[object()])  # type: ignore[list-item]

    assert " at 0x" not in client.identity + repr(client)
    assert "<object>" in client.identity


def test_timeouts_and_limits_are_no_identity() -> None:
    """How calls are made does not decide what they answer."""

    class Timed(Backend):
        def __init__(self, timeout: float = 1.0, limits: Limits | None = None) -> None:
            self.limits = limits or Limits()

    assert Timed(timeout=1.0).token == Timed(timeout=9.0, limits=Limits(concurrency=2)).token


# --- keys -------------------------------------------------------------------------------------------

KEY = "k-very-private-4711"


class Keyed(Backend):
    """A third party's backend that takes a key, and tells it to everybody."""

    def __init__(self, api_key: Any = None, *, headers: Any = None) -> None:
        self.key = api_key.reveal() if isinstance(api_key, Secret) else api_key

    @operation
    async def chat(self, prompt: str) -> str:
        if prompt == "fail":
            raise RuntimeError(f"401: wrong key {KEY}")
        if prompt == "fail deep down":
            raise RuntimeError("401") from ValueError(f"wrong key {KEY}")
        return prompt

    @chat.batch(max_items=10)
    async def chat_many(self, prompts: Sequence[str]) -> Sequence[Any]:
        return [RuntimeError(f"401: wrong key {KEY}") for _ in prompts]


CLIENTS = {
    "by keyword": lambda: Keyed(api_key=KEY),
    "by position": lambda: Keyed(KEY),
    "in a header": lambda: Keyed(headers={"Authorization": KEY, "n": [{"token": KEY}]}),
    "by name": lambda: Keyed(Secret("PRIVATE_KEY_OF_A_TEST")),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_a_key_shows_nowhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In no text of a client, call, node, request, plan, report, picture, error or traceback."""
    monkeypatch.setenv("PRIVATE_KEY_OF_A_TEST", KEY)
    client = CLIENTS[name]()
    nodes = [client.chat("fail"), client.chat("b"), client.chat("fail deep down")]
    shown = [repr(client), str(client), repr(client.config()), client.identity, repr(client.token)]
    shown += [repr(client.chat), repr(nodes), repr(nodes[0]._node), str(feste.explain(nodes))]
    shown += [str(feste.explain(nodes).to_json()), str(feste.explain(nodes).plan)]
    shown += [feste.compute(nodes[0], on_error="return")[0], nodes[0].visualize()]
    for given in ({}, {"optimize": False}):
        try:
            feste.compute(nodes, **given)
        except RunFailed as error:
            shown += [str(error), repr(error.errors), repr(error.partial)]
            shown += ["".join(traceback.format_exception(error))]
            shown += ["".join(traceback.format_exception(e)) for e in error.errors]
            shown += [pickle.dumps(error.errors).decode("latin-1")]
    report = feste.last_report()
    assert report is not None
    shown += [str(report), str(report.to_json()), report.timeline()]
    request = client.chat.prepare(["a"])
    shown += [repr(request), str(dict(request.client)), request.key]

    assert [str(text) for text in shown if KEY in str(text)] == []


@pytest.mark.parametrize("name", [n for n in CLIENTS if n != "by name"])
def test_a_literal_key_does_not_pickle(name: str) -> None:
    """A client with a literal key stays in its process; the error says how to name the key."""
    client = CLIENTS[name]()
    for thing in (client, client.chat, client.chat("a"), [client.chat("a") + "b"]):
        with pytest.raises(ConfigError, match=r"Secret\('MY_KEY'\)") as caught:
            pickle.dumps(thing)
        assert KEY not in str(caught.value)


def test_a_literal_key_can_be_copied_in_the_process() -> None:
    """A copy does not leave the process: it is a client with the same key."""
    client = Keyed(KEY)

    assert copy.copy(client).key == copy.deepcopy({"c": client})["c"].key == KEY
    assert copy.copy(client).token == client.token


def test_a_named_key_is_looked_for_before_the_run() -> None:
    """A backend that was given a Secret needs it: missing, it stops the run before any request."""

    class Lazy(Backend):
        def __init__(self, api_key: Secret) -> None:
            self.sent: list[str] = []

        @operation
        def chat(self, prompt: str) -> str:
            self.sent.append(prompt)
            return prompt

    client, fake = Lazy(Secret("A_KEY_THAT_IS_NOT_SET")), FakeBackend()
    node = client.chat("a")
    with pytest.raises(feste.errors.MissingKey, match="A_KEY_THAT_IS_NOT_SET") as caught:
        feste.compute(fake.chat("b"), node)

    assert caught.value.origin == node._node.where
    assert (client.sent, fake.requests) == ([], [])


# --- what tools show of a backend -------------------------------------------------------------------


def parameters(function: Any) -> str:
    return str(inspect.signature(function, eval_str=False)).replace("'", "")


def test_a_backend_shows_the_parameters_of_its_constructor() -> None:
    """Documentation tools and editors show these, not ``(*args, **kwargs)``."""

    @dataclasses.dataclass
    class Record(Backend):
        model: str = "m"

    assert parameters(Backend) == "()"
    assert parameters(Echo) == "(limits: Limits | None = None)"
    assert parameters(Record) == "(model: str = m)"
    assert parameters(FakeBackend).startswith(
        "(model: str = fake-1, *, latency: float = 0.0, fail:"
    )


def test_an_operation_shows_its_parameters() -> None:
    """Of a client as it is called, of the class as a method."""
    assert parameters(Echo().complete) == "(prompt: str, params: EchoParams = EchoParams())"
    assert parameters(Echo.complete) == "(self, prompt: str, params: EchoParams = EchoParams())"
    assert parameters(FakeBackend().embed) == "(text: str, params: FakeParams = FakeParams())"
    assert inspect.isroutine(FakeBackend.embed)
    assert inspect.signature(Call).parameters.keys() == {"client", "operation", "rest"}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"max_tokens": 3}, r"has no parameter 'max_tokens': give FakeParams\(max_tokens=3\)"),
        ({"model": "m"}, r"has no parameter 'model': give FakeParams\(model=\.\.\.\)"),
        ({"parms": 3}, r"has no parameter 'parms'\. Did you mean 'params'\?"),
    ],
)
def test_an_unknown_parameter_names_its_place(given: dict[str, Any], why: str) -> None:
    """A field of the operation's record belongs into the record; else the nearest name is said."""
    with pytest.raises(ParameterError, match=why):
        FakeBackend().chat("x", **given)


def test_an_operation_of_the_class_takes_a_client() -> None:
    """As any method does."""
    llm = FakeBackend()

    assert FakeBackend.embed(llm, "a").compute() == llm.embed("a").compute()


# --- the fake backend -------------------------------------------------------------------------------


def test_the_fake_answers_from_request_and_draw() -> None:
    """SAMPLE by the draw, GREEDY and PURE by the request alone; other models answer otherwise."""
    llm, other = FakeBackend(), FakeBackend("fake-2")
    greedy = FakeParams(temperature=0)
    samples = feste.compute([llm.chat("a") for _ in range(3)])[0]
    greedies = feste.compute([llm.chat("a", greedy) for _ in range(3)], optimize=False)[0]
    vectors = feste.compute([llm.embed("a") for _ in range(3)], optimize=False)[0]

    assert len(set(samples)) == 3
    assert len(set(greedies)) == 1
    assert vectors[0] == vectors[1] == vectors[2]
    assert (vectors[0].typecode, len(vectors[0])) == ("f", 8)
    assert llm.chat("a", greedy).compute() != other.chat("a", greedy).compute()
    assert isinstance(samples[0], Reply)


def test_the_fake_fails_where_it_is_told_to() -> None:
    """Each call gets an error of its own, with all that the given one knows."""
    told = InvalidRequest("no", status=400)
    llm = FakeBackend(fail={"poison": told})
    values = feste.compute(llm.chat("fine"), llm.chat("poison"), on_error="return")

    assert (type(values[1]), values[1].status) == (InvalidRequest, 400)
    assert values[1] is not told
    assert told.attempts == CallError.attempts
    assert told.origin == ""


@pytest.mark.parametrize(
    "text", ["fake-1", "messages", "role", "user", "seed", "\\n", "'", "max_tokens"]
)
def test_the_fake_looks_for_that_in_what_is_said_only(text: str) -> None:
    """Neither the model nor the names of a request's fields are what the user says."""
    llm = FakeBackend(fail={text: InvalidRequest("no")})
    params = FakeParams(seed=1, max_tokens=2)
    calls = [llm.chat("a\nb", params), llm.complete("a\nb", params), llm.embed("a\nb")]

    assert feste.compute(calls, on_error="return")[0] == feste.compute(calls)[0]


@pytest.mark.parametrize("name", ["chat", "complete", "embed"])
def test_the_fake_looks_into_every_text(name: str) -> None:
    """Into messages and their parts, and into each text of a shared request."""
    llm = FakeBackend(fail={"two\nlines 'bad'": InvalidRequest("no")})
    bad: Any = "with two\nlines 'bad' in it"
    if name == "chat":
        parts = [{"type": "text", "text": bad}]
        bad = [{"role": "system", "content": "fine"}, {"role": "user", "content": parts}]
    fine, broken = feste.compute(
        [getattr(llm, name)("fine"), getattr(llm, name)(bad)], on_error="return"
    )[0]

    assert isinstance(broken, InvalidRequest) and not isinstance(fine, InvalidRequest)


@pytest.mark.parametrize(
    ("name", "argument"),
    [("complete", 5), ("complete", ["a"]), ("embed", None), ("embed", []), ("embed", ["a", "b"])]
    + [("chat", 5), ("chat", []), ("chat", ["hello"]), ("chat", [{"content": "hello"}])],
)
def test_the_fake_refuses_what_real_ones_refuse(name: str, argument: Any) -> None:
    """A wrong argument is an error before anything is sent."""
    llm = FakeBackend()
    (error,) = feste.compute(getattr(llm, name)(argument), on_error="return")

    assert isinstance(error, ParameterError)
    assert llm.requests == []


@pytest.mark.parametrize("name", ["chat", "complete"])
@pytest.mark.parametrize("temperature", [None, 0])
def test_the_fake_gives_as_many_answers_as_are_asked_for(
    name: str, temperature: float | None
) -> None:
    """With ``n`` above 1 the value is a list of answers, all different, and the same in any mode."""
    params = FakeParams(n=3, temperature=temperature)
    fresh_draws()
    calls = [getattr(FakeBackend(), name)(text, params) for text in ("a", "b")]
    made = feste.compute(calls)[0]
    fresh_draws()
    with context.set(eager=True):
        again = [getattr(FakeBackend(), name)(text, params) for text in ("a", "b")]

    assert made == again
    assert [len(replies) for replies in made] == [3, 3]
    assert len({*made[0], *made[1]}) == 6
    assert all(isinstance(reply, Reply) for reply in made[0])
    assert isinstance(getattr(FakeBackend(), name)("a", FakeParams(n=1)).compute(), Reply)
    (error,) = feste.compute(
        getattr(FakeBackend(), name)("a", FakeParams(n=True)), on_error="return"
    )
    assert isinstance(error, ParameterError)


def test_fakes_that_fail_differently_are_different_clients() -> None:
    """What a fake is told to fail at decides its answers, so its calls are nobody else's."""
    one, two = FakeBackend(fail={"a": InvalidRequest("no")}), FakeBackend()
    values = feste.compute([two.embed("a"), one.embed("a")], on_error="return")[0]

    assert type(values[0]) is not type(values[1])


def test_the_fake_counts_what_is_in_flight() -> None:
    """``peak`` is the most requests at once; it respects the limits of the client."""
    llm = FakeBackend(latency=0.01, limits=Limits(concurrency=2))
    feste.compute([llm.chat(str(i)) for i in range(6)])

    assert 1 <= llm.peak <= 2


@pytest.mark.parametrize("wrong", [3, {"concurrency": 3}])
def test_limits_are_limits(wrong: Any) -> None:
    """Anything else is refused where the backend is made, not where the gate looks at it."""
    with pytest.raises(ConfigError, match="Limits"):
        FakeBackend(limits=wrong)


def test_parameters_of_another_operation_are_refused_at_the_call() -> None:
    """Before anything is sent, at the user's own line."""

    class Other(Params):
        volume: int | None = None

    with pytest.raises(ParameterError, match=r"FakeParams\(\.\.\.\), not .*\.Other") as caught:
        FakeBackend().chat("a", Other())  # type: ignore[arg-type]
    assert "test_operations.py" in caught.value.origin


@pytest.mark.parametrize("wrong", [None, RuntimeError("x"), "text"])
def test_unpack_gives_responses_or_errors(wrong: Any) -> None:
    """Anything else is an error of these calls, and of nothing besides."""

    class Odd(FakeBackend):
        complete = Operation(
            prepare=FakeBackend._prepare_complete,
            send=FakeBackend._send,
            parse=FakeBackend._parse_text,
            batch=BatchRule(
                "prompt", "prompt", 16, pack=FakeBackend._pack, unpack=lambda b, q, r: [wrong] * 2
            ),
        )

    odd, good = Odd(), FakeBackend()
    nodes = [odd.complete("a"), odd.complete("b"), good.complete("a"), good.complete("b")]
    values = feste.compute(*nodes, on_error="return")

    assert [type(value) for value in values[:2]] == [MalformedResponse] * 2
    assert not any(isinstance(value, Exception) for value in values[2:])


def test_a_server_that_gives_no_answers_to_n_is_not_asked_again() -> None:
    """The calls are sent singly, and so are those of later runs."""

    class Nothing(FakeBackend):
        chat = Operation(
            prepare=FakeBackend._prepare_chat,
            send=FakeBackend._send,
            parse=FakeBackend._parse_text,
            samples=SampleRule(lambda backend, request, response: []),
        )

    llm = Nothing("gives-nothing")
    (first,) = feste.compute([llm.chat("Hi") for _ in range(3)])
    (second,) = feste.compute([llm.chat("Ho") for _ in range(3)])

    assert len(set(first)) == len(set(second)) == 3
    assert [r.items for r in llm.requests] == [3] + [1] * 6
