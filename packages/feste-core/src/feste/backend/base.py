"""What a backend is: a client of one provider, and the configuration that makes another like it."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar, Self

from feste.backend.limits import Limits
from feste.backend.secret import Secret
from feste.errors import ConfigError

__all__ = ["Backend", "create"]

#: Configuration that decides how calls are made, not what they answer.
_NOT_IDENTITY = frozenset({"timeout", "limits"})


class _Constructor:
    """The signature of a backend's class: that of its constructor, which ``__new__`` would hide."""

    def __get__(self, instance: object, owner: type[Backend]) -> inspect.Signature:
        signature = inspect.signature(owner.__init__)
        _, *parameters = signature.parameters.values()
        return signature.replace(parameters=parameters, return_annotation=signature.empty)


class Backend:
    """The base of all backends: a class whose operations are its attributes.

    The smallest backend is one method under :func:`~feste.backend.operation`. A backend is made
    of plain configuration, so that another process can make its own; SDK clients are built when
    the first request is sent.

    >>> from feste.backend import operation
    >>> class Greeter(Backend):
    ...     def __init__(self, greeting: str = "Hello", *, api_key: str | Secret | None = None):
    ...         self.greeting = greeting
    ...     @operation
    ...     async def greet(self, name: str) -> str:
    ...         return f"{self.greeting}, {name}!"
    >>> Greeter("Salut").greet("Ada").compute()
    'Salut, Ada!'
    >>> Greeter(api_key=Secret("GREETER_KEY")).config()
    {'api_key': {'env': 'GREETER_KEY'}}
    """

    plugin: ClassVar[str] = ""
    """The name under which plugins offer it; the class's own name in lower case if not set."""

    limits: Limits = Limits()
    """What the account or server can take."""

    _given: tuple[tuple[Any, ...], dict[str, Any]]
    __signature__ = _Constructor()

    def __init__(self) -> None:
        """Make a client; a subclass takes what it needs as its own arguments."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "plugin" not in cls.__dict__:
            cls.plugin = cls.__name__.lower()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if cls.__hash__ is None:  # a dataclass; clients are told apart by identity
            cls.__hash__ = object.__hash__
        self = super().__new__(cls)
        self.__dict__["_given"] = (args, kwargs)  # also of a frozen dataclass
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
        """The API keys that a call needs: those that the constructor was given."""
        given = [v for v in self._named().values() if isinstance(v, Secret)]
        return (*given, *(h for h in self._hidden if isinstance(h, Secret)))

    def config(self) -> Mapping[str, Any]:
        """Return the client's configuration as plain JSON, for records; API keys by name.

        The default is what the constructor was given, less what is None.
        """
        return {name: _shown(name, value) for name, value in self._named().items()}

    @property
    def identity(self) -> str:
        """What decides the answers of this client, as text: endpoint, account, configuration."""
        cached: str | None = self.__dict__.get("_identity")
        if cached is None:
            # neither a new optional argument nor a key's new name makes another client
            config = {
                name: value
                for name, value in self.config().items()
                if name not in _NOT_IDENTITY and value is not None and not _SECRET.search(name)
            }
            text = json.dumps(config, sort_keys=True, default=repr)
            cached = f"{self.plugin}<{self.endpoint} {self.account} {text}>"
            self.__dict__["_identity"] = cached
        return cached

    @property
    def token(self) -> Hashable:
        """Equal for clients that may stand for each other: same class, identity, keys."""
        return (type(self), self.identity, self.secrets, self._hidden)

    @property
    def _hidden(self) -> tuple[Hashable, ...]:
        """What :meth:`config` hides but makes clients different: literal keys, objects."""
        cached: tuple[Hashable, ...] | None = self.__dict__.get("_hides")
        if cached is None:
            hidden: list[Hashable] = []
            for name, value in self._named().items():
                if name not in _NOT_IDENTITY:
                    _shown(name, value, hidden)
            cached = self.__dict__["_hides"] = tuple(hidden)
        return cached

    def _named(self) -> dict[str, Any]:
        """What the constructor was given, by name."""
        args, kwargs = self._given
        if not args:
            return kwargs
        try:
            return inspect.signature(self.__init__).bind(*args, **kwargs).arguments  # type: ignore[misc]
        except (TypeError, ValueError):  # the constructor has said so, or hides its parameters
            return {**{str(i): value for i, value in enumerate(args)}, **kwargs}

    def preflight(self) -> None:
        """Raise what can be known to be wrong before anything is sent.

        :raises MissingKey: if the environment variable of a key is not set.
        :raises ConfigError: if a key holds what cannot be sent.
        """
        for secret in self.secrets:
            secret.check()

    def __copy__(self) -> Backend:
        return _rebuild(type(self), *self._given)

    def __deepcopy__(self, memo: object) -> Backend:
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        for literal in (h for h in self._hidden if isinstance(h, Secret)):
            raise ConfigError(
                f"{type(self).__name__} holds a literal {literal.name}, which never leaves this "
                f"process. Name an environment variable instead: {literal.name}=Secret('MY_KEY')"
            )
        return (_rebuild, (type(self), *self._given))

    def __repr__(self) -> str:
        config = {k: v for k, v in self.config().items() if v is not None}
        for name, value in config.items():
            if isinstance(value, Mapping) and value.keys() == {"env"}:
                config[name] = Secret(value["env"])
        shown = ", ".join(f"{k}={v!r}" for k, v in config.items())
        return f"{type(self).__name__}({shown})"


def _rebuild(cls: type[Backend], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Backend:
    made: Backend = cls(*args, **kwargs)
    return made


_LITERAL = "<literal>"
_SECRET = re.compile(r"(?i)(^|[_-])(key|token|secret|passw(or)?d|authorization|cookie)$|apikey$")


def _shown(name: str, value: Any, hidden: list[Hashable] | None = None) -> Any:
    """Configuration as JSON: a literal key shows as no more than that it is there.

    :param name: the parameter, or the key of the dict, that holds the value.
    :param value: the value.
    :param hidden: gets what does not show but tells clients apart: literal keys as Secrets, other
        objects by identity.
    """
    hidden = [] if hidden is None else hidden
    if isinstance(value, Mapping):
        return {str(k): _shown(str(k), v, hidden) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shown(name, v, hidden) for v in value]
    if isinstance(value, str) and _SECRET.search(name):
        hidden.append(Secret.of(value, name))
        return _LITERAL
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if not isinstance(value, (Secret, Limits)):
        hidden.append(id(value))  # it lives as long as the client that was given it
    if isinstance(value, Secret):
        return value.to_json()
    shown = repr(value)
    return f"<{type(value).__qualname__}>" if " at 0x" in shown else shown


def create(name: str, /, **config: Any) -> Backend:
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
