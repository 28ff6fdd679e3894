"""The prompt of one text, and how prompts are joined."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any, Never

from feste.delayed import FesteDelayed, refuse_node_text
from feste.errors import LanguageMismatch, LazyValueError, PromptError
from feste.node import Lazy, here
from feste.prompt.environment import FesteEnvironment
from feste.prompt.limits import SOURCE_LIMIT
from feste.prompt.operation import PromptBase, PromptOp
from feste.prompt.template import Template

__all__ = ["Prompt", "warn_of_languages"]


class Prompt(PromptBase):
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

    def __init__(
        self,
        source: str,
        *,
        language: str = "en",
        environment: FesteEnvironment | None = None,
    ) -> None:
        self._become(Template(source, language, environment))

    def _become(self, template: Template) -> Prompt:
        super().__init__(PromptOp((template,), (), template.language))
        return self

    @classmethod
    def _of(cls, template: Template) -> Prompt:
        return cls.__new__(cls)._become(template)

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
        :raises PromptError: for other encodings, or no template.
        :raises OSError: if it cannot be read.
        """
        file = Path(path)
        try:
            with file.open(encoding=encoding, newline="") as stream:
                source = stream.read(SOURCE_LIMIT + 1)
        except UnicodeDecodeError as error:
            why = f"template {file.name}: {error}; name its encoding=..."
            raise PromptError(why, origin=here()) from None
        return cls._of(Template(source, language, environment, file.name))

    @property
    def _template(self) -> Template:
        return self._op.templates[0]

    @property
    def source(self) -> str:
        """The text of the template."""
        return self._template.source

    @property
    def environment(self) -> FesteEnvironment:
        """The globals and filters of the template."""
        return self._template.environment

    def __call__(self, /, *args: Never, **variables: Any) -> FesteDelayed[str]:
        """Return the rendered text: a lazy value, or in eager mode the text itself.

        Variables that the template gives a ``default``, or asks whether they are ``defined``, may
        be left out.

        :param variables: the values: plain data, dataclasses, pydantic models, lazy values.
        :raises PromptError: for a value without a name.
        :raises UndefinedVariable: if one is missing.
        :raises ExtraVariable: if the template has no such variable.
        :raises PlainDataError: for a value that is not plain data.
        """
        return self._record(args, variables)  # type: ignore[no-any-return]

    def __add__(self, other: Prompt | str) -> Prompt:
        if isinstance(other, str):
            return self._with(_join(self.source, _data(other, before=self.source)))
        if isinstance(other, Lazy):
            what = f"{self!r} + a lazy value: give it as a variable of the template"
            raise LazyValueError(what, origin=here())
        if not isinstance(other, Prompt):
            return NotImplemented
        if self.environment.identity != other.environment.identity:
            what = f"{self!r} + {other!r}: give both the same environment"
            raise PromptError(what, origin=here())
        warn_of_languages(self, other)
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
        return f"<Prompt {self._template.short} {self.language}>"


def warn_of_languages(one: Prompt, other: Prompt) -> None:
    """Warn of two prompts that are joined and differ in language.

    :param one: the prompt whose language the result has.
    :param other: the one joined to it.
    """
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
    try:
        refuse_node_text(text)
    except LazyValueError as error:
        error.origin = here()
        raise
    text = str.__str__(text)
    stripped = before.endswith(("-}}", "-%}", "-#}")) or after.startswith(("{{-", "{%-", "{#-"))
    if "{" not in text and "\r" not in text and not stripped:
        return text
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}"
