"""What servers get wrong when a reply has several answers."""

from __future__ import annotations

import random
from typing import Any

__all__ = ["arranged", "relisted"]


def arranged(given: list[Any], quirk: str) -> list[Any]:
    """Return the answers of a reply as a server with a quirk sends them; a single one has none.

    :param given: the answers, those that have an ``index`` in its order.
    :param quirk: ``"shuffled"``, always in the same way and never unchanged; ``"duplicated"``, with
        the first in place of the last; ``"extra"``, with one more; any other leaves them as they are.

    >>> arranged([{"index": 0}, {"index": 1}], "shuffled")
    [{'index': 1}, {'index': 0}]
    """
    if len(given) < 2:
        return given
    match quirk:
        case "shuffled":
            order = random.Random(len(given)).sample(given, len(given))
            return order if order != given else given[::-1]
        case "duplicated":
            return [*given[:-1], given[0]]
        case "extra":
            last = given[-1]
            numbered = isinstance(last, dict) and "index" in last
            return [*given, {**last, "index": len(given)} if numbered else last]
    return given


def relisted(body: Any, kind: str) -> Any:
    """Return a reply as a fault leaves its answers, which are its first list; itself if it is whole.

    :param body: the reply as JSON.
    :param kind: ``"wrong_count"``, without the last answer, or a quirk of :func:`arranged`.

    >>> relisted({"model": "m", "data": [1, 2]}, "wrong_count")
    {'model': 'm', 'data': [1]}
    """
    if isinstance(body, list):
        return body[:-1] if kind == "wrong_count" else arranged(body, kind)
    if isinstance(body, dict):
        for name, value in body.items():
            other = relisted(value, kind)
            if other is not value:
                return {**body, name: other}
            if isinstance(value, list):
                return body
    return body
