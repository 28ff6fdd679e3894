"""A key that must be found nowhere, and the search for it in whatever a program leaves behind."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterator
from urllib.parse import quote

#: Of no known form, so that only knowing it blanks it; some of it looks different in URLs and JSON.
KEY = "Ynarac/7fQz3+Wk9vB2xR8=Lm4Tt6HjP1sDgN5cX0eUa"
#: The characters of a piece that gives the key away; a text with twice as many has a whole piece.
PIECE = 8
#: What may stand between the characters of a key that is split: over lines, strings, colours, tags.
_BETWEEN = re.compile(rb"\x1b\[[\d;]*m|</?[a-z][^<>]{0,80}>|\\[nrt]|[\s\"'|,\\]|\xe2\x94\x82")


def forms(key: str = KEY) -> dict[str, bytes]:
    """What becomes of a key, by the name of the form."""
    data = key.encode()
    found = {
        "plain": data,
        "percent": quote(key, safe="").encode(),
        "hex": data.hex().encode(),
        "reversed": data[::-1],
        "utf-16": key.encode("utf-16-le"),
    }
    for before in range(3):  # wherever it begins in what is encoded
        text = b64encode(b"\0" * before + data)[(0, 2, 3)[before] : (before + len(data)) * 8 // 6]
        found[f"base64 {before}"] = text
        found[f"base64url {before}"] = text.translate(bytes.maketrans(b"+/", b"-_"))
    return found


def pieces(text: bytes) -> Iterator[bytes]:
    """The pieces of a form, one after the other."""
    for start in range(0, len(text) - PIECE + 1, PIECE):
        yield text[start : start + PIECE]


_PIECES = [(name, piece) for name, form in forms().items() for piece in pieces(form)]


def hits(data: bytes | str) -> list[str]:
    """The forms in which a key, or a piece of it, is in some data, also split."""
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    raw = re.sub(rb"\0{64,}", b"\0", raw)  # files that only hold space
    both = {raw, _BETWEEN.sub(b"", raw)}
    return sorted({name for name, piece in _PIECES if any(piece in text for text in both)})
