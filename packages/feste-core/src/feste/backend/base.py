"""The base class of backends: a client of one provider, made from plain configuration."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

from feste.backend.address import proxy_for
from feste.backend.fallback import FALL_BACK_ON, On, Rest, as_errors
from feste.backend.limits import Limits
from feste.backend.profile import Profile
from feste.backend.rate_headers import Spellings
from feste.backend.secret import Secret
from feste.errors import CallError, ConfigError
from feste.wording import printable

__all__ = ["Backend", "create"]

_log = logging.getLogger("feste.backend")

#: Configuration that affects how calls are made but not their answers.
_NOT_IDENTITY = frozenset({"timeout", "limits", "profile"})


class _Constructor:
    """Gives a backend's class the signature of its constructor, which ``__new__`` would hide."""

    def __get__(self, instance: object, owner: type[Backend]) -> inspect.Signature:
        signature = inspect.signature(owner.__init__)
        _, *parameters = signature.parameters.values()
        return signature.replace(parameters=parameters, return_annotation=signature.empty)


class Backend:
    """The base class of all backends; its operations are class attributes.

    The smallest backend is one method decorated with :func:`~feste.backend.operation`. A backend is
    made from plain configuration, so that another process can make an equal one; SDK clients are
    built when the first request is sent.

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
    """The backend's name among plugins; by default the class's name in lower case."""

    limits: Limits = Limits()
    """The limits of the account or server; None, where a constructor sets that, leaves the class's."""

    rate_limit_headers: ClassVar[Spellings] = ()
    """Names of headers that tell the provider's rate limits, besides the usual ones: pairs such as
    ``("tokens", "x-{}-tokens-minute")``, where ``{}`` is limit, remaining or reset."""

    #: Returns the constructor's arguments; a function, because ``vars(client)`` would show a key.
    _given: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    #: What :meth:`or_else` made this of: the backend to ask first, and those after it.
    _first: Backend | None = None
    _others: tuple[tuple[Backend, On], ...] = ()
    __signature__ = _Constructor()

    def __init__(self) -> None:
        """Make a backend; a subclass defines its own arguments."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "plugin" not in cls.__dict__:
            cls.plugin = cls.__name__.lower()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if cls.__hash__ is None:  # a dataclass; backends are compared by identity
            cls.__hash__ = object.__hash__
        self = super().__new__(cls)
        self.__dict__["_given"] = lambda: (args, kwargs)  # works for a frozen dataclass too
        return self

    @property
    def endpoint(self) -> str:
        """The effective URL of calls, or ``plugin:<name>``."""
        return f"plugin:{self.plugin}"

    @property
    def account(self) -> str:
        """The account that limits apply to: organization or project; never a key."""
        return ""

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """The API keys that a call needs: by default those given to the constructor."""
        given = [v for v in self._named().values() if isinstance(v, Secret)]
        return (*given, *(h for h in self._hidden if isinstance(h, Secret)))

    def config(self) -> Mapping[str, Any]:
        """Return the configuration as plain JSON for records, with API keys by name only.

        The default is the constructor's arguments that are not None.
        """
        return {name: _shown(name, value) for name, value in self._named().items()}

    @property
    def identity(self) -> str:
        """A text of everything that affects the answers: endpoint, account, configuration."""
        cached: str | None = self.__dict__.get("_identity")
        if cached is None:
            # a new optional argument or a key's new name must not change the identity
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
        """Equal for backends that may replace each other: same class, identity and keys."""
        return (type(self), self.identity, self.secrets, self._hidden)

    @property
    def _hidden(self) -> tuple[Hashable, ...]:
        """What differs between backends but is not in :meth:`config`: literal keys, objects."""
        cached: tuple[Hashable, ...] | None = self.__dict__.get("_hides")
        if cached is None:
            hidden: list[Hashable] = []
            for name, value in self._named().items():
                if name not in _NOT_IDENTITY:
                    _shown(name, value, hidden)
            cached = self.__dict__["_hides"] = tuple(hidden)
        return cached

    def _named(self) -> dict[str, Any]:
        """Return the constructor's arguments by name."""
        args, kwargs = self._given()
        if not args:
            return kwargs
        cached: Callable[[], dict[str, Any]] | None = self.__dict__.get("_arguments")
        if cached is None:
            try:
                named = inspect.signature(self.__init__).bind(*args, **kwargs).arguments  # type: ignore[misc]
            except (TypeError, ValueError):  # wrong arguments, or the signature is not readable
                named = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
            cached = self.__dict__["_arguments"] = lambda: named
        return cached()

    # --- fallbacks --------------------------------------------------------------------------------

    def or_else(self, *others: Backend, on: type[CallError] | On = FALL_BACK_ON) -> Self:
        """Return a client with the operations that all have: a call that fails here is made there.

        The next backend is asked when all attempts of the one before have ended in an error that
        another provider may not give. Parameters are translated by name; if one of them exists here
        only, give a tuple of parameters, one for each backend.

        :param others: the backends to ask after this one, in order.
        :param on: the errors for which the next is asked: a class of errors, or a tuple of them. The
            default is :data:`FALL_BACK_ON`, which leaves out wrong requests.
        :raises ConfigError: if there is no other backend, or ``on`` holds no classes of errors.

        >>> from feste.errors import QuotaExhausted
        >>> from feste.testing import FakeBackend
        >>> llm = FakeBackend("big", fail={"": QuotaExhausted()}).or_else(FakeBackend("small"))
        >>> llm.chat("Hi").compute().partition(":")[0]
        'small'
        """
        kinds = as_errors(on)
        if not others or not all(isinstance(other, Backend) for other in others):
            raise ConfigError("or_else() takes the backends to ask next: llm.or_else(other)")
        chain = [link for o in others for link in ((o.first, kinds), *o._others)]
        new: Self = object.__new__(type(self))
        new.__dict__.update({k: v for k, v in self.__dict__.items() if k != "_calls"})
        new.__dict__.update(_first=self.first, _others=(*self._others, *chain))
        return new

    @property
    def first(self) -> Backend:
        """The backend that is asked first: itself, if :meth:`or_else` did not make it."""
        return self._first or self

    def calls_after(self, operation: str) -> Rest:
        """Return the calls to make if an operation fails here, each with the errors for which.

        :param operation: the operation's name.
        :raises AttributeError: if a backend to ask next has no such operation.
        """
        for other, _ in self._others:
            if getattr(getattr(other, operation, None), "kind", "") != "call":
                raise AttributeError(
                    f"{operation}: {type(other).__name__}, which or_else() names, has no such operation"
                )
        return tuple((getattr(other, operation), on) for other, on in self._others)

    def profile(self, model: str) -> Profile:
        """Return what is known of a model beforehand; by default nothing.

        Plans and estimates read it: latency, prices, prompt cache, capabilities.

        :param model: the model's name, or an empty string.
        """
        return Profile()

    def preflight(self) -> None:
        """Raise errors that can be known before anything is sent; log which proxy it goes through.

        :raises MissingKey: if the environment variable of a key is not set.
        :raises ConfigError: if a key contains characters that cannot be sent.
        """
        for secret in self.secrets:
            secret.check()
        _log_proxy(self.endpoint)

    def warm_up(self) -> None:
        """Do what no request should wait for, such as importing an SDK; it may block.

        Called in a thread before the first request of a class of backends leaves a process, and so
        that its time limit starts afterwards; perhaps several times, and in several threads.
        """

    def __copy__(self) -> Backend:
        made = _rebuild(type(self), *self._given())
        return _chained(made, self._others)

    def __deepcopy__(self, memo: object) -> Backend:
        return self.__copy__()

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._first is not None:  # a subclass's __reduce__ knows the first only
            return (_chained, (self._first, self._others))
        return super().__reduce_ex__(protocol)

    def __reduce__(self) -> tuple[Any, ...]:
        for literal in (h for h in self._hidden if isinstance(h, Secret)):
            raise ConfigError(
                f"{type(self).__name__} holds a literal {literal.name}, which never leaves this "
                f"process. Name an environment variable instead: {literal.name}=Secret('MY_KEY')"
            )
        return (_rebuild, (type(self), *self._given()))

    def __repr__(self) -> str:
        try:
            config = {k: v for k, v in self.config().items() if v is not None}
        except AttributeError:  # a traceback with variables shows what its constructor refused
            return f"<{type(self).__name__}, not made>"
        for name, value in config.items():
            if isinstance(value, Mapping) and value.keys() == {"env"}:
                config[name] = Secret(value["env"])
        shown = ", ".join(f"{k}={v!r}" for k, v in config.items())
        others = "".join(f".or_else({other!r})" for other, _ in self._others)
        return f"{type(self).__name__}({shown}){others}"


def _chained(first: Backend, others: tuple[tuple[Backend, On], ...]) -> Backend:
    for other, on in others:
        first = first.or_else(other, on=on)
    return first


def _rebuild(cls: type[Backend], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Backend:
    made: Backend
    try:
        made = cls(*args, **kwargs)
    finally:
        del args, kwargs  # so that no traceback with variables shows a literal key
    return made


_LITERAL = "<literal>"
_SECRET = re.compile(r"(?i)(^|[_-])(key|token|secret|passw(or)?d|authorization|cookie)$|apikey$")


def _shown(name: str, value: Any, hidden: list[Hashable] | None = None) -> Any:
    """Return configuration as JSON; a literal key is replaced by a placeholder.

    :param name: the name of the parameter, or the dict key, that holds the value.
    :param value: the value.
    :param hidden: collects what the JSON omits but distinguishes backends: literal keys as Secrets,
        other objects by identity.
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
    if not isinstance(value, (Secret, Limits, Profile)):
        hidden.append(id(value))  # safe: the object lives as long as the backend
    if isinstance(value, Secret):
        return value.to_json()
    shown = repr(value)
    return f"<{type(value).__qualname__}>" if " at 0x" in shown else shown


def create(name: str, /, **config: Any) -> Any:
    """Make a backend from its registered name.

    A name does not tell a type checker which operations there are: annotate what needs to be checked,
    ``llm: OpenAI = create("openai")``.

    :param name: the backend's name, as listed by ``feste plugins``.
    :param config: the arguments of its class.
    :returns: the backend.
    :raises UnknownName: if no plugin registers that name; the message suggests the nearest one.

    >>> create("fake").plugin
    'fake'
    """
    from feste.plugins import registry

    try:
        return registry().find("backends", name)(**config)
    finally:
        del config  # so that no traceback with variables shows a literal key


@functools.lru_cache(maxsize=256)  # once for each server
def _log_proxy(url: str) -> None:
    proxy = proxy_for(url)
    if proxy is not None:
        host = printable(urlsplit(url).netloc)
        _log.info("the environment names a proxy for %s: %s", host, printable(proxy))
