"""Whatever a parameter is given: it is refused before anything is sent, or sent as it is."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feste.backend import Params
from feste.backend.cohere import ChatParams as CohereChat
from feste.backend.cohere import Cohere, GenerateParams
from feste.backend.cohere import EmbedParams as CohereEmbed
from feste.backend.openai import ChatParams, CompleteParams, EmbedParams, OpenAI
from feste.backend.request import canonical
from feste.errors import ConfigError, ParameterError, PlainDataError
from tests.fuzz.sizes import cases

openai, cohere = OpenAI("m"), Cohere("m")
OPERATIONS: dict[str, tuple[type[Params], Callable[[Params], Any]]] = {
    "openai chat": (ChatParams, lambda params: openai.chat.prepare(["Hi", params, None])),
    "openai complete": (CompleteParams, lambda params: openai.complete.prepare(["Hi", params])),
    "openai embed": (EmbedParams, lambda params: openai.embed.prepare(["Hi", params])),
    "cohere chat": (CohereChat, lambda params: cohere.chat.prepare(["Hi", params, None])),
    "cohere embed": (CohereEmbed, lambda params: cohere.embed.prepare(["Hi", params])),
    "cohere generate": (GenerateParams, lambda params: cohere.generate.prepare(["Hi", params])),
}


def nested(depth: int) -> Any:
    made: Any = 1
    for _ in range(depth):
        made = [made]
    return made


def endless() -> Any:
    made: list[Any] = []
    made.append(made)
    return made


class Text(str):
    def __str__(self) -> str:
        return "other"


#: What no JSON can hold, by name: some of it has no repr either.
ODD: dict[str, Any] = {
    "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": 10**5000, "-huge": -(10**4400),
    "big": 1 << 64, "surrogate": "\ud800", "nul": "\0", "bytes": b"x", "set": {1}, "object": object(),
    "deep": nested(2_000), "deepest": nested(100_000), "endless": endless(), "key": {1: 2},
    "none key": {None: 1}, "inner key": {"a": {("b",): 1}}, "text": Text("x"), "function": print,
    "range": range(3), "complex": 1j, "true": True, "view": memoryview(b"x"), "class": Params,
    "deep dict": {"a": {"b": nested(5_000)}},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Odd:
    """Stands for one of them."""

    name: str


def filled(value: Any) -> Any:
    if isinstance(value, Odd):
        return ODD[value.name]
    if isinstance(value, list):
        return [filled(item) for item in value]
    return (
        {name: filled(item) for name, item in value.items()} if isinstance(value, dict) else value
    )


odd = st.sampled_from(sorted(ODD)).map(Odd)
values = odd | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | odd,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("name", OPERATIONS)
@cases(20)
@given(st.data())
def test_a_parameter_is_refused_or_sent_as_it_is(name: str, data: st.DataObject) -> None:
    """An error of the API, or a request whose canonical JSON comes back as it was."""
    kind, prepare = OPERATIONS[name]
    fields = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    drawn = data.draw(st.dictionaries(st.sampled_from(fields), values, min_size=1, max_size=3))
    given = filled(drawn)
    try:
        request = prepare(kind(**given))
        text = canonical(request.body)
        key = request.key
    except (ConfigError, ParameterError, PlainDataError):
        return

    assert canonical(json.loads(text)) == text
    assert text.isascii()
    assert key == prepare(kind(**given)).key
