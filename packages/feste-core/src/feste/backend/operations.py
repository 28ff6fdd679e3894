"""Operations of backends: three halves, and rules for calls that share requests.

``prepare`` turns a call's arguments into a request, ``send`` does the I/O, ``parse`` turns the
response into a value. Only ``send`` costs time and money; the other two are pure and free to
repeat. An :class:`Operation` names the three halves; :func:`operation` makes one of a single
method.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from feste.backend.arguments import as_params
from feste.backend.batching import BatchRule, PrefixRule, SampleRule
from feste.backend.fallback import Rest, for_each
from feste.backend.limits import Limits
from feste.backend.params import Params
from feste.backend.profile import profile_of
from feste.backend.rate_headers import spellings_of
from feste.backend.redaction import redact
from feste.backend.request import Request, Response, canonical
from feste.delayed import FesteDelayed, record, refuse_node_text
from feste.draw import Determinism
from feste.errors import (
    ConfigError,
    FesteError,
    MalformedResponse,
    ParameterError,
    PluginError,
    suggest,
)
from feste.node import Lazy, call_site
from feste.plain import plain
from feste.wording import a_kind, raised_at

if TYPE_CHECKING:
    from feste.backend.base import Backend

__all__ = ["Call", "OnChunk", "Operation"]

R = TypeVar("R", covariant=True)
OnChunk = Callable[[str], None]


class Operation(Generic[R]):
    """One operation of a backend, as a class attribute; on an instance it gives a :class:`Call`.

    :param prepare: ``prepare(backend, *arguments) -> Request``; pure. Its signature and docstring
        become the operation's.
    :param send: ``async send(backend, request, on_chunk) -> Response``; if ``on_chunk`` is given,
        it is called with pieces of text as they arrive, and the whole is still returned.
    :param parse: ``parse(backend, response, arguments) -> value``; pure. ``arguments`` are the
        call's arguments by name.
    :param determinism: the determinism class of a call; parameters may narrow SAMPLE to GREEDY.
    :param batch: how calls are packed into one request, or None.
    :param samples: how equal SAMPLE calls become one request for several answers, or None.
    :param prefix: what the provider's prompt cache sees of a request, or None.
    :param signature: the method that provides the signature and docstring, if it is not
        ``prepare``.

    >>> from feste.backend import Backend
    >>> class Shop(Backend):
    ...     def _prepare(self, item: str) -> Request:
    ...         return Request(self.plugin, "price", "plugin:shop", {"item": item})
    ...     async def _send(self, request, on_chunk=None):
    ...         return Response({"cents": 10 * len(request.body["item"])})
    ...     def _parse(self, response, arguments):
    ...         return f"{arguments['item']}: {response.payload['cents']} cents"
    ...     price = Operation(prepare=_prepare, send=_send, parse=_parse)
    >>> Shop().price("tea").compute()
    'tea: 30 cents'
    """

    def __init__(
        self,
        *,
        prepare: Callable[..., Request],
        send: Callable[..., Any],
        parse: Callable[[Any, Response, Mapping[str, Any]], R],
        determinism: Determinism = Determinism.SAMPLE,
        batch: BatchRule | None = None,
        samples: SampleRule | None = None,
        prefix: PrefixRule | None = None,
        signature: Callable[..., Any] | None = None,
    ) -> None:
        self._prepare, self._send, self._parse = prepare, send, parse
        self.determinism = determinism
        self.rule = batch
        self.samples = samples
        self.prefix = prefix
        self.name = ""
        self._signature_from(signature or prepare)

    def _signature_from(self, function: Callable[..., Any]) -> None:
        self.__doc__, self.__wrapped__ = function.__doc__, function
        signature = inspect.signature(function)
        self.__signature__ = signature.replace(return_annotation=signature.empty)
        parameters = list(signature.parameters.values())[1:]
        for p in parameters:
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY):
                raise ConfigError(
                    f"operation {function.__name__}: the parameter {p} must have a name"
                )
        self.parameters = parameters
        self.call_signature = inspect.Signature(parameters)
        self.names = tuple(p.name for p in parameters)
        self.positional = sum(p.kind is not p.KEYWORD_ONLY for p in parameters)
        self.defaults = tuple(p.default for p in parameters)

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        self.owner = owner

    @overload
    def __get__(self, instance: None, owner: type) -> Operation[R]: ...
    @overload
    def __get__(self, instance: Backend, owner: type) -> Call[R]: ...
    def __get__(self, instance: Backend | None, owner: type) -> Any:
        if instance is None:
            return self
        # a weak reference, because a cycle would delay freeing the client and keep its limits alive
        calls: dict[str, weakref.ref[Call[R]]] = instance.__dict__.setdefault("_calls", {})
        known = calls.get(self.name)
        call = known() if known is not None else None
        if call is None or call.operation is not self:
            call = Call(instance.first, self, instance.calls_after(self.name))
            calls[self.name] = weakref.ref(call)
        return call

    def __call__(self, client: Backend, /, *args: Any, **kwargs: Any) -> FesteDelayed[R]:
        """Call the operation as ``Class.operation(client, ...)``."""
        call: Call[R] = self.__get__(client, type(client))
        return call(*args, **kwargs)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return one argument for each parameter, with defaults filled in.

        :param args: positional arguments.
        :param kwargs: keyword arguments.
        :raises ParameterError: for an unknown, repeated or missing argument.
        """
        if len(args) > self.positional:
            raise ParameterError(
                f"{self.name}() takes {self.positional} positional arguments, not {len(args)}"
            )
        bound = [*args, *self.defaults[len(args) :]]
        for name, value in kwargs.items():
            if name not in self.names:
                raise ParameterError(
                    f"{self.name}() has no parameter {name!r}{self._where(name, value)}"
                )
            position = self.names.index(name)
            if position < len(args):
                raise ParameterError(f"{self.name}() got {name!r} twice")
            bound[position] = value
        for name, value, default in zip(self.names, bound, self.defaults, strict=True):
            if value is inspect.Parameter.empty:
                raise ParameterError(f"{self.name}() needs {name!r}")
            if isinstance(default, Params) and not isinstance(value, Lazy):
                as_params(value, type(default), self.name, name)
        return tuple(bound)

    def _where(self, name: str, value: Any) -> str:
        """Return a hint for an unknown parameter: the record it belongs to, or the nearest name."""
        for default in self.defaults:
            if isinstance(default, Params) and name in {f.name for f in fields(default)}:  # type: ignore[arg-type]
                shown = repr(value) if isinstance(value, (int, float)) else "..."
                return f": give {type(default).__name__}({name}={shown})"
        return f".{suggest(name, self.names)}"


class Call(Generic[R]):
    """An operation of one backend object; calling it records a node with this as its op.

    :param client: the backend.
    :param operation: the operation.
    :param rest: the calls that are made if this one fails, one after the other, each with the errors
        before it for which it is made.
    :raises ConfigError: if the backend's limits, or the names of its headers, are none.
    """

    kind = "call"
    emits = False

    def __init__(self, client: Backend, operation: Operation[R], rest: Rest = ()) -> None:
        self.client = client
        self.operation = operation
        self.rest = rest
        # read here, on the user's line: the scheduler asks no code of a plugin for them
        self.limits = Limits.of_client(client)
        self.spellings = spellings_of(client)
        self.name = operation.name
        self.__doc__ = operation.__doc__
        self.__signature__ = operation.call_signature

    @property
    def identity(self) -> str:
        """The operation and its backend's configuration, without any key."""
        return f"{self.client.identity}.{self.name}"

    @property
    def token(self) -> Hashable:
        """Equal for operations of backends that may replace each other."""
        rest = tuple((call.token, on) for call, on in self.rest)
        return (self.client.token, self.operation, *rest)

    @property
    def rule(self) -> BatchRule | None:
        """How its calls are packed into one request, or None."""
        return self.operation.rule

    @property
    def max_items(self) -> int:
        """The maximum number of calls in one request."""
        rule = self.rule
        return min(rule.max_items, self.limits.max_items or rule.max_items) if rule else 1

    def model(self, args: Sequence[Any]) -> str:
        """Return the model of a call as far as it is known before the run, or an empty string.

        :param args: packed arguments.
        """
        for argument in args:
            named = getattr(argument, "model", None) if isinstance(argument, Params) else None
            if isinstance(named, str):
                return named
        return str(getattr(self.client, "model", None) or "")

    def max_draws(self, model: str) -> int:
        """Return the maximum number of answers to one prompt in one request; 1 without a rule.

        :param model: the model.
        """
        rule = self.operation.samples
        if rule is None:
            return 1
        known = profile_of(self.client, model).max_draws
        return rule.max_draws if known is None else min(known, rule.max_draws)

    def __call__(self, /, *args: Any, **kwargs: Any) -> FesteDelayed[R]:
        others: dict[str, Any] = {}
        try:
            if self.rest:
                args, kwargs, others = for_each(self, args, kwargs)
            bound = self.operation.bind(args, kwargs)
            for argument in bound:
                refuse_node_text(argument)
        except FesteError as error:
            error.origin = call_site()
            raise
        return record(self, bound, others)  # type: ignore[no-any-return]

    def determinism(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Determinism:
        """Return the operation's class, narrowed by the parameters if they are known."""
        for argument in args:
            if isinstance(argument, Params):
                return argument.determinism(self.operation.determinism)
        return self.operation.determinism

    def group(self, args: Sequence[Any]) -> str | None:
        """Return a text that is equal for calls that may share a request; the plan uses it.

        :param args: packed arguments.
        :returns: None if the call cannot share a request: the operation has no rule, or an argument
            other than the item is not known before the run.
        """
        if self.rule is None:
            return None
        fixed = []
        for name, argument in zip(self.operation.names, args, strict=True):
            if name == self.rule.item:
                continue
            known = _constant(argument)
            if known is None:
                return None
            fixed.append(known)
        return f"{self.identity}({','.join(fixed)})"

    def may_repeat(self, args: Sequence[Any]) -> bool:
        """Return whether the parameters are known and ask for one answer as such; the plan uses it.

        :param args: packed arguments.
        """
        for default, argument in zip(self.operation.defaults, args, strict=True):
            if isinstance(argument, Params):
                if not argument.may_repeat():
                    return False
            elif isinstance(default, Params):
                return False
        return True

    def prepare(self, arguments: Sequence[Any]) -> Request:
        """Return the request of a call. Pure.

        :param arguments: one value for each parameter.
        :raises FesteError: if an argument is wrong; PluginError if the backend raises anything else.
        """
        for argument in arguments:
            refuse_node_text(argument)
        operation = self.operation
        by_name = dict(
            zip(
                operation.names[operation.positional :],
                arguments[operation.positional :],
                strict=True,
            )
        )
        positional = arguments[: operation.positional]
        request = self._made("prepare", operation._prepare, *positional, **by_name)
        request.check()
        accounts = filter(None, (request.account, *(s.label for s in self.client.secrets)))
        bounds = (a.max_output() for a in arguments if isinstance(a, Params))
        bound = next(bounds, None) if request.max_output is None else request.max_output
        return replace(request, account=" ".join(dict.fromkeys(accounts)), max_output=bound)

    def pack(self, requests: Sequence[Request]) -> Request:
        """Return one request for those of several calls. Pure.

        :param requests: the requests.
        :raises PluginError: if the backend cannot make one of them.
        """
        assert self.rule is not None, "only operations with a rule are packed"
        return self._made("pack", self.rule.pack, requests)

    def _made(self, half: str, make: Callable[..., Any], *given: Any, **named: Any) -> Request:
        try:
            request = make(self.client, *given, **named)
        except FesteError:
            raise
        except Exception as error:  # a bug in the backend, or what it did not expect
            said = f"{type(error).__name__}: {error} ({raised_at(error)})"
            said = redact(said, *self.client.secrets)
            raise PluginError(
                f"{half} of {self.client.plugin}.{self.name} raised {said}"
            ) from error
        if not isinstance(request, Request):
            raise PluginError(
                f"{half} of {self.client.plugin}.{self.name} returned {type(request).__name__}, not a "
                "Request"
            )
        return request

    async def send(self, request: Request, on_chunk: OnChunk | None = None) -> Response:
        """Send a request.

        :param request: the request, single or packed.
        :param on_chunk: receives pieces of the text as they arrive, or None.
        :raises CallError: if it failed; MalformedResponse if the backend did not return a Response.
        """
        if request.mark is not None and self.operation.prefix is not None:
            request = self.operation.prefix.mark(request, *request.mark)
        response = await self.operation._send(self.client, request, on_chunk)
        if not isinstance(response, Response):
            raise MalformedResponse(
                f"send of {request.plugin}.{self.name} returned {a_kind(response)}, not a Response"
            )
        return response.tidy()

    def parse(self, response: Response, arguments: Sequence[Any]) -> R:
        """Return the value of a response. Pure.

        :param response: the response.
        :param arguments: the call's arguments.
        :raises MalformedResponse: if the response does not have the form the endpoint promises.
        """
        named = dict(zip(self.operation.names, arguments, strict=True))
        return self.operation._parse(self.client, response, named)

    def followed_by(self, rest: Rest) -> Call[R]:
        """Return the same operation with other calls to make if it fails.

        :param rest: as for the class.
        """
        return Call(self.client, self.operation, rest)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.rest:
            return (Call.followed_by, (self.followed_by(()), self.rest))
        if getattr(type(self.client), self.name, None) is self.operation:
            return (getattr, (self.client, self.name))
        return (_call_of_base, (self.operation.owner, self.name, self.client))

    def __repr__(self) -> str:
        return f"<{self.identity}>"


def _constant(argument: Any) -> str | None:
    """Return a text for a known argument; None if it contains slots or is no plain data."""
    if isinstance(argument, type):
        return f"{argument.__module__}.{argument.__qualname__}@{id(argument)}"
    if isinstance(argument, Params):
        argument = [type(argument).__qualname__, argument.body()]
    try:
        return canonical(argument)
    except ConfigError:
        with suppress(FesteError):
            return canonical(plain(argument))  # dataclasses as dicts, as default halves send them
        return None


def _call_of_base(owner: type, name: str, client: Backend) -> Any:
    """The operation of a base class that a subclass has overridden, for one client."""
    return owner.__dict__[name].__get__(client, owner)
