"""Checks of a call's arguments that all backends share, made before anything is sent and paid."""

from __future__ import annotations

from numbers import Integral
from typing import Any, TypeVar

from feste.backend.params import Params
from feste.backend.request import canonical
from feste.errors import ParameterError, PlainDataError
from feste.plain import plain
from feste.wording import a_kind, class_name

__all__ = ["as_count", "as_messages", "as_params", "as_text"]

P = TypeVar("P", bound=Params)


def as_text(value: Any, operation: str, name: str) -> str:
    """Check an argument that must be a text, and return it as a plain str.

    :param value: the argument; a :class:`~feste.backend.Reply` is a text too.
    :param operation: the operation's name, for the error.
    :param name: the parameter's name, for the error.
    :raises ParameterError: if it is not a text.

    >>> as_text(5, "embed", "text")
    Traceback (most recent call last):
    feste.errors.ParameterError: embed() needs text as a text, not an int
    """
    if isinstance(value, str):
        return str.__str__(value)
    hint = _call_it(value)
    if isinstance(value, (list, tuple)):
        hint = f"; write a call for each, [llm.{operation}(t) for t in texts]: they are batched"
    raise ParameterError(f"{operation}() needs {name} as a text, not {_a(value)}{hint}")


def as_messages(prompt: Any, operation: str = "chat") -> list[dict[str, Any]]:
    """Return a conversation as a new list of JSON messages.

    :param prompt: the user's message as text, or a list of messages: dicts with a role.
    :param operation: the operation's name, for the error.
    :raises ParameterError: if it is neither.

    >>> as_messages("Hi")
    [{'role': 'user', 'content': 'Hi'}]
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": str.__str__(prompt)}]
    if not isinstance(prompt, (list, tuple)) or not prompt:
        raise ParameterError(
            f"{operation}() needs a text, or a list of messages like [{{'role': 'user', "
            f"'content': '...'}}], not {_a(prompt)}{_call_it(prompt)}"
        )
    try:
        made: list[Any] = plain(prompt, "messages")
    except PlainDataError as error:
        raise ParameterError(str(error)) from None
    canonical(made, "messages")  # raises for NaN and infinity, which JSON does not have
    for i, message in enumerate(made):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ParameterError(
                f"messages[{i}] must be a dict with a role, like {{'role': 'user', 'content': "
                "'...'}; a Reply goes back into a conversation as reply.message"
            )
    return made


def as_params(params: Any, kind: type[P], operation: str, name: str = "params") -> P:
    """Check that a call's parameters are of the operation's own class, and return them.

    :param params: the argument.
    :param kind: the class; classes of two backends may have the same name.
    :param operation: the operation's name, for the error.
    :param name: the name of the argument, for the error.
    :raises ParameterError: if they are of another class.

    >>> class SpeakParams(Params):
    ...     volume: int | None = None
    >>> as_params({"volume": 3}, SpeakParams, "speak")
    Traceback (most recent call last):
    feste.errors.ParameterError: speak() takes params=SpeakParams(...), not a dict
    """
    if isinstance(params, kind):
        return params
    wanted, given = kind.__name__, _a(params)
    if isinstance(params, Params):
        wanted, given = class_name(kind), class_name(type(params))
    raise ParameterError(f"{operation}() takes {name}={wanted}(...), not {given}")


def as_count(value: Any, name: str) -> int:
    """Return the number of answers to ask for; 1 for None.

    :param value: the parameter.
    :param name: its name, for the error.
    :raises ParameterError: if it is not an integer above 0; the answers would be paid for but could
        not be read.

    >>> as_count("2", "n")
    Traceback (most recent call last):
    feste.errors.ParameterError: n='2': it must be a whole number above 0
    """
    if value is None:
        return 1
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ParameterError(f"{name}={_shown(value)}: it must be a whole number above 0")
    return int(value)


def _shown(value: Any) -> str:
    """Return the repr of a value, or its type: numbers may be too long, and lists too deep."""
    try:
        return repr(value)[:80]
    except (ValueError, RecursionError):
        return f"<{class_name(type(value))}>"


def _call_it(value: Any) -> str:
    is_prompt = callable(value) and not isinstance(value, type)
    return ": call it with its variables first" if is_prompt else ""


def _a(value: Any) -> str:
    if isinstance(value, (list, tuple)) and not value:
        return f"an empty {class_name(type(value))}"
    return f"the class {class_name(value)}" if isinstance(value, type) else a_kind(value)
