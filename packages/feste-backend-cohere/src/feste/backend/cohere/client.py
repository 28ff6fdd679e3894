"""The Cohere backend: its configuration, its operations, and their requests."""

from __future__ import annotations

import array
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from feste.backend import (
    Backend,
    BatchRule,
    Determinism,
    Limits,
    Message,
    Operation,
    Params,
    Profile,
    Request,
    Response,
    Secret,
    a_kind,
    as_count,
    as_messages,
    as_params,
    as_text,
    is_local,
    plain,
    server_url,
)
from feste.backend.cohere import profiles, replies, transport
from feste.backend.cohere.params import ChatParams, EmbedParams, GenerateParams
from feste.errors import ConfigError, ParameterError

__all__ = ["Cohere"]

_URL = "https://api.cohere.com"
_HOSTS = ("api.cohere.com", "api.cohere.ai")
_MAX_TEXTS = 96
_ONE = Profile(max_draws=1)  # chat has no parameter for more answers


def _normal(url: str) -> str:
    """Return the only spelling of a URL; older versions of the SDK required ``/v1`` at its end."""
    found = server_url(url)
    if (urlsplit(found).hostname or "").endswith((".cohere.com", ".cohere.ai")):
        found = found.removesuffix("/v1").removesuffix("/v2")
    return found


class Cohere(Backend):
    """Cohere, or a server with the same API.

    Texts to embed share requests, up to 96 in each; a chat request holds one conversation.

    :param model: the model of calls whose parameters do not name one.
    :param api_key: a :class:`~feste.backend.Secret`, or the key itself, which is then held in
        memory only; None reads ``CO_API_KEY`` when a call is made, which goes to Cohere, to this
        machine and to the server of ``CO_API_URL``, not to another ``base_url``. A server on this
        machine needs none.
    :param base_url: the URL of the API; None uses ``CO_API_URL``, or ``https://api.cohere.com``. It
        must be https, except for a server on this machine.
    :param timeout: the time limit of one attempt in seconds.
    :param limits: the limits of the account or the server.
    :param profile: what you know of the server's models: times, prices; it goes before what
        :meth:`profile` knows itself.
    :raises ConfigError: if an argument is wrong.

    >>> Cohere(base_url="http://api.example.com")
    Traceback (most recent call last):
    feste.errors.ConfigError: base_url: http:// would send key and prompts to api.example.com in the clear. Use https://, or a tunnel to this machine: ssh -L 8000:localhost:8000 ..., then base_url='http://127.0.0.1:8000/v1'
    """

    plugin = "cohere"

    def __init__(
        self,
        model: str | None = None,
        *,
        api_key: str | Secret | None = None,
        base_url: str | None = None,
        timeout: float = 300.0,
        limits: Limits | None = None,
        profile: Profile | None = None,
    ) -> None:
        is_default = not api_key
        try:
            self._secret = Secret.of(api_key, "CO_API_KEY")
        finally:
            del api_key  # so that no traceback with variables shows it, should an argument be wrong
        if not isinstance(model, (str, type(None))):
            raise ConfigError(f"model must be a str, not {a_kind(model)}")
        if type(timeout) not in (int, float) or not 0 < timeout < math.inf:
            raise ConfigError(f"timeout={timeout!r}: it must be a number of seconds above 0")
        self.model = model
        self.base_url = _normal(base_url or os.environ.get("CO_API_URL") or _URL)
        self._local = is_local(self.base_url)
        self.timeout = timeout
        self.limits = Limits.of(limits)
        self._profile = Profile.of(profile)
        if is_default and base_url:  # one from the environment was chosen with the key beside it
            self._secret.check_server(self.base_url, _HOSTS)
        # pickle the effective URL, because another process may have another CO_API_URL
        own_key = None if is_default and (base_url or self.base_url == _URL) else self._secret
        named = {"model": model, "api_key": own_key, "base_url": self.base_url}
        own = {"timeout": timeout, "limits": limits, "profile": profile}
        self._given = lambda: ((), {**named, **own})

    @property
    def endpoint(self) -> str:
        """The base URL of all calls."""
        return self.base_url

    @property
    def account(self) -> str:
        """The account that limits apply to: the name of the key."""
        return "" if self._secret.is_literal else self._secret.name

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """The API key; none for a server on this machine without a key."""
        return () if self._local and not self._secret.is_set else (self._secret,)

    def warm_up(self) -> None:
        """Import the SDK."""
        transport.load()

    def profile(self, model: str) -> Profile:
        """Return what is known of a model beforehand.

        That is the constructor's ``profile`` and, for Cohere itself only, rough times, with prices
        if ``feste-core[prices]`` is installed.

        :param model: the model's name; empty means the backend's own.

        >>> Cohere().profile("embed-v4.0").latency.token
        0.0
        """
        given = self._profile.over(_ONE)
        if urlsplit(self.base_url).hostname not in _HOSTS:
            return given
        return profiles.whole(given, model or self.model or "")

    def _token(self) -> str:
        if not self.secrets:
            return "none"  # the SDK requires a token; the server ignores it
        return self._secret.reveal()

    # --- prepare --------------------------------------------------------------------------------

    def _request(
        self, path: str, params: Params, kind: type[Params], own: Mapping[str, Any], parser: str
    ) -> Request:
        operation = path.rpartition("/")[2]
        given = as_params(params, kind, operation).body()
        body = {"model": self.model, **given, **own}
        if body["model"] is None:
            del body["model"]
            if operation != "generate":
                raise ConfigError(
                    f"{operation}() needs a model: Cohere(model=...) or {kind.__name__}(model=...)"
                )
        return Request(
            plugin=self.plugin,
            operation=operation,
            endpoint=f"{self.base_url}{path}",
            body=plain(body, "the request"),
            parser=parser,
            client=self.config(),
            account=self.account,
            timeout=self.timeout,
        )

    def _prepare_chat(
        self,
        prompt: str | list[Message],
        params: ChatParams = ChatParams(),
        *,
        output: type | None = None,
    ) -> Request:
        """Answer a conversation.

        :param prompt: the user's message, or all messages.
        :param params: parameters of the API.
        :param output: a pydantic model; the answer is then an instance of it. Cohere advises to ask
            for JSON in the prompt too.
        :returns: a :class:`~feste.backend.Reply`, or an instance of ``output``.
        """
        own: dict[str, Any] = {"messages": as_messages(prompt), "stream": False}
        if output is None:
            return self._request("/v2/chat", params, ChatParams, own, "reply")
        if getattr(params, "response_format", None) is not None:
            raise ParameterError("chat() takes output= or response_format, not both")
        schema = getattr(output, "model_json_schema", None)
        if schema is None:
            raise ParameterError(f"output= takes a pydantic model, not {output!r}")
        own["response_format"] = {"type": "json_object", "json_schema": schema()}
        parser = f"{output.__module__}.{output.__qualname__}"
        return self._request("/v2/chat", params, ChatParams, own, parser)

    def _prepare_embed(self, text: str, params: EmbedParams = EmbedParams()) -> Request:
        """Return the vector of a text.

        :param text: the text.
        :param params: parameters of the API.
        :returns: an ``array.array`` of 32-bit floats, or as set by ``embedding_types``.
        """
        own = {"texts": [as_text(text, "embed", "text")]}
        request = self._request("/v2/embed", params, EmbedParams, own, "vector")
        kinds = request.body.get("embedding_types")
        if not isinstance(kinds, list) or not kinds:
            raise ParameterError(f"embedding_types is a list like ['float'], not {a_kind(kinds)}")
        return request

    def _prepare_generate(self, prompt: str, params: GenerateParams = GenerateParams()) -> Request:
        """Continue a text. Cohere keeps this endpoint for old programs only; prefer ``chat``.

        :param prompt: the text.
        :param params: parameters of the API.
        :returns: a :class:`~feste.backend.Reply`; a list of them if ``num_generations`` is above 1.
        """
        own = {"prompt": as_text(prompt, "generate", "prompt"), "stream": False}
        request = self._request("/v1/generate", params, GenerateParams, own, "generations")
        as_count(request.body.get("num_generations"), "num_generations")
        return request

    # --- send -----------------------------------------------------------------------------------

    async def _send(
        self, request: Request, on_chunk: Callable[[str], None] | None = None
    ) -> Response:
        # the key goes to its own server only
        if not request.endpoint.startswith(f"{self.base_url}/"):
            raise ConfigError(f"this client is for {self.base_url}, not for {request.endpoint}")
        self._token()  # so that a missing key raises its own error
        return await transport.send(
            request, token=self._token, secret=self._secret, local=self._local, on_chunk=on_chunk
        )

    # --- parse ----------------------------------------------------------------------------------

    def _body(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self.model or "", **arguments["params"].body()}

    def _parse_chat(self, response: Response, arguments: Mapping[str, Any]) -> Any:
        reply = replies.chat_reply(response.payload, self._body(arguments)["model"])
        output = arguments["output"]
        return reply if output is None else replies.instance(reply, output, *self.secrets)

    def _parse_embed(self, response: Response, arguments: Mapping[str, Any]) -> array.array[float]:
        made: Any = replies.vectors(response.payload, self._body(arguments)["embedding_types"])
        (vector, *others) = made.values()
        return made if others else vector  # type: ignore[no-any-return]

    def _parse_generate(self, response: Response, arguments: Mapping[str, Any]) -> Any:
        body = self._body(arguments)
        count = as_count(body.get("num_generations"), "num_generations")
        made = replies.generations(response.payload, count, body["model"])
        return made[0] if count == 1 else made

    def _pack_embed(self, requests: Sequence[Request]) -> Request:
        texts = [request.body["texts"][0] for request in requests]
        return replace(requests[0], body={**requests[0].body, "texts": texts})

    def _unpack_embed(self, request: Request, response: Response) -> list[Response]:
        kinds, count = request.body["embedding_types"], len(request.body["texts"])
        return replies.split(response.payload, kinds, count)

    chat = Operation(prepare=_prepare_chat, send=_send, parse=_parse_chat)
    embed = Operation(
        prepare=_prepare_embed,
        send=_send,
        parse=_parse_embed,
        determinism=Determinism.PURE,
        batch=BatchRule("text", "texts", _MAX_TEXTS, pack=_pack_embed, unpack=_unpack_embed),
    )
    # No rule for draws: generations need not carry an index, so a repeated one would pass for two
    # draws, and nothing says that they are independent.
    generate = Operation(prepare=_prepare_generate, send=_send, parse=_parse_generate)
