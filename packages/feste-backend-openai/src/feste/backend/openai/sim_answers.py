"""What OpenAI's servers answer, as JSON and as the events of streams, for the simulated ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from feste.testing.wire import Call, answer, cut, digest, json_answer, pieces, sse, tool_answer

__all__ = [
    "chat_deltas",
    "chat_logprobs",
    "envelope",
    "events",
    "logprobs",
    "message",
    "text_deltas",
    "usage",
]


def message(
    call: Call, messages: list[dict[str, Any]], sample: int, limit: int | None
) -> tuple[dict[str, Any], str, str]:
    """Return an assistant's message, its text and its finish_reason.

    :param call: the request.
    :param messages: its messages.
    :param sample: the number of the draw.
    :param limit: the most tokens of the text, or None.
    """
    choice = call.body.get("tool_choice")
    named = choice.get("function", {}).get("name") if isinstance(choice, dict) else None
    tools = [] if choice == "none" else call.body.get("tools") or []
    asked = tool_answer(messages, tools, forced=choice == "required" or bool(named), name=named)
    if asked:
        function = {"name": asked[0], "arguments": asked[1]}
        made = {"id": f"call_{digest(messages, sample)}", "type": "function", "function": function}
        answered = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [made]}
        return answered, f"{asked[0]}({asked[1]})", "tool_calls"
    text, was_cut = cut(_chat_text(call, messages, sample), limit)
    answered = {"role": "assistant", "content": text, "refusal": None}
    return answered, text, "length" if was_cut else "stop"


def _chat_text(call: Call, messages: list[dict[str, Any]], sample: int) -> str:
    wanted = call.body.get("response_format") or {}
    if wanted.get("type") == "json_schema":
        schema: object = wanted.get("json_schema", {}).get("schema", {})
    elif wanted.get("type") == "json_object":
        schema = {"properties": {"echo": {"type": "string"}}, "required": ["echo"]}
    else:
        return answer(messages, sample, seed=call.seed)
    return json_answer(messages, schema, sample, seed=call.seed)


def envelope(call: Call, prefix: str, kind: str) -> dict[str, Any]:
    """Return what stands around the choices.

    :param call: the request.
    :param prefix: the beginning of the ID.
    :param kind: the ``object``.
    """
    name = f"{prefix}-{call.id}"
    return {"id": name, "object": kind, "created": 0, "model": call.body["model"]}


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Return the tokens of an answer.

    :param prompt: tokens read.
    :param completion: tokens generated.
    """
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


def chat_logprobs(text: str) -> dict[str, object]:
    """Return the log-probabilities of a chat's text.

    :param text: the text.
    """
    common: dict[str, object] = {"logprob": -0.5, "bytes": None, "top_logprobs": []}
    return {"content": [{"token": t, **common} for t in pieces(text)], "refusal": None}


def logprobs(text: str) -> dict[str, object]:
    """Return the log-probabilities of a completion.

    :param text: the text.
    """
    tokens = pieces(text)
    offsets = [sum(map(len, tokens[:at])) for at in range(len(tokens))]
    values = {"token_logprobs": [-0.5] * len(tokens), "text_offset": offsets}
    return {"tokens": tokens, **values, "top_logprobs": [{token: -0.5} for token in tokens]}


def chat_deltas(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Split a choice into the choices of its chunks: role, pieces or tool calls, end.

    :param choice: the choice of a chat.
    """
    told = choice["message"]
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    for index, made in enumerate(told.get("tool_calls", [])):
        deltas.append({"tool_calls": [{"index": index, **made}]})
    deltas += [{"content": piece} for piece in pieces(told["content"] or "")]
    parts = [{"index": choice["index"], "delta": d, "finish_reason": None} for d in deltas]
    if choice["logprobs"]:
        for part in parts[1:]:
            part["logprobs"] = chat_logprobs(part["delta"].get("content", ""))
    return [
        *parts,
        {"index": choice["index"], "delta": {}, "finish_reason": choice["finish_reason"]},
    ]


def text_deltas(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Split a choice into the choices of its chunks: pieces, end.

    :param choice: the choice of a completion.
    """
    parts = [{**choice, "text": p, "finish_reason": None} for p in pieces(choice["text"])]
    return [*parts, {**choice, "text": "", "logprobs": None}]


def events(
    call: Call, base: Mapping[str, Any], parts: Sequence[object], usage: object
) -> list[bytes]:
    """Encode a stream: a chunk for each part, the usage if requested, the end marker.

    :param call: the request.
    :param base: what stands around the choices.
    :param parts: the choices of the chunks.
    :param usage: the tokens of the answer.
    """
    chunks = [sse({**base, "choices": [part]}) for part in parts]
    options = call.body.get("stream_options")
    if isinstance(options, dict) and options.get("include_usage"):
        chunks.append(sse({**base, "choices": [], "usage": usage}))
    return [*chunks, sse("[DONE]")]
