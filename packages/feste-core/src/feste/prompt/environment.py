"""What a template may use besides its variables, and how that counts in the identity of a prompt."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from types import CodeType, FunctionType, MethodType
from typing import Any

from feste.errors import FesteError
from feste.plain import plain

__all__ = ["FesteEnvironment", "default_environment", "digest"]


class FesteEnvironment:
    """What templates may use besides their variables: your own globals and filters.

    Both are plain dicts, read at each rendering. A template can reach all that is in them: put in
    functions and data, not clients. Of Jinja's own there are ``range``, ``dict``, ``namespace``,
    ``cycler``, ``joiner``, and the filters less ``random`` (a prompt is the same each time) and
    ``urlize``; ``tojson`` writes plain JSON, without escapes for HTML.

    >>> from feste.prompt import Prompt
    >>> environment = FesteEnvironment()
    >>> environment.globals["product"] = "Feste"
    >>> Prompt("{{ product }}: {{ question }}", environment=environment).variables()
    frozenset({'question'})
    """

    def __init__(self) -> None:
        self.globals: dict[str, Any] = {}
        self.filters: dict[str, Callable[..., Any]] = {}

    @property
    def identity(self) -> str:
        """What the environment is, as text: equal for equal ones in every run of the program."""
        if not self.globals and not self.filters:
            return ""
        given = [sorted(names.items()) for names in (self.globals, self.filters)]
        try:
            return digest(json.dumps(given, default=_parts))
        except (TypeError, ValueError):  # functions that hold themselves, keys that are no text
            return digest(repr(given))

    def __repr__(self) -> str:
        return f"<FesteEnvironment globals={list(self.globals)} filters={list(self.filters)}>"


#: The environment of all prompts that are given none.
default_environment = FesteEnvironment()


def digest(text: str) -> str:
    """Return a short hash of a text, the same in every run of the program.

    :param text: any text.
    """
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def _parts(value: Any) -> Any:
    """What JSON does not know: functions by their code, since lambdas share a name."""
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        name = f"{value.__module__}.{value.__qualname__}"
        return [name, value.__code__, value.__defaults__, value.__kwdefaults__, cells]
    if isinstance(value, CodeType):
        return [value.co_code.hex(), value.co_names, value.co_consts]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))  # their order differs from run to run
    try:
        return plain(value)
    except FesteError:
        kind = value if hasattr(value, "__qualname__") else type(value)
        return f"{getattr(kind, '__module__', '')}.{kind.__qualname__}"
