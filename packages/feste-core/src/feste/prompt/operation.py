"""The parts that prompts and chat prompts share: their op, and the check of variables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from feste.delayed import record
from feste.draw import Determinism
from feste.errors import ExtraVariable, FesteError, PromptError, UndefinedVariable, suggest
from feste.node import call_site
from feste.plain import plain
from feste.prompt.environment import digest
from feste.prompt.template import Template

__all__ = ["PromptBase", "PromptOp"]


class PromptOp:
    """The op of a prompt's node: it renders a text or, with roles, a list of messages.

    :param templates: one for each role; a single one without roles.
    :param roles: the roles of the messages; they do not depend on the texts.
    :param language: the language of all templates.
    """

    __slots__ = ("language", "roles", "templates")

    name = "prompt"
    kind = "prompt"
    emits = False
    pure = True
    executor = "quick"  # feste.scheduler.QUICK, which stands above this module
    is_async = False

    def __init__(
        self, templates: tuple[Template, ...], roles: tuple[str, ...], language: str
    ) -> None:
        self.templates = templates
        self.roles = roles
        self.language = language

    @property
    def identity(self) -> str:
        """A text that identifies the op: equal for equal ops in every run of the program."""
        return digest(repr((self.roles, self.language, [t.identity for t in self.templates])))

    def determinism(self, args: object, kwargs: Mapping[str, Any]) -> Determinism:
        """Return PURE if equal variables give equal texts, or SAMPLE where something impure is used."""
        for template in self.templates:
            if template.is_impure(kwargs):
                return Determinism.SAMPLE
        return Determinism.PURE

    def fn(self, /, **variables: Any) -> Any:
        """Render the templates.

        :param variables: the computed values.
        :raises PlainDataError: for a value that is not plain data.
        :raises PromptError: if rendering fails.
        """
        values = self.plain(variables)
        return self._made_of([template.render(values) for template in self.templates])

    def _made_of(self, texts: list[str]) -> Any:
        if not self.roles:
            return texts[0]
        return [{"role": role, "content": text} for role, text in zip(self.roles, texts)]

    def checked(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Check the variables of a call and return them, with constants copied to plain data.

        :param variables: the values; some may be lazy.
        :raises UndefinedVariable: if a value is missing.
        :raises ExtraVariable: if no template has such a variable.
        :raises PlainDataError: for a value that is not plain data.
        """
        missing: dict[str, Template] = {}
        allowed = frozenset[str]()
        for template in self.templates:
            made = template.compiled()
            allowed |= made.allowed
            if needed := made.required - variables.keys():
                needed -= template.environment.globals.keys()
                missing |= dict.fromkeys(sorted(needed), template)
        extra = sorted(variables.keys() - allowed)
        if missing or extra:
            raise self._wrong_names(missing, extra, allowed)
        try:
            return self.plain(variables, lazy=True)
        except FesteError as error:
            error.origin = call_site()
            raise

    def _wrong_names(
        self, missing: dict[str, Template], extra: list[str], allowed: frozenset[str]
    ) -> FesteError:
        where, told = self.templates[0], []
        if missing:
            where = next(iter(missing.values()))
            add = ", ".join(f"{name}=..." for name in missing)
            told.append(f"no value for {_listed(missing)}; add {add}")
        if extra:
            known = suggest(extra[0], allowed) if allowed else " It has none at all."
            told.append(f"it has no variable {_listed(extra)}.{known}")
        kind = UndefinedVariable if missing else ExtraVariable
        return kind(f"{where.label}: {'; '.join(told)}", origin=call_site())

    def plain(self, variables: Mapping[str, Any], lazy: bool = False) -> dict[str, Any]:
        """Return variables copied to plain data.

        :param variables: the values.
        :param lazy: keep lazy values.
        :raises PlainDataError: for a value that is not plain data; it names the template.
        """
        try:
            return {name: plain(value, name, lazy=lazy) for name, value in variables.items()}
        except FesteError as error:
            raise type(error)(f"{self.templates[0].label}: variable {error}") from None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


class PromptBase:
    """The base class of prompts and chat prompts."""

    def __init__(self, op: PromptOp) -> None:
        self._op = op

    @property
    def language(self) -> str:
        """The language, as a standard BCP 47 tag."""
        return self._op.language

    def variables(self) -> frozenset[str]:
        """Return the names of the variables, without the environment's globals."""
        return frozenset[str]().union(*(t.variables() for t in self._op.templates))

    def _record(self, args: tuple[object, ...], variables: dict[str, Any]) -> Any:
        if args:
            names = sorted(self.variables())
            how = f"give them by name: ({', '.join(f'{n}=...' for n in names)})"
            raise PromptError(
                f"{self!r} takes no values by position; {how if names else 'it has no variables'}",
                origin=call_site(),
            )
        return record(self._op, (), self._op.checked(variables))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptBase) and self._op.identity == other._op.identity

    def __hash__(self) -> int:  # without the environment, whose globals may change
        return hash(tuple(template.source for template in self._op.templates))

    def __feste_fingerprint__(self) -> Any:
        return {"prompt": self._op.identity}
