"""Compile and render templates. This module imports Jinja, so import it on first use only."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, meta, nodes

from feste.prompt.counting import count_work
from feste.prompt.filters import BUDGET, Filters
from feste.prompt.including import inlined, place
from feste.prompt.limits import TEXT_LIMIT, Budget, TooMuch, size
from feste.prompt.sandbox import JINJA_NAMES, sandbox_with
from feste.prompt.template import Files

__all__ = ["Compiled", "build", "compiled", "explain", "filters_in", "joined", "parse", "texts"]


class Compiled(NamedTuple):
    """A compiled template, with its required and allowed variables, and the filters it uses."""

    template: Template
    required: frozenset[str]
    allowed: frozenset[str]
    filters: frozenset[str]

    def render(self, values: dict[str, Any], others: dict[str, Any]) -> str:
        """Return the rendered text.

        :param values: the variables, as plain data.
        :param others: the globals of the environment.
        :raises TooMuch: if the template exceeds a limit; user code in it may raise anything else.
        """
        return joined(texts(self.template, {**others, **values, BUDGET: Budget(values)}))


def texts(template: Template, names: dict[str, Any]) -> Iterator[str]:
    """Render a template, and return the parts of its text one by one.

    :param template: the template.
    :param names: the variables and globals, and the budget.
    """
    return template.root_render_func(template.new_context(names))


def joined(parts: Iterable[str]) -> str:
    """Return the text that has these parts.

    :param parts: the parts.
    :raises TooMuch: if the text exceeds the limit.
    """
    kept, total = [], 0
    for text in parts:
        kept.append(text)
        total += size(text)
        if total > TEXT_LIMIT:
            raise TooMuch(f"its text is larger than {TEXT_LIMIT:,} bytes")
    return "".join(kept)


@functools.lru_cache(maxsize=512)
def compiled(source: str, files: Files, filters: Filters) -> Compiled:
    """Compile a template; equal ones are compiled once.

    :param source: the source of the template.
    :param files: the files that it includes.
    :param filters: the user's filters, by name.
    """
    sandbox = sandbox_with(filters)
    tree = parse(source, files, sandbox)
    optional = _optional(tree)
    used = filters_in(tree, filters)
    count_work(tree)  # before find_undeclared_variables, which would call filters on constants
    names = frozenset(meta.find_undeclared_variables(tree))
    return Compiled(build(tree), names - optional - JINJA_NAMES.keys(), names, used)


def parse(source: str, files: Files, sandbox: Environment) -> nodes.Template:
    """Return the syntax tree of a template, with the files that it includes.

    :param source: the source of the template.
    :param files: the files that it includes.
    :param sandbox: the sandbox.
    :raises TemplateSyntaxError: if the template is not valid.
    """
    return inlined(sandbox.parse(source), source, files, sandbox)


def build(tree: nodes.Template) -> Template:
    """Compile a syntax tree whose work is counted already.

    :param tree: the tree.
    """
    sandbox = tree.environment
    assert sandbox is not None, "a parsed tree knows its sandbox"
    return Template.from_code(sandbox, sandbox.compile(tree), JINJA_NAMES)


def filters_in(tree: nodes.Node, filters: Filters) -> frozenset[str]:
    """Return the names of the filters in a tree; ``map`` takes the name of one as a value.

    :param tree: the tree.
    :param filters: the user's filters, all of which count where a name is computed.
    """
    found = set()
    for node in tree.find_all(nodes.Filter):
        found.add(node.name)
        if node.name == "map":
            first = node.args[0] if node.args else None
            if isinstance(first, nodes.Const):
                found.add(str(first.value))
            elif first or node.dyn_args:
                found.update(name for name, _ in filters)
    return frozenset(found)


def _optional(tree: nodes.Template) -> set[str]:
    """Return the names that the template gives a default or tests with `defined`."""
    asking = {"default", "d", "defined", "undefined"}
    return {
        node.node.name
        for node in tree.find_all((nodes.Filter, nodes.Test))
        if node.name in asking and isinstance(node.node, nodes.Name)
    }


def explain(error: Exception, template: Template | None = None, files: Files = ()) -> str:
    """Describe an error in a template, with its line.

    :param error: the exception from compiling or rendering.
    :param template: the template that was rendered.
    :param files: the files that it includes.
    """
    line, file = 0, None
    if isinstance(error, TemplateSyntaxError):
        line, file = error.lineno, error.name
    for frame, number in traceback.walk_tb(error.__traceback__):
        if template and frame.f_globals.get("__jinja_template__") == template:
            line = template.get_corresponding_lineno(number)
    included, line = place(line, files)
    what = getattr(error, "message", None) or str(error)
    if isinstance(error, RecursionError):  # Python's words depend on where it was noticed
        what = "it calls itself too deep"
    elif not isinstance(error, (TemplateError, TooMuch)):
        what = f"{type(error).__name__}: {what}"
    where = f" of {(included or file)!r}" if included or file else ""
    return f", line {line}{where}: {what}" if line else f": {what}"
