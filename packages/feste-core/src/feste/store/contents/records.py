"""An answer with its request as one record, for other programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from feste.store.contents.reader import Kept

__all__ = ["dumps", "iso", "record_of", "text_of"]


def record_of(kept: Kept) -> dict[str, Any]:
    """Return an answer with its request as one record.

    :param kept: the answer.
    """
    answer, asked, request = kept
    plugin, operation, endpoint, _, body = asked or (None,) * 5
    if request is not None:
        plugin, operation, endpoint = request["plugin"], request["operation"], request["endpoint"]
    response = json.loads(answer["response"])
    usage = response["usage"]
    named = body.get("model") if isinstance(body, Mapping) else None
    return {
        "key": answer["key"],
        "draw": answer["draw"],
        "plugin": plugin,
        "operation": operation,
        "endpoint": endpoint,
        "model": named if request is None else request["model"],
        "request": body,
        "response": response["payload"],
        "text": text_of(response["payload"]),
        "usage": usage and dict(zip(("input", "output", "cached"), usage)),
        "request_id": response["request_id"],
        "kept": iso(answer["kept"]),
        "session": None if request is None else request["session"],
        "run": None if request is None else request["run"],
        "source": answer["source"],
    }


def iso(moment: float) -> str:
    """Return a moment as ISO 8601 in UTC.

    :param moment: seconds since 1970.

    >>> iso(0.25)
    '1970-01-01T00:00:00.250Z'
    """
    text = datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def text_of(payload: Any) -> str | None:
    """Return the text of a reply, if its payload has one in one of the usual places.

    :param payload: the body of the response.

    >>> text_of({"choices": [{"message": {"role": "assistant", "content": "Yes."}}]})
    'Yes.'
    >>> text_of({"message": {"content": [{"type": "text", "text": "Yes."}]}})
    'Yes.'
    >>> text_of({"data": [{"embedding": [0.5]}]})
    """
    found = payload
    if isinstance(found, Mapping) and isinstance(found.get("choices"), list):
        found = found["choices"][0] if len(found["choices"]) == 1 else None
    if isinstance(found, Mapping) and isinstance(found.get("message"), Mapping):
        found = found["message"]
    if isinstance(found, Mapping):
        found = found.get("content", found.get("text"))
    if isinstance(found, list):
        texts = [p["text"] for p in found if isinstance(p, Mapping) and type(p.get("text")) is str]
        found = "".join(texts) if texts else None
    return found if isinstance(found, str) else None


def dumps(value: Any) -> str:
    """Return a value as JSON in ASCII without control characters; NaN and infinities become null.

    :param value: JSON, perhaps with the numbers that only Python's reader takes for JSON.

    >>> dumps(["\\x7f", float("nan")])
    '["\\\\u007f",null]'
    """
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError:  # what some providers send as NaN is no JSON
        return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return value
