"""Counts and lines as people read them: nouns in their number, nothing wider than a terminal."""

from __future__ import annotations

import textwrap

__all__ = ["WIDTH", "counted", "wrapped"]

#: The columns of a terminal that nobody has made wider.
WIDTH = 80


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun.

    :param count: how many.
    :param noun: what is counted, for one.
    :param plural: the noun for several, if it is not made with an s.

    >>> counted(1, "request"), counted(20_000, "call"), counted(0, "box", "boxes")
    ('1 request', '20,000 calls', '0 boxes')
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def wrapped(text: str, indent: int = 0) -> list[str]:
    """Return a text as lines of at most :data:`WIDTH` columns; a longer word is left whole.

    :param text: the text; line ends in it count as spaces.
    :param indent: the columns before the first line; the others begin two further to the right.

    >>> [len(line) for line in wrapped("word " * 20, indent=4)]
    [78, 30]
    """
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 2),
        break_long_words=False,  # paths and names are copied from here
        break_on_hyphens=False,
    )
