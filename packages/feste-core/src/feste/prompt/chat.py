"""Prompts of conversations: a list of messages, each a template."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Never

from feste.delayed import FesteDelayed
from feste.errors import ConfigError, PromptError, suggest
from feste.node import call_site
from feste.prompt.environment import FesteEnvironment
from feste.prompt.operation import PromptBase, PromptOp
from feste.prompt.template import Template, standard_tag
from feste.prompt.text import Prompt, warn_of_languages

__all__ = ["ChatPrompt"]

Message = dict[str, str]

ROLES = ("system", "developer", "user", "assistant")


class ChatPrompt(PromptBase):
    """The messages of a conversation, each a template.

    Calling it gives a list of messages, lazily. The roles are fixed, so no value of a variable can
    end its message or start another one.

    :param system: the system message: a template source or a :class:`Prompt`.
    :param user: the user's message, likewise.
    :param messages: instead of these two, pairs of role and source, for longer conversations.
    :param language: the language; None uses that of the first message given as a Prompt, or "en".
    :param environment: globals and filters for the messages given as sources.
    :raises PromptError: if there is no message, or a source is not a valid template.
    :raises ConfigError: for an unknown role.

    >>> ask = ChatPrompt("You are {{ who }}.", "{{ question }}")
    >>> sorted(ask.variables())
    ['question', 'who']
    >>> from feste import context
    >>> with context.set(eager=True):
    ...     ask(who="a poet", question="Why?")[1]
    {'role': 'user', 'content': 'Why?'}
    """

    def __init__(
        self,
        system: str | Prompt | None = None,
        user: str | Prompt | None = None,
        *,
        messages: Iterable[tuple[str, str | Prompt]] | None = None,
        language: str | None = None,
        environment: FesteEnvironment | None = None,
    ) -> None:
        given = [(r, s) for r, s in (("system", system), ("user", user)) if s is not None]
        if messages is not None and given:
            raise PromptError("give system and user, or messages, not both", origin=call_site())
        given = given or list(messages or ())
        if not given:
            what = "a ChatPrompt needs a message: give system=..., user=..."
            raise PromptError(what, origin=call_site())
        prompts = [source for _, source in given if isinstance(source, Prompt)]
        for other in prompts[1:]:
            warn_of_languages(prompts[0], other)
        language = standard_tag(language or (prompts[0].language if prompts else "en"))
        for role, _ in given:
            if role not in ROLES:
                what = f"no role {role!r}.{suggest(str(role), ROLES)}"
                raise ConfigError(what, origin=call_site())
        templates = tuple(
            source._op.templates[0]
            if isinstance(source, Prompt)
            else Template(source, language, environment)
            for _, source in given
        )
        super().__init__(PromptOp(templates, tuple(role for role, _ in given), language))

    @property
    def messages(self) -> tuple[tuple[str, Prompt], ...]:
        """The pairs of role and prompt."""
        return tuple(zip(self._op.roles, map(Prompt._of, self._op.templates)))

    def __call__(self, /, *args: Never, **variables: Any) -> FesteDelayed[list[Message]]:
        """Return the messages: a lazy value, or in eager mode the list itself.

        :param variables: the values, as for :class:`Prompt`; each message uses its own.
        :raises PromptError: for a value given by position.
        :raises UndefinedVariable: if a value is missing.
        :raises ExtraVariable: if no message has such a variable.
        :raises PlainDataError: for a value that is not plain data.
        """
        return self._record(args, variables)  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self._op.templates)

    def __repr__(self) -> str:
        return f"<ChatPrompt {', '.join(self._op.roles)} {self.language}>"
