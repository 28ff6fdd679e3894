"""Prompts of a single text, and how prompts are joined."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any, Never

from feste.delayed import FesteDelayed, refuse_node_text
from feste.errors import LanguageMismatch, LazyValueError, PromptError
from feste.node import Lazy, call_site
from feste.prompt.environment import FesteEnvironment
from feste.prompt.limits import SOURCE_LIMIT
from feste.prompt.operation import PromptBase, PromptOp
from feste.prompt.template import Files, Template

__all__ = ["Prompt", "warn_of_languages"]


class Prompt(PromptBase):
    """A template of a text with named variables, in Jinja's language.

    Calling it gives the rendered text, lazily, as a node of the graph. Prompts can be joined with
    ``+``; a plain text joined to one is data and renders unchanged.

    :param source: the template, written by you; pass a model's answers as variables instead.
    :param language: the language of the text, a BCP 47 tag.
    :param environment: globals and filters; None uses the shared ``default_environment``.
    :raises PromptError: if the source is not a valid template, too large, or not exactly a ``str``.
    :raises ConfigError: if the language is not a valid tag.

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

        :param path: the file; errors show its name.
        :param language: as for :class:`Prompt`; likewise ``environment``.
        :param encoding: the file's encoding.
        :raises PromptError: if the encoding is wrong, or the text is not a valid template.
        :raises OSError: if the file cannot be read.
        """
        file = Path(path)
        try:
            with file.open(encoding=encoding, newline="") as stream:
                source = stream.read(SOURCE_LIMIT + 1)
        except UnicodeDecodeError as error:
            why = f"template {file.name}: {error}; name its encoding=..."
            raise PromptError(why, origin=call_site()) from None
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

        Variables that have a ``default`` in the template, or are tested with ``defined``, are
        optional.

        :param variables: the values: plain data, dataclasses, pydantic models, lazy values.
        :raises PromptError: for a value given by position.
        :raises UndefinedVariable: if a value is missing.
        :raises ExtraVariable: if the template has no such variable.
        :raises PlainDataError: for a value that is not plain data.
        """
        return self._record(args, variables)  # type: ignore[no-any-return]

    def __add__(self, other: Prompt | str) -> Prompt:
        if isinstance(other, str):
            source = _join(self.source, _data(other, before=self.source))
            return self._with(source, self._template.files)
        if isinstance(other, Lazy):
            what = f"{self!r} + a lazy value: give it as a variable of the template"
            raise LazyValueError(what, origin=call_site())
        if not isinstance(other, Prompt):
            return NotImplemented
        if self.environment.identity != other.environment.identity:
            what = f"{self!r} + {other!r}: give both the same environment"
            raise PromptError(what, origin=call_site())
        warn_of_languages(self, other)
        files = dict(self._template.files)
        for name, text in other._template.files:
            if files.setdefault(name, text) != text:
                what = f"{self!r} + {other!r}: the file {name!r} has changed between them"
                raise PromptError(f"{what}; make both of one version", origin=call_site())
        return self._with(_join(self.source, other.source), tuple(sorted(files.items())))

    def __radd__(self, other: str) -> Prompt:
        if not isinstance(other, str):
            return NotImplemented
        source = _join(_data(other, after=self.source), self.source)
        return self._with(source, self._template.files)

    def _with(self, source: str, files: Files) -> Prompt:
        return self._of(Template(source, self.language, self.environment, files=files))

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        return f"<Prompt {self._template.short} {self.language}>"


def warn_of_languages(one: Prompt, other: Prompt) -> None:
    """Warn if two joined prompts differ in language.

    :param one: the prompt whose language the result has.
    :param other: the prompt joined to it.
    """
    if one.language != other.language:
        why = f"{one!r} and {other!r} are joined; the result counts as {one.language!r}"
        warnings.warn(LanguageMismatch(f"different languages: {why}"), stacklevel=3)


def _join(left: str, right: str) -> str:
    """Concatenate two sources, keeping a brace at the seam as text."""
    if left.endswith("{") and right.startswith(("{", "%", "#")):
        left = left[:-1] + '{{ "{" }}'
    return left + right


def _data(text: str, *, before: str = "", after: str = "") -> str:
    """Return a template source that renders as the text: the text itself if safe, or a constant."""
    try:
        refuse_node_text(text)
    except LazyValueError as error:
        error.origin = call_site()
        raise
    text = str.__str__(text)
    stripped = before.endswith(("-}}", "-%}", "-#}")) or after.startswith(("{{-", "{%-", "{#-"))
    if "{" not in text and "\r" not in text and not stripped:
        return text
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}"
