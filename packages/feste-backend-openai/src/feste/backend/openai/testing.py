"""OpenAI's wire format for `feste.testing.SimServer`.

It serves chat completions, completions, embeddings and models, including streams, and can imitate
the quirks of OpenAI-compatible servers. The answers follow `answer`: a line ``REPLY: text`` in the
last user message is answered with that text, a line ``CALL: name {json}`` with a call of that tool.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Mapping, Sequence
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
    arranged,
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

__all__ = ["OpenAIWire", "answer", "embedding", "json_answer"]

_NO_LIMIT = 2**31 - 1

Lists = Literal["yes", "first_only", "refuse", "shuffled", "duplicated", "extra"]
Choices = Literal["yes", "one", "refuse", "shuffled", "duplicated"]
Order = Literal["given", "first_only", "shuffled", "duplicated", "extra"]


class OpenAIWire:
    """The wire format of OpenAI and compatible servers.

    Several answers in one reply are what servers get wrong, and three options say how:
    ``"shuffled"`` has them out of order but with correct indexes; ``"duplicated"`` has the first
    answer again, with its index, in place of the last; ``"extra"`` has one more than asked for;
    ``"first_only"`` has only the first. A reply with a single answer has no such quirk.

    :param lists: how ``/v1/completions`` answers a list of prompts: ``"yes"`` answers all;
        ``"refuse"`` sends status 400; or a quirk.
    :param choices: how chats and completions answer ``n``: ``"yes"`` with n choices, ``"one"`` with
        a single one whatever n is; ``"refuse"`` sends status 400 for n > 1; or a quirk.
    :param usage: whether the usage for a list of prompts is the ``"sum"`` or that of the
        ``"first"``.
    :param max_prompts: send status 400 for longer lists of prompts.
    :param max_inputs: send status 400 for longer lists of embedding inputs.
    :param order: how ``/v1/embeddings`` answers a list: as ``"given"``, or with a quirk.
    :param dimensions: the length of a vector, if the request does not set it.
    :param require_key: send status 401 for any other key.
    :param models: the existing models; others get status 404. None accepts any name.
    :param poison: send status 400 if any message, prompt or input contains this text, without
        saying which.
    :raises ValueError: if an option has an unknown value.

    If the server has a prompt cache, chats use it, with OpenAI's fields: ``prompt_cache_key``,
    ``prompt_cache_options`` and, in a block of text, ``prompt_cache_breakpoint``.
    """

    paths = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models")

    def __init__(
        self,
        *,
        lists: Lists = "yes",
        choices: Choices = "yes",
        usage: Literal["sum", "first"] = "sum",
        max_prompts: int | None = None,
        max_inputs: int = 2048,
        order: Order = "given",
        dimensions: int = 16,
        require_key: str | None = None,
        models: Sequence[str] | None = None,
        poison: str | None = None,
    ) -> None:
        for value, known in (
            (lists, get_args(Lists)),
            (choices, get_args(Choices)),
            (usage, ("sum", "first")),
            (order, get_args(Order)),
        ):
            if value not in known:
                raise ValueError(f"{value!r} is none of {known}")
        self.lists, self.choices, self.usage, self.order = lists, choices, usage, order
        self.max_prompts, self.max_inputs, self.dimensions = max_prompts, max_inputs, dimensions
        self.require_key, self.models, self.poison = require_key, models, poison

    def plan(self, call: Call) -> Plan:
        """Check a request and plan its answers (see `feste.testing.wire.Wire`).

        :param call: the request.
        :returns: the plan.
        :raises Refusal: if OpenAI would refuse it.
        """
        call.require_key(self.require_key)
        if call.method == "GET" and call.path.startswith("/v1/models"):
            return self._list_models(call)
        routes = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._complete,
            "/v1/embeddings": self._embed,
        }
        if call.method != "POST" or call.path not in routes:
            raise Refusal(404, f"Invalid URL ({call.method} {call.path})")
        model = call.body.get("model")
        if not isinstance(model, str) or not model:
            raise Refusal(400, "You must provide a model parameter.", param="model")
        self._check_model(model)
        return routes[call.path](call)

    def error(self, refusal: Refusal) -> object:
        """Return the JSON body of an error.

        :param refusal: the error.
        :returns: ``{"error": {"message", "type", "param", "code"}}``.
        """
        kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
        kind = "requests" if refusal.status == 429 else kind
        code = refusal.code or ("rate_limit_exceeded" if refusal.status == 429 else None)
        if code == "insufficient_quota":
            kind = code
        fields = {"message": refusal.message, "type": kind, "param": refusal.param, "code": code}
        return {"error": fields}

    def limit_headers(
        self, status: int, requests: Remaining | None, tokens: Remaining | None
    ) -> dict[str, str]:
        """Return the headers that tell what is left of the limits.

        :param status: the status of the reply.
        :param requests: what is left of the requests.
        :param tokens: what is left of the tokens.
        """
        headers = {}
        for name, found in (("requests", requests), ("tokens", tokens)):
            if found is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(int(found.limit))
                headers[f"x-ratelimit-remaining-{name}"] = str(int(found.left))
                headers[f"x-ratelimit-reset-{name}"] = _duration(found.reset)
        return headers

    def _check_model(self, name: str) -> None:
        if self.models is not None and name not in self.models:
            message = f"The model `{name}` does not exist."
            raise Refusal(404, message, param="model", code="model_not_found")

    def _wanted(self, call: Call) -> int:
        """Return the number of answers to a prompt."""
        n = call.integer("n", 1, 1, 128) or 1
        if n > 1 and self.choices == "refuse":
            raise Refusal(400, "'n' must be 1 for this model.", param="n")
        return 1 if self.choices == "one" else n

    def _list_models(self, call: Call) -> Plan:
        def shown(name: str) -> dict[str, object]:
            return {"id": name, "object": "model", "created": 0, "owned_by": "feste"}

        name = call.path.removeprefix("/v1/models").strip("/")
        if name:
            self._check_model(name)
            return Plan(0, lambda: Answer(shown(name)))
        found = [shown(name) for name in self.models or ["sim"]]
        return Plan(0, lambda: Answer({"object": "list", "data": found}))

    def _chat(self, call: Call) -> Plan:
        messages = call.body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Refusal(400, "'messages' must be a non-empty array.", param="messages")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise Refusal(400, "Each message must be an object with a role.", param="messages")
        n = self._wanted(call)
        limit = call.integer("max_tokens", None, 1, _NO_LIMIT)
        limit = call.integer("max_completion_tokens", limit, 1, _NO_LIMIT)
        call.refuse_poison(self.poison, map(message_text, messages))
        read = _read(call, messages)
        messages = [_unmarked(message) for message in messages]

        def generate() -> Answer:
            prompt, key = last_user_text(messages), digest(messages)
            choices, items = [], []
            for index, sample in enumerate(call.samples(messages, n)):
                message, text, finish = _message(call, messages, sample, limit)
                choice = {"index": index, "message": message, "finish_reason": finish}
                choice["logprobs"] = _chat_logprobs(text) if call.body.get("logprobs") else None
                choices.append(choice)
                items.append(Item(prompt, text, key, sample))
            choices = arranged(choices, self.choices)
            billed = replace(read, output_tokens=sum(words(item.answer) for item in items))
            usage: dict[str, object] = {**_usage(billed.input_tokens, billed.output_tokens)}
            usage["prompt_tokens_details"] = {
                "cached_tokens": billed.cached_tokens,
                "cache_write_tokens": billed.written_tokens,
            }
            base = _envelope(call, "chatcmpl", "chat.completion")
            if call.body.get("stream") is True:
                base["object"] = "chat.completion.chunk"
                parts = [part for choice in choices for part in _chat_deltas(choice)]
                events = _events(call, base, parts, usage)
                return Answer(items=items, events=events, billed=billed)
            return Answer({**base, "choices": choices, "usage": usage}, items, billed=billed)

        return Plan(n, generate, read.input_tokens + (limit or 0) * n)

    def _complete(self, call: Call) -> Plan:
        prompts, listed = _texts(call.body.get("prompt"), "prompt")
        if listed and self.lists == "refuse":
            raise Refusal(400, "'prompt' must be a string.", param="prompt")
        if self.max_prompts is not None and len(prompts) > self.max_prompts:
            raise Refusal(400, f"At most {self.max_prompts} prompts a request.", param="prompt")
        n = self._wanted(call)
        limit = call.integer("max_tokens", None, 1, _NO_LIMIT)
        call.refuse_poison(self.poison, prompts)
        if self.lists == "first_only":
            prompts = prompts[:1]

        def generate() -> Answer:
            choices: list[dict[str, Any]] = []
            items = []
            for prompt in prompts:
                for sample in call.samples(prompt, n):
                    text, was_cut = cut(answer(prompt, sample, seed=call.seed), limit)
                    finish = "length" if was_cut else "stop"
                    choice = {"index": len(choices), "text": text, "finish_reason": finish}
                    logged = call.body.get("logprobs") is not None
                    choice["logprobs"] = _logprobs(text) if logged else None
                    choices.append(choice)
                    items.append(Item(prompt, text, digest(prompt), sample))
            counted = 1 if self.usage == "first" else len(prompts)
            usage = _usage(
                sum(words(prompt) for prompt in prompts[:counted]),
                sum(words(item.answer) for item in items[: counted * n]),
            )
            billed = Billed.uncached(
                sum(words(prompt) for prompt in prompts), sum(words(item.answer) for item in items)
            )
            if len(prompts) > 1:
                choices = arranged(choices, self.lists)
            choices = arranged(choices, self.choices if n > 1 else "yes")
            base = _envelope(call, "cmpl", "text_completion")
            if call.body.get("stream") is True:
                parts = [part for choice in choices for part in _text_deltas(choice)]
                events = _events(call, base, parts, usage)
                return Answer(items=items, events=events, billed=billed)
            return Answer({**base, "choices": choices, "usage": usage}, items, billed=billed)

        asked_for = (limit or 0) * n * len(prompts)
        return Plan(
            len(prompts) * n, generate, sum(words(prompt) for prompt in prompts) + asked_for
        )

    def _embed(self, call: Call) -> Plan:
        texts, _ = _texts(call.body.get("input"), "input")
        if len(texts) > self.max_inputs:
            raise Refusal(400, f"At most {self.max_inputs} inputs a request.", param="input")
        if not all(texts):
            raise Refusal(400, "'input' cannot be an empty string.", param="input")
        size = call.integer("dimensions", self.dimensions, 1, 65_536) or 1
        encoding = call.body.get("encoding_format") or "float"
        if encoding not in ("float", "base64"):
            raise Refusal(400, "encoding_format is float or base64.", param="encoding_format")
        call.refuse_poison(self.poison, texts)
        if self.order == "first_only":
            texts = texts[:1]

        def generate() -> Answer:
            data: list[dict[str, Any]] = []
            items = []
            for index, text in enumerate(texts):
                vector = embedding(text, size)
                packed = struct.pack(f"<{size}f", *vector)
                shown = base64.b64encode(packed).decode() if encoding == "base64" else vector
                data.append({"object": "embedding", "index": index, "embedding": shown})
                items.append(Item(text, f"vector:{digest(packed.hex())}", digest(text)))
            data = arranged(data, self.order)
            tokens = sum(words(text) for text in texts)
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            body = {"object": "list", "data": data, "model": call.body["model"], "usage": usage}
            return Answer(body, items, billed=Billed.uncached(tokens))

        return Plan(len(texts), generate, sum(words(text) for text in texts))


def _duration(seconds: float) -> str:
    """Spell a time as Go does, to the millisecond, as in ``12ms``, ``1.5s`` or ``6m0s``."""
    left = math.ceil(seconds * 1000)
    if 0 < left < 1000:
        return f"{left}ms"
    minutes, left = divmod(left, 60_000)
    hours, minutes = divmod(minutes, 60)
    longer = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{longer}{left / 1000:g}s"


def _unmarked(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without marks for the prompt cache, a lone text as a string."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    blocks = [dict(block) if isinstance(block, dict) else block for block in content]
    for block in blocks:
        mark = block.pop("prompt_cache_breakpoint", None) if isinstance(block, dict) else None
        if mark is not None and (not isinstance(mark, dict) or mark.get("mode") != "explicit"):
            raise Refusal(400, "mode is explicit.", param="prompt_cache_breakpoint")
    alone = len(blocks) == 1 and isinstance(blocks[0], dict) and blocks[0].get("type") == "text"
    return {**message, "content": blocks[0].get("text") if alone else blocks}


def _texts(value: object, name: str) -> tuple[list[str], bool]:
    """Return the texts of a prompt or input (also as token numbers), and whether it was a list."""
    if isinstance(value, str):
        return [value], False
    if isinstance(value, list) and value:
        if all(isinstance(part, int) for part in value):
            return [" ".join(map(str, value))], False
        texts = [" ".join(map(str, part)) if isinstance(part, list) else part for part in value]
        if all(isinstance(text, str) for text in texts):
            return texts, True
    raise Refusal(400, f"'{name}' must be a string or a non-empty array of them.", param=name)


def _read(call: Call, messages: list[dict[str, Any]]) -> Billed:
    """Have the server's prompt cache read a conversation."""
    options = call.body.get("prompt_cache_options") or {}
    mode = options.get("mode", "implicit") if isinstance(options, dict) else None
    if mode not in ("implicit", "explicit"):
        message = "prompt_cache_options.mode is implicit or explicit."
        raise Refusal(400, message, param="prompt_cache_options")
    parts = prompt_parts(messages, call.body.get("tools") or [], "prompt_cache_breakpoint")
    key = call.body.get("prompt_cache_key")
    if not isinstance(key, (str, type(None))):
        raise Refusal(400, "Expected a string.", param="prompt_cache_key")
    scope = call.body["model"], key
    return call.read(scope, parts, explicit=mode == "explicit")


def _message(
    call: Call, messages: list[dict[str, Any]], sample: int, limit: int | None
) -> tuple[dict[str, Any], str, str]:
    """Return an assistant's message, its text and its finish_reason."""
    choice = call.body.get("tool_choice")
    named = choice.get("function", {}).get("name") if isinstance(choice, dict) else None
    tools = [] if choice == "none" else call.body.get("tools") or []
    asked = tool_answer(messages, tools, forced=choice == "required" or bool(named), name=named)
    if asked:
        function = {"name": asked[0], "arguments": asked[1]}
        made = {"id": f"call_{digest(messages, sample)}", "type": "function", "function": function}
        message = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [made]}
        return message, f"{asked[0]}({asked[1]})", "tool_calls"
    text, was_cut = cut(_chat_text(call, messages, sample), limit)
    message = {"role": "assistant", "content": text, "refusal": None}
    return message, text, "length" if was_cut else "stop"


def _chat_text(call: Call, messages: list[dict[str, Any]], sample: int) -> str:
    wanted = call.body.get("response_format") or {}
    if wanted.get("type") == "json_schema":
        schema: object = wanted.get("json_schema", {}).get("schema", {})
    elif wanted.get("type") == "json_object":
        schema = {"properties": {"echo": {"type": "string"}}, "required": ["echo"]}
    else:
        return answer(messages, sample, seed=call.seed)
    return json_answer(messages, schema, sample, seed=call.seed)


def _envelope(call: Call, prefix: str, kind: str) -> dict[str, Any]:
    name = f"{prefix}-{call.id}"
    return {"id": name, "object": kind, "created": 0, "model": call.body["model"]}


def _usage(prompt: int, completion: int) -> dict[str, int]:
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


def _chat_logprobs(text: str) -> dict[str, object]:
    common: dict[str, object] = {"logprob": -0.5, "bytes": None, "top_logprobs": []}
    return {"content": [{"token": t, **common} for t in pieces(text)], "refusal": None}


def _logprobs(text: str) -> dict[str, object]:
    tokens = pieces(text)
    offsets = [sum(map(len, tokens[:at])) for at in range(len(tokens))]
    values = {"token_logprobs": [-0.5] * len(tokens), "text_offset": offsets}
    return {"tokens": tokens, **values, "top_logprobs": [{token: -0.5} for token in tokens]}


def _chat_deltas(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Split a choice into the choices of its chunks: role, pieces or tool calls, end."""
    message = choice["message"]
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    for index, made in enumerate(message.get("tool_calls", [])):
        deltas.append({"tool_calls": [{"index": index, **made}]})
    deltas += [{"content": piece} for piece in pieces(message["content"] or "")]
    parts = [{"index": choice["index"], "delta": d, "finish_reason": None} for d in deltas]
    if choice["logprobs"]:
        for part in parts[1:]:
            part["logprobs"] = _chat_logprobs(part["delta"].get("content", ""))
    return [
        *parts,
        {"index": choice["index"], "delta": {}, "finish_reason": choice["finish_reason"]},
    ]


def _text_deltas(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    parts = [{**choice, "text": p, "finish_reason": None} for p in pieces(choice["text"])]
    return [*parts, {**choice, "text": "", "logprobs": None}]


def _events(
    call: Call, base: Mapping[str, Any], parts: Sequence[object], usage: object
) -> list[bytes]:
    """Encode a stream: a chunk for each part, the usage if requested, the end marker."""
    events = [sse({**base, "choices": [part]}) for part in parts]
    options = call.body.get("stream_options")
    if isinstance(options, dict) and options.get("include_usage"):
        events.append(sse({**base, "choices": [], "usage": usage}))
    return [*events, sse("[DONE]")]
