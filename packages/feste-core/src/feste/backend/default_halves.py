"""Make an operation of one method, with default halves, and its batched form of a second method."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import traceback
import typing
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

from feste import errors
from feste.backend.batching import BatchRule, Outcome
from feste.backend.operations import OnChunk, Operation
from feste.backend.params import Params
from feste.backend.rebuilding import alternatives, rebuilt, resolved
from feste.backend.redaction import redact
from feste.backend.reply import Reply
from feste.backend.request import Request, Response, Usage
from feste.draw import Determinism
from feste.errors import (
    CallError,
    ConfigError,
    CountMismatch,
    FesteError,
    MalformedResponse,
    OutputMismatch,
    ParameterError,
    Rejected,
)
from feste.plain import plain
from feste.wording import a_kind

if TYPE_CHECKING:
    from feste.backend.base import Backend

__all__ = ["operation"]

R = TypeVar("R", covariant=True)


class _Simple(Operation[R]):
    """An operation made of one method that takes the call's arguments and returns plain JSON."""

    def __init__(self, method: Callable[..., Any], determinism: Determinism) -> None:
        self.method = method
        self.many: Callable[..., Any] | None = None
        super().__init__(
            prepare=self._default_prepare,
            send=self._default_send,
            parse=self._default_parse,
            determinism=determinism,
            signature=method,
        )

    def __set_name__(self, owner: type, name: str) -> None:
        if not self.name:  # the method under `@name.batch` is the same operation, so keep its name
            self.name, self.owner = name, owner

    def batch(
        self,
        *,
        max_items: int,
        max_tokens: int | None = None,
        max_bytes: int | None = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Use a method that answers many calls at once as the batched form of this operation.

        The method takes a sequence of the first parameter and single values of the others. It
        returns one value or exception for each call, in order.

        :param max_items: the maximum number of calls in one request.
        :param max_tokens: the maximum number of tokens in one request, or None.
        :param max_bytes: the maximum size of the request in bytes, or None.
        """

        def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
            if not self.names:
                raise ConfigError(
                    f"@{self.method.__name__}.batch: {self.method.__name__}() has no parameter, so its calls "
                    "have nothing to make a list of"
                )
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
                self._check_kind(name, type(argument))
                argument = _given(argument)
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
        return dataclasses.replace(first, body=body)

    async def _default_send(
        self, backend: Backend, request: Request, on_chunk: OnChunk | None
    ) -> Response:
        method = self.many if request.packed else self.method
        assert method is not None
        broken = None
        try:
            kinds = self._kinds
            named = {name: _record(request.body[name], kinds.get(name)) for name in self.names}
            # passed by position, because the batched form names its first parameter differently
            first = [named.pop(name) for name in self.names[:1]]
            if inspect.iscoroutinefunction(method):
                value = await method(backend, *first, **named)
            else:
                value = await asyncio.to_thread(method, backend, *first, **named)
        except CallError:
            raise
        except Exception as error:
            broken = error
        if broken is not None:  # raised outside `except`, so that __context__ cannot show a key
            told = _call_error(broken, backend)
            if _shows_a_key(broken, backend):
                trace = "".join(traceback.format_exception(broken))
                told.add_note(redact(trace, *backend.secrets, limit=4000))
                broken = None
            raise told from broken
        try:
            if request.packed:
                outcomes = _outcomes(value, backend, self._as_json)
                return Response(
                    outcomes, _usage(*(v for v in value if not isinstance(v, Exception)))
                )
            return Response(self._as_json(value, "the reply"), _usage(value))
        except FesteError as error:
            raise OutputMismatch(f"{self.name} of {backend.plugin}: {error}") from None

    def _default_parse(self, backend: Backend, response: Response, arguments: object) -> Any:
        payload = response.payload
        if not self._gives_replies:
            return payload
        if isinstance(payload, str):
            return Reply(payload)
        usage = payload["usage"] and Usage(**payload["usage"])
        return Reply(**{**payload, "usage": usage})

    @functools.cached_property
    def _gives_replies(self) -> bool:
        annotation = self.method.__annotations__.get("return")
        return resolved(annotation, self.method.__globals__) is Reply

    def _as_json(self, value: Any, path: str) -> Any:
        """Return a value as plain JSON; a reply with all that it says, if the annotation names one."""
        if not self._gives_replies:
            return plain(value, path)
        if not isinstance(value, str):
            raise MalformedResponse(f"{path} is {a_kind(value)}, not a Reply")
        if not isinstance(value, Reply):
            return plain(value, path)
        says = {name: getattr(value, name) for name in _SAYS}
        return {"text": plain(value, path), **plain(says, path)}

    def _check_kind(self, name: str, kind: type[Params]) -> None:
        """Raise if a record's class cannot be found to rebuild it from JSON in another process."""
        known = self._kinds.get(name)
        if known is None:
            raise ParameterError(
                f"{self.name}(): {name} was given a {kind.__name__}, but its annotation names no "
                f"such class that can be found; write {name}: {kind.__name__} = {kind.__name__}()"
            )
        if kind is not known:  # JSON would arrive as the other class
            raise ParameterError(
                f"{self.name}() takes {name}={known.__name__}(...), not a {kind.__name__}"
            )

    @functools.cached_property
    def _kinds(self) -> dict[str, Any]:
        """The parameters that are records, with the class to rebuild each from JSON."""
        kinds: dict[str, Any] = {}
        for p in self.parameters:
            hint = resolved(p.annotation, self.method.__globals__)
            for kind in (*alternatives(hint), type(p.default)):
                if isinstance(kind, type) and issubclass(kind, Params):
                    kinds[p.name] = kind
        return kinds


def _given(params: Params) -> dict[str, Any]:
    """Return the fields of a record that are not None, so that a new one makes no new request."""
    fields = dataclasses.fields(params)  # type: ignore[arg-type]
    values = {f.name: getattr(params, f.name) for f in fields}
    return {name: value for name, value in values.items() if value is not None}


def _record(value: Any, kind: Any) -> Any:
    """Return the record that :func:`_given` took apart; any other argument as it is."""
    if kind is None or not isinstance(value, dict):
        return value
    return rebuilt({**dict.fromkeys(f.name for f in dataclasses.fields(kind)), **value}, kind)


def _call_error(error: Exception, backend: Backend) -> CallError:
    """Return the exception as a CallError whose text holds no keys."""
    if isinstance(error, CallError):
        return error
    text = redact(f"{type(error).__name__}: {error}", *backend.secrets)
    return Rejected(text, billed="unknown")


def _shows_a_key(error: Exception, backend: Backend) -> bool:
    """Whether a traceback of the error would show a key, also by the variables of frames."""
    said = str(error)
    if redact(said, limit=len(said)) != said:
        return True
    if not backend.secrets:  # variables, such as a model's weights, become text only for a key
        return False
    kind, trace = type(error), error.__traceback__
    try:
        told = traceback.TracebackException(kind, error, trace, capture_locals=True)
    except Exception:  # the repr of a variable broke, and so might hold anything
        return True
    whole = "".join(told.format())
    return any(secret.blank(whole) != whole for secret in backend.secrets)


_FACTS = ("billed", "status", "code", "request_id", "retry_after")


#: What a reply says besides its text.
_SAYS = ("message", "finish_reason", "usage", "logprobs", "model")


def _usage(*values: Any) -> Usage | None:
    """Return what replies used together, or None if not all of them say it."""
    used = [Response(None, v.usage).tidy().usage for v in values if isinstance(v, Reply)]
    known = [usage for usage in used if usage is not None]
    return sum(known, Usage()) if known and len(known) == len(values) else None


def _outcomes(
    values: Any, backend: Backend, as_json: Callable[[Any, str], Any] = plain
) -> list[dict[str, Any]]:
    """Convert values and exceptions to JSON."""
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise MalformedResponse(f"it must return a list, not {a_kind(values)}")
    outcomes: list[dict[str, Any]] = []
    for i, value in enumerate(values):
        if isinstance(value, Exception):
            error = _call_error(value, backend)
            kind = next(k for k in type(error).__mro__ if k.__module__ == errors.__name__)
            facts = {name: getattr(error, name) for name in _FACTS}
            text = str(error.args[0]) if error.args else type(error).__name__
            outcomes.append({"error": kind.__name__, "message": text, "facts": facts})
        else:
            outcomes.append({"value": as_json(value, f"the reply[{i}]")})
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
    """The type of ``operation(...)`` with options: a decorator for sync and async methods."""

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

    The method, sync or async, receives the arguments of a call by name as plain JSON, and returns
    plain JSON or, if its annotation is ``-> Reply``, a :class:`Reply`. A sync method runs in a thread.

    A :class:`Params` record arrives as a record of its class with all of its fields, which hold plain
    data: a tuple or a dataclass arrives as such where the field's annotation names it, otherwise as a
    list or a dict; a set or an enum is refused.

    :param method: the method, when used without parentheses.
    :param determinism: the determinism class of its calls.

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
