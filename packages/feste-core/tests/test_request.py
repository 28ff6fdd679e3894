"""Requests and responses are data: one canonical text, one key, the same everywhere."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from types import MappingProxyType
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feste.backend import BatchRule, Request, Response, Usage
from feste.backend.request import canonical
from feste.draw import Draw
from feste.errors import ConfigError

BODY = {"model": "m", "prompt": "Hé", "n": [1, 1.0, True, None, {"b": 1, "a": 2}]}
ONE = Request("echo", "complete", "plugin:echo", BODY)

json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 3),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=3),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(json_values)
def test_canonical_text_is_json_of_the_value(value: Any) -> None:
    """Reading the text gives the value back; writing that again gives the text."""
    text = canonical(value)

    assert json.loads(text) == value
    assert canonical(json.loads(text)) == text
    assert text.isascii()


@given(json_values, json_values)
def test_canonical_texts_are_equal_exactly_for_equal_values(one: Any, two: Any) -> None:
    """1, 1.0 and true stay apart; the order of keys does not count."""

    def exact(value: Any) -> Any:
        if isinstance(value, dict):
            return frozenset((k, exact(v)) for k, v in value.items())
        if isinstance(value, list):
            return tuple(exact(v) for v in value)
        return (type(value), repr(value))

    assert (canonical(one) == canonical(two)) is (exact(one) == exact(two))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": [1, {"b": object()}]}, r"body\['a'\]\[1\]\['b'\] is an object, which is not plain"),
        ([float("nan")], r"body\[0\] is nan, which JSON cannot hold"),
        ({"x": float("-inf")}, r"body\['x'\] is -inf"),
        ({1: 2}, "body has the key 1; keys must be str"),
        ({"s": {1}}, r"body\['s'\] is a set"),
        (b"x", "body is a bytes"),
        ([numpy.float32(1)], r"body\[0\] is a numpy\.float32, which is not .* give its \.item\(\)"),
    ],
)
def test_what_is_no_json_is_named_by_its_path(value: Any, said: str) -> None:
    """The error leads to the offender."""
    with pytest.raises(ConfigError, match=said):
        canonical(value)


def test_mappings_of_any_kind_are_data() -> None:
    """Proxies and tuples count by content."""
    assert canonical({"a": MappingProxyType({"b": (1, 2)})}) == '{"a":{"b":[1,2]}}'


FIELDS: list[dict[str, Any]] = [
    {"plugin": "other"},
    {"operation": "chat"},
    {"endpoint": "https://example.com"},
    {"parser": "json"},
    {"body": {**BODY, "prompt": "Ho"}},
    {"body": {**BODY, "more": None}},
]
UNHASHED: list[dict[str, Any]] = [
    {"client": {"model": "x"}},
    {"account": "me"},
    {"timeout": 3.0},
    {"draws": (Draw("main", "f", 1),)},
    {"body": dict(reversed(BODY.items()))},
]


@pytest.mark.parametrize("change", FIELDS)
def test_what_decides_the_answer_decides_the_key(change: dict[str, Any]) -> None:
    """Plugin, operation, endpoint, body, parser: another one is another key."""
    assert dataclasses.replace(ONE, **change).key != ONE.key


@pytest.mark.parametrize("change", UNHASHED)
def test_what_does_not_decide_the_answer_does_not_decide_the_key(change: dict[str, Any]) -> None:
    """Client configuration, account, timeout, draws and the order of keys leave the key alone."""
    assert dataclasses.replace(ONE, **change).key == ONE.key


def test_the_key_is_the_same_in_every_process() -> None:
    """Stored answers are found again by another process, whatever its hash seed."""
    code = f"from feste.backend import Request; print(Request('echo', 'complete', 'plugin:echo', {BODY!r}).key)"
    keys = set()
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        keys.add(run.stdout.strip())

    assert keys == {ONE.key}
    assert len(ONE.key) == 64


def test_a_request_cannot_be_changed_and_pickles() -> None:
    """Requests are frozen, travel whole, and show no configuration."""
    request: Any = dataclasses.replace(ONE, client={"api_key": "Secret('K')"}, account="me")
    request.key, request.size  # noqa: B018 - both are remembered
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.body = {}

    assert pickle.loads(pickle.dumps(request)) == request
    assert "Secret" not in repr(request)
    assert dataclasses.replace(request, body={"a": 1}).size == len('{"a":1}')


def test_sizes() -> None:
    """Items are draws, at least one; tokens are four bytes each; the model is the body's."""
    draws = (Draw("main", "f", 0), Draw("main", "f", 1))
    request = Request("p", "o", "e", {"model": "m", "prompt": "x" * 100})

    assert (request.items, dataclasses.replace(request, draws=draws).items) == (1, 2)
    assert request.size == len(json.dumps(request.body, separators=(",", ":")))
    assert request.tokens == 100 // 4 + 1  # the text alone
    cyrillic = Request("p", "o", "e", {"input": ["Ж" * 200, {"text": "x" * 40}], "dimensions": 9})
    assert cyrillic.tokens == (400 + 40) // 4 + 1
    assert (request.model, Request("p", "o", "e", {}).model) == ("m", "")


def test_alike_requests_differ_in_one_field() -> None:
    """The signature of a batch: everything but the item; not the client, but the account."""
    other = dataclasses.replace(ONE, body={**BODY, "prompt": "Ho"})

    def signature(request: Request, field: str = "prompt") -> str:
        unused: Any = None
        return BatchRule("text", field, 2, pack=unused, unpack=unused).signature(request)

    assert signature(ONE) == signature(other)
    assert signature(ONE, "model") != signature(other, "model")
    for change in [*FIELDS[:4], {"account": "me"}, {"body": {**BODY, "model": "n"}}]:
        assert signature(dataclasses.replace(ONE, **change)) != signature(ONE)


def test_usage_adds_up() -> None:
    """Tokens of several requests are summed by kind."""
    assert Usage(1, 2, 3) + Usage(10, 20, 30) == Usage(11, 22, 33)
    assert Usage(1, 2, 3).total == 3


def test_a_response_shows_its_payload_and_usage() -> None:
    """Headers may hold anything: they do not show."""
    response = Response([1], Usage(1), {"set-cookie": "secret"}, "r-1")

    assert repr(response) == (
        "Response(payload=[1], usage=Usage(input=1, output=0, cached=0, written=0), request_id='r-1')"
    )


class _Mute:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    "count", [10**400, -(10**400), float("inf"), float("nan"), "7", None], ids=str
)
@pytest.mark.parametrize("name", [10**5000, _Mute()], ids=["long", "mute"])
def test_nothing_beside_an_answer_loses_it(count: Any, name: Any) -> None:
    """Whatever a backend gives for the tokens and the ID, the payload stays."""
    assert Response("Hi", Usage(count, 1), request_id=name).tidy() == Response("Hi")
