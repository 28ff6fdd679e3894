"""What arrives at the method of an operation with default halves, and what its reply becomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import feste
from feste import context
from feste.backend import Backend, Determinism, Params, Reply, Usage, operation
from feste.errors import PlainDataError, RunFailed
from feste.testing import fresh_draws


def only_error(node: Any) -> Any:
    """The error that a call ends in."""
    with pytest.raises(RunFailed) as caught:
        node.compute()
    (error,) = caught.value.errors
    return error


@dataclasses.dataclass(frozen=True)
class Box:
    size: tuple[int, int] = (1, 2)
    inner: Box | None = None
    area: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "area", self.size[0] * self.size[1])


@dataclasses.dataclass
class Pause:
    hours: float
    changes: int = dataclasses.field(init=False, default=0)

    def __post_init__(self) -> None:
        self.hours *= 60  # minutes from now on


@dataclasses.dataclass(frozen=True)
class Label:
    text: str


class Pair(NamedTuple):
    one: int
    two: str


class RichParams(Params):
    """Fields of all kinds; the body has another name for one of them, and one is left out."""

    max_tokens: int | None = None
    voice: str = "plain"
    stop: tuple[str, ...] | None = None
    box: Box | Label | None = None
    boxes: Sequence[Box] | None = None
    labels: Mapping[str, Label] | None = None
    pair: Pair | None = None
    pause: Pause | None = None
    any: Any = None
    extra: Mapping[str, Any] | None = None

    def body(self) -> dict[str, Any]:
        body = {k: v for k, v in super().body().items() if k != "voice"}
        return {**body, "max_completion_tokens": body.pop("max_tokens", 1)}


class Rich(Backend):
    @operation
    async def one(self, text: str, params: RichParams = RichParams()) -> str:
        seen.append(params)
        return text

    @one.batch(max_items=8)
    async def many(self, texts: list[str], params: RichParams) -> list[str]:
        seen.append(params)
        return texts


seen: list[Any] = []


@pytest.mark.parametrize(
    "given",
    [
        RichParams(max_tokens=3),
        RichParams(voice="loud"),
        RichParams(max_tokens=3, extra={"max_tokens": 4, "stop": "b"}),
        RichParams(stop=("a", "b")),
        RichParams(box=Box((3, 4), Box())),
        RichParams(box=Label("a")),
        RichParams(boxes=[Box(), Box((3, 4))], labels={"a": Label("b")}),
        RichParams(pair=Pair(1, "a"), any={"a": [1]}),
    ],
)
def test_a_record_arrives_as_it_was_given(given: RichParams) -> None:
    """All of its fields do, whatever its body is; single, in lists and in eager mode."""
    seen.clear()
    feste.compute(Rich().one("a", given))
    feste.compute([Rich().one(text, given) for text in "ab"])
    with context.set(eager=True):
        Rich().one("a", given)

    assert seen == [given] * 3


def test_a_dataclass_arrives_with_the_fields_that_it_has() -> None:
    """What its own code did to them is not done again, nor undone."""
    seen.clear()
    pause = Pause(2)
    pause.changes = 3
    Rich().one("a", RichParams(pause=pause)).compute()

    assert (seen[0].pause.hours, seen[0].pause.changes) == (120, 3)


def test_a_dict_like_a_dataclass_that_is_named_arrives_as_one() -> None:
    """As JSON they are the same, and so are the requests."""
    seen.clear()
    like: Any = {"text": "a"}
    Rich().one("a", RichParams(box=like)).compute()

    assert seen == [RichParams(box=Label("a"))]


def test_what_an_annotation_does_not_name_arrives_plain() -> None:
    """A tuple is a list there, and a dataclass a dict."""
    seen.clear()
    Rich().one("a", RichParams(any=(Label("b"),))).compute()

    assert seen == [RichParams(any=[{"text": "b"}])]


@pytest.mark.parametrize("wrong", [{"a"}, Determinism.PURE, {1: 2}, object()])
def test_what_cannot_arrive_is_refused(wrong: Any) -> None:
    """Sets, enums and objects are an error that names the field, before anything is sent."""
    seen.clear()
    error = only_error(Rich().one("a", RichParams(any=wrong)))

    assert isinstance(error, PlainDataError) and str(error).startswith("params['any'] ")
    assert seen == []


def test_a_subclass_of_a_record_is_refused() -> None:
    """It would arrive as the other class, without its own fields and methods."""

    class Louder(RichParams):
        much: int = 2

    error = only_error(Rich().one("a", Louder()))
    assert str(error).startswith("one() takes params=RichParams(...), not a Louder")


class Answering(Backend):
    """Its methods say that they return replies."""

    def __init__(self, value: Any = "") -> None:
        self.value = value

    @operation
    async def ask(self, text: str) -> Reply:
        said: Reply = self.value or told(text)
        return said

    @ask.batch(max_items=2)
    async def ask_all(self, texts: list[str]) -> list[Reply]:
        return [told(text) for text in texts]

    @operation
    async def say(self, text: str) -> str:
        return told(text)


def told(text: str) -> Reply:
    message = {"role": "assistant", "content": text, "tool_calls": [{"id": "1"}]}
    usage = Usage(3, 2)
    return Reply(text, message=message, finish_reason="length", usage=usage, logprobs=[0.5])


def test_a_method_that_says_so_gives_replies(tmp_path: Path) -> None:
    """They arrive with all that they say: single, in lists, in eager mode, and from a store."""
    llm, store = Answering(), tmp_path / "runs.db"
    values = []
    for _ in range(2):
        fresh_draws()
        values += feste.compute([llm.ask(text) for text in "abc"], store=store)
    report = feste.last_report()
    with context.set(eager=True):
        values.append([llm.ask(text) for text in "abc"])

    for some in values:
        assert [type(value) for value in some] == [Reply] * 3
        assert [vars(value) for value in some] == [vars(told(text)) for text in "abc"]
        assert some == ["a", "b", "c"]
    assert report is not None and report.reused == 3
    assert type(llm.say("a").compute()) is str


def test_the_usage_of_replies_is_counted() -> None:
    """Each reply has its own, and a request the sum."""
    feste.compute([Answering().ask(text) for text in "abc"])
    report = feste.last_report()

    assert report is not None
    used = [(r.items, r.input_tokens, r.output_tokens) for r in report.requests]
    assert sorted(used) == [(1, 3, 2), (2, 6, 4)]


def test_a_method_that_says_so_may_return_text() -> None:
    """A text alone becomes a reply; anything else is wrong."""
    value = Answering("plain").ask("a").compute()

    assert type(value) is Reply and value == "plain" and value.finish_reason is None
    assert "the reply is an int, not a Reply" in str(only_error(Answering(3).ask("a")))
