"""What every backend checks of a call's arguments."""

from __future__ import annotations

from typing import Any

import numpy
import pytest

from feste.backend import Params, Reply, as_count, as_messages, as_params, as_text
from feste.errors import ConfigError, ParameterError
from feste.testing import FakeParams


class SpeakParams(Params):
    volume: int | None = None


def test_a_text_is_a_plain_text() -> None:
    """A reply is a text too; what is handed on is a plain ``str``."""
    assert type(as_text(Reply("hello"), "embed", "text")) is str


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (5, "embed\\(\\) needs text as a text, not an int$"),
        (["a"], r"not a list; write a call for each, \[llm.embed\(t\) for t in texts\]"),
        (print, "call it with its variables first"),
        (SpeakParams, r"not the class .*\.SpeakParams$"),
    ],
)
def test_what_is_no_text(value: Any, why: str) -> None:
    """The error names the parameter and, where it can be guessed, what was meant."""
    with pytest.raises(ParameterError, match=why):
        as_text(value, "embed", "text")


def test_messages_are_copied() -> None:
    """What the caller changes later changes no request."""
    given: list[dict[str, Any]] = [{"role": "user", "content": ["a"]}]
    made = as_messages(given)
    given[0]["content"].append("b")

    assert made == [{"role": "user", "content": ["a"]}]


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ([], "not an empty list"),
        (None, "chat\\(\\) needs a text, or a list"),
        (["hello"], r"messages\[0\] must be a dict with a role"),
        ([{"role": "user"}, {"content": "x"}], r"messages\[1\] must"),
        ([{"role": "user", "content": {1}}], "is a set"),
        ([{"role": "user", "content": float("nan")}], r"messages\[0\]\['content'\] is nan"),
    ],
)
def test_what_are_no_messages(prompt: Any, why: str) -> None:
    """What is no conversation is refused, with an example of one."""
    with pytest.raises(ConfigError, match=why):
        as_messages(prompt)


def test_parameters_are_of_the_class_itself() -> None:
    """Classes of two backends may share a name, so the error names their modules."""
    assert as_params(SpeakParams(volume=1), SpeakParams, "speak").volume == 1
    with pytest.raises(ParameterError, match=r"params=SpeakParams\(\.\.\.\), not a dict"):
        as_params({}, SpeakParams, "speak")
    with pytest.raises(ParameterError, match=r"\.SpeakParams\(\.\.\.\), not feste\.testing\."):
        as_params(FakeParams(), SpeakParams, "speak")


@pytest.mark.parametrize(("value", "count"), [(None, 1), (1, 1), (3, 3), (numpy.int64(2), 2)])
def test_a_count(value: Any, count: int) -> None:
    """None asks for one answer; a whole number of any kind is one."""
    assert as_count(value, "n") == count


@pytest.mark.parametrize("value", ["2", 2.0, True, 0, -1, [2]])
def test_what_is_no_count(value: Any) -> None:
    """Anything else would be paid and not be understood."""
    with pytest.raises(ParameterError, match=r"n=.*: it must be a whole number above 0"):
        as_count(value, "n")
