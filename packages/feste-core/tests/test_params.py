"""Parameters: a typed, frozen record that refuses what it does not know, and sends what was given."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import pytest

import feste
from feste.backend import Determinism, Params
from feste.errors import ParameterError


class Some(Params):
    temperature: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    extra: dict[str, Any] | None = None


class More(Some):
    """A subclass lists only what it adds."""

    top_k: int | None = None


class Must(Params):
    size: int
    name: str = "n"


def test_what_is_given_is_the_body() -> None:
    """Only what was given is sent: None means that the provider's default holds; 0 and "" are given."""
    assert Some().body() == {}
    assert Some(temperature=0, seed=0, stop=[]).body() == {"temperature": 0, "seed": 0, "stop": []}
    assert Some(temperature=None, seed=1).body() == {"seed": 1}


def test_extra_goes_into_the_body_and_before_the_fields() -> None:
    """``extra`` is for parameters that only some servers know; it is no parameter itself."""
    assert Some(seed=1, extra={"top_p": 0.5, "seed": 2}).body() == {"seed": 2, "top_p": 0.5}
    assert "extra" not in Some(extra={}).body()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: Some(temprature=0),
            "Some has no parameter 'temprature'. Did you mean 'temperature'?",
        ),
        (
            lambda: Some(zzz=0),
            "Some has no parameter 'zzz'. Known: extra, seed, stop, temperature.",
        ),
        (lambda: More(topk=1), "More has no parameter 'topk'. Did you mean 'top_k'?"),
        (lambda: Some(0.5), "Some takes its parameters by name"),
    ],
)
def test_a_wrong_parameter_is_refused_where_it_is_written(make: Any, said: str) -> None:
    """A misspelt parameter, or one by position, names the right one; nothing is sent."""
    with pytest.raises(ParameterError) as caught:
        make()

    assert said in str(caught.value)


def test_a_missing_parameter_is_refused() -> None:
    """A field without a default must be given."""
    with pytest.raises(ParameterError, match="Must needs 'size'"):
        Must()  # type: ignore[call-arg]

    assert Must(size=1).body() == {"size": 1, "name": "n"}


def test_records_are_frozen_and_compare_by_content() -> None:
    """They can be defaults and keys of nothing: equal content is equal, and cannot be changed."""
    one: Any = Some(seed=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.seed = 2

    assert one == Some(seed=1) != Some(seed=2)
    assert one != More(seed=1)
    assert repr(one) == "Some(seed=1)"


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))]
)
def test_records_pickle_and_copy(again: Any) -> None:
    """Other processes get the same record."""
    record = More(seed=1, top_k=3, extra={"a": [1]})

    assert again(record) == record


def test_records_can_be_made_from_one_another() -> None:
    """``dataclasses.replace`` changes one parameter and keeps the others, checked as ever."""
    assert dataclasses.replace(More(seed=1), top_k=2) == More(seed=1, top_k=2)
    with pytest.raises(ParameterError, match="'sed'"):
        dataclasses.replace(Some(), sed=1)


@pytest.mark.parametrize(
    ("params", "determinism"),
    [
        (Some(), Determinism.SAMPLE),
        (Some(temperature=0), Determinism.GREEDY),
        (Some(temperature=0.0), Determinism.GREEDY),
        (Some(temperature=1e-9), Determinism.SAMPLE),
        (Some(temperature=None), Determinism.SAMPLE),
        (Some(seed=0), Determinism.GREEDY),
        (Some(temperature=1, seed=7), Determinism.GREEDY),
        (Some(extra={"temperature": 0}), Determinism.GREEDY),
        (Some(temperature=0, extra={"temperature": 0.7}), Determinism.SAMPLE),
        (Some(seed=1, extra={"seed": None}), Determinism.SAMPLE),
        (Must(size=0), Determinism.SAMPLE),
    ],
)
def test_parameters_narrow_samples_to_greedy(params: Params, determinism: Determinism) -> None:
    """An explicit temperature of 0, or a seed, asks for determinism; an omitted one does not."""
    assert params.determinism(Determinism.SAMPLE) is determinism
    for other in (Determinism.PURE, Determinism.EFFECT, Determinism.GREEDY):
        assert params.determinism(other) is other


def test_the_signature_lists_the_fields() -> None:
    """Editors and ``help`` see the parameters, by name."""
    parameters = inspect.signature(More).parameters

    assert list(parameters) == ["temperature", "seed", "stop", "extra", "top_k"]
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}


def test_fields_may_be_lazy() -> None:
    """A record with a node in it is filled in when the node is there."""

    @feste.task
    def five() -> int:
        return 5

    @feste.task
    def look(params: Some) -> Any:
        return params

    assert look(Some(seed=five(), stop=[five()])).compute() == Some(seed=5, stop=[5])  # type: ignore[arg-type,list-item]


def test_a_record_shows_what_is_not_its_default() -> None:
    """Signatures, pictures and errors show a record: of many fields those that were given."""

    class Shown(Params):
        model: str | None = None
        kinds: tuple[str, ...] = ("float",)
        extra: dict[str, Any] | None = None

    assert repr(Shown()) == "Shown()"
    assert repr(Shown(model="m", extra={"k": 1})) == "Shown(model='m', extra={'k': 1})"


@pytest.mark.parametrize("extra", [[("k", 1)], "text", 5])
def test_extra_is_a_dict(extra: Any) -> None:
    """Anything else is refused where it is written."""

    class Loose(Params):
        extra: dict[str, Any] | None = None

    with pytest.raises(ParameterError, match="Loose: extra must be a dict of further parameters"):
        Loose(extra=extra)
