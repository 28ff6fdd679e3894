"""Requests and responses as plain data.

A :class:`Request` is plain JSON. Batching, prices and the keys of stored answers are computed from
it, never from Python arguments, so they see exactly what the provider sees.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from feste.draw import Draw
from feste.errors import ConfigError
from feste.wording import a_kind, how_plain

__all__ = ["BYTES_PER_TOKEN", "Request", "Response", "Usage", "canonical", "text_bytes"]

#: How many bytes of text are a token: the usual rule for English.
BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Request:
    """One request to a provider, before it is sent.

    The first five fields determine the answer and are hashed; the others are not.

    :param plugin: the backend's plugin name.
    :param operation: the operation's name.
    :param endpoint: the effective URL, or ``plugin:<name>`` if there is none.
    :param body: the whole body as it will be sent: JSON.
    :param parser: a label of how :meth:`Operation.parse` reads the answer, so that an answer read
        in two ways has two keys.
    :param client: the backend's configuration as JSON, for the record; API keys by name only.
    :param account: the account that limits apply to: organization, names of keys; never a key.
    :param timeout: the time limit of one attempt in seconds.
    :param max_output: the maximum number of tokens that the provider may generate; None if there is
        no bound.
    :param draws: the draws that this request answers, one for each call.
    :param packed: whether a :class:`BatchRule` packed it from several requests.
    :param samples: how many answers it asks for to each prompt, by a :class:`SampleRule`.
    :param mark: what to tell the provider's prompt cache as it is sent: a key or None, and after how
        many parts of the prompt reusable prefixes end; see :class:`PrefixRule`. None tells nothing.

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
    samples: int = field(default=1, repr=False)
    mark: tuple[str | None, tuple[int, ...]] | None = field(default=None, repr=False)

    @property
    def text(self) -> str:
        """The hashed fields as canonical JSON; a store keeps it beside the key.

        :raises ConfigError: if the body is not plain JSON.
        """
        return canonical([self.plugin, self.operation, self.endpoint, self.parser, self.body])

    # Cached by hand: until Python 3.12 cached_property has a lock, which a fork may inherit locked.

    @property
    def key(self) -> str:
        """SHA-256 of :attr:`text`, in hex; equal requests have equal keys on every machine.

        :raises ConfigError: if the body is not plain JSON.
        """
        known: str | None = self.__dict__.get("_key")
        if known is None:
            known = self.__dict__["_key"] = hashlib.sha256(self.text.encode()).hexdigest()
        return known

    def check(self) -> None:
        """Raise if the request cannot be sent or recorded.

        :raises ConfigError: if the body is not plain JSON, or a name is no text; the message names the
            path.
        """
        for name in ("plugin", "operation", "endpoint", "parser"):
            if not isinstance(value := getattr(self, name), str):
                raise ConfigError(f"{name} of a request is {a_kind(value)}, not a str")
        _check(self.body, "body")

    @property
    def model(self) -> str:
        """The requested model, or an empty string."""
        return str(self.body.get("model") or "")

    @property
    def scope(self) -> tuple[str, str, str]:
        """Endpoint, account and model: what a provider's limits apply to."""
        return self.endpoint, self.account, self.model

    @property
    def items(self) -> int:
        """The number of calls that this request answers."""
        return max(1, len(self.draws))

    @property
    def size(self) -> int:
        """The size of the body as JSON, in bytes."""
        known: int | None = self.__dict__.get("_size")
        if known is None:
            known = len(json.dumps(self.body, separators=(",", ":"), default=str))
            self.__dict__["_size"] = known
        return known

    @property
    def tokens(self) -> int:
        """A rough count of the tokens that the provider reads: one for four bytes of text.

        Only texts of the body count, not the names of its fields.
        """
        known: int | None = self.__dict__.get("_tokens")
        if known is None:
            texts = (value for name, value in self.body.items() if name != "model")
            known = sum(map(text_bytes, texts)) // BYTES_PER_TOKEN + 1
            self.__dict__["_tokens"] = known
        return known


def text_bytes(value: Any) -> int:
    """Return the bytes of all texts in plain data, without the names of fields.

    :param value: the data.

    >>> text_bytes({"messages": ["one", {"content": "é"}], "n": 3})
    5
    """
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, (list, tuple)):
        return sum(map(text_bytes, value))
    return sum(map(text_bytes, value.values())) if isinstance(value, Mapping) else 0


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens that a provider counted.

    :param input: tokens read.
    :param output: tokens generated.
    :param cached: tokens of ``input`` that were read from the provider's prompt cache.
    :param written: tokens of ``input`` that were written to the provider's prompt cache; a store does
        not keep them.

    >>> Usage(10, 2) + Usage(7, 1, cached=4, written=3)
    Usage(input=17, output=3, cached=4, written=3)
    """

    input: int = 0
    output: int = 0
    cached: int = 0
    written: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input + other.input,
            self.output + other.output,
            self.cached + other.cached,
            self.written + other.written,
        )

    @property
    def total(self) -> int:
        """The sum of tokens read and generated."""
        return self.input + self.output


@dataclass(frozen=True, slots=True)
class Response:
    """One response of a provider, unparsed.

    :param payload: the body: JSON.
    :param usage: the tokens used, or None if the provider does not report them.
    :param headers: the HTTP headers, names in lower case; a store does not keep them, so ``parse`` must
        not need them.
    :param request_id: the provider's ID of the request, or None.
    """

    payload: Any
    usage: Usage | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    request_id: str | None = None

    def tidy(self) -> Response:
        """Return it without what a backend passed on that is no count and no text.

        An answer that is paid for is not thrown away for what stands beside it.

        >>> Response("Hi", Usage(1, None), request_id=7).tidy()
        Response(payload='Hi', usage=None, request_id='7')
        """
        used, name = self.usage, self.request_id
        counts: list[Any] = []
        if used is not None:
            counts = [used.input, used.output, used.cached, used.written]
        counted = all(isinstance(n, (int, float)) and abs(n) < _MOST_TOKENS for n in counts)
        if counted and (name is None or type(name) is str):
            return self
        try:
            name = None if name is None else str(name)
        except Exception:  # a number of too many digits, or whatever its class does
            name = None
        return replace(self, usage=used if counted else None, request_id=name)


def canonical(value: Any, path: str = "body") -> str:
    """Return the canonical JSON text of a value: keys sorted, ASCII, no spaces, finite numbers.

    ``1``, ``1.0`` and ``true`` stay distinct, and Unicode is not normalized, because the text that
    is sent decides.

    :param value: plain JSON data.
    :param path: the name of the value in errors.
    :raises ConfigError: if it is not plain JSON data; the message names the path.

    >>> canonical({"b": 1, "a": ["é", 1.0, True]})
    '{"a":["\\\\u00e9",1.0,true],"b":1}'
    """
    _check(value, path)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain_mapping)


def _plain_mapping(value: Any) -> Any:
    return dict(value)


#: No count of tokens is as high; higher ones may overflow floats, and the columns of a store.
_MOST_TOKENS: Final = 2**53

#: Deeper nesting than this is refused: no provider reads it, and writing it recurses.
_DEEPEST: Final = 100

#: The longest numbers that Python writes and reads have 4,300 digits.
_MOST_BITS: Final = 14_000


def _check(value: Any, path: str, depth: int = 0) -> None:
    if value is None or isinstance(value, (str, bool)):
        return
    if depth > _DEEPEST:
        raise ConfigError(f"{path[:60]}... is nested more than {_DEEPEST} levels deep")
    if isinstance(value, int):
        if value.bit_length() > _MOST_BITS:
            raise ConfigError(f"{path} is a number of more than 4,000 digits; give it as text")
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(f"{path} is {value}, which JSON cannot hold")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check(item, f"{path}[{i}]", depth + 1)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(name, str):
                raise ConfigError(f"{path} has the key {name!r}; keys must be str")
            _check(item, f"{path}[{name!r}]", depth + 1)
    else:
        raise ConfigError(
            f"{path} is {a_kind(value)}, which is not plain JSON data: give {how_plain(value)}"
        )
