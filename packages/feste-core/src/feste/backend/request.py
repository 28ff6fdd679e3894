"""Requests and responses as data.

A :class:`Request` is plain JSON. Draws, batching, prices and the keys of stored answers are computed
on it, never on Python arguments, so they see exactly what the provider sees.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from feste.draw import Draw
from feste.errors import ConfigError

__all__ = ["Request", "Response", "Usage", "canonical"]


@dataclass(frozen=True)
class Request:
    """One request to a provider, before it is sent.

    The first five fields decide the answer and are hashed; the others do not.

    :param plugin: the backend's plugin name.
    :param operation: the operation's name.
    :param endpoint: the effective URL, or ``plugin:<name>`` where there is none.
    :param body: the whole body as it will be sent: JSON.
    :param parser: a label of what :meth:`Operation.parse` makes of the answer: one answer read in
        two ways has two keys.
    :param client: the client's configuration as JSON, for the record; an API key by its name.
    :param account: who pays, as far as limits are concerned: organization, names of keys; never a
        key.
    :param timeout: seconds that one attempt may take.
    :param max_output: tokens that the provider may generate for it, at most; None if nothing
        bounds them.
    :param draws: the draws this request answers, one an item.
    :param packed: whether a :class:`BatchRule` has made it of several requests.

    >>> from dataclasses import replace
    >>> a = Request("echo", "complete", "plugin:echo", {"prompt": "Hi"})
    >>> a.key == replace(a, account="other").key
    True
    >>> a.key == replace(a, body={"prompt": "Ho"}).key
    False
    """

    plugin: str
    operation: str
    endpoint: str
    body: Mapping[str, Any]
    parser: str = "value"
    client: Mapping[str, Any] = field(default_factory=dict, repr=False)
    account: str = field(default="", repr=False)
    timeout: float | None = field(default=None, repr=False)
    max_output: int | None = field(default=None, repr=False)
    draws: tuple[Draw, ...] = field(default=(), repr=False)
    packed: bool = field(default=False, repr=False)

    @cached_property
    def key(self) -> str:
        """SHA-256 of the hashed fields, as hex; equal requests have equal keys on every machine.

        :raises ConfigError: if the body is not plain JSON.
        """
        hashed = [self.plugin, self.operation, self.endpoint, self.parser, self.body]
        return hashlib.sha256(canonical(hashed).encode()).hexdigest()

    def check(self) -> None:
        """Raise what of the body could not be sent.

        :raises ConfigError: if the body is not plain JSON, with the path of the offender.
        """
        _check(self.body, "body")

    @property
    def model(self) -> str:
        """The model asked for, or an empty string."""
        return str(self.body.get("model") or "")

    @property
    def items(self) -> int:
        """How many logical calls this request answers."""
        return max(1, len(self.draws))

    @cached_property
    def size(self) -> int:
        """The bytes of the body as JSON."""
        return len(json.dumps(self.body, separators=(",", ":"), default=str))

    @property
    def tokens(self) -> int:
        """A rough count of the body's tokens: four bytes each, the usual rule for English text."""
        return self.size // 4 + 1


@dataclass(frozen=True, slots=True)
class Usage:
    """What a provider counted, in tokens.

    :param input: tokens read.
    :param output: tokens generated.
    :param cached: tokens of ``input`` that came from the provider's prompt cache.

    >>> Usage(10, 2) + Usage(1, 1)
    Usage(input=11, output=3, cached=0)
    """

    input: int = 0
    output: int = 0
    cached: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input + other.input, self.output + other.output, self.cached + other.cached
        )

    @property
    def total(self) -> int:
        """Tokens read and generated."""
        return self.input + self.output


@dataclass(frozen=True, slots=True)
class Response:
    """One answer of a provider, as it came.

    :param payload: the body: JSON.
    :param usage: what it cost in tokens, or None where the provider does not say.
    :param headers: the HTTP headers, names in lower case.
    :param request_id: the provider's name for the request, or None.
    """

    payload: Any
    usage: Usage | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    request_id: str | None = None


def canonical(value: Any) -> str:
    """Return the one JSON text of a value: keys sorted, ASCII, no spaces, numbers finite.

    ``1``, ``1.0`` and ``true`` stay apart, and no Unicode form is changed: the text that is sent
    decides.

    :param value: plain JSON data.
    :raises ConfigError: if it is not plain JSON data, with the path of the offender.

    >>> canonical({"b": 1, "a": ["é", 1.0, True]})
    '{"a":["\\\\u00e9",1.0,true],"b":1}'
    """
    _check(value, "body")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain_mapping)


def _plain_mapping(value: Any) -> Any:
    return dict(value)


def _check(value: Any, path: str) -> None:
    if value is None or isinstance(value, (str, bool, int)):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(f"{path} is {value}, which JSON cannot hold")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check(item, f"{path}[{i}]")
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(name, str):
                raise ConfigError(f"{path} has the key {name!r}; keys must be str")
            _check(item, f"{path}.{name}")
    else:
        raise ConfigError(f"{path} is a {type(value).__name__}, not plain JSON data")
