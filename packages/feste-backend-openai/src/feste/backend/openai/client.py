"""The OpenAI backend: its configuration and its operations."""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload
from urllib.parse import urlsplit

from feste.backend import (
    Backend,
    BatchRule,
    Determinism,
    Limits,
    Message,
    OnChunk,
    Operation,
    Params,
    PrefixRule,
    Profile,
    Reply,
    SampleRule,
    Secret,
    a_kind,
    is_local,
    server_url,
)
from feste.backend.openai import answers, prefixes, profiles, requests
from feste.backend.openai.params import ChatParams, CompleteParams, EmbedParams
from feste.errors import ConfigError

if TYPE_CHECKING:
    import array

    from pydantic import BaseModel

    from feste import FesteDelayed
    from feste.backend import Request, Response

__all__ = ["OpenAI"]

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound="BaseModel")

_URL = "https://api.openai.com/v1"
_HOST = "api.openai.com"
_KEY = "OPENAI_API_KEY"
_DRAWS = SampleRule(unpack=answers.unpack_draws)


def _operation(**halves: Any) -> Callable[[F], F]:
    """Make a method an operation with its own signature, for users and type checkers."""

    def make(method: F) -> F:
        return cast(F, Operation(signature=method, send=_send, **halves))

    return make


async def _send(llm: OpenAI, request: Request, on_chunk: OnChunk | None = None) -> Response:
    """Send a request; `warm_up` has imported the SDK."""
    from feste.backend.openai import sending

    return await sending.send(llm, request, on_chunk)


class OpenAI(Backend):
    """OpenAI, or a server with the same protocol: vLLM, llama.cpp, Ollama and others.

    The constructor only reads the environment; the SDK is imported, and a connection made, when the
    first request is sent. A key given as text is held in memory only, and such a backend cannot be
    pickled; one that holds the key's name can.

    :param model: the model of all calls whose parameters do not name one.
    :param api_key: the key's environment variable as a :class:`~feste.backend.Secret`, or the key
        itself; None means ``Secret("OPENAI_API_KEY")``, which goes to OpenAI, to this machine and to
        the server of ``OPENAI_BASE_URL``, not to another ``base_url``. A server on this machine
        needs none.
    :param base_url: the server's URL up to the path before ``/chat/completions``; None uses
        ``OPENAI_BASE_URL`` from the environment, or OpenAI itself.
    :param organization: the organization to bill; None uses ``OPENAI_ORG_ID`` from the environment.
    :param project: the project to bill; None uses ``OPENAI_PROJECT_ID`` from the environment.
    :param timeout: the time limit of one attempt in seconds, from connecting to the last byte.
    :param limits: the limits of the account or the server; ``Limits(max_items=...)`` limits how
        many calls share a request.
    :param profile: what you know of the server's models: times, prices, prompt cache; it goes before
        what :meth:`profile` knows itself.
    :raises ConfigError: if an argument is wrong.

    >>> llm = OpenAI(model="smollm2", base_url="http://localhost:8080/v1/")
    >>> llm.endpoint
    'http://localhost:8080/v1'
    """

    plugin = "openai"

    def __init__(
        self,
        model: str | None = None,
        *,
        api_key: str | Secret | None = None,
        base_url: str | None = None,
        organization: str | None = None,
        project: str | None = None,
        timeout: float = 600.0,
        limits: Limits | None = None,
        profile: Profile | None = None,
    ) -> None:
        is_default = not api_key
        try:
            self._secret = Secret.of(api_key, _KEY)
        finally:
            del api_key  # so that no traceback with variables shows it, should an argument be wrong
        if not isinstance(model, (str, type(None))):
            raise ConfigError(f"model must be a str, not {a_kind(model)}")
        if type(timeout) not in (int, float) or not 0 < timeout < math.inf:
            raise ConfigError(f"timeout={timeout!r}: it must be a number of seconds above 0")
        self.model = model
        self.timeout = float(timeout)
        self.limits = Limits.of(limits)
        self._profile = Profile.of(profile)
        self.organization = organization or os.environ.get("OPENAI_ORG_ID") or None
        self.project = project or os.environ.get("OPENAI_PROJECT_ID") or None
        self._endpoint = server_url(base_url or os.environ.get("OPENAI_BASE_URL") or _URL)
        if is_default and base_url:  # one from the environment was chosen with the key beside it
            self._secret.check_server(self._endpoint, [_HOST])

    # --- configuration ----------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        """The effective base URL of calls, normalized."""
        return self._endpoint

    @property
    def account(self) -> str:
        """The organization and project, if they are known."""
        return "/".join([self.organization or "", self.project or ""]).strip("/")

    @functools.cached_property
    def is_local(self) -> bool:
        """Whether the server is on this machine."""
        return is_local(self._endpoint)

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """The key; none if the server is on this machine and there is no key."""
        return () if self.is_local and not self._secret.is_set else (self._secret,)

    def warm_up(self) -> None:
        """Import the SDK."""
        importlib.import_module(f"{__package__}.sending")

    def config(self) -> Mapping[str, Any]:
        """Return the configuration as plain JSON, with the key by name."""
        return {
            "model": self.model,
            "api_key": self._secret.to_json(),
            "base_url": self._endpoint,
            "organization": self.organization,
            "project": self.project,
            "timeout": self.timeout,
        }

    def profile(self, model: str) -> Profile:
        """Return what is known of a model beforehand.

        That is the constructor's ``profile`` and, for OpenAI itself only, a dated list of what it
        publishes, with prices of the standard service tier if ``feste-core[prices]`` is installed.
        Of other servers nothing is known but what you say.

        :param model: the model's name; empty means the backend's own.

        >>> OpenAI(base_url="http://localhost:8080/v1").profile("smollm2") == Profile()
        True
        >>> OpenAI("gpt-5.6-sol").profile("").prompt_cache.write
        1.25
        """
        if urlsplit(self._endpoint).hostname != _HOST:
            return self._profile
        return profiles.whole(self._profile, model or self.model or "")

    def key(self) -> str:
        """Return the current API key.

        :raises MissingKey: if there is none, and the server is not on this machine.
        :raises ConfigError: if it contains characters that no HTTP header may hold.
        """
        for secret in self.secrets:
            return secret.reveal()
        return "no-key"  # the SDK requires a key; a local server ignores it

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the effective values, because another process may have another environment."""
        given: dict[str, Any] = {
            "api_key": self._secret,  # raises if it is a literal key
            "base_url": self._endpoint,
            "organization": self.organization,
            "project": self.project,
            "timeout": self.timeout,
            "limits": self.limits,
            "profile": self._profile,
        }
        return (functools.partial(type(self), self.model, **given), ())

    # --- operations -------------------------------------------------------------------------------

    @overload
    def chat(
        self,
        prompt: str | Sequence[Message | FesteDelayed[Any]] | FesteDelayed[Any],
        params: ChatParams | FesteDelayed[Any] | tuple[Params, ...] = ...,
        *,
        output: None = None,
    ) -> FesteDelayed[Reply]: ...
    @overload
    def chat(
        self,
        prompt: str | Sequence[Message | FesteDelayed[Any]] | FesteDelayed[Any],
        params: ChatParams | FesteDelayed[Any] | tuple[Params, ...] = ...,
        *,
        output: type[M],
    ) -> FesteDelayed[M]: ...
    @_operation(
        prepare=requests.chat_request,
        parse=answers.chat_value,
        samples=_DRAWS,
        prefix=PrefixRule(parts=prefixes.parts, mark=prefixes.mark),
    )
    def chat(
        self,
        prompt: str | Sequence[Message | FesteDelayed[Any]] | FesteDelayed[Any],
        params: ChatParams | FesteDelayed[Any] | tuple[Params, ...] = ChatParams(),
        *,
        output: type[BaseModel] | None = None,
    ) -> FesteDelayed[Any]:
        """Answer a conversation.

        :param prompt: the user's message, or a list of messages: dicts with ``role`` and
            ``content``, as returned by a :class:`~feste.prompt.ChatPrompt`.
        :param params: the parameters; for a client with fallbacks, a tuple may give each its own.
        :param output: a pydantic model; the answer is then JSON of its schema, returned as an
            instance.
        :returns: a :class:`~feste.backend.Reply` or the instance; a list if ``n`` is above 1.
        """
        raise NotImplementedError

    @_operation(
        prepare=requests.complete_request,
        parse=answers.complete_value,
        batch=BatchRule(
            item="prompt",
            field="prompt",
            max_items=64,  # no limit is documented; with more, one slow prompt delays too many
            pack=requests.pack_by("prompt"),
            unpack=answers.unpack_choices,
        ),
        samples=_DRAWS,
    )
    def complete(
        self,
        prompt: str | FesteDelayed[Any],
        params: CompleteParams | FesteDelayed[Any] | tuple[Params, ...] = CompleteParams(),
    ) -> FesteDelayed[Reply]:
        """Continue a text. Calls with equal parameters share requests.

        :param prompt: the text.
        :param params: the parameters.
        :returns: a :class:`~feste.backend.Reply`; a list if ``n`` is above 1. Its ``usage`` is None
            if the request was shared, because the provider counts only whole requests.
        """
        raise NotImplementedError

    @_operation(
        prepare=requests.embed_request,
        parse=answers.vector,
        determinism=Determinism.PURE,
        batch=BatchRule(
            item="text",
            field="input",
            max_items=2048,
            max_tokens=300_000,
            pack=requests.pack_by("input"),
            unpack=answers.unpack_vectors,
        ),
    )
    def embed(
        self,
        text: str | FesteDelayed[Any],
        params: EmbedParams | FesteDelayed[Any] | tuple[Params, ...] = EmbedParams(),
    ) -> FesteDelayed[array.array[float]]:
        """Return the vector of a text. Calls with equal parameters share requests.

        :param text: the text; it must not be empty.
        :param params: the parameters.
        :returns: an ``array.array`` of 32-bit floats, which ``numpy.asarray`` wraps without a copy.
        """
        raise NotImplementedError
