"""API keys: held by name, read where the call is made, never shown."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Sequence
from typing import Any, NoReturn
from urllib.parse import urlsplit

from feste.backend.address import is_local
from feste.errors import ConfigError, MissingKey

__all__ = ["Secret", "redact"]


_LITERAL = "<literal>"
#: Salts the labels of literal keys, so that they reveal nothing outside this process.
_SALT = secrets.token_bytes(16)


class Secret:
    """An API key, held as the name of its environment variable.

    :param name: the variable's name. The key is read when a call is made, in the process that makes
        it. This object never holds the key, so it may be printed and pickled.
    :raises ConfigError: if the name is not a valid variable name; it may then be a key.

    >>> Secret("OPENAI_API_KEY")
    Secret('OPENAI_API_KEY')
    """

    __slots__ = ("_literal", "name")

    def __init__(self, name: str) -> None:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):  # may be the key itself, so do not show it
            raise ConfigError(
                "a Secret takes the name of an environment variable, such as Secret('MY_KEY'), and "
                "what it was given is none"
            )
        self.name = name
        self._literal: str | None = None

    @classmethod
    def of(
        cls, key: str | Secret | None, default: str, *, url: str = "", hosts: Sequence[str] = ()
    ) -> Secret:
        """Return the secret for a constructor's ``api_key``.

        A key that nobody named, because there is a default, goes to the hosts that it was made for
        and to this machine. Give ``url`` and ``hosts`` where the address is one that code has
        chosen; an address that stands in the environment beside the key was chosen with it.

        :param key: a literal key, a Secret, or None; an empty string counts as None.
        :param default: the variable's name to use for None.
        :param url: the address of the server, or an empty text for any.
        :param hosts: the hosts, each with all below it, that the default key is for.
        :raises ConfigError: for any other type, or if the default key is for another server.

        >>> Secret.of(None, "MY_KEY", url="https://api.example.net/v1", hosts=["api.example.com"])
        Traceback (most recent call last):
        feste.errors.ConfigError: MY_KEY is a key for api.example.com, and api.example.net is asked: if this server shall have it, say so: api_key=Secret('MY_KEY'), with Secret from feste.backend; else give the server's own key as api_key=
        """
        if isinstance(key, Secret):
            return key
        if not isinstance(key, (str, type(None))):
            raise ConfigError(f"api_key must be a str or a Secret, not {type(key).__name__}")
        host = urlsplit(url).hostname or ""
        known = any(host == one or host.endswith(f".{one}") for one in hosts)
        if host and not key and not known and not is_local(url):
            raise ConfigError(
                f"{default} is a key for {hosts[0] if hosts else 'no server'}, and {host} is asked: "
                f"if this server shall have it, say so: api_key=Secret({default!r}), with Secret "
                "from feste.backend; else give the server's own key as api_key="
            )
        secret = cls.__new__(cls)
        secret.name, secret._literal = default, key or None
        return secret

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
        salted = hashlib.blake2b(self._literal.encode(), key=_SALT, digest_size=6)
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
        """Replace the key in a text with three asterisks.

        :param text: any text.
        :param least: a key of fewer characters stays: it is a word such as "none" or "ollama", which
            local servers take for a key.
        """
        key = self._read()
        return text.replace(key, "***") if len(key) >= least else text

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


def _refuse() -> NoReturn:
    raise ConfigError(
        "a literal API key never leaves this process, so its client cannot be pickled. Put the key "
        "into an environment variable and name it: api_key=Secret('MY_KEY')"
    )


#: The characters of the shortest text that is taken for a key, and not for a word such as "none".
_SHORTEST = 8

_KEYS = re.compile(
    r"(?i)(bearer\s+)[\w.~+/=-]{8,}|\b(?:sk|pk|rk|key|co)-[\w-]{8,}"
    r"|((?:api[-_]?key|token|secret|password)[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;}]{6,}"
)


def redact(text: str, *secrets: Secret | None, limit: int = 500) -> str:
    """Redact API keys in a text from outside and limit its length.

    :param text: the text of a provider or an SDK.
    :param secrets: keys to redact in addition to those found by their form.
    :param limit: the maximum number of characters.

    >>> redact("Incorrect API key provided: sk-proj-1234567890")
    'Incorrect API key provided: ***'
    """
    for secret in secrets:
        if secret is not None:
            text = secret.blank(text, _SHORTEST)
    text = _KEYS.sub(lambda m: (m.group(1) or m.group(2) or "") + "***", text)
    return text if len(text) <= limit else text[: limit - 3] + "..."
