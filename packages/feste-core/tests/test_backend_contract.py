"""The contract of backends: ours keep it, and each rule notices whoever does not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from feste.backend import (
    Backend,
    BatchRule,
    Determinism,
    Operation,
    Params,
    Request,
    Response,
    Secret,
    operation,
)
from feste.delayed import FesteDelayed
from feste.errors import InvalidRequest
from feste.testing import BackendContract, FakeBackend, FakeParams

NAME = "A_KEY_OF_THE_CONTRACT"


class TestFake(BackendContract):
    def make(self) -> Backend:
        return FakeBackend()

    def calls(self, llm: Any) -> Sequence[FesteDelayed[Any]]:
        params = FakeParams(n=2, temperature=0)
        return [
            llm.chat("Hi"),
            llm.chat([{"role": "user", "content": "Hi"}], params),
            *(llm.complete(text, params) for text in "abc"),
            *(llm.embed(text) for text in "abc"),
        ]

    def broken(self) -> Sequence[Backend]:
        return [FakeBackend(fail={text: InvalidRequest("no") for text in ("Hi", "a", "b", "c")})]


class EchoParams(Params):
    times: int = 1


class Echo(Backend):
    """One method, and one for many."""

    @operation(determinism=Determinism.PURE)
    async def say(self, prompt: str, params: EchoParams = EchoParams()) -> str:
        return prompt * params.times

    @say.batch(max_items=3)
    async def say_many(self, prompts: list[str], params: EchoParams) -> list[str]:
        return [prompt * params.times for prompt in prompts]


class TestEcho(BackendContract):
    def make(self) -> Backend:
        return Echo()

    def calls(self, llm: Any) -> Sequence[FesteDelayed[Any]]:
        return [llm.say(text, EchoParams(times=2)) for text in "abcd"]


# --- what the rules notice ------------------------------------------------------------------------


class Whole(Backend):
    """A backend with all three halves; each of those below breaks one rule."""

    def __init__(self, model: str = "m", *, api_key: Any = None) -> None:
        self.model = model
        self._secret = Secret.of(api_key, NAME)

    @property
    def secrets(self) -> tuple[Secret, ...]:
        return (self._secret,)

    def prepared(self, text: str) -> Request:
        return Request("whole", "say", "plugin:whole", {"texts": [text]}, client=self.config())

    async def sent(self, request: Request, on_chunk: Any = None) -> Response:
        self._secret.reveal()
        return Response({"texts": [text.upper() for text in request.body["texts"]]})

    def parsed(self, response: Response, arguments: Any) -> str:
        (text,) = response.payload["texts"]
        return str(text)

    def packed(self, requests: Sequence[Request]) -> Request:
        texts = [text for request in requests for text in request.body["texts"]]
        return replace(requests[0], body={"texts": texts})

    def unpacked(self, request: Request, response: Response) -> list[Response]:
        return [Response({"texts": [text]}) for text in response.payload["texts"]]

    say = Operation(  # by name, so that subclasses can replace a half
        prepare=lambda self, text: self.prepared(text),
        send=lambda self, request, on_chunk: self.sent(request, on_chunk),
        parse=lambda self, response, arguments: self.parsed(response, arguments),
        determinism=Determinism.PURE,
        batch=BatchRule(
            "text",
            "texts",
            8,
            pack=lambda self, requests: self.packed(requests),
            unpack=lambda self, request, response: self.unpacked(request, response),
        ),
    )


class Contract(BackendContract):
    key_name = NAME
    kind: type[Whole] = Whole

    def make(self) -> Backend:
        return self.kind()

    def calls(self, llm: Any) -> Sequence[FesteDelayed[Any]]:
        return [llm.say(text) for text in "abc"]


class TestWhole(Contract):
    """The one that breaks none."""


_counter = itertools.count()


class Literal(Whole):
    def __init__(self) -> None:
        super().__init__(api_key="sk-literal-0123456789")
        self._given = ((), {"api_key": "sk-literal-0123456789"})


class Forgetful(Whole):
    def __reduce__(self) -> Any:
        return (type(self), ("another",))


class Shown(Whole):
    def prepared(self, text: str) -> Request:
        return replace(super().prepared(text), account=self._secret.reveal())


class Random(Whole):
    def prepared(self, text: str) -> Request:
        return replace(super().prepared(text), body={"texts": [text], "id": next(_counter)})


class Tuples(Whole):
    def prepared(self, text: str) -> Request:
        return replace(super().prepared(text), body={"texts": (text,)})


class Reversed(Whole):
    def unpacked(self, request: Request, response: Response) -> list[Response]:
        return super().unpacked(request, response)[::-1]


class Short(Whole):
    def unpacked(self, request: Request, response: Response) -> list[Response]:
        return super().unpacked(request, response)[:-1]


class Alone(Whole):
    def prepared(self, text: str) -> Request:
        return replace(super().prepared(text), body={"texts": [text], "own": text})


class Objects(Whole):
    async def sent(self, request: Request, on_chunk: Any = None) -> Response:
        return Response({"texts": set(request.body["texts"])})


class Counting(Whole):
    def parsed(self, response: Response, arguments: Any) -> str:
        return f"{next(_counter)}"


class Foreign(Whole):
    async def sent(self, request: Request, on_chunk: Any = None) -> Response:
        raise OSError("of an SDK")


class Leaky(Whole):
    async def sent(self, request: Request, on_chunk: Any = None) -> Response:
        raise InvalidRequest(f"the key {self._secret.reveal()} is wrong")


class Printable(Whole):
    """An error's traceback has a variable that holds the key."""

    async def sent(self, request: Request, on_chunk: Any = None) -> Response:
        headers = {"authorization": f"Bearer {self._secret.reveal()}"}
        raise InvalidRequest(f"{len(headers)} header is wrong")


class Caused(Printable):
    """The error before it has one."""

    async def sent(self, request: Request, on_chunk: Any = None) -> Response:
        try:
            return await super().sent(request)
        except InvalidRequest as error:
            raise InvalidRequest("wrong") from error


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (Literal, "a_client_travels_as_configuration"),
        (Forgetful, "a_client_travels_as_configuration"),
        (Shown, "the_key_shows_nowhere"),
        (Random, "prepare_is_pure"),
        (Tuples, "prepare_is_pure"),
        (Reversed, "a_shared_request_has_one_outcome_for_each_call"),
        (Short, "a_shared_request_has_one_outcome_for_each_call"),
        (Alone, "a_shared_request_has_one_outcome_for_each_call"),
        (Objects, "parse_is_repeatable"),
        (Counting, "parse_is_repeatable"),
        (Foreign, "send_raises_call_errors_only"),
        (Leaky, "send_raises_call_errors_only"),
        (Printable, "send_raises_call_errors_only"),
        (Caused, "send_raises_call_errors_only"),
    ],
)
def test_who_breaks_a_rule_is_noticed(kind: type[Whole], rule: str) -> None:
    """The rule's own test fails for that backend, and not for the one that keeps it."""
    contract = Contract()
    contract.setup_method()
    try:
        getattr(contract, f"test_{rule}")()  # keeps it as it is
        contract.kind = kind
        with pytest.raises(Exception):  # noqa: B017 - whatever a test fails with
            getattr(contract, f"test_{rule}")()
    finally:
        contract.teardown_method()


def test_the_variable_that_shows_a_key_is_named() -> None:
    """The rule says where the error was raised, and which variable a tool would print."""
    contract = Contract()
    contract.kind = Printable
    contract.setup_method()
    try:
        with pytest.raises(AssertionError, match=r"shows the key: headers in sent \(.*\.py:\d+\)"):
            contract.test_send_raises_call_errors_only()
    finally:
        contract.teardown_method()


def test_broken_clients_must_fail() -> None:
    """What ``broken`` gives and yet answers is no proof of anything."""

    class Fine(Contract):
        def broken(self) -> Sequence[Backend]:
            return [self.make()]

    contract = Fine()
    contract.setup_method()
    try:
        with pytest.raises(AssertionError, match="but answered"):
            contract.test_send_raises_call_errors_only()
    finally:
        contract.teardown_method()
