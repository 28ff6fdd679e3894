"""Build requests from arguments and pack several into one; pure, without the SDK."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from feste.backend import MOST_BYTES, Request, as_messages, as_params, as_text, canonical, plain
from feste.backend.openai.params import ChatParams, Common, CompleteParams, EmbedParams
from feste.backend.openai.schema import check_model, response_format
from feste.errors import ConfigError, ParameterError, PlainDataError

if TYPE_CHECKING:
    from feste.backend.openai.client import OpenAI

__all__ = ["chat_request", "complete_request", "embed_request", "most_bytes", "pack_by"]


#: The tokens that an answer may have where its request does not say.
_TOKENS: Final = 32_768


def chat_request(llm: OpenAI, prompt: Any, params: ChatParams, output: Any = None) -> Request:
    """Return the request of a conversation.

    :param llm: the backend.
    :param prompt: the user's message, or the messages.
    :param params: the parameters.
    :param output: the pydantic model of the answer, or None.
    :raises ConfigError: if an argument is wrong, or no model is given.
    """
    given = _given(params, ChatParams, "chat")
    if output is not None:
        check_model(output)
        if "response_format" in given:
            raise ParameterError("give output= or response_format=, not both")
        given["response_format"] = response_format(output)
    body = {"messages": as_messages(prompt), **given}
    parser = "reply" if output is None else "output"
    return _request(llm, "chat", "/chat/completions", body, parser)


def complete_request(llm: OpenAI, prompt: Any, params: CompleteParams) -> Request:
    """Return the request to continue a text.

    :param llm: the backend.
    :param prompt: the text.
    :param params: the parameters.
    :raises ConfigError: if an argument is wrong, or no model is given.
    """
    body = {
        "prompt": as_text(prompt, "complete", "prompt"),
        **_given(params, CompleteParams, "complete"),
    }
    return _request(llm, "complete", "/completions", body, "reply")


def embed_request(llm: OpenAI, text: Any, params: EmbedParams) -> Request:
    """Return the request for the vector of a text.

    :param llm: the backend.
    :param text: the text.
    :param params: the parameters.
    :raises ConfigError: if an argument is wrong, no model is given, or the text is empty.
    """
    given = as_text(text, "embed", "text")
    if not given:
        # an empty text would make the provider refuse the whole shared request
        raise ConfigError(
            "embed() was given an empty text, which has no vector: leave empty texts out, for "
            "example [llm.embed(t) for t in texts if t]"
        )
    body = {"input": given, "encoding_format": "base64", **_given(params, EmbedParams, "embed")}
    return _request(llm, "embed", "/embeddings", body, "vector")


def pack_by(field: str) -> Callable[[Any, Sequence[Request]], Request]:
    """Return a function that packs requests which differ in one field of the body.

    :param field: the field, which becomes a list in the packed request.
    """

    def pack(llm: Any, requests: Sequence[Request]) -> Request:
        first = requests[0]
        return replace(first, body={**first.body, field: [r.body[field] for r in requests]})

    return pack


def most_bytes(request: Request, *, stream: bool) -> tuple[int, int]:
    """Return the bytes that a reply may have, at most, and how many answers are in it.

    What is asked for decides: a refused answer is paid all the same. 2,048 vectors of 4,096 numbers
    are 45 MB as base64, and up to 200 MB as numbers; a token is at most 12 bytes of text, 350 with
    the frame of its event, and as many more for each logprob, which OpenAI indents.

    :param request: the request.
    :param stream: whether the reply is a stream of events, each of which repeats its frame.
    """
    body = request.body
    texts = body.get("input", body.get("prompt"))
    answers = len(texts) if isinstance(texts, list) else 1
    if "input" in body:
        size = body.get("dimensions")
        return MOST_BYTES + answers * 24 * max(4_096, size if type(size) is int else 0), answers
    answers *= body.get("n") or 1
    limits = [body.get("max_completion_tokens"), body.get("max_tokens")]
    tokens = max([one for one in limits if type(one) is int], default=_TOKENS)
    logprobs, most = body.get("logprobs"), body.get("top_logprobs")
    each, scale = 512 if stream else 16, 4 if stream else 1
    if logprobs not in (None, False):
        top = most if type(most) is int else logprobs  # a number itself where texts are continued
        each, scale = each + 512 * (1 + int(top)), 16
    usual = scale * (MOST_BYTES + answers * MOST_BYTES // 16)
    return max(usual, MOST_BYTES + answers * tokens * each), answers


def _request(llm: OpenAI, operation: str, path: str, body: dict[str, Any], parser: str) -> Request:
    model = body.get("model") or llm.model
    if not model:
        raise ConfigError(
            f"{operation}() has no model: give OpenAI(model=...), or model= in the parameters"
        )
    return Request(
        plugin=llm.plugin,
        operation=operation,
        endpoint=llm.endpoint + path,
        body={**body, "model": model},
        parser=parser,
        client=llm.config(),
        account=llm.account,
        timeout=llm.timeout,
    )


def _given(params: Any, kind: type[Common], operation: str) -> dict[str, Any]:
    """Return the parameters as a copy in JSON, so that later changes do not affect the request."""
    params = as_params(params, kind, operation)
    params.check()  # again, because lazy values are known now
    given: dict[str, Any] = params.body()
    try:
        given = {name: plain(v, f"{kind.__name__}.{name}") for name, v in given.items()}
    except PlainDataError as error:
        raise ParameterError(str(error)) from None
    for name, value in given.items():
        canonical(value, f"{kind.__name__}.{name}")  # raises for NaN, which JSON does not have
    return given
