"""Compile and render templates. This module imports Jinja, so import it on first use only."""

from __future__ import annotations

import functools
import traceback
from typing import Any, NamedTuple

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta, nodes

from feste.prompt.limits import TEXT_LIMIT, Budget, TooMuch, size
from feste.prompt.sandbox import BUDGET, JINJA_NAMES, Filters, count_work, sandbox_with

__all__ = ["Compiled", "compiled", "explain"]


class Compiled(NamedTuple):
    """A compiled template, with its required and its allowed variables."""

    template: Template
    required: frozenset[str]
    allowed: frozenset[str]

    def render(self, values: dict[str, Any], others: dict[str, Any]) -> str:
        """Return the rendered text.

        :param values: the variables, as plain data.
        :param others: the globals of the environment.
        :raises TooMuch: if the template exceeds a limit; user code in it may raise anything else.
        """
        names = {**others, **values, BUDGET: Budget(values)}
        context = self.template.new_context(names)
        texts, total = [], 0
        for text in self.template.root_render_func(context):
            texts.append(text)
            total += size(text)
            if total > TEXT_LIMIT:
                raise TooMuch(f"its text is larger than {TEXT_LIMIT:,} bytes")
        return "".join(texts)


@functools.lru_cache(maxsize=512)
def compiled(source: str, filters: Filters) -> Compiled:
    """Compile a template; equal ones are compiled once.

    :param source: the source of the template.
    :param filters: the user's filters, by name.
    """
    sandbox = sandbox_with(filters)
    tree = sandbox.parse(source)
    kinds = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
    for foreign in tree.find_all(kinds):
        raise TemplateSyntaxError("a prompt is one text and cannot include others", foreign.lineno)
    optional = _optional(tree)
    count_work(tree)  # before find_undeclared_variables, which would call filters on constants
    names = frozenset(meta.find_undeclared_variables(tree))
    template = Template.from_code(sandbox, sandbox.compile(tree), JINJA_NAMES)
    return Compiled(template, names - optional - JINJA_NAMES.keys(), names)


def _optional(tree: nodes.Template) -> set[str]:
    """Return the names that the template gives a default or tests with `defined`."""
    asking = {"default", "d", "defined", "undefined"}
    return {
        node.node.name
        for node in tree.find_all((nodes.Filter, nodes.Test))
        if node.name in asking and isinstance(node.node, nodes.Name)
    }


def explain(error: Exception, template: Template | None = None) -> str:
    """Describe an error in a template, with its line.

    :param error: the exception from compiling or rendering.
    :param template: the template that was rendered.
    """
    line = error.lineno if isinstance(error, TemplateSyntaxError) else 0
    for frame, number in traceback.walk_tb(error.__traceback__):
        if template and frame.f_globals.get("__jinja_template__") == template:
            line = template.get_corresponding_lineno(number)
    what = getattr(error, "message", None) or str(error)
    if not isinstance(error, (TemplateError, TooMuch)):
        what = f"{type(error).__name__}: {what}"
    return f", line {line}: {what}" if line else f": {what}"
