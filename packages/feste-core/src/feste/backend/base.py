"""What a backend is: a client of one provider, and the configuration that makes another like it."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

from feste.backend.limits import Limits
from feste.backend.secret import Secret
from feste.errors import ConfigError

__all__ = ["Backend", "create"]

#: Configuration that decides how calls are made, not what they answer.
_NOT_IDENTITY = frozenset({"timeout", "limits"})


class Backend:
    """The base of all backends: a class whose operations are its attributes.

    The smallest backend is one method under :func:`~feste.backend.operation`. A backend is made
    of plain configuration, so that another process can make its own; SDK clients are built when
    the first request is sent.
    """

    plugin: ClassVar[str] = ""
    """The name under which plugins offer it; the class's own name in lower case if not set."""

    limits: Limits = Limits()
    """What the account or server can take."""

    _given: tuple[tuple[Any, ...], dict[str, Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "plugin" not in cls.__dict__:
            cls.plugin = cls.__name__.lower()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        self._given = (args, kwargs)
        return self

    @property
    def endpoint(self) -> str:
        """The URL that calls really go to, or ``plugin:<name>``."""
        return f"plugin:{self.plugin}"

    @property
    def account(self) -> str:
        """Who pays, as far as limits are concerned: organization, project; never a key."""
        return ""

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """The API keys that a call needs."""
        return ()

    def config(self) -> Mapping[str, Any]:
        """Return what makes an equal client: keyword arguments as plain JSON, keys by name.

        The default is what the constructor was given.
        """
        args, kwargs = self._given
        return {**{str(i): _shown(a) for i, a in enumerate(args)}, **_shown(kwargs)}

    @property
    def identity(self) -> str:
        """What decides the answers of this client, as text: endpoint, account, configuration."""
        cached: str | None = self.__dict__.get("_identity")
        if cached is None:
            config = {k: v for k, v in self.config().items() if k not in _NOT_IDENTITY}
            text = json.dumps(config, sort_keys=True, default=repr)
            cached = self._identity = f"{self.plugin}<{self.endpoint} {self.account} {text}>"
        return cached

    @property
    def token(self) -> Hashable:
        """Equal for clients that may stand for each other: same identity, same keys."""
        return (self.identity, self.secrets)

    def preflight(self) -> None:
        """Raise what can be known to be wrong before anything is sent.

        :raises MissingKey: if the environment variable of a key is not set.
        """
        for secret in self.secrets:
            secret.reveal()

    def __reduce__(self) -> tuple[Any, ...]:
        args, kwargs = self._given
        for name, value in kwargs.items():
            if "key" in name and isinstance(value, str):
                raise ConfigError(
                    f"{type(self).__name__} holds a literal {name}, which never leaves this "
                    f"process. Name an environment variable instead: {name}=Secret('MY_KEY')"
                )
        return (_rebuild, (type(self), args, kwargs))

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in self.config().items() if v is not None)
        return f"{type(self).__name__}({shown})"


def _rebuild(cls: type[Backend], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Backend:
    made: Backend = cls(*args, **kwargs)
    return made


def _shown(value: Any) -> Any:
    """Configuration as JSON; a literal key shows as no more than that it is there."""
    if isinstance(value, dict):
        return {
            k: "<literal>" if "key" in k and isinstance(v, str) else _shown(v)
            for k, v in value.items()
        }
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return repr(value)


def create(name: str, **config: Any) -> Backend:
    """Return a client of the backend that a plugin offers under a name.

    :param name: the backend's name, as ``feste plugins`` lists it.
    :param config: what its class takes.
    :raises UnknownName: if no plugin offers that name, with the nearest one.

    >>> create("fake").plugin
    'fake'
    """
    from feste.plugins import registry

    backend: Backend = registry().find("backends", name)(**config)
    return backend
