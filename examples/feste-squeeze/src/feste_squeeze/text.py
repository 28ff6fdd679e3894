"""White space that a reader of text does not miss."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["squeezed"]

_TEXTS = ("content", "text")  # what holds text in a message, or in a part of one


def squeezed(value: Any) -> Any:
    """Return a prompt without spare white space; the same object if there is none to spare.

    Spare are blanks at the end of a line, blank lines at both ends, and blank lines beyond one
    between others. Indentation stays, since it has a meaning in code, and so do blanks inside a
    line. A text of nothing but white space is left as it is.

    :param value: a text, a message, or a list of these; anything else is returned as it is.

    >>> squeezed("A list:  \\n\\n\\n\\n  - one \\n")
    'A list:\\n\\n  - one'
    >>> squeezed([{"role": "user", "content": "Hi  "}])
    [{'role': 'user', 'content': 'Hi'}]
    """
    made: Any = value
    if isinstance(value, str):
        lines = "\n".join([line.rstrip(" \t\r") for line in value.split("\n")])
        made = re.sub(r"\n{3,}", "\n\n", lines).strip("\n") or value
    elif type(value) is list:
        made = [squeezed(part) for part in value]
    elif type(value) is dict:
        made = {name: squeezed(part) if name in _TEXTS else part for name, part in value.items()}
    return value if made == value else made
