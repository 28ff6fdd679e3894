"""Operations: what a backend can do, as three halves and a rule for batches.

``prepare`` makes plain data of a call's arguments, ``send`` does the I/O, ``parse`` makes a value of
the answer. Only ``send`` costs time and money; the other two are pure, so they are free to repeat.
An :class:`Operation` names the three; :func:`operation` makes one of a single method.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import traceback
import types
import typing
from collections.abc import Callable, Coroutine, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from feste import errors
from feste.backend.params import Params
from feste.backend.request import Request, Response, alike, canonical
from feste.backend.secret import redact
from feste.delayed import FesteDelayed, record, refuse_node_text
from feste.draw import Determinism
from feste.errors import (
    CallError,
    ConfigError,
    CountMismatch,
    FesteError,
    MalformedResponse,
    ParameterError,
    Rejected,
    suggest,
)
from feste.node import Lazy, here
from feste.plain import plain

if TYPE_CHECKING:
    from feste.backend.base import Backend

__all__ = ["BatchRule", "Call", "Operation", "operation"]

R = TypeVar("R", covariant=True)
Outcome = Response | CallError
OnChunk = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BatchRule:
    """How calls of an operation become one request.

    :param item: the parameter that differs from call to call; all others must be equal.
    :param field: the field of the body that holds it.
    :param max_items: calls in one request, at most.
    :param max_tokens: tokens in one request, at most, or None. Counts are estimates, so a twentieth
        is kept in reserve.
    :param max_bytes: bytes of the body, at most, or None.
    :param pack: ``pack(backend, requests) -> request``.
    :param unpack: ``unpack(backend, request, response) -> outcomes``: for each call its own
        response or error, in the order of the calls. It may raise
        :class:`~feste.errors.CountMismatch`: the calls are then sent one by one.
    """

    item: str
    field: str
    max_items: int
    pack: Callable[[Any, Sequence[Request]], Request]
    unpack: Callable[[Any, Request, Response], Sequence[Outcome]]
    max_tokens: int | None = None
    max_bytes: int | None = None

    def signature(self, request: Request) -> str:
        """Return a text that is equal for requests that may share one.

        :param request: the request of one call.
        """
        return alike(request, self.field)

    def chunks(self, sizes: Sequence[tuple[int, int]], max_items: int | None = None) -> list[int]:
        """Return how many calls go into each request, so that every limit is kept.

        Calls stay in order, and the last two requests are balanced: 17 calls at 16 make 9 and 8.

        :param sizes: tokens and bytes of each call.
        :param max_items: a lower limit of items than the rule's, or None.

        >>> rule = BatchRule("prompt", "prompt", 16, pack=None, unpack=None, max_tokens=None)
        >>> rule.chunks([(1, 4)] * 17), rule.chunks([(1, 4)] * 32)
        ([9, 8], [16, 16])
        """
        top = min(self.max_items, max_items or self.max_items)
        counts: list[int] = []
        items = tokens = size = 0
        for token, byte in sizes:
            if items and self._over(items + 1, tokens + token, size + byte, top):
                counts.append(items)
                items = tokens = size = 0
            items, tokens, size = items + 1, tokens + token, size + byte
        if items:
            counts.append(items)
        if len(counts) > 1 and counts[-2] - counts[-1] > 1:
            both = counts[-2] + counts[-1]
            last = sizes[-(both // 2) :]
            if not self._over(len(last), sum(t for t, _ in last), sum(b for _, b in last), top):
                counts[-2:] = [both - both // 2, both // 2]
        return counts

    def _over(self, items: int, tokens: int, size: int, top: int) -> bool:
        """Whether a request of so many items, tokens and bytes would be too large."""
        return (
            items > top
            or (self.max_tokens is not None and tokens > 0.95 * self.max_tokens)
            or (self.max_bytes is not None and size > 0.95 * self.max_bytes)
        )


class Operation(Generic[R]):
    """One operation of a backend, as a class attribute; on an instance it is a :class:`Call`.

    :param prepare: ``prepare(backend, *arguments) -> Request``; pure. Its signature is the
        operation's, its docstring too.
    :param send: ``async send(backend, request, on_chunk) -> Response``; with ``on_chunk`` it hands
        over pieces of text as they come and still returns the whole.
    :param parse: ``parse(backend, response, arguments) -> value``; pure. ``arguments`` are the
        call's, by name.
    :param determinism: the class of a call; parameters may narrow SAMPLE to GREEDY.
    :param batch: how calls become one request, or None.
    :param signature: the method whose signature and docstring are the operation's, if it is not
        ``prepare``.
    """

    def __init__(
        self,
        *,
        prepare: Callable[..., Request],
        send: Callable[..., Any],
        parse: Callable[[Any, Response, Mapping[str, Any]], R],
        determinism: Determinism = Determinism.SAMPLE,
        batch: BatchRule | None = None,
        signature: Callable[..., Any] | None = None,
    ) -> None:
        self._prepare, self._send, self._parse = prepare, send, parse
        self.determinism = determinism
        self.rule = batch
        self.name = ""
        self._signature_from(signature or prepare)

    def _signature_from(self, function: Callable[..., Any]) -> None:
        self.__doc__ = function.__doc__
        parameters = list(inspect.signature(function).parameters.values())[1:]
        for p in parameters:
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY):
                raise ConfigError(
                    f"operation {function.__name__}: the parameter {p} must have a name"
                )
        self.parameters = parameters
        self.names = tuple(p.name for p in parameters)
        self.positional = sum(p.kind is not p.KEYWORD_ONLY for p in parameters)
        self.defaults = tuple(p.default for p in parameters)

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Operation[R]: ...
    @overload
    def __get__(self, instance: Backend, owner: type) -> Call[R]: ...
    def __get__(self, instance: Backend | None, owner: type) -> Any:
        if instance is None:
            return self
        call: Call[R] = Call(instance, self)
        instance.__dict__[self.name] = call  # the next look-up finds it without coming here
        return call

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return one argument for each parameter, defaults filled in.

        :param args: positional arguments.
        :param kwargs: keyword arguments.
        :raises ParameterError: for an unknown, doubled or missing one.
        """
        if len(args) > self.positional:
            raise ParameterError(
                f"{self.name}() takes {self.positional} positional arguments, not {len(args)}"
            )
        bound = [*args, *self.defaults[len(args) :]]
        for name, value in kwargs.items():
            if name not in self.names:
                raise ParameterError(
                    f"{self.name}() has no parameter {name!r}.{suggest(name, self.names)}"
                )
            position = self.names.index(name)
            if position < len(args):
                raise ParameterError(f"{self.name}() got {name!r} twice")
            bound[position] = value
        for name, value, default in zip(self.names, bound, self.defaults, strict=True):
            if value is inspect.Parameter.empty:
                raise ParameterError(f"{self.name}() needs {name!r}")
            if isinstance(default, Params) and not isinstance(value, (Params, Lazy)):
                kind = type(default).__name__
                raise ParameterError(
                    f"{self.name}() takes {name}={kind}(...), not a {type(value).__name__}"
                )
        return tuple(bound)


class Call(Generic[R]):
    """An operation of one client: calling it records a node, whose op it is.

    :param client: the backend.
    :param operation: the operation.
    """

    kind = "call"
    emits = False

    def __init__(self, client: Backend, operation: Operation[R]) -> None:
        self.client = client
        self.operation = operation
        self.name = operation.name
        self.__doc__ = operation.__doc__

    @property
    def identity(self) -> str:
        """The operation and its client's configuration, without any key."""
        return f"{self.client.identity}.{self.name}"

    @property
    def token(self) -> Hashable:
        """Equal for operations of clients that may stand for each other."""
        return (self.client.token, self.name)

    @property
    def rule(self) -> BatchRule | None:
        """How its calls become one request, or None."""
        return self.operation.rule

    @property
    def max_items(self) -> int:
        """How many calls one request may hold."""
        rule = self.rule
        return min(rule.max_items, self.client.limits.max_items or rule.max_items) if rule else 1

    def __call__(self, /, *args: Any, **kwargs: Any) -> FesteDelayed[R]:
        try:
            bound = self.operation.bind(args, kwargs)
            for argument in bound:
                refuse_node_text(argument)
        except FesteError as error:
            error.origin = here()
            raise
        return record(self, bound, {})  # type: ignore[no-any-return]

    def determinism(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Determinism:
        """The operation's class, narrowed by the parameters where they are known."""
        for argument in args:
            if isinstance(argument, Params):
                return argument.determinism(self.operation.determinism)
        return self.operation.determinism

    def group(self, args: Sequence[Any]) -> str | None:
        """Return a text that is equal for calls that may share a request, as far as a plan can tell.

        :param args: packed arguments.
        :returns: None if the call can share no request: the operation has no rule, or an argument
            other than the item is not known before the run.
        """
        if self.rule is None:
            return None
        fixed = []
        for name, argument in zip(self.operation.names, args, strict=True):
            if name == self.rule.item:
                continue
            if isinstance(argument, Params) and argument._sent("seed") is not None:
                return None  # a list endpoint applies one seed to all its items
            known = _constant(argument)
            if known is None:
                return None
            fixed.append(known)
        return f"{self.identity}({','.join(fixed)})"

    def prepare(self, arguments: Sequence[Any]) -> Request:
        """Return the request of a call. Pure.

        :param arguments: one value for each parameter.
        :raises FesteError: if the arguments are wrong.
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
        request = operation._prepare(self.client, *arguments[: operation.positional], **by_name)
        request.check()
        return request

    async def send(self, request: Request, on_chunk: OnChunk | None = None) -> Response:
        """Send a request.

        :param request: the request, single or packed.
        :param on_chunk: gets pieces of text as they come, or None.
        :raises CallError: if it failed.
        """
        response: Response = await self.operation._send(self.client, request, on_chunk)
        return response

    def parse(self, response: Response, arguments: Sequence[Any]) -> R:
        """Return the value of an answer. Pure.

        :param response: the answer.
        :param arguments: the call's arguments.
        :raises MalformedResponse: if the answer is not what the endpoint promises.
        """
        named = dict(zip(self.operation.names, arguments, strict=True))
        return self.operation._parse(self.client, response, named)

    def __reduce__(self) -> tuple[Any, ...]:
        return (getattr, (self.client, self.name))

    def __repr__(self) -> str:
        return f"<{self.identity}>"


def _constant(argument: Any) -> str | None:
    """A text for an argument known now; None if it holds slots or cannot be told apart by text."""
    if isinstance(argument, type):
        return f"{argument.__module__}.{argument.__qualname__}@{id(argument)}"
    if isinstance(argument, Params):
        argument = [type(argument).__qualname__, argument.body()]
    try:
        return canonical(argument)
    except ConfigError:
        return None


# --- one method is an operation: the default halves -----------------------------------------------


class _Simple(Operation[R]):
    """An operation whose one method is given the call's arguments and returns plain JSON."""

    def __init__(self, method: Callable[..., Any], determinism: Determinism) -> None:
        self.method = method
        self.many: Callable[..., Any] | None = None
        self._seen: dict[str, Any] = {}
        super().__init__(
            prepare=self._default_prepare,
            send=self._default_send,
            parse=lambda backend, response, arguments: response.payload,
            determinism=determinism,
            signature=method,
        )
        self.__wrapped__ = method

    def __set_name__(self, owner: type, name: str) -> None:
        if not self.name:  # the method of `@name.batch` is the same operation under another name
            self.name = name

    def batch(
        self,
        *,
        max_items: int,
        max_tokens: int | None = None,
        max_bytes: int | None = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Make a method that answers many calls at once the batched form of this operation.

        The method takes the first parameter as a sequence and the others as they are, and returns
        one value or exception a call, in order.

        :param max_items: calls in one request, at most.
        :param max_tokens: tokens in one request, at most, or None.
        :param max_bytes: bytes of the request, at most, or None.
        """

        def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
            self.many = method
            item = self.names[0]
            self.rule = BatchRule(
                item=item,
                field=item,
                max_items=max_items,
                max_tokens=max_tokens,
                max_bytes=max_bytes,
                pack=self._default_pack,
                unpack=_default_unpack,
            )
            return method

        return wrap

    def _default_prepare(self, backend: Backend, *arguments: Any, **by_name: Any) -> Request:
        body = {}
        for name, argument in zip(self.names, (*arguments, *by_name.values()), strict=True):
            if isinstance(argument, Params):
                self._seen[name] = type(argument)
                argument = argument.body()
            body[name] = plain(argument, name)
        return Request(
            plugin=backend.plugin,
            operation=self.name,
            endpoint=backend.endpoint,
            body=body,
            client=backend.config(),
            account=backend.account,
        )

    def _default_pack(self, backend: Backend, requests: Sequence[Request]) -> Request:
        item = self.names[0]
        first = requests[0]
        body = {**first.body, item: [r.body[item] for r in requests]}
        return dataclasses.replace(first, operation=f"{self.name}[]", body=body)

    async def _default_send(
        self, backend: Backend, request: Request, on_chunk: OnChunk | None
    ) -> Response:
        packed = request.operation.endswith("[]")
        method = self.many if packed else self.method
        assert method is not None
        named = {name: self._revived(name, request.body[name]) for name in self.names}
        # the batched form has a name of its own for the first one
        first = [named.pop(name) for name in self.names[:1]]
        broken = None
        try:
            if inspect.iscoroutinefunction(method):
                value = await method(backend, *first, **named)
            else:
                value = await asyncio.to_thread(method, backend, *first, **named)
        except CallError:
            raise
        except Exception as error:
            broken = error
        if broken is not None:  # raised out here: what shows a key must not be its context either
            told = _call_error(broken, backend)
            raise told from (None if _shows_a_key(broken, backend) else broken)
        try:
            return Response(_outcomes(value, backend) if packed else plain(value, "the reply"))
        except FesteError as error:
            raise MalformedResponse(f"{self.name} of {backend.plugin}: {error}") from None

    def _revived(self, name: str, value: Any) -> Any:
        kind = self._kinds.get(name) or self._seen.get(name)
        if kind is None or not isinstance(value, dict):
            return value
        known = {f.name for f in dataclasses.fields(kind)}
        extra = {key: value[key] for key in value if key not in known}
        given = {key: value[key] for key in value if key in known}
        return kind(**given, extra=extra) if extra else kind(**given)

    @functools.cached_property
    def _kinds(self) -> dict[str, Any]:
        """The parameters that are records: their class is needed to make them from JSON again."""
        try:
            hints = typing.get_type_hints(self.method)
        except NameError:  # an annotation that only a type checker can see
            hints = {}
        kinds: dict[str, Any] = {}
        for p in self.parameters:
            hint = hints.get(p.name, type(p.default))
            union = typing.get_origin(hint) in (typing.Union, types.UnionType)
            for kind in typing.get_args(hint) if union else (hint,):
                if isinstance(kind, type) and issubclass(kind, Params):
                    kinds[p.name] = kind
        return kinds


def _call_error(error: Exception, backend: Backend) -> CallError:
    """The error as one of a call, as text without keys."""
    if isinstance(error, CallError):
        return error
    text = redact(f"{type(error).__name__}: {error}", *backend.secrets)
    return Rejected(text, billed="unknown")


def _shows_a_key(error: Exception, backend: Backend) -> bool:
    """Whether a printed traceback of the error, with all that led to it, would show a key."""
    said = str(error)
    whole = "".join(traceback.format_exception(error))
    keys = [secret.reveal() for secret in backend.secrets if secret.is_set]
    return any(key in whole for key in keys) or redact(said, limit=len(said)) != said


_FACTS = ("billed", "status", "code", "request_id", "retry_after")


def _outcomes(values: Any, backend: Backend) -> list[dict[str, Any]]:
    """Values and exceptions as JSON."""
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise MalformedResponse(f"it must return a list, not {type(values).__name__}")
    outcomes: list[dict[str, Any]] = []
    for i, value in enumerate(values):
        if isinstance(value, Exception):
            error = _call_error(value, backend)
            kind = next(k for k in type(error).__mro__ if k.__module__ == errors.__name__)
            facts = {name: getattr(error, name) for name in _FACTS}
            text = str(error.args[0]) if error.args else type(error).__name__
            outcomes.append({"error": kind.__name__, "message": text, "facts": facts})
        else:
            outcomes.append({"value": plain(value, f"the reply[{i}]")})
    return outcomes


def _default_unpack(backend: Backend, request: Request, response: Response) -> list[Outcome]:
    outcomes = response.payload
    if len(outcomes) != request.items:
        raise CountMismatch(
            f"{request.operation} of {backend.plugin} returned {len(outcomes)} values for "
            f"{request.items} calls"
        )
    return [
        getattr(errors, o["error"])(o["message"], **o["facts"])
        if "error" in o
        else Response(o["value"])
        for o in outcomes
    ]


class _OperationMaker(typing.Protocol):
    """What ``operation(...)`` with options is: a decorator, of async methods too."""

    @overload
    def __call__(self, method: Callable[..., Coroutine[Any, Any, R]], /) -> _Simple[R]: ...
    @overload
    def __call__(self, method: Callable[..., R], /) -> _Simple[R]: ...


@overload
def operation(method: Callable[..., Coroutine[Any, Any, R]], /) -> _Simple[R]: ...
@overload
def operation(method: Callable[..., R], /) -> _Simple[R]: ...
@overload
def operation(*, determinism: Determinism = Determinism.SAMPLE) -> _OperationMaker: ...
def operation(
    method: Callable[..., Any] | None = None,
    /,
    *,
    determinism: Determinism = Determinism.SAMPLE,
) -> Any:
    """Make a method of a :class:`Backend` an operation, with default halves.

    The method, sync or async, gets the arguments of a call by name as plain JSON (a
    :class:`Params` record as itself) and returns plain JSON. A sync method runs in a thread.

    :param method: the method, when used without parentheses.
    :param determinism: the class of its calls.

    >>> from feste.backend import Backend, operation
    >>> class Shout(Backend):
    ...     @operation
    ...     async def complete(self, prompt: str) -> str:
    ...         return prompt.upper()
    ...     @complete.batch(max_items=96)
    ...     async def complete_many(self, prompts: list[str]) -> list[str]:
    ...         return [p.upper() for p in prompts]
    >>> Shout().complete("hello").compute()
    'HELLO'
    """

    def wrap(function: Callable[..., Any]) -> _Simple[Any]:
        return _Simple(function, determinism)

    return wrap if method is None else wrap(method)
