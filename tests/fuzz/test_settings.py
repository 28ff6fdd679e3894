"""Any value of any setting is refused with an error that names the setting, or it can be used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

import feste
from feste import context
from feste.errors import ConfigError, FesteError
from feste.testing import FakeBackend
from tests.fuzz.sizes import cases


class Rude:
    """An object whose every method raises."""

    def _refuse(self, *args: object) -> Any:
        raise RuntimeError("no")

    __repr__ = __str__ = __eq__ = __lt__ = __bool__ = __len__ = _refuse  # type: ignore[assignment]
    __float__ = __int__ = __index__ = __iter__ = __fspath__ = __call__ = _refuse
    __hash__ = object.__hash__


class Odd(str):
    """A text that is not quite one."""


NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, -(10**400), 10**5000, 2**63, 1e308, 5e-324, -0.0, True, False]),
)
WORDS = st.sampled_from(
    """raise return stop paid all none balanced cost latency replay record replay-only auto local dask
    client workers 1 0 true no on 0.5 -1 1e400 nan inf 0x10 1_000 $5 200000_tokens tokens os:system
    module:name /dev/null ~nobody/x ~ . .. 5% tcp://10.0.0.1:1 tls://x""".split()
).map(lambda word: word.replace("200000_tokens", "200000 tokens"))
TEXTS = st.one_of(
    st.text(), WORDS, st.sampled_from(["\0", "\ud800", "x" * 5000, "9" * 5000, "-", " 7 "])
)
THINGS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    NUMBERS,
    TEXTS,
    TEXTS.map(Odd),
    st.binary(),
    st.lists(TEXTS, max_size=3),
    st.dictionaries(TEXTS, st.one_of(st.booleans(), NUMBERS, st.none()), max_size=3),
    st.sampled_from([object(), object, print, ..., Path("x"), {1}, (1,), 1j, Exception("x"), os]),
    st.builds(Rude),
)
VALUES = st.one_of(THINGS, st.lists(THINGS, max_size=2), st.tuples(THINGS))
#: The names of files, and of what runs a graph, are checked when they are used.
LATER = {"store", "cache", "scheduler", "requests_on", "prepare_worker"}
CASES = cases(12, full=500)


@pytest.fixture(autouse=True)
def values_forgotten() -> Any:
    """A value from the environment is read once in a process: each case begins without."""
    yield
    context._base.clear()


def names() -> list[str]:
    return sorted(context.declarations())


def use(**given: Any) -> None:
    """Run something with a value that was accepted; whatever goes wrong is an error of Feste."""
    try:
        assert feste.compute(FakeBackend().chat("Hi"), feste.task(abs)(-2), **given)[1] == 2
    except FesteError as error:
        assert str(error)


def check_refusal(error: ConfigError, name: str) -> None:
    """See that an error names what is wrong, on one line and not at any length."""
    assert f"{name}=" in str(error)
    assert len(str(error)) < 2000
    assert str(error).isprintable()


@pytest.mark.parametrize("name", names())
def test_any_value_is_refused_by_name_or_can_be_used(name: str) -> None:
    """Nothing but a ``ConfigError`` with the setting's name comes out of a value."""

    @CASES
    @given(VALUES)
    def holds(value: Any) -> None:
        try:
            with context.set(**{name: value}):
                stored = context.get(name)
                assert context.settings()[name] is stored
                if name not in LATER:
                    use()
        except ConfigError as error:
            check_refusal(error, name)
        else:
            if name not in LATER:
                use(**{name: stored})

    holds()


@pytest.mark.parametrize("name", names())
def test_any_text_in_the_environment_is_refused_by_name_or_can_be_used(name: str) -> None:
    """The same for ``FESTE_<NAME>``; the error names the variable."""
    variable = f"FESTE_{name.upper()}"

    @CASES
    @given(TEXTS.filter(lambda text: "\0" not in text and "\ud800" not in text))
    def holds(text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError:
            return
        context._base.clear()
        with mock.patch.dict(os.environ, {variable: text}):
            try:
                stored = context.get(name)
            except ConfigError as error:
                check_refusal(error, variable)
            else:
                if name not in LATER:
                    use(**{name: stored})

    holds()


@cases(30)
@given(st.dictionaries(st.text(min_size=1), VALUES, min_size=1, max_size=2))
def test_any_name_that_is_no_setting_is_refused(given: dict[str, Any]) -> None:
    """And nothing of what stands beside it is set."""
    unknown = {name: value for name, value in given.items() if name not in names()}
    before = {name: context.get(name) for name in names() if name != "optimize"}
    if unknown:
        with pytest.raises(ConfigError, match="no setting"):
            context.set(max_failures=7, **unknown)

        assert {name: context.get(name) for name in names() if name != "optimize"} == before
