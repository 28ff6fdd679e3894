"""One template: its source, language and environment, checked when the user makes it."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from feste.delayed import refuse_node_text
from feste.errors import ConfigError, LazyValueError, PromptError
from feste.node import call_site
from feste.prompt.environment import FesteEnvironment, default_environment, digest
from feste.prompt.limits import SOURCE_LIMIT, size
from feste.wording import a_kind

if TYPE_CHECKING:  # Jinja takes 41 ms of CPU to import, so that waits for the first template
    from feste.prompt.compiler import Compiled
    from feste.prompt.cutting import Piece

__all__ = ["Files", "Template", "as_filter", "standard_tag"]

#: Names and texts of the files that a template includes, directly or by another one.
Files = tuple[tuple[str, str], ...]


def standard_tag(language: str) -> str:
    """Return a language tag in its standard form; langcodes is imported only for tags besides "en".

    :param language: a BCP 47 tag.
    :raises ConfigError: if it is not a valid tag.

    >>> standard_tag("pt_br")
    'pt-BR'
    """
    if language == "en":
        return language
    import langcodes

    if not langcodes.tag_is_valid(str(language)):
        raise ConfigError(
            f"language={language!r} is no language tag (BCP 47); use for example "
            '"en", "de" or "pt-BR"',
            origin=call_site(),
        )
    return langcodes.standardize_tag(language)


def as_filter(name: str) -> str:
    """Return the name of a filter as it stands among those of variables and globals.

    :param name: its name.
    """
    return f"|{name}"


class Template:
    """The template of one text.

    :param source: the template.
    :param language: the language of the text.
    :param environment: globals and filters; None uses the shared ones.
    :param file: the name of the file it was read from.
    :param files: the files that it includes; None reads them from the environment's folder.
    :raises PromptError: if the source is not a valid template, too large, or not exactly a ``str``,
        or if it includes a file that cannot be read.
    :raises ConfigError: if the language or the environment is not valid.
    :raises LazyValueError: if the source contains the repr of a lazy value.
    """

    def __init__(
        self,
        source: str,
        language: str = "en",
        environment: FesteEnvironment | None = None,
        file: str = "",
        files: Files | None = None,
    ) -> None:
        if type(source) is not str:
            raise PromptError(
                "a template source must be written by you, as a plain str, not "
                f"{a_kind(source)}; give model answers as variables: "
                'Prompt("... {{ answer }}")(answer=...)',
                origin=call_site(),
            )
        if not isinstance(environment, (FesteEnvironment, type(None))):
            raise ConfigError(
                f"environment: expected a FesteEnvironment, not {a_kind(environment)}",
                origin=call_site(),
            )
        self.source = source
        self.language = standard_tag(language)
        self.environment = environment or default_environment
        self.file = file
        self.files: Files = files or ()
        try:
            refuse_node_text(source)
            if size(source) > SOURCE_LIMIT:
                large = f"larger than {SOURCE_LIMIT:,} bytes; give long texts as variables"
                raise PromptError(f"{self.label}: {large}")
            if files is None:
                self.files = self._gathered()
            self.compiled()
        except (PromptError, LazyValueError) as error:
            error.origin = call_site()
            raise

    @property
    def short(self) -> str:
        """The name of the file, or the beginning of the source."""
        first, *more = self.source.strip().splitlines() or [""]
        cut = f"{first[:39].rstrip()}…" if len(first) > 40 or more else first
        return self.file or repr(cut)

    @property
    def label(self) -> str:
        """The template's name in errors."""
        return f"template {self.short}"

    @property
    def identity(self) -> str:
        """A text that identifies the template: equal for equal ones in every run."""
        return digest(repr((self.source, self.language, self.environment.identity, *self.files)))

    def _gathered(self) -> Files:
        from feste.prompt.compiler import explain
        from feste.prompt.including import gather

        try:
            return gather(self.source, self.environment.root)
        except Exception as error:
            raise PromptError(f"{self.label}{explain(error)}") from None

    def compiled(self) -> Compiled:
        """Return the compiled template, with the environment's current filters.

        :raises PromptError: if it cannot be compiled.
        """
        from feste.prompt.compiler import compiled, explain

        try:
            return compiled(self.source, self.files, tuple(self.environment.filters.items()))
        except Exception as error:  # from Jinja, or from Python when it compiles Jinja's output
            raise PromptError(f"{self.label}{explain(error, files=self.files)}") from None

    def variables(self) -> frozenset[str]:
        """Return the variables that are not globals of Jinja or the environment."""
        made = self.compiled()
        return made.allowed - self.environment.globals.keys() - made.template.globals.keys()

    def is_impure(self, given: Collection[str]) -> bool:
        """Return True if equal renderings may give different texts.

        :param given: the names of the variables, which go before globals of the same name.
        """
        impure = self.environment.impure
        if not impure:
            return False
        made = self.compiled()
        return not impure.isdisjoint(made.filters | (made.allowed - frozenset(given)))

    def pieces(self, unknown: frozenset[str]) -> tuple[Piece, ...]:
        """Return the pieces that the template is cut into; see :mod:`feste.prompt.cutting`.

        :param unknown: the variables whose values are not known.
        """
        from feste.prompt.cutting import cut

        return cut(self.source, self.files, tuple(self.environment.filters.items()), unknown)

    def render(self, values: dict[str, Any]) -> str:
        """Return the rendered text.

        :param values: the variables, as plain data.
        :raises PromptError: if rendering fails.
        """
        from feste.prompt.compiler import explain

        made = self.compiled()
        try:
            return made.render(values, self.environment.globals)
        except Exception as error:
            raise PromptError(f"{self.label}{explain(error, made.template, self.files)}") from error
