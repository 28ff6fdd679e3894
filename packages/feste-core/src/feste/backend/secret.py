"""API keys: held by name, read where the call is made, never shown."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NoReturn
from urllib.parse import urlsplit

from feste.backend.address import is_local
from feste.backend.redaction import every_spelling, redact
from feste.errors import ConfigError, MissingKey
from feste.wording import class_name

__all__ = ["BlankedPieces", "Secret", "redact_record"]

_LITERAL = "<literal>"
#: The characters of the shortest key that no answer has by chance.
_NO_WORD = 16
#: Salts the labels of literal keys, so that they reveal nothing outside this process.
_SALT = secrets.token_bytes(16)
#: All secrets of this process, by their IDs: equal ones end at different times.
_known: weakref.WeakValueDictionary[int, Secret] = weakref.WeakValueDictionary()


def redact_record(record: logging.LogRecord) -> bool:
    """Redact the keys of all clients, and what looks like one, in a line of a log: a filter.

    Texts of providers, which may repeat a key, go into the logs of SDKs. Filters of a logger are not
    asked for lines of the loggers below it, so each logger that writes lines gets it.

    :param record: the line.
    :returns: True: no line is left out.

    >>> logging.getLogger("feste.doctest").addFilter(redact_record)
    """
    if isinstance(record.msg, str):
        try:
            text = record.getMessage()
        except Exception:  # its values do not fit: a handler would report it, and not raise
            text = record.msg
        # a list that is made at once, since other threads make secrets meanwhile
        known = [found() for found in _known.valuerefs()]
        record.msg = redact(text, *known, limit=100_000)
        record.args = None
    return True


class Secret:
    """An API key, held as the name of its environment variable.

    :param name: the variable's name. The key is read when a call is made, in the process that makes
        it. This object never holds the key, so it may be printed and pickled.
    :raises ConfigError: if the name is not a valid variable name; it may then be a key.

    >>> Secret("OPENAI_API_KEY")
    Secret('OPENAI_API_KEY')
    """

    __slots__ = ("__weakref__", "_literal", "name")

    _literal: str | None

    def __init__(self, name: str) -> None:
        self.name, self._literal = "", None  # for the repr in a traceback
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            del (
                name
            )  # it may be the key itself, so no tool that prints variables of frames shows it
            raise ConfigError(
                "a Secret takes the name of an environment variable, such as Secret('MY_KEY'), and "
                "what it was given is none"
            )
        self.name = name
        _known[id(self)] = self

    @classmethod
    def of(cls, key: str | Secret | None, default: str) -> Secret:
        """Return the secret for a constructor's ``api_key``.

        :param key: a literal key, a Secret, or None; an empty string counts as None.
        :param default: the variable's name to use for None.
        :raises ConfigError: for any other type.
        """
        if isinstance(key, Secret):
            return key
        if not isinstance(key, (str, type(None))):
            kind = class_name(type(key))
            del key  # it may hold the key, and tools print the variables of frames
            raise ConfigError(f"api_key must be a str or a Secret, not {kind}")
        secret = cls.__new__(cls)
        secret.name, secret._literal = default, key or None
        _known[id(secret)] = secret
        return secret

    def check_server(self, url: str, hosts: Sequence[str]) -> None:
        """Raise if a server is neither one that this key was made for nor on this machine.

        For a key that nobody named, because it is the default, where code has chosen the address. An
        address that stands in the environment beside the key was chosen with it.

        :param url: the address of the server.
        :param hosts: the hosts that the key is for, each with all below it.
        :raises ConfigError: if it is another one.

        >>> Secret("MY_KEY").check_server("https://api.example.net/v1", ["api.example.com"])
        Traceback (most recent call last):
        feste.errors.ConfigError: MY_KEY is a key for api.example.com, and api.example.net is asked: if this server shall have it, say so: api_key=Secret('MY_KEY'), with Secret from feste.backend; else give the server's own key as api_key=
        """
        host = urlsplit(url).hostname or ""
        if not is_local(url) and not any(f".{host}".endswith(f".{known}") for known in hosts):
            raise ConfigError(
                f"{self.name} is a key for {' or '.join(hosts)}, and {host} is asked: if this server "
                f"shall have it, say so: api_key=Secret({self.name!r}), with Secret from "
                "feste.backend; else give the server's own key as api_key="
            )

    @property
    def is_literal(self) -> bool:
        """Whether the key itself was given; it is then held in memory only."""
        return self._literal is not None

    def to_json(self) -> Any:
        """Return the form for records: ``{"env": name}``, or a placeholder for a literal key."""
        return {"env": self.name} if self._literal is None else _LITERAL

    @property
    def label(self) -> str:
        """A name that distinguishes keys: the variable's, or for a literal key a salted hash."""
        if self._literal is None:
            return self.name
        salted = hashlib.blake2b(
            self._literal.encode(errors="surrogatepass"), key=_SALT, digest_size=6
        )
        return f"literal-{salted.hexdigest()}"

    @property
    def is_set(self) -> bool:
        """Whether there is a key."""
        return self.is_literal or bool(os.environ.get(self.name))

    def check(self) -> None:
        """Raise errors that can be known without sending the key.

        No frame of the traceback holds the key, because some tools print the variables of frames.

        :raises MissingKey: if its environment variable is not set.
        :raises ConfigError: if it contains characters that no HTTP header may hold.
        """
        if not self.is_set:
            raise MissingKey(
                f"no API key: the environment variable {self.name} is not set. Set it, or give "
                "api_key="
            )
        if not self._can_be_sent:
            where = "api_key" if self.is_literal else self.name
            raise ConfigError(
                f"the API key in {where} holds a space, a line end or another character that no "
                "key has; was it copied whole, and alone?"
            )

    @property
    def _can_be_sent(self) -> bool:
        key = self._read()
        return key.isascii() and key.isprintable() and " " not in key

    def reveal(self) -> str:
        """Return the key.

        :raises MissingKey: if its environment variable is not set.
        :raises ConfigError: if it contains characters that no HTTP header may hold.
        """
        self.check()
        return self._read()

    def blank(self, text: str, least: int = 1) -> str:
        """Replace the key in a text, however it is spelled there, with three asterisks.

        :param text: any text.
        :param least: a key of fewer characters stays: it is a word such as "none" or "ollama", which
            local servers take for a key.
        """
        key = self._read()
        return every_spelling(key).sub("***", text) if len(key) >= max(least, 1) else text

    def blank_json(self, content: bytes) -> bytes:
        r"""Replace the key in the JSON of an answer, before anything reads it, with asterisks.

        This costs next to nothing, and finds the key as it may be written in JSON only. A key that could
        be a word of the answer, as local servers take it ("lm-studio"), stays: one of less than 16
        characters, or without a digit.

        :param content: the answer.

        >>> key = "canary/0123456789"
        >>> Secret.of(key, "MY_KEY").blank_json(rb'["canary/0123456789", "canary\/0123456789"]')
        b'["***", "***"]'
        >>> Secret.of(key, "MY_KEY").blank_json(rb'["c\u0061nary\u002F0123456789"]')
        b'["***"]'
        >>> Secret.of("password", "MY_KEY").blank_json(b'["enter your password"]')
        b'["enter your password"]'
        """
        key = self._read()
        if not _is_no_word(key):
            return content
        if b"\\u00" in content:
            content = _ESCAPED.sub(_unescaped, content)
        for text in _in_json(key):
            content = content.replace(text, b"***")
        return content

    def blank_payload(self, payload: Any) -> Any:
        """Replace the key in an answer that was put together from the pieces of a stream.

        :param payload: the answer as JSON; it is returned itself if it has no key.

        >>> Secret.of("canary/0123456789", "MY_KEY").blank_payload(["canary/0123456789", 1])
        ['***', 1]
        """
        content = json.dumps(payload).encode()
        blanked = self.blank_json(content)
        return payload if blanked == content else json.loads(blanked)

    def _read(self) -> str:
        return self._literal or os.environ.get(self.name, "")

    def __repr__(self) -> str:
        return f"Secret({self.name!r})" if self._literal is None else "Secret(<literal>)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return self.name == other.name and self._literal == other._literal

    def __hash__(self) -> int:
        return hash(self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._literal is not None:
            _refuse()
        return (Secret, (self.name,))


class BlankedPieces:
    """Hand over the pieces of a stream without a key, even one that is split between them.

    What may be the beginning of the key is held back until the next piece. As in
    :meth:`Secret.blank_json`, a key that could be a word of the answer stays.

    :param secret: the key.
    :param on_chunk: receives the pieces.

    >>> found = []
    >>> shown = BlankedPieces(Secret.of("canary/0123456789", "MY_KEY"), found.append)
    >>> for piece in ("a can", "ary/01234", "56789 in a c", "an"):
    ...     shown.take(piece)
    >>> shown.end()
    >>> found
    ['a ', '*** in a ', 'can']
    """

    def __init__(self, secret: Secret, on_chunk: Callable[[str], None]) -> None:
        self._secret, self._on_chunk, self._held = secret, on_chunk, ""

    def take(self, piece: str) -> None:
        """Hand over a piece, except its end if the key may begin there.

        :param piece: the piece.
        """
        key = self._secret._read()
        if _is_no_word(key):
            text = (self._held + piece).replace(key, "***")
            at = text.find(key[0], max(0, len(text) - len(key) + 1))
            while at >= 0 and not key.startswith(text[at:]):
                at = text.find(key[0], at + 1)
            piece, self._held = (text, "") if at < 0 else (text[:at], text[at:])
        if piece:
            self._on_chunk(piece)

    def end(self) -> None:
        """Hand over what was held back: the stream has ended, and it was no key."""
        if self._held:
            self._on_chunk(self._held)


def _is_no_word(key: str) -> bool:
    """Whether no answer has the key by chance."""
    return len(key) >= _NO_WORD and any(map(str.isdigit, key))


#: What JSON has escaped; characters that keys have, by their number.
_ESCAPED = re.compile(rb"\\(?:u00([2-7][0-9a-fA-F])|.)", re.DOTALL)


def _unescaped(found: re.Match[bytes]) -> bytes:
    number = found[1]
    return found[0] if number is None else json.dumps(chr(int(number, 16)))[1:-1].encode()


@lru_cache(maxsize=64)
def _in_json(key: str) -> set[bytes]:
    """Return how JSON writes a key."""
    escaped = json.dumps(key)[1:-1]
    written = (key, escaped, escaped.replace("/", "\\/"))
    return {text.encode(errors="surrogatepass") for text in written}


def _refuse() -> NoReturn:
    raise ConfigError(
        "a literal API key never leaves this process, so its client cannot be pickled. Put the key "
        "into an environment variable and name it: api_key=Secret('MY_KEY')"
    )
