"""Cohere's wire format for `feste.testing.SimServer`.

It serves ``/v2/chat`` (including streams), ``/v2/embed`` and the legacy ``/v1/generate``. The
answers follow `answer`: a line ``REPLY: text`` in the last user message is answered with that text,
a line ``CALL: name {json}`` with a call of that tool.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from feste.testing.wire import (
    Answer,
    Billed,
    Call,
    Item,
    Plan,
    Refusal,
    Remaining,
    answer,
    cut,
    digest,
    embedding,
    json_answer,
    last_user_text,
    message_text,
    pieces,
    prompt_parts,
    sse,
    tool_answer,
    words,
)

__all__ = ["CohereWire", "answer", "embedding", "json_answer"]

_NO_LIMIT = 2**31 - 1
_OBJECT = {"properties": {"echo": {"type": "string"}}, "required": ["echo"]}

Lists = Literal["yes", "first_only", "extra"]


class CohereWire:
    """The wire format of Cohere.

    :param max_texts: send status 400 for more texts in one embedding request.
    :param dimensions: the length of a vector, if the request does not set it.
    :param require_key: send status 401 for any other key.
    :param lists: how ``/v2/embed`` answers several texts: ``"yes"`` with a vector for each;
        ``"first_only"`` with that of the first; ``"extra"`` with one vector too many.
    :param poison: send status 400 if any message, prompt or text contains this, without saying
        which.
    :raises ValueError: if an option has an unknown value.

    If the server has a prompt cache, chats use it.
    """

    paths = ("/v2/chat", "/v2/embed", "/v1/generate")

    def __init__(
        self,
        *,
        max_texts: int = 96,
        dimensions: int = 16,
        require_key: str | None = None,
        lists: Lists = "yes",
        poison: str | None = None,
    ) -> None:
        if lists not in get_args(Lists):
            raise ValueError(f"{lists!r} is none of {get_args(Lists)}")
        self.max_texts, self.dimensions, self.require_key = max_texts, dimensions, require_key
        self.lists, self.poison = lists, poison

    def plan(self, call: Call) -> Plan:
        """Check a request and plan its answers (see `feste.testing.wire.Wire`).

        :param call: the request.
        :returns: the plan.
        :raises Refusal: if Cohere would refuse it.
        """
        call.require_key(self.require_key)
        routes = {"/v2/chat": self._chat, "/v2/embed": self._embed, "/v1/generate": self._generate}
        if call.method != "POST" or call.path not in routes:
            raise Refusal(404, f"no such endpoint: {call.method} {call.path}")
        if call.path.startswith("/v2/") and not isinstance(call.body.get("model"), str):
            raise Refusal(400, "invalid request: model is required")
        return routes[call.path](call)

    def error(self, refusal: Refusal) -> object:
        """Return the JSON body of an error.

        :param refusal: the error.
        :returns: ``{"message": ...}``.
        """
        if refusal.code == "insufficient_quota":
            return {"message": "You are using a Trial key, which has 1000 API calls / month."}
        return {"message": refusal.message}

    def limit_headers(
        self, status: int, requests: Remaining | None, tokens: Remaining | None
    ) -> dict[str, str]:
        """Return the headers that tell what is left of the limits: none with a 429.

        :param status: the status of the reply.
        :param requests: what is left of the requests.
        :param tokens: what is left of the tokens, which Cohere does not tell.
        """
        if status == 429 or requests is None:
            return {}
        return {
            "x-trial-endpoint-call-limit": str(int(requests.limit)),
            "x-trial-endpoint-call-remaining": str(int(requests.left)),
        }

    def _chat(self, call: Call) -> Plan:
        messages = call.body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Refusal(400, "invalid request: messages must be a non-empty list")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise Refusal(400, "invalid request: each message must have a role")
        limit = call.integer("max_tokens", None, 1, _NO_LIMIT)
        call.refuse_poison(self.poison, map(message_text, messages))
        read = call.read(call.body["model"], prompt_parts(messages, call.body.get("tools") or []))

        def generate() -> Answer:
            (sample,) = call.samples(messages, 1)
            message, text, finish = _message(call, messages, sample, limit)
            item = Item(last_user_text(messages), text, digest(messages), sample)
            billed = replace(read, output_tokens=words(text))
            usage: dict[str, object] = {**_usage(billed.input_tokens, billed.output_tokens)}
            usage["cached_tokens"] = billed.cached_tokens
            if call.body.get("stream") is True:
                events = _events(call, message, finish, usage)
                return Answer(items=[item], events=events, billed=billed)
            body: dict[str, object] = {"id": call.id, "finish_reason": finish}
            body |= {"message": message, "usage": usage}
            if call.body.get("logprobs"):
                body["logprobs"] = _logprobs(text)
            return Answer(body, [item], billed=billed)

        return Plan(1, generate, read.input_tokens + (limit or 0))

    def _generate(self, call: Call) -> Plan:
        prompt = call.body.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise Refusal(400, "invalid request: prompt must be at least 1 token long")
        n = call.integer("num_generations", 1, 1, 5) or 1
        limit = call.integer("max_tokens", None, 1, _NO_LIMIT)
        call.refuse_poison(self.poison, [prompt])

        def generate() -> Answer:
            made, items = [], []
            for index, sample in enumerate(call.samples(prompt, n)):
                text, was_cut = cut(answer(prompt, sample, seed=call.seed), limit)
                finish = "MAX_TOKENS" if was_cut else "COMPLETE"
                one = {"id": f"{call.id}-{index}", "text": text, "finish_reason": finish}
                made.append({**one, "index": index} if n > 1 else one)
                items.append(Item(prompt, text, digest(prompt), sample))
            output = sum(words(item.answer) for item in items)
            meta = {"api_version": {"version": "1"}, **_usage(words(prompt), output)}
            body = {"id": call.id, "prompt": prompt, "generations": made, "meta": meta}
            return Answer(body, items, billed=Billed.uncached(words(prompt), output))

        return Plan(n, generate, words(prompt) + (limit or 0) * n)

    def _embed(self, call: Call) -> Plan:
        if not isinstance(call.body.get("input_type"), str):
            raise Refusal(400, "invalid request: input_type is required")
        texts = _texts(call.body)
        if len(texts) > self.max_texts:
            raise Refusal(
                400, f"invalid request: total number of texts must be at most {self.max_texts}"
            )
        kinds = call.body.get("embedding_types") or ["float"]
        if not isinstance(kinds, list) or not {"float", "int8", "base64"}.issuperset(kinds):
            raise Refusal(400, "invalid request: embedding_types are float, int8 and base64 here")
        size = call.integer("output_dimension", self.dimensions, 1, 65_536) or 1
        call.refuse_poison(self.poison, texts)
        embedded = texts[:1] if self.lists == "first_only" else texts

        def generate() -> Answer:
            vectors = [embedding(text, size) for text in embedded]
            packed = [struct.pack(f"<{size}f", *vector) for vector in vectors]
            forms: dict[str, list[Any]] = {
                "float": vectors,
                "int8": [[round(127 * value) for value in vector] for vector in vectors],
                "base64": [base64.b64encode(data).decode() for data in packed],
            }
            items = [
                Item(text, f"vector:{digest(data.hex())}", digest(text))
                for text, data in zip(embedded, packed, strict=True)
            ]
            tokens = sum(words(text) for text in embedded)
            meta = {"api_version": {"version": "2"}, "billed_units": {"input_tokens": tokens}}
            shown = {kind: forms[kind] for kind in kinds}
            if self.lists == "extra" and len(texts) > 1:
                shown = {kind: [*column, column[-1]] for kind, column in shown.items()}
            body = {"id": call.id, "embeddings": shown, "texts": texts, "meta": meta}
            body["response_type"] = "embeddings_by_type"
            return Answer(body, items, billed=Billed.uncached(tokens))

        return Plan(len(texts), generate, sum(words(text) for text in texts))


def _texts(body: Mapping[str, Any]) -> list[str]:
    """Return the texts to embed: `texts`, or `inputs` made of text parts."""
    texts = body.get("texts")
    inputs = body.get("inputs")
    if texts is None and isinstance(inputs, list):
        contents = [one.get("content") if isinstance(one, dict) else None for one in inputs]
        texts = [last_user_text([{"role": "user", "content": content}]) for content in contents]
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise Refusal(400, "invalid request: texts must be a non-empty list of strings")
    if not all(texts):
        raise Refusal(400, "invalid request: texts cannot be empty")
    return texts


def _message(
    call: Call, messages: list[dict[str, Any]], sample: int, limit: int | None
) -> tuple[dict[str, Any], str, str]:
    """Return the assistant's message, its text and its finish_reason."""
    choice = call.body.get("tool_choice")
    tools = [] if choice == "NONE" else call.body.get("tools") or []
    asked = tool_answer(messages, tools, forced=choice == "REQUIRED")
    if asked:
        function = {"name": asked[0], "arguments": asked[1]}
        made = {"id": f"call_{digest(messages, sample)}", "type": "function", "function": function}
        return {"role": "assistant", "tool_calls": [made]}, f"{asked[0]}({asked[1]})", "TOOL_CALL"
    wanted = call.body.get("response_format") or {}
    if wanted.get("type") == "json_object":
        schema = wanted.get("json_schema") or _OBJECT
        text = json_answer(messages, schema, sample, seed=call.seed)
    else:
        text = answer(messages, sample, seed=call.seed)
    text, was_cut = cut(text, limit)
    message = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    return message, text, "MAX_TOKENS" if was_cut else "COMPLETE"


def _usage(prompt: int, output: int) -> dict[str, dict[str, int]]:
    counts = {"input_tokens": prompt, "output_tokens": output}
    return {"billed_units": counts, "tokens": counts}


def _logprobs(text: str) -> list[dict[str, object]]:
    return [{"text": part, "token_ids": [len(part)], "logprobs": [-0.5]} for part in pieces(text)]


def _events(call: Call, message: Mapping[str, Any], finish: str, usage: object) -> list[bytes]:
    """Encode the stream of a message: its start, its text or tool calls, its end."""

    def event(kind: str, **fields: object) -> bytes:
        return sse({"type": kind, **fields}, kind)

    events = [event("message-start", id=call.id, delta={"message": {"role": "assistant"}})]
    for index, part in enumerate(message.get("content", [])):
        start = {"message": {"content": {"type": "text", "text": ""}}}
        events.append(event("content-start", index=index, delta=start))
        for piece in pieces(part["text"]):
            delta = {"message": {"content": {"text": piece}}}
            events.append(event("content-delta", index=index, delta=delta))
        events.append(event("content-end", index=index))
    for index, made in enumerate(message.get("tool_calls", [])):
        function: Mapping[str, str] = made["function"]
        first = {**made, "function": {**function, "arguments": ""}}
        events.append(
            event("tool-call-start", index=index, delta={"message": {"tool_calls": first}})
        )
        more = {"message": {"tool_calls": {"function": {"arguments": function["arguments"]}}}}
        events.append(event("tool-call-delta", index=index, delta=more))
        events.append(event("tool-call-end", index=index))
    return [
        *events,
        event("message-end", id=call.id, delta={"finish_reason": finish, "usage": usage}),
    ]
