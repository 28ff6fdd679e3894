"""Lazy values and ``@feste.task``: how calls become nodes.

In lazy mode :func:`record` makes a :class:`~feste.node.Node` of every call and returns a
:class:`FesteDelayed`; in eager mode it runs the call at once and returns its value.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import operator
import sys
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, Protocol, TypeVar, overload

from feste import context
from feste.draw import Determinism
from feste.errors import ConfigError, GraphError, LazyValueError, ParameterError
from feste.node import Lazy, Node, call_site, node_of_handle, origin_of, records_of_handle
from feste.packing import MAX_DEPTH, CallDeps, pack
from feste.wording import a_kind

__all__ = ["FesteDelayed", "Task", "record", "refuse_node_text", "task"]

R = TypeVar("R", covariant=True)  # what gives a Reply may stand where a str is wanted
Where = Literal["thread", "process", "inline"]
#: Of most nodes; an empty dict of its own would be a sixth of one.
_NO_KWARGS: Mapping[str, Any] = {}
_NO_RESOURCES: Mapping[str, float] = {}


def record(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Record a call as a node, or run it at once in eager mode.

    :param op: the op.
    :param args: positional arguments; they may contain nodes at any depth.
    :param kwargs: keyword arguments.
    :returns: a :class:`FesteDelayed`; in eager mode the value.
    """
    deps = CallDeps()
    try:
        packed = tuple([pack(a, deps) for a in args])
        named = {k: pack(v, deps) for k, v in kwargs.items()} if kwargs else _NO_KWARGS
    except GraphError as error:
        error.origin = call_site()
        raise
    node = Node(op, packed, named, tuple(deps.nodes), origin_of(sys._getframe(1)))
    if context.get("eager"):
        from feste import _compute

        return _compute.run_eager(node)
    return FesteDelayed(node)


class _Threads:
    """The Dask scheduler of nodes: the same function that Dask's own collections use."""

    def __get__(self, instance: object, owner: type) -> Callable[..., Any]:
        import dask.threaded

        get: Callable[..., Any] = dask.threaded.get
        return get


class FesteDelayed(Lazy, Generic[R]):
    """A value that is not computed yet: the handle of one node.

    Operators, indexing, attributes and method calls make further nodes. Anything that needs the
    value now (``bool``, ``len``, ``in``, a loop, an f-string) raises
    :class:`~feste.errors.LazyValueError`, whose message names the fix. ``key``, ``compute`` and
    ``visualize`` are reserved names.

    >>> import feste
    >>> @feste.task
    ... def double(x: int) -> int:
    ...     return 2 * x
    >>> (double(2) + 1).compute()
    5
    """

    __slots__ = ()
    __array_ufunc__ = None  # so that numpy leaves `array + node` to the node

    @property
    def key(self) -> str:
        """The node's name, unique across all processes."""
        return self._node.key

    def compute(self, **settings: Any) -> R:
        """Run the nodes that this value needs and return it.

        :param settings: settings for this run, as for :func:`feste.compute`.
        :raises feste.errors.RunFailed: if this node or one that it needs failed.
        """
        from feste import _compute

        value: R = _compute.compute(self, **settings)[0]
        return value

    def visualize(self, path: str | Path | None = None) -> str:
        """Draw the graph that this value needs.

        :param path: the file to write: ``.svg``, ``.mmd`` (Mermaid) or ``.html``; None writes none.
        :returns: the picture: Mermaid text for ``.mmd``, otherwise SVG.
        """
        from feste import _compute

        return _compute.visualize(self, path)

    def __await__(self) -> Generator[Any, None, R]:
        from feste import _compute

        return _compute.acompute_one(self).__await__()

    # --- identity: copies of a node are the same node ---------------------------------------------

    def __copy__(self) -> FesteDelayed[R]:
        return self

    def __deepcopy__(self, memo: object) -> FesteDelayed[R]:
        return self

    def __hash__(self) -> int:
        return id(self._node)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_handle, records_of_handle(self._node))

    def __repr__(self) -> str:
        return f"FesteDelayed({self._node.key!r})"

    __str__ = __repr__

    # --- operations that make further nodes -------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        # or Dask would take a node for a graph, and before 2026.7 for one of its expressions
        if name.startswith("_") or name in ("dask", "expr"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return record(_GETATTR, (self, name), {})

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        node = self._node
        if node.op is _GETATTR:  # make `node.method(...)` one node instead of two
            return record(_METHOD, (_handle_of_first(node), node.args[1], *args), kwargs)
        return record(_CALL, (self, *args), kwargs)

    def __getitem__(self, index: Any) -> FesteDelayed[Any]:
        return record(_GETITEM, (self, index), {})  # type: ignore[no-any-return]

    def __eq__(self, other: object) -> Any:
        return record(_OPERATORS["eq"], (self, other), {})

    def __ne__(self, other: object) -> Any:
        return record(_OPERATORS["ne"], (self, other), {})

    if TYPE_CHECKING:  # the remaining operators are installed at the end of this module

        def _of_one(self) -> FesteDelayed[Any]: ...
        def _of_two(self, other: Any, /) -> FesteDelayed[Any]: ...
        def __round__(self, digits: Any = ..., /) -> FesteDelayed[Any]: ...
        def __pow__(self, other: Any, modulus: Any = ..., /) -> FesteDelayed[Any]: ...

        __neg__ = __pos__ = __abs__ = __invert__ = _of_one
        __add__ = __sub__ = __mul__ = __matmul__ = __truediv__ = __floordiv__ = _of_two
        __mod__ = __divmod__ = __lshift__ = __rshift__ = __and__ = __or__ = __xor__ = _of_two
        __radd__ = __rsub__ = __rmul__ = __rmatmul__ = __rtruediv__ = __rfloordiv__ = _of_two
        __rmod__ = __rdivmod__ = __rlshift__ = __rrshift__ = __rand__ = __ror__ = _of_two
        __rxor__ = __rpow__ = __lt__ = __le__ = __gt__ = __ge__ = _of_two

    # --- operations that would need the value now -------------------------------------------------

    def __bool__(self) -> bool:
        _refuse(self, "used as a condition", "Compute it first, or branch inside a @feste.task")

    def __iter__(self) -> NoReturn:
        _refuse(self, "iterated over", "Compute it first, or iterate inside a @feste.task")

    def __len__(self) -> int:
        _refuse(self, "asked for its length", "Compute it first, or use len inside a @feste.task")

    def __contains__(self, item: object) -> bool:
        _refuse(self, "searched with `in`", "Compute it first, or search inside a @feste.task")

    def __format__(self, spec: str) -> str:
        _refuse(
            self,
            "put into a string",
            'Give it to a Prompt as a variable (Prompt("... {{ x }}")(x=node)), or compute it first',
        )

    def __int__(self) -> int:
        _refuse(self, "converted to a number", "Compute it first, or convert in a @feste.task")

    __float__ = __complex__ = __index__ = __int__

    # --- Dask's collection protocol ----------------------------------------------------------------

    def __dask_graph__(self) -> Any:
        from feste import _compute

        return _compute.lowered(self)

    def __dask_keys__(self) -> list[str]:
        return [self._node.key]

    def __dask_layers__(self) -> tuple[str, ...]:
        return (self._node.key,)

    def __dask_tokenize__(self) -> str:
        return self._node.key

    def __dask_postcompute__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return operator.itemgetter(0), ()

    def __dask_postpersist__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        from feste import _compute

        return _compute.persisted, (self._node,)

    @staticmethod
    def __dask_optimize__(dsk: Any, keys: Any, **kwargs: Any) -> Any:
        from feste import _compute

        return _compute.optimize_lowered(dsk, keys)

    __dask_scheduler__ = _Threads()


def _handle(records: list[tuple[Any, ...]], index: int) -> FesteDelayed[Any]:
    return FesteDelayed(node_of_handle(records, index))


def _handle_of_first(node: Node) -> FesteDelayed[Any]:
    return FesteDelayed(node.deps[node.args[0].index])


def _refuse(value: FesteDelayed[Any], what: str, fix: str) -> NoReturn:
    raise LazyValueError(f"{value!r} is a lazy value and was {what}. {fix}", origin=call_site())


def refuse_node_text(value: Any, depth: int = 0) -> None:
    """Raise if a text contains the repr of a node, because a lazy value was turned into a string.

    :param value: an argument; strings are searched, also inside lists and dicts.
    :param depth: the current depth of the recursion; leave it out.
    :raises LazyValueError: if a string contains such a repr.

    >>> refuse_node_text("plain text")
    """
    if isinstance(value, str):
        if "FesteDelayed('" in value:
            start = value.index("FesteDelayed('")
            name = value[start : start + 60].split(")")[0] + ")"
            raise LazyValueError(
                f"this text holds {name}, the name of a lazy value instead of its content. "
                "Give the lazy value itself as a variable of a Prompt, or compute it first"
            )
    elif isinstance(value, (list, tuple, dict)) and depth < MAX_DEPTH:
        for item in value:
            refuse_node_text(item, depth + 1)
        if isinstance(value, dict):
            for item in value.values():
                refuse_node_text(item, depth + 1)


class Task(Generic[R]):
    """A Python function whose calls become nodes; made by :func:`task`.

    The attributes ``pure``, ``emits``, ``once``, ``executor`` and ``resources`` hold the options of
    :func:`task`.
    """

    kind = "task"

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        name: str = "",
        pure: bool = False,
        emits: bool = False,
        once: bool = False,
        executor: Where = "thread",
        resources: Mapping[str, float] | None = None,
        identity: str = "",
    ) -> None:
        self.fn = fn
        self.name = name or getattr(fn, "__name__", type(fn).__name__).strip("<>")
        self.pure = pure
        self.emits = emits
        self.once = once
        self.executor = executor
        self.resources: Mapping[str, float] = dict(resources) if resources else _NO_RESOURCES
        called = getattr(type(fn), "__call__", None)  # noqa: B004 - of an object that is callable
        self.is_async = inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(called)
        module = getattr(fn, "__module__", "")
        self.identity = identity or f"{module}.{getattr(fn, '__qualname__', self.name)}"
        self._class = Determinism.PURE if pure else Determinism.EFFECT
        self._arity = _arity(fn)

    def determinism(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Determinism:
        """Return PURE for ``pure=True``, otherwise EFFECT."""
        return self._class

    def __call__(self, /, *args: Any, **kwargs: Any) -> FesteDelayed[R]:
        low, high = self._arity
        if kwargs or not low <= len(args) <= high:
            try:
                inspect.signature(self.fn).bind(*args, **kwargs)
            except ValueError:  # a builtin without a readable signature
                pass
            except TypeError as error:
                raise ParameterError(f"{self.name}(): {error}", origin=call_site()) from None
        return record(self, args, kwargs)  # type: ignore[no-any-return]

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __reduce__(self) -> Any:
        module = getattr(self.fn, "__module__", None)
        qualname = getattr(self.fn, "__qualname__", "")
        if _OPS.get(self.identity) is self:
            return (_operator, (self.identity,))
        if module in sys.modules and module != "__main__" and _lookup(module, qualname) is self:
            return (_lookup, (module, qualname))
        return self.by_value()

    def by_value(self) -> tuple[Any, ...]:
        """Return the reduced form that carries the function itself; for picklers."""
        return (_rebuild_task, (self.fn, self._options()))

    def _options(self) -> dict[str, Any]:
        names = ("name", "pure", "emits", "once", "executor", "resources", "identity")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        return f"<task {self.identity}>"


@functools.cache
def importable(module: str | None) -> bool:
    """Return True if another process with the same ``sys.path`` can import a module by its name.

    False for the main script and for modules loaded from a file under an invented name.

    :param module: the module's name.

    >>> importable("json"), importable("__main__")
    (True, False)
    """
    if module not in sys.modules or module == "__main__":
        return False
    top = module.partition(".")[0]
    return top in sys.stdlib_module_names or PathFinder.find_spec(top) is not None


def _rebuild_task(fn: Callable[..., Any], options: dict[str, Any]) -> Task[Any]:
    return Task(fn, **options)


def _lookup(module: str, qualname: str) -> Any:
    """Return the object with this name, or None; used to unpickle importable tasks."""
    found: Any = sys.modules.get(module) or importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def _arity(fn: Callable[..., Any]) -> tuple[float, float]:
    """Return how many positional arguments always fit; (1, 0) if only binding can tell."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return 1, 0
    low, high = 0.0, 0.0
    for parameter in parameters:
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            high += 1
            low += parameter.default is parameter.empty
        elif parameter.kind is parameter.VAR_POSITIONAL:
            high = float("inf")
        elif parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            return 1, 0
    return low, high


class _TaskMaker(Protocol):
    """The type of ``task(...)`` with options: a decorator for sync and async functions.

    A lazy value that the function returns is typed as its value.
    """

    @overload
    def __call__(self, fn: Callable[..., Coroutine[Any, Any, FesteDelayed[R]]], /) -> Task[R]: ...
    @overload
    def __call__(self, fn: Callable[..., Coroutine[Any, Any, R]], /) -> Task[R]: ...
    @overload
    def __call__(self, fn: Callable[..., FesteDelayed[R] | R], /) -> Task[R]: ...


@overload
def task(fn: Callable[..., Coroutine[Any, Any, FesteDelayed[R]]], /) -> Task[R]: ...
@overload
def task(fn: Callable[..., Coroutine[Any, Any, R]], /) -> Task[R]: ...
@overload
def task(fn: Callable[..., FesteDelayed[R] | R], /) -> Task[R]: ...
@overload
def task(
    *,
    pure: bool = False,
    emits: bool = False,
    once: bool = False,
    executor: Where = "thread",
    resources: Mapping[str, float] | None = None,
) -> _TaskMaker: ...
def task(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    pure: bool = False,
    emits: bool = False,
    once: bool = False,
    executor: Where = "thread",
    resources: Mapping[str, float] | None = None,
) -> Any:
    """Turn a function into one whose calls are nodes of the graph.

    The function may be ``async def``. Its arguments may contain lazy values, at any depth in lists,
    dicts, sets and dataclasses; the function receives their values.

    :param fn: the function, when used without parentheses.
    :param pure: equal calls give equal results and have no effects, so they may be merged.
    :param emits: it may return nodes, so that the graph grows while it runs.
    :param once: it changes something outside, such as sending a mail, and must not do so twice when
        the program is run again. It needs the setting ``store``, where its result is kept; arguments
        and result are JSON data. A call that was started and is not known to have returned raises
        :class:`~feste.errors.NotRepeated` instead of running again. It runs in this process.
    :param executor: where it runs: ``"thread"`` in the thread pool, ``"process"`` in a worker
        process (arguments and result are pickled), ``"inline"`` on the scheduler's own thread (only
        for tasks of microseconds).
    :param resources: what a worker of a cluster must have free to run it, by names that its workers
        were started with: ``{"GPU": 1}``. On one machine it changes nothing.
    :raises ConfigError: for an unknown executor, an ``async def`` function with another executor than
        ``"thread"``, or ``once`` together with ``pure``, ``emits`` or ``executor="process"``; for
        resources that are not names with positive numbers, or of a task that runs in this process.

    >>> import feste
    >>> @feste.task(pure=True)
    ... def shout(text: str) -> str:
    ...     return text.upper()
    >>> shout("hello").compute()
    'HELLO'
    """
    if executor not in ("thread", "process", "inline"):
        raise ConfigError(
            f"executor={executor!r}: allowed are 'thread', 'process' and 'inline'",
        )

    if once and (pure or emits or executor == "process"):
        raise ConfigError(
            "once=True is for a task with an effect that runs in this process and returns JSON data: "
            "it cannot be pure, emit nodes or have executor='process'"
        )
    if resources:
        _check_resources(resources, once, executor)

    def wrap(function: Callable[..., Any]) -> Task[Any]:
        if not callable(function):
            raise ConfigError(
                f"a task needs a function, not {a_kind(function)}; put @feste.task below "
                "@classmethod and @staticmethod"
            )
        made: Task[Any] = Task(
            function, pure=pure, emits=emits, once=once, executor=executor, resources=resources
        )
        if made.is_async and executor != "thread":
            raise ConfigError(
                f"{made.name} is async def and runs on Feste's loop for tasks; drop "
                f"executor={executor!r}"
            )
        functools.update_wrapper(made, function, updated=())  # do not overwrite Task's attributes
        return made

    return wrap if fn is None else wrap(fn)


def _check_resources(resources: Any, once: bool, executor: Where) -> None:
    amounts: Any = resources.items() if isinstance(resources, Mapping) else [(resources, None)]
    for name, amount in amounts:
        number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
        if not isinstance(name, str) or not number or not 0 < amount < float("inf"):
            raise ConfigError(
                f"resources={resources!r}: give names with positive numbers, as in "
                "resources={'GPU': 1}"
            )
    if once or executor != "thread":
        option = "once=True" if once else f"executor={executor!r}"
        raise ConfigError(
            f"resources={resources!r} are those of a cluster's workers, but a task with {option} "
            "runs on the machine of the program: drop one of them"
        )


# --- the operators of nodes, as pure tasks --------------------------------------------------------


_OPS: dict[str, Task[Any]] = {}


def _op(fn: Callable[..., Any], name: str, *, pure: bool = True) -> Task[Any]:
    made: Task[Any] = Task(fn, name=name, pure=pure, identity=f"operator.{name}")
    _OPS[made.identity] = made
    return made


def _call_value(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _call_method(value: Any, name: str, /, *args: Any, **kwargs: Any) -> Any:
    return getattr(value, name)(*args, **kwargs)


def _operator(identity: str) -> Task[Any]:
    return _OPS[identity]


_GETATTR = _op(getattr, "getattr")
_GETITEM = _op(operator.getitem, "getitem")
_METHOD = _op(_call_method, "method", pure=False)
_CALL = _op(_call_value, "call", pure=False)

_BINARY = "add sub mul truediv floordiv mod divmod pow lshift rshift and or xor matmul lt le gt ge".split()
_UNARY = "neg pos abs invert round".split()


def _swapped(fn: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    return fn(right, left)


def _function(name: str) -> Callable[..., Any]:
    builtins: dict[str, Callable[..., Any]] = {"divmod": divmod, "pow": pow, "round": round}
    return builtins.get(name) or getattr(operator, f"__{name}__")


_OPERATORS = {name: _op(_function(name), name) for name in (*_BINARY, *_UNARY, "eq", "ne")}


def _install_operators() -> None:
    def method(made: Task[Any]) -> Callable[..., Any]:
        return lambda self, *others: record(made, (self, *others), {})

    for name in (*_BINARY, *_UNARY):
        setattr(FesteDelayed, f"__{name}__", method(_OPERATORS[name]))
    for name in _BINARY[:-4]:
        swapped = functools.partial(_swapped, _function(name))
        setattr(FesteDelayed, f"__r{name}__", method(_op(swapped, f"r{name}")))


_install_operators()
