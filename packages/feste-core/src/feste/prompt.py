"""Prompts: templates with named variables, rendered once, in a sandbox, from plain data.

>>> from feste import context
>>> with context.set(eager=True):
...     Prompt("Hello {{ name }}!")(name="world")
'Hello world!'

The author of a template is trusted, the values of its variables are not: they are copied to plain
data, are never read as template text, and cannot become a message of their own.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from feste import draw
from feste.delayed import FesteDelayed, record, refuse_node_text
from feste.draw import Determinism
from feste.errors import (
    ConfigError,
    ExtraVariable,
    FesteError,
    LanguageMismatch,
    LazyValueError,
    PromptError,
    UndefinedVariable,
    suggest,
)
from feste.node import Lazy, Node, origin_of
from feste.plain import (
    TEXT_LIMIT,
    Budget,
    TooMuch,
    check_filter,
    check_format,
    check_method,
    check_operator,
    extent,
    plain,
)

if TYPE_CHECKING:  # jinja2 costs 41 ms of CPU: it is imported when the first template is made
    from jinja2 import Environment, Template, nodes
    from jinja2.runtime import Context

__all__ = ["ChatPrompt", "FesteEnvironment", "Prompt", "default_environment"]

E = TypeVar("E", bound=FesteError)
Names = frozenset[str]
Message = dict[str, str]

#: The largest template, in bytes of UTF-8.
SOURCE_LIMIT = 256 << 10

ROLES = ("system", "developer", "user", "assistant")


# --- environments ---------------------------------------------------------------------------------


class FesteEnvironment:
    """What templates may use besides their variables: your own globals and filters.

    Both are plain dicts, read at each rendering. A template can reach all that is in them: put in
    functions and data, not clients. Of Jinja's own there are ``range``, ``dict``, ``namespace``,
    ``cycler``, ``joiner``, and the filters less ``random`` (a prompt is the same each time) and
    ``urlize``; ``tojson`` writes plain JSON, without escapes for HTML.

    >>> environment = FesteEnvironment()
    >>> environment.globals["product"] = "Feste"
    >>> Prompt("{{ product }}: {{ question }}", environment=environment).variables()
    frozenset({'question'})
    """

    def __init__(self) -> None:
        self.globals: dict[str, Any] = {}
        self.filters: dict[str, Callable[..., Any]] = {}

    @property
    def identity(self) -> str:
        """What the environment is, as text: equal for equal ones in every run of the program."""
        if not self.globals and not self.filters:
            return ""
        given = (dict(self.globals), dict(self.filters))
        return _digest(repr([sorted((k, _describe(v)) for k, v in d.items()) for d in given]))

    def _sandbox(self) -> Environment:
        return _sandbox(tuple(self.filters.items()))

    def __reduce__(self) -> str | tuple[Any, ...]:
        if self is default_environment and not self.identity:
            return "default_environment"
        return (_environment, (dict(self.globals), dict(self.filters)))

    def __repr__(self) -> str:
        return f"<FesteEnvironment globals={list(self.globals)} filters={list(self.filters)}>"


#: The environment of all prompts that are given none.
default_environment = FesteEnvironment()


def _environment(names: dict[str, Any], filters: dict[str, Any]) -> FesteEnvironment:
    made = FesteEnvironment()
    made.globals, made.filters = names, filters
    return made


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def _describe(value: Any) -> str:
    """Functions by name and code (two lambdas share their name), anything else by content."""
    if isinstance(value, functools.partial):
        return f"partial {_describe(value.func)} {_describe([value.args, value.keywords])}"
    function = getattr(value, "__func__", value)
    if not callable(value) or isinstance(value, type) or not hasattr(function, "__qualname__"):
        try:
            return json.dumps(value, sort_keys=True, default=draw._plain)
        except (TypeError, ValueError):  # keys of mixed types and the like
            return repr(value)
    name = f"{function.__module__}.{function.__qualname__}"
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return name
    cells = [getattr(cell, "cell_contents", None) for cell in function.__closure__ or ()]
    outer = [getattr(cell, "__qualname__", cell) for cell in cells]
    return f"{name} {_code(code)} {_describe([outer, function.__defaults__])}"


def _code(code: CodeType) -> str:
    """The code as text; sets of constants sorted, since their order differs from run to run."""
    parts = [
        _code(part)
        if isinstance(part, CodeType)
        else repr(sorted(map(repr, part)) if isinstance(part, frozenset) else part)
        for part in code.co_consts
    ]
    return f"{code.co_code.hex()} {code.co_names} {parts}"


# --- the sandbox ----------------------------------------------------------------------------------

#: Where a rendering keeps its budget in the context: a name that no template can write.
_BUDGET = " budget"
_LIMITED = ("batch", "center", "format", "indent", "join", "replace", "round", "slice", "wordwrap")


def _budget(context: Context) -> Budget:
    return context.parent[_BUDGET]  # type: ignore[no-any-return]


def _tick(context: Context, _: None) -> bool:
    _budget(context).spend()
    return True


def _weigh(context: Context, value: Any) -> Any:
    if type(value) is str:
        _budget(context).spend(len(value))
    elif type(value) in (list, dict, tuple, range):
        _budget(context).spend(
            min(4 * len(value), TEXT_LIMIT)
        )  # an item is more work than a letter
    return value


def _concat(context: Context, parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    _budget(context).spend(extent(texts))
    return "".join(texts)


def _block(parts: Iterable[str]) -> str:
    """Join what a macro or a captured block has written."""
    texts = list(parts)
    if sum(map(len, texts)) > TEXT_LIMIT:
        raise TooMuch("a block of it is too large")
    return "".join(texts)


def _printable(context: Context, value: Any) -> Any:
    """Refuse what would be printed as ``<... object at 0x...>``."""
    kind = type(value)
    if kind is str or kind is int:
        return value
    from jinja2 import Undefined

    if isinstance(value, Undefined):
        return value  # it raises by itself
    if isinstance(value, Lazy):
        raise LazyValueError("a global is a lazy value; give it as a variable")
    if callable(value) or hasattr(kind, "__next__") or not _shows(kind):
        raise TypeError(
            f"an expression gives a {kind.__name__}, which is no text: call it, use |list, "
            "or write x['name'] for the key of a dict"
        )
    _budget(context).spend(extent(value))
    return value


def _shows(kind: type) -> bool:
    return any("__str__" in c.__dict__ or "__repr__" in c.__dict__ for c in kind.__mro__[:-1])


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=min(indent, 16) if indent else indent)


@functools.cache
def _sandbox_class() -> tuple[type[Environment], dict[str, Any]]:
    """The class of all environments and the names they know; jinja2 is imported here, not above."""
    from jinja2.defaults import DEFAULT_NAMESPACE
    from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**", "%"))
        concat = staticmethod(_block)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            """Without bytes: they have the methods of texts, unchecked."""
            if attr in ("encode", "to_bytes"):
                return False
            return super().is_safe_attribute(obj, attr, value)

        def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
            check_operator(operator, left, right)
            return _weigh(context, super().call_binop(context, operator, left, right))

        def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            args = check_method(obj, args, kwargs)
            return _weigh(context, super().call(context, obj, *args, **kwargs))

        def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
            safe = super().wrap_str_format(value)

            def checked(*args: Any, **kwargs: Any) -> str:
                check_format(value.__self__, (*args, *kwargs.values()))
                return safe(*args, **kwargs)  # type: ignore[misc]

            return safe and checked

    names = {**DEFAULT_NAMESPACE, "range": safe_range}
    del names["lipsum"]
    return Sandbox, names


@functools.lru_cache(maxsize=64)
def _sandbox(filters: tuple[tuple[str, Callable[..., Any]], ...]) -> Environment:
    """The one place where environments of Jinja are made.

    Nothing is folded at compile time (a bomb would go off there), nothing can be included.
    """
    from jinja2 import StrictUndefined, pass_context

    sandbox = _sandbox_class()[0]
    options: dict[str, Any] = {
        "undefined": StrictUndefined,
        "keep_trailing_newline": True,
        "autoescape": False,
        "optimized": False,
        "finalize": pass_context(_printable),
    }
    inner, made = sandbox(**options), sandbox(**options)

    def limited(name: str) -> Callable[..., Any]:
        def call(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
            value = check_filter(name, value, args, kwargs)
            result = inner.call_filter(name, value, args, kwargs, context)
            _budget(context).spend(extent(result))
            return result

        return pass_context(call)

    made.globals.clear()  # names are given at each rendering, so that a variable goes before them
    del made.filters["random"], made.filters["urlize"]
    made.filters.update({name: limited(name) for name in _LIMITED}, tojson=_tojson)
    made.filters.update(filters)
    for function in (_tick, _weigh, _concat):
        made.filters[function.__name__ + "!"] = pass_context(function)
    return made


def _count_work(tree: nodes.Template) -> None:
    """Make a template count its turns of loops, what its filters are given, what ``~`` joins."""
    from jinja2 import nodes

    def hidden(node: nodes.Expr, function: Callable[..., Any]) -> nodes.Filter:
        name = function.__name__ + "!"
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    for node in list(tree.find_all((nodes.For, nodes.Filter, nodes.Concat))):
        if isinstance(node, nodes.Filter):
            node.node = node.node and hidden(node.node, _weigh)
        elif isinstance(node, nodes.Concat):
            node.nodes = [hidden(nodes.List(node.nodes, lineno=node.lineno), _concat)]
        elif isinstance(node, nodes.For):
            turn = hidden(nodes.Const(None, lineno=node.lineno), _tick)
            node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
            node.test = node.test and nodes.And(turn, node.test, lineno=node.lineno)


# --- which variables a template needs -------------------------------------------------------------


def _needed(tree: nodes.Template) -> set[str]:
    """The names that are read where nothing has made sure that they are defined."""
    from jinja2 import nodes

    needed: set[str] = set()
    empty = frozenset[str]()

    def stored(*targets: nodes.Node) -> Names:
        names = [n for t in targets for n in (t, *t.find_all(nodes.Name))]
        return frozenset(n.name for n in names if isinstance(n, nodes.Name))

    def proven(test: nodes.Node, outcome: bool) -> Names:
        """The names that are defined if the test has this outcome."""
        if isinstance(test, nodes.Test) and isinstance(test.node, nodes.Name):
            if test.name == ("defined" if outcome else "undefined"):
                return frozenset((test.node.name,))
        elif isinstance(test, nodes.Not):
            return proven(test.node, not outcome)
        elif isinstance(test, (nodes.And, nodes.Or)):
            left, right = proven(test.left, outcome), proven(test.right, outcome)
            return left | right if isinstance(test, nodes.And) is outcome else left & right
        return empty

    def every(parts: Iterable[nodes.Node], known: Names) -> Names:
        for part in parts:
            known = read(part, known)
        return known

    def read(node: nodes.Node, known: Names) -> Names:
        """Note what the node needs beyond the known names; return what is known after it."""
        if isinstance(node, nodes.Name):
            if node.ctx == "load" and node.name not in known:
                needed.add(node.name)
        elif isinstance(node, (nodes.And, nodes.Or)):
            read(node.left, known)
            read(node.right, known | proven(node.left, isinstance(node, nodes.And)))
        elif isinstance(node, nodes.CondExpr):
            read(node.test, known)
            read(node.expr1, known | proven(node.test, True))
            if node.expr2 is not None:
                read(node.expr2, known | proven(node.test, False))
        elif isinstance(node, nodes.If):
            ends, rest = [], known
            for branch in (node, *node.elif_):
                read(branch.test, rest)
                ends.append(every(branch.body, rest | proven(branch.test, True)))
                rest |= proven(branch.test, False)
            return every(node.else_, rest).intersection(*ends)
        elif isinstance(node, nodes.For):
            read(node.iter, known)
            inside = known | stored(node.target) | {"loop"}
            if node.test is not None:
                read(node.test, inside)
                inside |= proven(node.test, True)
            every(node.body, inside)
            every(node.else_, known)
        elif isinstance(node, (nodes.Macro, nodes.CallBlock)):
            if isinstance(node, nodes.CallBlock):
                read(node.call, known)
            every(node.defaults, known)
            every(node.body, known | stored(*node.args) | {"caller", "varargs", "kwargs"})
            return known | {node.name} if isinstance(node, nodes.Macro) else known
        elif isinstance(node, nodes.With):
            every(node.values, known)
            every(node.body, known | stored(*node.targets))
        elif isinstance(node, (nodes.Assign, nodes.AssignBlock)):
            every(node.iter_child_nodes(exclude=("target",)), known)
            return known | stored(node.target)
        else:
            parts = list(node.iter_child_nodes())
            tested = isinstance(node, nodes.Test) and node.name in ("defined", "undefined")
            defaulted = isinstance(node, nodes.Filter) and node.name in ("default", "d")
            if (tested or defaulted) and parts and isinstance(parts[0], nodes.Name):
                del parts[0]
            every(parts, known)
        return known

    read(tree, empty)
    return needed


class _Compiled(NamedTuple):
    """A template, the variables that it must and that it may be given."""

    template: Template
    required: Names
    allowed: Names


@functools.lru_cache(maxsize=512)
def _compile(source: str, sandbox: Environment) -> _Compiled:
    from jinja2 import Template, TemplateSyntaxError, meta, nodes

    tree = sandbox.parse(source)
    kinds = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
    for foreign in tree.find_all(kinds):
        raise TemplateSyntaxError("a prompt is one text and cannot include others", foreign.lineno)
    needed = _needed(tree)
    _count_work(tree)  # before Jinja looks for names: doing so, it would call filters of constants
    allowed = frozenset(meta.find_undeclared_variables(tree))
    required = allowed & needed - _sandbox_class()[1].keys()
    template = Template.from_code(sandbox, sandbox.compile(tree), {})
    return _Compiled(template, required, allowed)


# --- operations -----------------------------------------------------------------------------------


def _failure(kind: type[E], message: str) -> E:
    """An error with the place of the user's call."""
    return kind(message, origin=Node(_NOWHERE, origin=origin_of(sys._getframe(1))).where)


class _Op:
    """What the node of a prompt does: ``fn(**variables)`` renders."""

    name = "prompt"
    kind = "prompt"
    emits = False
    pure = True
    executor = "thread"
    is_async = False

    #: what it is built of
    parts: tuple[_TextOp, ...] = ()
    _names: tuple[Names, Names] | None = None

    @property
    def identity(self) -> str:
        raise NotImplementedError

    @property
    def fn(self) -> Callable[..., Any]:
        return self.render

    def render(self, /, **variables: Any) -> Any:
        raise NotImplementedError

    def determinism(self, args: object, kwargs: object) -> Determinism:
        return Determinism.PURE

    @property
    def names(self) -> tuple[Names, Names]:
        """The variables that must and that may be given; globals are not taken off."""
        if self._names is None:
            made = [part.compiled() for part in self.parts]
            required = Names().union(*(m.required for m in made))
            self._names = required, Names().union(*(m.allowed for m in made))
        return self._names

    def variables(self) -> Names:
        known = _sandbox_class()[1].keys()
        return Names().union(
            *(p.names[1] - p.environment.globals.keys() - known for p in self.parts)
        )

    def check(self, variables: dict[str, Any]) -> None:
        """Refuse wrong variables; make constants plain, so that they count by content."""
        required, allowed = self.names
        if not (required <= variables.keys() <= allowed):
            self._check_names(set(variables))
        for name, value in variables.items():
            kind = type(value)
            if kind is int or kind is FesteDelayed:
                continue
            try:
                if kind is str:
                    refuse_node_text(value)
                else:
                    variables[name] = plain(value, name, lazy=True)
            except FesteError as error:
                what = f"variable {name}: {error}" if kind is str else f"variable {error}"
                raise _failure(type(error), f"{self.parts[0].label}: {what}") from None

    def _check_names(self, given: set[str]) -> None:
        allowed = self.names[1]
        extra = sorted(given - allowed)
        unknown = suggest(extra[0], allowed) if extra and allowed else ""
        missing = [
            (name, part.label)
            for part in self.parts
            for name in sorted(part.names[0] - given - part.environment.globals.keys())
        ]
        if missing:
            names = list(dict(missing))
            also = f" It has no variable {_listed(extra)}.{unknown}" if extra else ""
            raise _failure(
                UndefinedVariable,
                f"{missing[0][1]}: no value for {_listed(names)}; add "
                f"{', '.join(f'{name}=...' for name in names)}.{also}",
            )
        if extra:
            raise _failure(
                ExtraVariable,
                f"{self.parts[0].label}: it has no variable {_listed(extra)}."
                f"{unknown or ' It has none at all.'}",
            )


_NOWHERE = _Op()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


class _TextOp(_Op):
    """Renders one template to a text."""

    def __init__(
        self, source: str, language: str, environment: FesteEnvironment, file: str = ""
    ) -> None:
        self.source = source
        self.language = language
        self.environment = environment
        self.file = file
        self.parts = (self,)
        self._compiled: _Compiled | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (_TextOp, (self.source, self.language, self.environment, self.file))

    @property
    def identity(self) -> str:
        return _digest(repr(("prompt", self.source, self.language, self.environment.identity)))

    @property
    def label(self) -> str:
        first, *more = self.source.strip().splitlines() or [""]
        short = f"{first[:39].rstrip()}…" if len(first) > 40 or more else first
        return f"template {self.file or repr(short)}"

    def compiled(self) -> _Compiled:
        sandbox = self.environment._sandbox()
        made = self._compiled
        if made is None or made.template.environment is not sandbox:
            try:
                made = self._compiled = _compile(self.source, sandbox)
            except Exception as error:  # jinja's own, and Python's for what it made of the source
                line = getattr(error, "lineno", 0)
                where = f", line {line}" if line and not isinstance(error, SyntaxError) else ""
                raise PromptError(f"{self.label}{where}: {_why(error)}") from None
        return made

    def render(self, /, **variables: Any) -> Any:
        return self.text(self.values(variables))

    def values(self, variables: dict[str, Any]) -> dict[str, Any]:
        """The values as plain data, also those that were computed."""
        try:
            return {name: plain(value, name) for name, value in variables.items()}
        except FesteError as error:
            raise type(error)(f"{self.label}: variable {error}") from None

    def text(self, values: dict[str, Any]) -> str:
        template = self.compiled().template
        names = {**_sandbox_class()[1], **self.environment.globals, **values, _BUDGET: Budget()}
        texts, size = [], 0
        try:
            for text in template.root_render_func(template.new_context(names, shared=True)):
                size += _bytes(text)
                if size > TEXT_LIMIT:
                    raise TooMuch(f"its text is larger than {TEXT_LIMIT:,} bytes")
                texts.append(text)
        except Exception as error:
            kind = LazyValueError if isinstance(error, LazyValueError) else PromptError
            what = f"{self.label}, line {_line(error, template)}: {_why(error)}"
            raise kind(what) from (None if isinstance(error, (TooMuch, FesteError)) else error)
        return "".join(texts)


class _ChatOp(_Op):
    """Renders a conversation: roles are structure, whatever the texts hold."""

    def __init__(self, messages: tuple[tuple[str, _TextOp], ...], language: str) -> None:
        self.messages = messages
        self.language = language
        self.parts = tuple(part for _, part in messages)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_ChatOp, (self.messages, self.language))

    @property
    def identity(self) -> str:
        parts = [(role, part.identity) for role, part in self.messages]
        return _digest(repr(("chat", parts, self.language)))

    def render(self, /, **variables: Any) -> Any:
        values = self.parts[0].values(variables)
        return [{"role": role, "content": part.text(values)} for role, part in self.messages]


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _why(error: Exception) -> str:
    """What a template did wrong, as text."""
    from jinja2 import TemplateError

    if isinstance(error, (TemplateError, TooMuch, FesteError)):
        return str(getattr(error, "message", None) or error)
    return f"{type(error).__name__}: {error}"


def _line(error: BaseException, template: Template) -> int:
    """The line of the template at which the error was raised."""
    line, trace = 1, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__jinja_template__") is template:
            line = template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return line


# --- prompts --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _standard(tag: str) -> str:
    """The tag in its standard form; langcodes, 38 ms of CPU, is imported for others than "en"."""
    if tag == "en":
        return tag
    import langcodes

    if not langcodes.tag_is_valid(tag):
        raise ValueError(tag)
    return langcodes.standardize_tag(tag)


def _language(tag: str) -> str:
    try:
        return _standard(tag)
    except (ValueError, TypeError, AttributeError):
        raise _failure(
            ConfigError,
            f'language={tag!r} is no language tag (BCP 47); use for example "en", "de" or "pt-BR"',
        ) from None


class _Callable:
    """What prompts and chat prompts share."""

    __slots__ = ("__weakref__", "_op")

    def __init__(self, op: Any) -> None:
        self._op = op

    @property
    def language(self) -> str:
        """The language, as a BCP 47 tag in its standard form."""
        return self._op.language  # type: ignore[no-any-return]

    def variables(self) -> frozenset[str]:
        """Return the names of the variables, less the globals of the environment."""
        return self._op.variables()  # type: ignore[no-any-return]

    def _record(self, variables: dict[str, Any]) -> Any:
        self._op.check(variables)
        return record(self._op, (), variables)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Callable):
            return NotImplemented
        return type(self) is type(other) and bool(self._op.identity == other._op.identity)

    def __hash__(self) -> int:  # not by environment: its globals may change
        return hash(tuple(part.source for part in self._op.parts))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_revive, (type(self), self._op))

    def __feste_fingerprint__(self) -> Any:
        return {"prompt": self._op.identity}


def _revive(kind: type[Any], op: Any) -> Any:
    """A prompt as it was; its template is compiled when it is used."""
    made = object.__new__(kind)
    made._op = op
    return made


class Prompt(_Callable):
    """A template of a text, in Jinja's language, with named variables.

    Calling it gives the text, lazily: a node of the graph. Prompts can be joined with ``+``; a
    plain text joined to one is data and renders as itself.

    :param source: the template, written by you; what a model answered is given as a variable.
    :param language: the language of the text, a BCP 47 tag.
    :param environment: globals and filters; None for the shared ``default_environment``.
    :raises PromptError: for a source that is no template, too large, or not exactly a ``str``.
    :raises ConfigError: for a language that is none.

    >>> greet = Prompt("Hello {{ name }}!")
    >>> greet.variables()
    frozenset({'name'})
    >>> from feste import context
    >>> with context.set(eager=True):
    ...     (greet + " {{ braces }} are kept.")(name="Ada")
    'Hello Ada! {{ braces }} are kept.'
    """

    __slots__ = ()

    def __init__(
        self,
        source: str,
        *,
        language: str = "en",
        environment: FesteEnvironment | None = None,
    ) -> None:
        super().__init__(_text_op(source, language, environment))

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        language: str = "en",
        environment: FesteEnvironment | None = None,
        encoding: str = "utf-8",
    ) -> Prompt:
        """Read a template from a file.

        :param path: the file; its name stands in errors.
        :param language: as for :class:`Prompt`; likewise ``environment``.
        :param encoding: the file's encoding.
        :raises PromptError: for no regular file, other encodings, or no template.
        :raises OSError: if it cannot be read.
        """
        file = Path(path)
        if file.exists() and not file.is_file():
            raise _failure(PromptError, f"template {file.name}: not a regular file")
        with file.open("rb") as stream:
            content = stream.read(4 * SOURCE_LIMIT + 1)  # no encoding needs more than four times
        if len(content) > 4 * SOURCE_LIMIT:
            raise _failure(PromptError, f"template {file.name}: {_TOO_LARGE}")
        try:
            source = content.decode(encoding)
        except UnicodeDecodeError as error:
            why = f"template {file.name}: {error}; name its encoding=..."
            raise _failure(PromptError, why) from None
        made: Prompt = _revive(cls, _text_op(source, language, environment, file.name))
        return made

    @property
    def source(self) -> str:
        """The text of the template."""
        return self._op.source  # type: ignore[no-any-return]

    @property
    def environment(self) -> FesteEnvironment:
        """The globals and filters of the template."""
        return self._op.environment  # type: ignore[no-any-return]

    def __call__(self, /, **variables: Any) -> FesteDelayed[str]:
        """Return the rendered text: a lazy value, or in eager mode the text itself.

        :param variables: the values: plain data, dataclasses, pydantic models, lazy values.
        :raises UndefinedVariable: if one is missing; those with a ``default`` may be.
        :raises ExtraVariable: if the template has no such variable.
        :raises PlainDataError: for a value that is not plain data.
        """
        return self._record(variables)  # type: ignore[no-any-return]

    def __add__(self, other: Prompt | str) -> Prompt:
        if isinstance(other, str):
            return self._with(_join(self.source, _data(other, before=self.source)))
        if isinstance(other, Lazy):
            raise _failure(
                LazyValueError, f"{self!r} + a lazy value: give it as a variable of the template"
            )
        if not isinstance(other, Prompt):
            return NotImplemented
        if self.environment.identity != other.environment.identity:
            raise _failure(PromptError, f"{self!r} + {other!r}: give both the same environment")
        _same_language(self, other)
        return self._with(_join(self.source, other.source))

    def __radd__(self, other: str) -> Prompt:
        if not isinstance(other, str):
            return NotImplemented
        return self._with(_join(_data(other, after=self.source), self.source))

    def _with(self, source: str) -> Prompt:
        return Prompt(source, language=self.language, environment=self.environment)

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        return f"<Prompt {self._op.label.partition(' ')[2]} {self.language}>"


_TOO_LARGE = f"larger than {SOURCE_LIMIT:,} bytes; give long texts as variables"


def _text_op(
    source: str, language: str, environment: FesteEnvironment | None, file: str = ""
) -> _TextOp:
    """The checked op of one template."""
    if type(source) is not str:
        raise _failure(
            PromptError,
            f"a template source must be written by you, as a plain str, not "
            f"{type(source).__name__}; give model answers as variables: "
            'Prompt("... {{ answer }}")(answer=...)',
        )
    if environment is not None and not isinstance(environment, FesteEnvironment):
        kind = type(environment).__name__
        raise _failure(ConfigError, f"environment: expected a FesteEnvironment, not {kind}")
    _refuse_node_text(source)
    made = _TextOp(source, _language(language), environment or default_environment, file)
    if _bytes(source) > SOURCE_LIMIT:
        raise _failure(PromptError, f"{made.label}: {_TOO_LARGE}")
    try:
        made.compiled()
    except PromptError as error:
        raise _failure(PromptError, str(error)) from None
    return made


def _refuse_node_text(text: str) -> None:
    try:
        refuse_node_text(text)
    except LazyValueError as error:
        raise _failure(LazyValueError, str(error)) from None


def _same_language(one: Prompt, other: Prompt) -> None:
    if one.language != other.language:
        why = f"{one!r} and {other!r} are joined; the result counts as {one.language!r}"
        warnings.warn(LanguageMismatch(f"different languages: {why}"), stacklevel=3)


def _join(left: str, right: str) -> str:
    """Both sources, one after the other; a brace at the seam stays text."""
    if left.endswith("{") and right.startswith(("{", "%", "#")):
        left = left[:-1] + '{{ "{" }}'
    return left + right


def _data(text: str, *, before: str = "", after: str = "") -> str:
    """A source that renders as the text: as it is where that is sure, else as a constant."""
    _refuse_node_text(text)
    text = str.__str__(text)
    stripped = before.endswith(("-}}", "-%}", "-#}")) or after.startswith(("{{-", "{%-", "{#-"))
    if "{" not in text and "\r" not in text and not stripped:
        return text
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}"


class ChatPrompt(_Callable):
    """The messages of a conversation, each a template.

    Calling it gives a list of messages, lazily. Which message a text belongs to is structure: no
    value of a variable can end its message or begin another.

    :param system: what the system message says: a source or a :class:`Prompt`.
    :param user: what the user's message says.
    :param messages: instead of these two, pairs of role and source, for longer conversations.
    :param language: the language; None for that of the first message given as a Prompt, else "en".
    :param environment: globals and filters of those that are given as sources.
    :raises PromptError: for no message, or a source that is no template.
    :raises ConfigError: for an unknown role.

    >>> ask = ChatPrompt("You are {{ who }}.", "{{ question }}")
    >>> sorted(ask.variables())
    ['question', 'who']
    >>> from feste import context
    >>> with context.set(eager=True):
    ...     ask(who="a poet", question="Why?")[1]
    {'role': 'user', 'content': 'Why?'}
    """

    __slots__ = ()

    def __init__(
        self,
        system: str | Prompt | None = None,
        user: str | Prompt | None = None,
        *,
        messages: Iterable[tuple[str, str | Prompt]] | None = None,
        language: str | None = None,
        environment: FesteEnvironment | None = None,
    ) -> None:
        short = [(r, s) for r, s in (("system", system), ("user", user)) if s is not None]
        if messages is not None and short:
            raise _failure(PromptError, "give system and user, or messages, not both")
        given = short if messages is None else list(messages)
        if not given:
            raise _failure(PromptError, "a ChatPrompt needs a message: give system=..., user=...")
        prompts = [source for _, source in given if isinstance(source, Prompt)]
        for other in prompts[1:]:
            _same_language(prompts[0], other)
        language = _language(language or (prompts[0].language if prompts else "en"))
        made = []
        for role, source in given:
            if role not in ROLES:
                raise _failure(ConfigError, f"no role {role!r}.{suggest(str(role), ROLES)}")
            if isinstance(source, Prompt):
                made.append((role, source._op))
            else:
                made.append((role, _text_op(source, language, environment)))
        super().__init__(_ChatOp(tuple(made), language))

    @property
    def messages(self) -> tuple[tuple[str, Prompt], ...]:
        """The pairs of role and prompt."""
        return tuple((role, _revive(Prompt, part)) for role, part in self._op.messages)

    def __call__(self, /, **variables: Any) -> FesteDelayed[list[Message]]:
        """Return the messages: a lazy value, or in eager mode the list itself.

        :param variables: the values, as for a :class:`Prompt`; each message takes its own.
        :raises UndefinedVariable: if one is missing.
        :raises ExtraVariable: if no message has such a variable.
        :raises PlainDataError: for a value that is not plain data.
        """
        return self._record(variables)  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self._op.messages)

    def __repr__(self) -> str:
        return f"<ChatPrompt {', '.join(role for role, _ in self._op.messages)} {self.language}>"
