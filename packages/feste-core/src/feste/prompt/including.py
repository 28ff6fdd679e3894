"""Make one template of a template and the files that it includes, imports or extends.

This module imports Jinja, so import it on first use only.

The files are read when a prompt is made. Their syntax trees are put where they are mentioned, so a
prompt is one template for all that follows: its variables, limits, identity and early rendering.
What Jinja would do while rendering is said in terms of the template instead:

*include* is a scope with the file in it: names that it sets end there.

*import* is a macro that runs the file and stores the names that it defines in a namespace, and a
call of this macro. Its text is dropped.

*extends* is the other file, with blocks replaced, after the names that this one sets.

A file sees the variables of the prompt, and the limit of a template's source holds for the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, Final, Never

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.visitor import NodeTransformer

from feste.errors import suggest
from feste.prompt.files import read_under
from feste.prompt.limits import SOURCE_LIMIT, size
from feste.prompt.sandbox import sandbox_with
from feste.prompt.template import Files

__all__ = ["gather", "inlined", "place"]

#: Lines of the n-th file count from n times this, so that errors find file and line again.
_SHIFT: Final = 1 << 20
_DEEPEST: Final = 32
_KINDS: Final = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
_MENTION: Final = re.compile(r"\{%[-+]?\s*(include|import|from|extends)\b")
_SILENT: Final = (nodes.Assign, nodes.AssignBlock, nodes.Macro, nodes.ExprStmt)
_NAMESPACE: Final = "_into"


def gather(source: str, root: str | None) -> Files:
    """Read all files that a template is made of, and return their names and texts.

    :param source: the template.
    :param root: the folder of the files; None refuses them.
    :raises TemplateSyntaxError: if a name is not a constant, or a file cannot be read.
    """
    if not _MENTION.search(source):
        return ()
    found: dict[str, str] = {}
    left = SOURCE_LIMIT - size(source)
    texts = [("", source)]
    for where, text in texts:
        for node in sandbox_with(()).parse(text, where or None).find_all(_KINDS):
            name = _name_in(node, where)
            if name in found:
                continue
            read = _read(root, name, node, where)
            if read is not None:
                found[name] = read
                texts.append((name, read))
                left -= size(read)
            if left < 0:
                raise _TooLarge(node, where)
    return tuple(sorted(found.items()))


def _name_in(node: Any, where: str = "") -> str:
    given = node.template
    if isinstance(given, nodes.Const) and isinstance(given.value, str):
        return given.value
    what = f"{type(node).__name__.lower()} takes one name of a file in quotes"
    why = "the files that a prompt is made of are read before it has variables"
    raise TemplateSyntaxError(f"{what}: {why}", node.lineno, where or None)


def _read(root: str | None, name: str, node: Any, where: str) -> str | None:
    if root is None:
        what = f"{name!r} is a file, and the prompt's environment names no folder of files"
        how = 'Prompt(..., environment=FesteEnvironment(root="prompts"))'
        raise TemplateSyntaxError(f"{what}; use {how}", node.lineno, where or None)
    try:
        text = read_under(root, name)
    except FileNotFoundError:
        if getattr(node, "ignore_missing", False):
            return None
        what = f"there is no file {name!r} in {root!r}"
    except OSError as error:
        what = f"the file {name!r} in {root!r} cannot be read: {error.strerror}"
    except ValueError as error:
        what = str(error)
    else:  # as Jinja does: an included line is a part of the line that includes it
        return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
    raise TemplateSyntaxError(what, node.lineno, where or None)


def place(line: int, files: Files) -> tuple[str, int]:
    """Return the name of the file in which a line of a tree stands, or "", and its number there.

    :param line: the number of the line in the tree.
    :param files: the files that are in it.
    """
    position, line = divmod(line, _SHIFT)
    return (files[position - 1][0] if position else ""), line


def inlined(
    tree: nodes.Template, source: str, files: Files, sandbox: Environment
) -> nodes.Template:
    """Return a tree with the trees of all files put in their places.

    :param tree: the syntax tree of a template.
    :param source: the template.
    :param files: what :func:`gather` returned for it.
    :param sandbox: the sandbox.
    :raises TemplateSyntaxError: if a file includes itself, or the result is too large.
    """
    if next(tree.find_all(_KINDS), None) is None:
        return tree
    extends = next(tree.find_all(nodes.Extends), None) is not None
    made = _Inliner(files, sandbox, SOURCE_LIMIT - size(source)).whole(tree)
    return _Unblocker().visit(made) if extends else made


class _Inliner(NodeTransformer):
    def __init__(self, files: Files, sandbox: Environment, left: int) -> None:
        self.files = {name: (text, i) for i, (name, text) in enumerate(files, 1)}
        self.sandbox = sandbox
        self.left = left
        self.under_way: list[str] = []
        self.modules = 0

    def whole(self, tree: nodes.Template) -> nodes.Template:
        """Return a tree without mentions of files."""
        body = [node for node in tree.body if not _is_blank(node)]
        if not body or not isinstance(body[0], nodes.Extends):
            return self.generic_visit(tree)  # type: ignore[return-value]
        parent = self._file(body[0])
        tree.body = body[1:]
        self.generic_visit(tree)
        blocks = {node.name: node for node in tree.body if isinstance(node, nodes.Block)}
        others = [node for node in tree.body if not isinstance(node, nodes.Block)]
        known = {block.name for block in parent.find_all(nodes.Block)}
        for name, block in blocks.items():
            if name not in known:
                file = _name_in(body[0])
                _fail(f"{file!r} has no block {name!r}.{suggest(name, known)}", block)
        for node in others:
            if not isinstance(node, _SILENT):
                _fail("what stands outside the blocks of a template that extends is lost", node)
        _Overrider(blocks).visit(parent)
        parent.body[:0] = others
        return parent

    def _file(self, node: Any) -> nodes.Template:
        """Return the tree of the file that a statement mentions."""
        name = _name_in(node)
        if name in self.under_way:
            _fail(f"{name!r} includes itself: {' > '.join([*self.under_way, name])}", node)
        if len(self.under_way) == _DEEPEST:
            _fail(f"files include each other more than {_DEEPEST} levels deep", node)
        text, position = self.files[name]
        self.left -= size(text)
        if self.left < 0:
            raise _TooLarge(node)
        tree = self.sandbox.parse(text, name)
        for part in tree.find_all(nodes.Node):
            part.lineno = (part.lineno or 0) + position * _SHIFT
        self.under_way.append(name)
        made = self.whole(tree)
        self.under_way.pop()
        return made

    def _body(self, node: nodes.Stmt) -> list[nodes.Node]:
        """Return the body of a file that is not extended: its blocks stand for themselves."""
        return _Unblocker().visit(self._file(node)).body  # type: ignore[no-any-return]

    def visit_Extends(self, node: nodes.Extends) -> Never:
        _fail("extends stands once, before anything else", node)

    def visit_Include(self, node: nodes.Include) -> list[nodes.Node]:
        if not node.with_context:
            _fail("a file sees the variables of the prompt: leave out 'without context'", node)
        if node.ignore_missing and _name_in(node) not in self.files:
            return []
        body = self._body(node)
        if all(isinstance(part, nodes.Output) for part in body):
            return body
        return [nodes.Scope(body, lineno=node.lineno)]

    def visit_Import(self, node: nodes.Import) -> list[nodes.Node]:
        return self._module(node, node.target)[0]

    def visit_FromImport(self, node: nodes.FromImport) -> list[nodes.Node]:
        into = f"_names{self.modules}"
        made, defined = self._module(node, into)
        for each in node.names:
            name, alias = each if isinstance(each, tuple) else (each, each)
            if name not in defined:
                _fail(f"{_name_in(node)!r} defines no {name!r}.{suggest(name, defined)}", node)
            value = nodes.Getattr(_load(into, node), name, "load", lineno=node.lineno)
            made.append(nodes.Assign(_name(alias, "store", node), value, lineno=node.lineno))
        return made

    def _module(self, node: nodes.Stmt, into: str) -> tuple[list[nodes.Node], list[str]]:
        """Return statements that put what a file defines into a namespace, and its names."""
        self.modules += 1
        macro, line = f"_module{self.modules}", node.lineno
        body = self._body(node)
        defined = sorted({name for name in _defined(body) if not name.startswith("_")})
        for name in defined:
            target = nodes.NSRef(_NAMESPACE, name, lineno=line)
            body.append(nodes.Assign(target, _load(name, node), lineno=line))
        empty = nodes.Filter(nodes.Const(None), "module!", [], [], None, None, lineno=line)
        call = nodes.Call(_load(macro, node), [_load(into, node)], [], None, None, lineno=line)
        # as parameters without a value, names defined under a condition are no variables
        maybe = sorted(
            {name for part in body if isinstance(part, nodes.If) for name in _defined([part])}
        )
        params = [_name(name, "param", node) for name in (_NAMESPACE, *maybe)]
        made: list[nodes.Node] = [
            nodes.Macro(macro, params, [], body, lineno=line),
            nodes.Assign(_name(into, "store", node), empty, lineno=line),
            nodes.ExprStmt(call, lineno=line),
        ]
        return made, defined


class _Unblocker(NodeTransformer):
    """Makes blocks into scopes once nothing can replace them any more.

    A block of Jinja does not tell which names it takes from the statements around it.
    """

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        if node.required:
            _fail(f"the block {node.name!r} is required, and nothing replaces it", node)
        self.generic_visit(node)
        return nodes.Scope(node.body, lineno=node.lineno)

    def visit_Name(self, node: nodes.Name) -> nodes.Name:
        if node.name == "self":
            _fail("files of a prompt have no self: use a macro", node)
        return node


class _Overrider(NodeTransformer):
    """Replaces blocks by those of a template that extends this one."""

    def __init__(self, blocks: dict[str, nodes.Block]) -> None:
        self.blocks = blocks

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        given = self.blocks.get(node.name)
        if given is None:
            return self.generic_visit(node)
        parts = _Super(node.body)
        given.body = [made for part in given.body for made in parts.visit_list(part)]
        for name in given.find_all(nodes.Name):
            if name.name == "super":
                _fail("write {{ super() }} by itself, and once in a block", name)
        given.scoped = given.scoped or node.scoped
        return given


class _Super(NodeTransformer):
    """Puts the body of the replaced block where ``{{ super() }}`` stands for the first time."""

    def __init__(self, body: list[nodes.Node]) -> None:
        self.body: list[nodes.Node] | None = body

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        return node  # it has a parent of its own

    def visit_Output(self, node: nodes.Output) -> list[nodes.Node]:
        made: list[nodes.Node] = []
        for child in node.nodes:
            if self.body is not None and _is_super(child):
                made.append(nodes.Scope(self.body, lineno=child.lineno))
                self.body = None
            else:
                made.append(nodes.Output([child], lineno=child.lineno))
        return made


def _is_super(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Call) and getattr(node.node, "name", "") == "super"


def _is_blank(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Output) and not any(
        not isinstance(child, nodes.TemplateData) or child.data.strip() for child in node.nodes
    )


def _defined(body: Iterable[nodes.Node]) -> Iterator[str]:
    """Yield the names that statements define for what follows."""
    for node in body:
        if isinstance(node, nodes.Macro):
            yield node.name
        elif isinstance(node, (nodes.Assign, nodes.AssignBlock)):
            targets = [node.target, *node.target.find_all(nodes.Name)]
            yield from (each.name for each in targets if isinstance(each, nodes.Name))
        elif isinstance(node, nodes.If):
            yield from _defined([*node.body, *node.elif_, *node.else_])


def _name(name: str, ctx: str, like: nodes.Node) -> nodes.Name:
    return nodes.Name(name, ctx, lineno=like.lineno)


def _load(name: str, like: nodes.Node) -> nodes.Name:
    return _name(name, "load", like)


class _TooLarge(TemplateSyntaxError):
    """A template and its files are too large."""

    def __init__(self, node: nodes.Node, where: str = "") -> None:
        what = f"with its files it is larger than {SOURCE_LIMIT:,} bytes"
        super().__init__(f"{what}; give long texts as variables", node.lineno, where or None)


def _fail(what: str, node: nodes.Node) -> Never:
    raise TemplateSyntaxError(what, node.lineno)
