"""Every error that Feste raises, in one tree.

.. code-block:: text

    FesteError
    ├── ConfigError            a setting, a name or a parameter is wrong; nothing was sent
    │   ├── UnknownName        no setting, backend, ... has that name (also a LookupError)
    │   ├── ParameterError     a call got a parameter that its operation does not have (also a TypeError)
    │   └── MissingKey         the environment variable of an API key is not set
    ├── PluginError            a plugin could not be loaded or broke a rule
    ├── PromptError            a template or its variables are wrong
    │   ├── UndefinedVariable  a variable of the template was not given
    │   ├── ExtraVariable      a variable was given that the template does not use
    │   └── PlainDataError     a value is not plain data, so templates may not use it
    ├── GraphError             the graph is invalid: a cycle, a missing node, a broken rewrite
    ├── LazyValueError         a lazy value was used as if it were computed (also a TypeError)
    ├── BlockingCallError      a blocking call in a place where it would stop Feste itself
    ├── NestedRunError         a run inside a worker process: its second gate would double the quota
    ├── UngatedCall            a paid call outside the process that holds its gate
    ├── JournalError           a store cannot be used
    │   ├── JournalLocked      another process is writing it
    │   ├── JournalTooNew      a newer version of Feste made it
    │   ├── JournalDamaged     parts of the file are unreadable or missing
    │   └── JournalFailed      an answer or an intent could not be written: the disk is full, ...
    ├── NotRepeated            a once=True task was started before, so it is not run again
    ├── CallError              one LLM call failed
    │   ├── Rejected           the provider refused it: InvalidRequest, ContextTooLong, ContentFiltered,
    │   │                      AuthFailed, QuotaExhausted, ModelNotFound
    │   ├── Transient          it may work later: RateLimited, ServerError, Unreachable,
    │   │                      BackendUnavailable
    │   ├── CacheMiss          cache_mode="replay-only", and the cache has no answer
    │   ├── Ambiguous          it may have been billed: CallTimeout, ConnectionLost, WorkerLost,
    │   │                      Interrupted
    │   └── Unusable           a paid answer that cannot be used: MalformedResponse, OutputMismatch,
    │                          CountMismatch
    ├── NodeError              a user's function raised
    ├── UpstreamFailed         a node was not run because one that it needs failed
    ├── NotStarted             a node was not started because the run was stopped
    ├── BudgetExceeded         the cap on money or tokens is reached, so the run was stopped
    ├── StalledError           a run could not go on, because work was lost: .partial, .report
    └── RunFailed              some nodes failed: .partial, .report (`__cause__` is the first error)

    KeyboardInterrupt
    └── RunInterrupted         Ctrl-C while waiting for a run: .partial, .report

All of them are plain data: they can be pickled, and they hold text, never a provider's SDK objects,
which carry the API key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Self

from feste.wording import kinds_first, printable

__all__ = [
    "Ambiguous",
    "AuthFailed",
    "BackendUnavailable",
    "BlockingCallError",
    "BudgetExceeded",
    "CacheMiss",
    "CallError",
    "CallTimeout",
    "ConfigError",
    "ConnectionLost",
    "ContentFiltered",
    "ContextTooLong",
    "CountMismatch",
    "ExtraVariable",
    "FesteError",
    "FesteWarning",
    "GraphError",
    "Interrupted",
    "InvalidRequest",
    "JournalDamaged",
    "JournalError",
    "JournalFailed",
    "JournalLocked",
    "JournalTooNew",
    "LanguageMismatch",
    "LazyValueError",
    "MalformedResponse",
    "MissingKey",
    "ModelNotFound",
    "NestedRunError",
    "NodeError",
    "NotRepeated",
    "NotStarted",
    "OutputMismatch",
    "ParameterError",
    "PlainDataError",
    "PluginError",
    "PluginWarning",
    "PromptError",
    "QuotaExhausted",
    "RateLimited",
    "Rejected",
    "RunFailed",
    "RunInterrupted",
    "ServerError",
    "StalledError",
    "Transient",
    "UndefinedVariable",
    "UngatedCall",
    "UnknownName",
    "Unreachable",
    "Unusable",
    "UpstreamFailed",
    "WorkerLost",
    "suggest",
]

Billed = Literal["no", "yes", "unknown"]
#: A provider's request to wait this many seconds or longer is ignored.
_DAY = 86_400.0


class FesteError(Exception):
    """The base of all errors of Feste.

    :param message: what happened and how to fix it.
    :param origin: ``file:line`` of the user's call, or an empty string.

    >>> print(FesteError("it broke", origin="app.py:3"))
    it broke (at app.py:3)
    """

    origin: str = ""

    def __init__(self, message: str = "", *, origin: str = "") -> None:
        super().__init__(message)
        if origin:
            self.origin = origin

    @property
    def message(self) -> str:
        """The message, without the place."""
        return str(self.args[0] if self.args else "") or type(self).__name__

    def copy(self) -> Self:
        """Return an equal error, so that each failed place can have its own object.

        The constructor is not called, because a plugin's class may have other parameters.
        """
        made = type(self).__new__(type(self), *self.args)
        made.__dict__.update(self.__dict__)
        if "__notes__" in made.__dict__:
            made.__notes__ = list(made.__notes__)
        made.__cause__ = self.__cause__
        return made

    def __str__(self) -> str:
        # a message may quote a provider, and a traceback goes to a terminal
        text = printable(self.message, but="\n\t")
        return f"{text} (at {printable(self.origin)})" if self.origin else text


class FesteWarning(UserWarning):
    """The base of all warnings of Feste."""


class PluginWarning(FesteWarning):
    """A plugin was skipped, or a name in the environment does nothing."""


class LanguageMismatch(FesteWarning):
    """Prompts of different languages were joined."""


class ConfigError(FesteError, ValueError):
    """A setting, a name or a parameter is wrong; nothing was sent."""


class UnknownName(ConfigError, LookupError):
    """No setting, backend or scheduler has that name."""


class ParameterError(ConfigError, TypeError):
    """A call got a parameter that its operation does not have."""


class MissingKey(ConfigError):
    """The environment variable that should hold an API key is not set."""


class PluginError(FesteError):
    """A plugin could not be loaded or broke a rule."""


class PromptError(FesteError):
    """A template or its variables are wrong."""


class UndefinedVariable(PromptError):
    """A variable of the template was not given."""


class ExtraVariable(PromptError):
    """A variable was given that the template does not use."""


class PlainDataError(PromptError, TypeError):
    """A value is not plain data, so templates may not use it."""


class GraphError(FesteError):
    """The graph is invalid: a cycle, a missing node, a broken rewrite."""


class LazyValueError(FesteError, TypeError):
    """A lazy value was used as if it were computed."""


class BlockingCallError(FesteError, RuntimeError):
    """A blocking call in a place where it would stop Feste itself."""


class NestedRunError(FesteError, RuntimeError):
    """A run inside a worker process: its second gate would double the quota."""


class UngatedCall(FesteError, RuntimeError):
    """A paid call outside the process that holds its gate."""


class JournalError(FesteError):
    """A store cannot be used; nothing was sent."""


class JournalLocked(JournalError):
    """Another process is writing the store.

    :param pid: its process number; 0 if unknown.
    """

    pid: int = 0

    def __init__(self, message: str = "", *, origin: str = "", pid: int = 0) -> None:
        super().__init__(message, origin=origin)
        self.pid = pid


class JournalTooNew(JournalError):
    """A newer version of Feste made the store."""


class JournalDamaged(JournalError):
    """Parts of the store are unreadable or missing; ``feste store salvage`` keeps what is good."""


class JournalFailed(JournalError):
    """The store could not be written, for example because the disk is full; spending stops."""


class NotRepeated(FesteError):
    """A ``once=True`` task was started before and raised, or its end is not known: it stays undone.

    :param key: the key of the call in the store.
    """

    def __init__(self, message: str = "", *, origin: str = "", key: str = "") -> None:
        super().__init__(message, origin=origin)
        self.key = key


class CallError(FesteError):
    """One LLM call failed.

    :param message: what happened; the provider's text must be shortened and redacted before.
    :param billed: whether the provider charged for the call: ``"no"``, ``"yes"`` or ``"unknown"``.
    :param status: the HTTP status, or None.
    :param code: the provider's own error code, or None.
    :param request_id: the provider's ID of the request, or None.
    :param retry_after: seconds that the provider asks to wait; a value that is negative, or a day
        or longer, counts as None.

    Feste sets ``node``, ``backend``, ``model``, ``attempts`` and ``origin`` before the user gets
    the error.
    """

    billed: Billed = "no"
    status: int | None = None
    code: str | None = None
    request_id: str | None = None
    retry_after: float | None = None
    #: What the response's headers say of rate limits: :class:`feste.backend.RateLimit` records.
    rate_limits: tuple[Any, ...] = ()
    node: str = ""
    backend: str = ""
    model: str = ""
    attempts: int = 1

    def __init__(
        self,
        message: str = "",
        *,
        origin: str = "",
        billed: Billed | None = None,
        status: int | None = None,
        code: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, origin=origin)
        if billed is not None:
            self.billed = billed
        self.status = status
        self.code = code
        self.request_id = request_id
        if retry_after is not None and 0 <= retry_after < _DAY:
            self.retry_after = retry_after


class Rejected(CallError):
    """The provider refused the call; sending it again would not help."""


class InvalidRequest(Rejected):
    """The provider reports that the request is wrong (400, 413, 422)."""


class ContextTooLong(InvalidRequest):
    """The prompt does not fit the model's context."""


class ContentFiltered(Rejected):
    """The provider's content filter refused the prompt."""


class AuthFailed(Rejected):
    """The API key is wrong or lacks a permission (401, 403)."""


class QuotaExhausted(Rejected):
    """The account has no money or quota left (402, some 429)."""


class ModelNotFound(Rejected):
    """The provider has no such model or endpoint (404)."""


class CacheMiss(CallError):
    """``cache_mode="replay-only"``, and the cache has no answer; nothing was sent."""


class Transient(CallError):
    """The call may work later; Feste has retried it as often as allowed."""


class RateLimited(Transient):
    """The provider asked to slow down (429, 529, or 503 with ``Retry-After``)."""


class ServerError(Transient):
    """The provider failed (408, 409, 500, other 5xx)."""


class Unreachable(Transient):
    """No connection could be made, so nothing was sent."""


class BackendUnavailable(Transient):
    """The backend was down for longer than the run waits for it; its calls end, the others go on."""


class Ambiguous(CallError):
    """The request was sent but no answer came: it may have been billed."""

    billed: Billed = "unknown"


class CallTimeout(Ambiguous):
    """The time limit of one attempt, or of the whole call, was reached."""


class ConnectionLost(Ambiguous):
    """The connection, or a gateway before the provider (502, 504, 524), broke after the request was sent."""


class WorkerLost(Ambiguous):
    """The worker process that ran the task, or from which the request went out, died."""


class Interrupted(Ambiguous):
    """The run was stopped while the call was under way."""


class Unusable(CallError):
    """An answer came and was paid for, but it cannot be used.

    A backend whose ``send`` raises it puts the body that came into ``raw``, for the store.
    """

    billed: Billed = "yes"
    raw: str | None = None


class MalformedResponse(Unusable):
    """The answer does not have the form that the endpoint promises."""


class OutputMismatch(MalformedResponse):
    """An answer came, but it is no instance of ``output=``, or no plain data; it is not bought again.

    Where a validator of the model has a mistake, ``traceback`` shows it, as text.
    """

    traceback: str = ""


class CountMismatch(Unusable):
    """A batched response holds more or fewer answers than were asked for."""


class NodeError(FesteError):
    """A user's function raised; ``__cause__`` is the original exception if it could be kept.

    :param message: the exception as text.
    :param node: the key of the node.
    :param cause_type: the qualified name of the exception's class.
    :param traceback: the formatted traceback, as text.
    """

    def __init__(
        self,
        message: str = "",
        *,
        origin: str = "",
        node: str = "",
        cause_type: str = "",
        traceback: str = "",
    ) -> None:
        super().__init__(message, origin=origin)
        self.node = node
        self.cause_type = cause_type
        self.traceback = traceback


class UpstreamFailed(FesteError):
    """A node was not run because one that it needs failed.

    :param roots: the errors that caused it, nearest first.
    """

    def __init__(
        self,
        message: str = "",
        *,
        origin: str = "",
        node: str = "",
        roots: Iterable[FesteError] = (),
    ) -> None:
        super().__init__(message, origin=origin)
        self.node = node
        self.roots = tuple(roots)


class NotStarted(FesteError):
    """A node was not started: its run was stopped, or its backend refuses the account or the model."""

    node: str = ""


class BudgetExceeded(FesteError):
    """The cap of the setting ``budget`` is reached, so nothing more was sent.

    :param message: what was reached, and how to go on.
    :param cap: the cap, in units.
    :param spent: what answers have cost, in units.
    :param reserved: the most that requests may have cost whose outcome is unknown, in units.
    :param unit: ``"dollars"`` or ``"tokens"``.
    """

    def __init__(
        self,
        message: str = "",
        *,
        origin: str = "",
        cap: float = 0.0,
        spent: float = 0.0,
        reserved: float = 0.0,
        unit: str = "dollars",
    ) -> None:
        super().__init__(message, origin=origin)
        self.cap = cap
        self.spent = spent
        self.reserved = reserved
        self.unit = unit


class StalledError(FesteError):
    """A run could not go on, though no work was left that may end: it was lost, or Feste has a bug.

    :param partial: the finished values, and an error in each unfinished place; empty for runs that hand
        their values out one by one.
    :param report: the :class:`~feste.report.RunReport` of the run, or None.
    """

    def __init__(
        self,
        message: str = "",
        *,
        origin: str = "",
        partial: tuple[Any, ...] = (),
        report: Any = None,
    ) -> None:
        super().__init__(message, origin=origin)
        self.partial = partial
        self.report = report


class RunFailed(FesteError):
    """Some nodes failed; all other values are in ``partial``.

    :param partial: the result as ``on_error="return"`` gives it: every computed value, and an error
        in each failed place.
    :param report: the :class:`~feste.report.RunReport` of the run.
    :param errors: the errors of the nodes that failed themselves, in the order of failing.
    :param places: the places in ``partial`` that failed, as Python such as ``[0][7]``, each with its
        error.

    >>> print(RunFailed("1 of 2 results failed", places={"[0][1]": NodeError("bad")}))
    1 of 2 results failed
      NodeError: bad
        at partial[0][1]
    """

    max_shown: ClassVar[int] = 3

    def __init__(
        self,
        message: str = "",
        *,
        partial: tuple[Any, ...] = (),
        report: Any = None,
        errors: Iterable[FesteError] = (),
        places: Mapping[str, FesteError] | None = None,
    ) -> None:
        super().__init__(message)
        self.partial = partial
        self.report = report
        self.errors = tuple(errors)
        self.places = dict(places or {})

    def __str__(self) -> str:
        groups: dict[str, list[str]] = {}
        for error in self.errors:
            groups.setdefault(f"{type(error).__name__}: {error}", [])
        for where, error in self.places.items():
            for root in (error.roots if isinstance(error, UpstreamFailed) else ()) or (error,):
                groups.setdefault(f"{type(root).__name__}: {root}", []).append(f"partial{where}")
        lines = [super().__str__()]
        for text in kinds_first(groups)[: self.max_shown]:
            places = groups[text]
            times = f"{len(places):,} x " if len(places) > 1 else ""
            lines.append(f"  {times}{text}")
            if places:
                shown = ", ".join(places[: self.max_shown])
                more = len(places) - self.max_shown
                lines.append(f"    at {shown}{f' and {more:,} more' if more > 0 else ''}")
        if len(groups) > self.max_shown:
            lines.append(f"  ... and {len(groups) - self.max_shown:,} more kinds in .errors")
        return "\n".join(lines)


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C while waiting for a run; not caught by ``except Exception``.

    :param partial: the finished values, and an error in each unfinished place.
    :param report: the :class:`~feste.report.RunReport` of the run.
    """

    def __init__(
        self, message: str = "", *, partial: tuple[Any, ...] = (), report: Any = None
    ) -> None:
        super().__init__(message)
        self.partial = partial
        self.report = report


def suggest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest known name, or a list of all known names.

    >>> suggest("egaer", ["eager", "keep"])
    " Did you mean 'eager'?"
    >>> suggest("zzz", ["eager", "keep"])
    ' Known: eager, keep.'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(names)}." if names else " None are installed."
