"""Cut templates into pieces that can be rendered one by one, some of them early.

This module imports Jinja, so import it on first use only.

A template's body is a sequence of texts, expressions and statements. Rendering it is rendering them
in order, if none leaves anything behind that a later one could notice. What one could leave behind,
and why a cut is exact nevertheless:

*Names.* Only a statement that binds a name in the template's own scope does: ``set``, also in an
``if``, ``macro`` and ``block``; ``for``, ``with``, ``filter`` and included files have a
scope of their own. Changing
a namespace and switching ``autoescape`` have effects as well. So only kinds of statements that are
known to keep to themselves are cut off. From the first other one to the end, all is one piece: what
stands before it cannot notice it.

*Values.* They are plain data, which no template can change. Functions and filters of the user
change nothing either, or are named in ``impure``.

*The context.* A piece can only look up names that are written in it, so one that mentions no unknown
name has the same text whatever the others are. Functions that take Jinja's whole context could see
more: where a filter does, nothing is rendered early; a piece that calls one is refused.

*Limits.* A piece rendered early must respect them with the values that it mentions, which is
stricter than with all values. Its steps and its text then count when the rest is rendered.

*Errors.* A piece that fails early is not used, and if the rest fails, the whole template is rendered
instead: what fails there is what would have failed anyway. So only success must be proven equal.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, Final

from jinja2 import Template, nodes

from feste.prompt.compiler import build, filters_in, parse, texts
from feste.prompt.counting import count_work
from feste.prompt.filters import Filters
from feste.prompt.sandbox import sandbox_with, takes_context
from feste.prompt.template import Files, as_filter

__all__ = ["Piece", "cut"]

#: Statements without any effect on what follows, and those of them that have a scope of their own.
_SCOPES: Final = (nodes.For, nodes.With, nodes.FilterBlock, nodes.Scope)
_ALONE: Final = (nodes.Output, nodes.If, nodes.ExprStmt, *_SCOPES)
_BINDING: Final = (nodes.Assign, nodes.AssignBlock)


class Piece:
    """A part of a template between two cuts.

    :param part: the part as a template; it is compiled when it is rendered for the first time.
    :param names: the names that it mentions, in order; those of filters begin with a bar.
    :param needs: those of them that are unknown; None if it must not be rendered early at all.
    :param made_of: the arguments of :func:`cut`, and its position in the result.
    """

    __slots__ = (
        "_made_of",
        "_part",
        "_template",
        "is_constant",
        "names",
        "needs",
        "prints",
        "text",
    )

    def __init__(
        self,
        part: nodes.Template,
        names: tuple[str, ...],
        needs: frozenset[str] | None,
        made_of: tuple[str, Files, Filters, frozenset[str], int],
    ) -> None:
        self._part = part
        self._template: Template | None = None
        self._made_of = made_of
        self.names = names
        self.needs = needs
        self.is_constant = needs is not None and not needs
        #: Its text if nothing has to be computed for it, or None.
        self.text = _plain_text(part)
        #: The variable if it prints one and does no more: a text in it comes out as it is.
        self.prints = _printed(part)

    def texts(self, names: dict[str, Any]) -> Iterator[str]:
        """Render the piece, and return the parts of its text one by one.

        :param names: the variables and globals, and the budget.
        """
        if self._template is None:
            self._template = build(self._part)
        return texts(self._template, names)

    def __reduce__(self) -> tuple[Any, ...]:  # compiled templates cannot be pickled
        return (_piece, self._made_of)


@functools.lru_cache(maxsize=512)
def cut(source: str, files: Files, filters: Filters, unknown: frozenset[str]) -> tuple[Piece, ...]:
    """Cut a template into pieces; equal ones are cut once.

    :param source: the source of a valid template.
    :param files: the files that it includes.
    :param filters: the user's filters, by name.
    :param unknown: the names without a value, or whose value may change.
    """
    sandbox = sandbox_with(filters)
    tree = parse(source, files, sandbox)
    count_work(tree)
    is_open = any(takes_context(function) for _, function in filters)
    parts = [tree] if is_open else _parts(tree, filters, unknown)
    pieces: list[Piece] = []
    for part in parts:
        names = _mentioned(part, filters)
        needs = None if is_open else names & unknown
        made_of = (source, files, filters, unknown, len(pieces))
        pieces.append(Piece(part, tuple(sorted(names)), needs, made_of))
    return tuple(pieces)


def _piece(*made_of: *tuple[*tuple[Any, ...], int]) -> Piece:
    *arguments, position = made_of
    return cut(*arguments)[position]


def _parts(
    tree: nodes.Template, filters: Filters, unknown: frozenset[str]
) -> Iterator[nodes.Template]:
    """Yield the parts that a template is cut into: its atoms, with some neighbours together.

    Those are holes, and constants that mention the same names. Other constants stay apart, so that
    prompts that have only some values in common share what can be made of these.
    """

    def like(atom: nodes.Template) -> frozenset[str] | None:
        names = _mentioned(atom, filters)
        return names if unknown.isdisjoint(names) else None

    for _, atoms in itertools.groupby(_atoms(tree), like):
        yield _part([node for atom in atoms for node in atom.body], tree)


def _atoms(tree: nodes.Template) -> Iterator[nodes.Template]:
    """Yield the smallest parts that a template may be cut into."""
    for i, node in enumerate(tree.body):
        if not _is_alone(node):
            yield _part(tree.body[i:], tree)
            return
        if isinstance(node, nodes.Output):
            for child in node.nodes:
                yield _part([nodes.Output([child], lineno=child.lineno)], tree)
        else:
            yield _part([node], tree)


def _part(body: list[nodes.Node], tree: nodes.Template) -> nodes.Template:
    part = nodes.Template(body, lineno=1)
    part.environment = tree.environment
    return part


def _is_alone(node: nodes.Node, scoped: bool = False) -> bool:
    """Return True if nothing after a statement can tell whether it was executed.

    :param node: the statement, or a part of one.
    :param scoped: whether it stands in a scope of its own.
    """
    if isinstance(node, nodes.NSRef):
        return False
    if isinstance(node, nodes.Stmt):
        if not isinstance(node, _ALONE) and not (scoped and isinstance(node, _BINDING)):
            return False
        scoped = scoped or isinstance(node, _SCOPES)
    return all(_is_alone(child, scoped) for child in node.iter_child_nodes())


def _mentioned(part: nodes.Template, filters: Filters) -> frozenset[str]:
    """Return all names in a part of a template, also those of loop variables: more is safe here."""
    names = frozenset(found.name for found in part.find_all(nodes.Name))
    return names.union(map(as_filter, filters_in(part, filters)))


def _outputs(part: nodes.Template) -> list[nodes.Expr] | None:
    """Return what a part prints if it does no more than that, or None."""
    if not all(isinstance(node, nodes.Output) for node in part.body):
        return None
    return [child for output in part.find_all(nodes.Output) for child in output.nodes]


def _plain_text(part: nodes.Template) -> str | None:
    """Return the text of a part if it is all text, or None."""
    printed = _outputs(part)
    if printed is None:
        return None
    texts = [child.data for child in printed if isinstance(child, nodes.TemplateData)]
    return "".join(texts) if len(texts) == len(printed) else None


def _printed(part: nodes.Template) -> str:
    """Return the name of the variable if a part prints one and does no more, or an empty text."""
    printed = _outputs(part)
    if printed and len(printed) == 1 and isinstance(printed[0], nodes.Name):
        return printed[0].name
    return ""
