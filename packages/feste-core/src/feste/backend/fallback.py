"""Fallbacks: which errors pass a call on to another backend, and with which arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from feste import errors
from feste.backend.params import Params
from feste.errors import CacheMiss, CallError, ConfigError, ParameterError
from feste.node import Lazy

if TYPE_CHECKING:
    from feste.backend.operations import Call

__all__ = ["FALL_BACK_ON", "On", "Rest", "as_errors", "for_each", "for_next"]

On = tuple[type[CallError], ...]
Rest = tuple[tuple["Call[Any]", On], ...]

FALL_BACK_ON: On = (
    errors.Transient,
    errors.CallTimeout,
    errors.ConnectionLost,
    errors.AuthFailed,
    errors.QuotaExhausted,
    errors.ModelNotFound,
    errors.ContextTooLong,
    errors.ContentFiltered,
)
"""The errors that another provider may not give. A wrong request belongs to the program, and an
answer that cannot be used has been paid for: these are not passed on unless ``on=`` names them."""

#: Parameters whose values only one provider understands, whatever their names.
_OWN = frozenset(("model", "extra"))


def as_errors(on: Any) -> On:
    """Return classes of errors as a tuple; with them, what a replay does not find is passed on.

    :param on: a class of errors, or a tuple of them.
    :raises ConfigError: if it holds anything else.

    >>> as_errors(errors.RateLimited)
    (<class 'feste.errors.RateLimited'>, <class 'feste.errors.CacheMiss'>)
    """
    kinds = on if isinstance(on, tuple) else (on,)
    if not kinds or not all(isinstance(k, type) and issubclass(k, CallError) for k in kinds):
        raise ConfigError(
            f"or_else(on={on!r}): give classes of feste.errors.CallError, such as "
            "on=(errors.RateLimited, errors.ServerError)"
        )
    return kinds if CacheMiss in kinds else (*kinds, CacheMiss)


def for_each(
    call: Call[Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Return the arguments of a call for its own backend, and what differs at those asked next.

    :param call: the call.
    :param args: positional arguments; parameters may be a tuple, one for each backend.
    :param kwargs: keyword arguments, likewise.
    :returns: the arguments of the first backend; and as keywords what each other one is given
        otherwise, as :func:`for_next` reads them: the name, and how many backends are left.
    :raises ParameterError: if a backend does not take what is given.
    """
    operation = call.operation
    named = dict(zip(operation.names, args))
    given = {**named, **kwargs}
    records = [
        name
        for name, default in zip(operation.names, operation.defaults, strict=True)
        if isinstance(default, Params) and name in given
    ]
    others: list[dict[str, Any]] = [{} for _ in call.rest]
    for name in records:
        value = given[name]
        if isinstance(value, tuple):
            if len(value) != 1 + len(call.rest):
                raise ParameterError(
                    f"{call.name}() got {len(value)} {name} for {1 + len(call.rest)} backends"
                )
            given[name], *rest = value
        else:
            rest = [_translated(call, other, name, value) for other, _ in call.rest]
        for own, each in zip(others, rest, strict=True):
            own[name] = each
    for (other, _), own in zip(call.rest, others, strict=True):
        _check(call, other, given, own)
    first = tuple(given[name] for name in named)
    keywords = {
        f"{name} {left}": value
        for left, own in zip(range(len(others), 0, -1), others, strict=True)
        for name, value in own.items()
    }
    return (*first, *args[len(first) :]), {name: given[name] for name in kwargs}, keywords


def for_next(
    call: Call[Any], args: Sequence[Any], keywords: Mapping[str, Any]
) -> tuple[Call[Any], tuple[Any, ...], dict[str, Any]]:
    """Return the call of the next backend, with its arguments and the keywords that are left.

    :param call: the call that failed; there is a next one.
    :param args: its packed arguments.
    :param keywords: what :func:`for_each` gave, packed.
    """
    (other, _), *rest = call.rest
    own, left = {}, {}
    for keyword, value in keywords.items():
        name, _, number = keyword.rpartition(" ")
        if number == str(len(call.rest)):
            own[name] = value
        else:
            left[keyword] = value
    known = {**dict(zip(call.operation.names, args, strict=True)), **own}
    pairs = zip(other.operation.names, other.operation.defaults, strict=True)
    given = tuple(known.get(name, default) for name, default in pairs)
    return other.followed_by(tuple(rest)), given, left


def _check(
    call: Call[Any], other: Call[Any], given: Mapping[str, Any], own: dict[str, Any]
) -> None:
    """Check that a backend takes all that is given, and add its own defaults where nothing is."""
    names = other.operation.names
    for name in given:
        if name in call.operation.names and name not in names:
            raise ParameterError(f"{_at(other)}, which or_else() names, has no parameter {name!r}")
    bound = other.operation.bind((), {n: own.get(n, given.get(n)) for n in given if n in names})
    for name, value in zip(names, bound, strict=True):
        if name not in given:
            own[name] = value


def _translated(call: Call[Any], other: Call[Any], name: str, value: Any) -> Any:
    """Return parameters as the record of another backend, field by field."""
    defaults = dict(zip(other.operation.names, other.operation.defaults, strict=True))
    kind = type(defaults.get(name))
    if isinstance(value, kind) or not issubclass(kind, Params):
        return value
    if isinstance(value, Lazy):
        raise _untranslated(call, other, name, "what is computed later")
    if not isinstance(value, Params):
        return value  # the first backend will refuse it
    given = {
        f.name: getattr(value, f.name)
        for f in fields(value)  # type: ignore[arg-type]
        if getattr(value, f.name) is not f.default
    }
    known = {f.name for f in fields(kind)} - _OWN  # type: ignore[arg-type]
    foreign = [field for field in given if field not in known]
    if foreign:
        raise _untranslated(call, other, name, ", ".join(foreign))
    return kind(**given)


def _untranslated(call: Call[Any], other: Call[Any], name: str, what: str) -> ParameterError:
    each = ", ".join(f"{_record(c, name)}(...)" for c in (call, *(c for c, _ in call.rest)))
    return ParameterError(
        f"{_at(other)}, which or_else() names, cannot be given {what} of {name}: give each backend "
        f"its own, {name}=({each})"
    )


def _record(call: Call[Any], name: str) -> str:
    kind = type(dict(zip(call.operation.names, call.operation.defaults, strict=True)).get(name))
    return f"{call.client.plugin}.{kind.__name__}"


def _at(call: Call[Any]) -> str:
    return f"{call.client.plugin}.{call.name}()"
