"""The globals and filters of templates, and their part in the identity of a prompt."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from types import CodeType, FunctionType, MethodType
from typing import Any

from feste.errors import ConfigError, FesteError
from feste.node import call_site
from feste.plain import plain

__all__ = ["FesteEnvironment", "default_environment", "digest"]


class FesteEnvironment:
    """The globals and filters that you add for templates.

    Both are plain dicts, read at each rendering. A template can reach everything in them, so add
    functions and data, not clients. From Jinja there are ``range``, ``dict``, ``namespace``,
    ``cycler``, ``joiner``, and all filters except ``random`` (prompts must be reproducible) and
    ``urlize``; ``tojson`` writes plain JSON, without HTML escapes.

    Equal calls of them must give equal results and change nothing: prompts are rendered as soon as
    their variables are known, in pieces, and once for all equal ones. Name in ``impure`` those that
    do not, such as a clock or a random choice. A prompt that uses one is rendered in the run, each
    by itself, and counts as a ``SAMPLE``.

    With ``root``, templates can include, import and extend files under that folder, and no others.
    They are read as UTF-8 when a prompt is made, and are a part of it from then on.

    :param root: the folder of the files that templates include; None refuses all files.
    :raises ConfigError: if the root is no folder.

    >>> from feste.prompt import Prompt
    >>> environment = FesteEnvironment()
    >>> environment.globals["product"] = "Feste"
    >>> Prompt("{{ product }}: {{ question }}", environment=environment).variables()
    frozenset({'question'})
    >>> import time
    >>> environment.globals["now"] = time.ctime
    >>> environment.impure.add("now")
    >>> Prompt("It is {{ now() }}.", environment=environment)()._node.determinism.value
    'sample'
    """

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        if root is not None and not os.path.isdir(root):
            what = f"root={root!r} is no folder; name that of the files that templates include"
            raise ConfigError(what, origin=call_site())
        #: The folder of the files that templates include; it does not count for the identity.
        self.root = None if root is None else os.path.abspath(os.fspath(root))
        self.globals: dict[str, Any] = {}
        self.filters: dict[str, Callable[..., Any]] = {}
        self.impure: set[str] = set()

    @property
    def identity(self) -> str:
        """A text that identifies the environment: equal for equal ones in every run."""
        if not self.globals and not self.filters and not self.impure:
            return ""
        given: list[Any] = [sorted(names.items()) for names in (self.globals, self.filters)]
        if self.impure:
            given.append(sorted(self.impure))
        try:
            return digest(json.dumps(given, default=_parts))
        except (TypeError, ValueError):  # functions that contain themselves, keys that are not text
            return digest(repr(given))

    def __repr__(self) -> str:
        root = f" root={self.root!r}" if self.root else ""
        return f"<FesteEnvironment globals={list(self.globals)} filters={list(self.filters)}{root}>"


#: The environment of all prompts that are given no other.
default_environment = FesteEnvironment()


def digest(text: str) -> str:
    """Return a short hash of a text, stable across runs of the program.

    :param text: any text.
    """
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def _parts(value: Any) -> Any:
    """Convert what JSON cannot: functions by their code, since all lambdas share a name."""
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
        return sorted(map(repr, value))  # the order of a set differs from run to run
    try:
        return plain(value)
    except FesteError:
        kind = value if hasattr(value, "__qualname__") else type(value)
        return f"{getattr(kind, '__module__', '')}.{kind.__qualname__}"
