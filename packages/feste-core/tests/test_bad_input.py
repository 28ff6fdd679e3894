"""Bad input is a clear error before any request: it says what is wrong, where, and what to do."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest

import feste
from feste import context
from feste.backend import Backend, Operation, Request, Secret, create, operation
from feste.errors import (
    ConfigError,
    ExtraVariable,
    FesteError,
    GraphError,
    LazyValueError,
    MissingKey,
    ParameterError,
    PlainDataError,
    RunFailed,
    UndefinedVariable,
    UnknownName,
)
from feste.prompt import ChatPrompt, Prompt
from feste.testing import FakeBackend, FakeParams

llm = FakeBackend()
ask = Prompt("About {{ x }}")


def line() -> int:
    return sys._getframe(1).f_lineno


@feste.task
def same(value: Any) -> Any:
    return value


@feste.task(executor="process")
def elsewhere(*values: Any) -> Any:
    return values


class Paid(Backend):
    """A backend that needs a key."""

    def __init__(self, api_key: Secret = Secret("A_KEY_THAT_IS_NOT_SET")) -> None:
        self.key = api_key

    @property
    def secrets(self) -> tuple[Secret, ...]:
        return (self.key,)

    @operation
    async def chat(self, prompt: str) -> str:
        raise AssertionError("never sent")


def endless() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


class Opaque:
    def __repr__(self) -> str:
        return "<Opaque>"


#: How it is written wrongly, the kind of error, what it says: first the fault, then the fix.
WRONG: dict[str, tuple[Any, type[FesteError], list[str]]] = {
    "unknown setting": (
        lambda: feste.compute(llm.chat("a"), egaer=True),
        UnknownName,
        ["no setting 'egaer'", "Did you mean 'eager'?"],
    ),
    "unknown setting in a block": (
        lambda: context.set(on_eror="return"),
        UnknownName,
        ["no setting 'on_eror'", "Did you mean 'on_error'?"],
    ),
    "wrong value of a setting": (
        lambda: feste.compute(llm.chat("a"), on_error="ignore"),
        ConfigError,
        ["on_error='ignore'", "'raise', 'return', 'stop'"],
    ),
    "unknown backend": (
        lambda: create("fak"),
        UnknownName,
        ["no backend 'fak'", "Did you mean 'fake'?", "Is feste-backend-fak installed?"],
    ),
    "unknown scheduler": (
        lambda: feste.compute(llm.chat("a"), scheduler="loacl"),
        UnknownName,
        ["no scheduler 'loacl'", "Did you mean 'local'?"],
    ),
    "unknown scheduler by URL": (
        lambda: feste.compute(llm.chat("a"), scheduler="ray://host:1"),
        UnknownName,
        ["no scheduler 'ray'", "Is feste-scheduler-ray installed?"],
    ),
    "object that is no scheduler": (
        lambda: feste.compute(llm.chat("a"), scheduler=Opaque()),
        UnknownName,
        ["no scheduler "],
    ),
    "number for a scheduler": (
        lambda: feste.compute(llm.chat("a"), scheduler=3),
        ConfigError,
        ["scheduler=3: expected a name, a URL, a get function or a client object"],
    ),
    "unknown pass": (
        lambda: feste.compute(llm.chat("a"), optimize={"bacth": False}),
        UnknownName,
        ["no pass 'bacth'", "Did you mean 'batch'?"],
    ),
    "missing key": (
        lambda: feste.compute(llm.chat("a"), Paid().chat("b")),
        MissingKey,
        ["A_KEY_THAT_IS_NOT_SET is not set", "Set it, or give api_key="],
    ),
    "wrong parameter": (
        lambda: llm.chat("a", parms=FakeParams()),
        ParameterError,
        ["chat() has no parameter 'parms'", "Did you mean 'params'?"],
    ),
    "wrong name in the parameters": (
        lambda: llm.chat("a", FakeParams(temprature=0)),  # type: ignore[call-arg]
        ParameterError,
        ["FakeParams has no parameter 'temprature'", "Did you mean 'temperature'?"],
    ),
    "dict for parameters": (
        lambda: llm.chat("a", {"temperature": 0}),
        ParameterError,
        ["params=FakeParams(...), not a dict"],
    ),
    "wrong argument of a task": (
        lambda: same(valu=1),
        ParameterError,
        ["same(): missing a required argument: 'value'"],
    ),
    "missing template variable": (
        lambda: llm.chat(ask()),
        UndefinedVariable,
        ["no value for 'x'", "add x=..."],
    ),
    "unknown template variable": (
        lambda: llm.chat(ask(x=1, y=2)),
        ExtraVariable,
        ["it has no variable 'y'"],
    ),
    "missing variable of a conversation": (
        lambda: ChatPrompt(user="{{ q }}")(),
        UndefinedVariable,
        ["no value for 'q'", "add q=..."],
    ),
    "object in a template": (
        lambda: llm.chat(ask(x=Opaque())),
        PlainDataError,
        ["variable x is ", "Opaque", "not plain data", "give "],
    ),
    "set in a template": (
        lambda: llm.chat(ask(x=[{1, 2}])),
        PlainDataError,
        ["variable x[0] is a set", "give sorted(...) of it"],
    ),
    "client in a template": (
        lambda: llm.chat(ask(x={"a": llm})),
        PlainDataError,
        ["variable x['a'] is ", "FakeBackend"],
    ),
    "cycle in a message": (
        lambda: llm.chat(endless()),
        GraphError,
        ["a cycle", "give calls plain, finite data"],
    ),
    "cycle in an argument": (
        lambda: same(endless()),
        GraphError,
        ["a cycle", "give calls plain, finite data"],
    ),
    "cycle in a variable": (
        lambda: ask(x=endless()),
        PlainDataError,
        ["contains itself", "give finite data"],
    ),
    "lock for another process": (
        lambda: feste.compute(elsewhere(threading.Lock(), llm.chat("a"))),
        ConfigError,
        ["elsewhere runs in another process", "Give it plain data, or use executor='thread'"],
    ),
    "lazy value in an f-string": (
        lambda: llm.chat(f"About {same(1)}"),
        LazyValueError,
        ["was put into a string", "Give it to a Prompt as a variable"],
    ),
    "lazy value as text": (
        lambda: llm.chat("About " + str(same(1))),
        LazyValueError,
        ["the name of a lazy value", "Give the lazy value itself as a variable of a Prompt"],
    ),
    "lazy value as text in a message": (
        lambda: llm.chat([{"role": "user", "content": "About %s" % same(1)}]),  # noqa: UP031
        LazyValueError,
        ["the name of a lazy value", "or compute it first"],
    ),
    "lazy value as text in a variable": (
        lambda: llm.chat(ask(x=[repr(same(1))])),
        LazyValueError,
        ["variable x[0]", "the name of a lazy value"],
    ),
    "lazy value as a condition": (
        lambda: llm.chat("a" if same(1) else "b"),
        LazyValueError,
        ["was used as a condition", "or branch inside a @feste.task"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_it_is_refused_before_any_request(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right kind of error, with fault, fix and the user's own line; the backend hears nothing."""
    wrong, kind, said = WRONG[name]
    monkeypatch.delenv("A_KEY_THAT_IS_NOT_SET", raising=False)
    llm.requests.clear()
    with pytest.raises(FesteError) as caught:
        wrong()
    mine = f"{__file__}:{wrong.__code__.co_firstlineno}"
    lines = {f"{t.path}:{t.lineno + 1}" for t in caught.traceback}

    assert type(caught.value) is kind
    assert [part for part in said if part not in str(caught.value)] == []
    assert mine in lines
    assert caught.value.origin in ("", mine)
    assert llm.requests == []


LATE = ["missing key", "lock for another process"]


@pytest.mark.parametrize("name", LATE)
def test_what_is_found_at_compute_names_the_line_of_the_call(name: str) -> None:
    """An error that comes later than the call it is about names the call's line in its text."""
    wrong = WRONG[name][0]
    with pytest.raises(FesteError) as caught:
        wrong()

    assert str(caught.value).endswith(f"(at {__file__}:{wrong.__code__.co_firstlineno})")


def test_a_missing_key_is_found_behind_other_calls() -> None:
    """Also where the paid call would be the last of a long chain, nothing is sent before."""
    llm.requests.clear()
    node = Paid().chat(same(llm.chat("a")))
    number = line() - 1
    with pytest.raises(MissingKey) as caught:
        node.compute()

    assert caught.value.origin == f"{__file__}:{number}"
    assert llm.requests == []


def test_keys_of_what_is_answered_are_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that has its answer needs no key any more, and one that nothing needs never did."""
    monkeypatch.delenv("A_KEY_THAT_IS_NOT_SET", raising=False)
    node = Paid().chat("b")
    node._node.value = "known"

    assert feste.compute(same(node)) == ("known",)


def test_eager_mode_refuses_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad input is found in eager mode, too, before anything is sent."""
    monkeypatch.delenv("A_KEY_THAT_IS_NOT_SET", raising=False)
    llm.requests.clear()
    eager: list[tuple[Any, type[FesteError]]] = [
        (lambda: Paid().chat("a"), MissingKey),
        (lambda: llm.chat(ask()), UndefinedVariable),
        (lambda: llm.chat(ask(x=Opaque())), PlainDataError),
        (lambda: llm.chat("a", parms=1), ParameterError),
        (lambda: llm.chat(endless()), GraphError),
        (lambda: llm.chat(object()), ConfigError),
    ]
    for wrong, kind in eager:
        with context.set(eager=True), pytest.raises(kind):
            wrong()

    assert llm.requests == []


class Careless(FakeBackend):
    """A backend that puts into its requests whatever it is given."""

    def _careless(self, prompt: Any) -> Request:
        return Request("careless", "say", "plugin:careless", {"messages": prompt})

    say = Operation(prepare=_careless, send=FakeBackend._send, parse=FakeBackend._parse_text)


@pytest.mark.parametrize("value", [object(), [{"content": {1, 2}}], {"a": float("nan")}, [b"x"]])
def test_a_request_that_is_no_json_is_not_sent(value: Any) -> None:
    """Whatever an operation makes of its arguments is checked before it is sent."""
    careless = Careless()
    node = careless.say(value)
    with pytest.raises(RunFailed) as caught:
        node.compute()
    (error,) = caught.value.errors

    assert type(error) is ConfigError
    assert str(error).startswith("body['messages']")
    assert error.origin == node._node.where
    assert careless.requests == []
