"""The answers of the simulated model, which tests against `SimServer` use as their oracle.

Each function depends on its arguments only, so a test computes the expected text, JSON or vector
with the same call as the server. Wires re-export the functions that fit their provider.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "Prompt",
    "answer",
    "cut",
    "digest",
    "embedding",
    "json_answer",
    "last_user_text",
    "message_text",
    "minimal",
    "pieces",
    "tool_answer",
    "words",
]

Prompt = str | Sequence[Mapping[str, Any]]
_WORDS = (
    "amber birch cedar delta ember fjord grove heath inlet jetty knoll ledge maple oak pine rye"
)
_REPLY = re.compile(r"^REPLY: ?(.*)$", re.MULTILINE)
_CALL = re.compile(r"^CALL: ?(\S+) *(.*)$", re.MULTILINE)


def answer(prompt: Prompt, sample_index: int = 0, *, seed: int | None = None) -> str:
    """Return the text that the simulated model answers.

    It is ``echo:`` with sixteen hexadecimal digits and seven more words, all from a hash of the
    arguments; or, if the last user message has a line ``REPLY: text``, exactly that text. A single
    user message of plain text is equivalent to that text.

    :param prompt: the prompt or the list of messages, as sent.
    :param sample_index: the number of the answer: 0, 1, ... among the ``n`` of a GREEDY request, or
        counted over all equal prompts of a path for SAMPLE ones.
    :param seed: the seed of the request, if it has one.
    :returns: the answer before ``max_tokens`` cuts it.

    >>> answer("What is the capital of France?\\nREPLY: Paris")
    'Paris'
    """
    reply = _REPLY.search(last_user_text(prompt))
    if reply:
        return reply[1]
    mark = digest(prompt, sample_index, seed)
    names = _WORDS.split()
    return " ".join([f"echo:{mark}", *(names[int(digit, 16)] for digit in mark[:7])])


def json_answer(
    prompt: Prompt, schema: object, sample_index: int = 0, *, seed: int | None = None
) -> str:
    """Return the answer to a request for JSON that fits a schema.

    :param prompt: the prompt or the list of messages, as sent.
    :param schema: the JSON schema.
    :param sample_index: as for `answer`.
    :param seed: as for `answer`.
    :returns: the text of ``REPLY:``, or the JSON of `minimal`, with the first word of the plain
        answer in its free strings.
    """
    text = answer(prompt, sample_index, seed=seed)
    if _REPLY.search(last_user_text(prompt)):
        return text
    return json.dumps(minimal(schema, text.split()[0]))


def tool_answer(
    messages: Prompt, tools: Sequence[Mapping[str, Any]], *, forced: bool, name: str | None = None
) -> tuple[str, str] | None:
    """Return the tool call that the simulated model makes, or None.

    A line ``CALL: name {"json": "arguments"}`` in the last user message asks for a call, unless the
    last message is a tool's result. Otherwise a call is made only if one is forced.

    :param messages: the list of messages.
    :param tools: the tools of the request, each with a ``function``.
    :param forced: whether the request demands a call.
    :param name: the tool that the request demands; None takes the first one.
    :returns: the name and the JSON arguments, or None for a text answer.
    """
    functions = [tool.get("function", {}) for tool in tools]
    if not functions:
        return None
    script = _CALL.search(last_user_text(messages))
    after_tool = not isinstance(messages, str) and messages[-1].get("role") == "tool"
    if script and (forced or not after_tool):
        return script[1], script[2] or "{}"
    if not forced:
        return None
    chosen = next((f for f in functions if f.get("name") == name), functions[0])
    schema = chosen.get("parameters") or {"type": "object"}
    return str(chosen.get("name")), json.dumps(minimal(schema, f"echo:{digest(messages)}"))


def digest(prompt: Prompt, *parts: object) -> str:
    """Return a hash of a prompt or a list of messages, and of further values.

    :param prompt: the prompt or the list of messages.
    :param parts: further values; None is skipped.
    :returns: sixteen hexadecimal digits.
    """
    if not isinstance(prompt, str):
        first = prompt[0] if len(prompt) == 1 else {}
        alone = first.keys() == {"role", "content"} and first["role"] == "user"
        if alone and isinstance(first["content"], str):
            prompt = first["content"]
        else:
            prompt = json.dumps(prompt, sort_keys=True, separators=(",", ":"))
    text = "\0".join([prompt, *(str(part) for part in parts if part is not None)])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def embedding(text: str, dimensions: int = 16) -> list[float]:
    """Return the vector of a text: of length 1, made from a hash, exact in 32-bit floats.

    :param text: the text.
    :param dimensions: the number of dimensions.
    :returns: the vector.
    """
    data = text.encode("utf-8", "surrogatepass")
    raw = array("i", hashlib.shake_128(data).digest(4 * dimensions))
    length = math.hypot(*raw) or 1.0
    return array("f", [value / length for value in raw]).tolist()


def last_user_text(prompt: Prompt) -> str:
    """Return the text of the last user message, or the prompt itself.

    :param prompt: the prompt or the list of messages.
    :returns: the text; the parts of a message are joined by line ends.
    """
    if isinstance(prompt, str):
        return prompt
    for message in reversed(prompt):
        if message.get("role") == "user":
            return message_text(message)
    return ""


def words(prompt: Prompt) -> int:
    """Count the tokens of a text or of messages: one per whitespace-separated word.

    :param prompt: the text or the list of messages.
    :returns: the number of tokens.
    """
    if isinstance(prompt, str):
        return len(prompt.split())
    return sum(len(message_text(message).split()) for message in prompt)


def message_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message; its parts are joined by line ends.

    :param message: the message; `content` is a text or a list of parts.
    :returns: the text, empty if the message has none.
    """
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts: Iterable[Any] = content if isinstance(content, list) else ()
    return "\n".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def cut(text: str, limit: int | None) -> tuple[str, bool]:
    """Cut a text after a number of words.

    :param text: the text.
    :param limit: the maximum number of words; None for all.
    :returns: the text, and whether anything was cut off.
    """
    ends = [match.end() for match in re.finditer(r"\S+", text)] if limit is not None else []
    return (text[: ends[limit - 1]], True) if limit and len(ends) > limit else (text, False)


def pieces(text: str) -> list[str]:
    """Split a text into the pieces of a stream: words, each with the space after it.

    :param text: the text.
    :returns: the pieces, which joined give the text.
    """
    return re.findall(r"\S+\s*|^\s+", text)


_FORMATS = {
    "date": "2000-01-01",
    "date-time": "2000-01-01T00:00:00Z",
    "time": "00:00:00Z",
    "email": "a@example.com",
    "uri": "http://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


def minimal(schema: object, text: str = "") -> object:
    """Make a small instance of a JSON schema.

    Objects get only their required properties, arrays ``minItems`` items, a choice null if allowed
    or its first option. ``pattern`` is ignored.

    :param schema: the schema.
    :param text: the content of strings, where it is allowed.
    :returns: the instance.

    >>> minimal({"type": "object", "properties": {"n": {"minimum": 3, "type": "integer"}},
    ...          "required": ["n"]})
    {'n': 3}
    """
    return _instance(schema, text, schema)


def _instance(schema: Any, text: str, root: Any) -> Any:
    if not isinstance(schema, dict):
        return {}
    if "$ref" in schema:
        target = root
        for name in schema["$ref"].lstrip("#/").split("/"):
            target = target.get(name, {}) if name else target
        return _instance(target, text, root)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    options = schema.get("anyOf") or schema.get("oneOf")
    if options:
        nulls = [option for option in options if option.get("type") == "null"]
        return _instance((nulls or options)[0], text, root)
    if schema.get("allOf"):
        found = [_instance(part, text, root) for part in schema["allOf"]]
        if all(isinstance(value, dict) for value in found):
            return {name: value for part in found for name, value in part.items()}
        return found[0]
    return _typed(schema, text, root)


def _typed(schema: dict[str, Any], text: str, root: Any) -> Any:
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        known = schema.get("properties", {})
        return {k: _instance(known.get(k, {}), text, root) for k in schema.get("required", [])}
    if kind == "array":
        first = [_instance(part, text, root) for part in schema.get("prefixItems", [])]
        more = range(schema.get("minItems", len(first)) - len(first))
        return first + [_instance(schema.get("items", {}), text, root) for _ in more]
    if kind == "string":
        value = _FORMATS.get(schema.get("format", ""), text).ljust(schema.get("minLength", 0), "x")
        return value[: schema.get("maxLength")]
    if kind in ("integer", "number"):
        return _number(schema, kind == "integer")
    return {"boolean": False, "null": None}.get(kind)


def _number(schema: dict[str, Any], whole: bool) -> float:
    step = schema.get("multipleOf") or 1
    over = schema.get("exclusiveMinimum", -math.inf)
    under = schema.get("exclusiveMaximum", math.inf)
    low = max(schema.get("minimum", -math.inf), over)
    high = min(schema.get("maximum", math.inf), under)
    found: list[float] = [0]
    if low > -math.inf:
        found += [math.ceil(low / step) * step, (math.ceil(low / step) + 1) * step]
    if high < math.inf:
        found += [math.floor(high / step) * step, (math.floor(high / step) - 1) * step]
    if not whole:
        found += [(max(low, -1e9) + min(high, 1e9)) / 2]
    fits = [v for v in found if low <= v <= high and over < v < under]
    return (fits or found)[0]
