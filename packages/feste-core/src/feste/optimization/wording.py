"""Format counts with their nouns, and wrap lines to the width of a terminal."""

from __future__ import annotations

import textwrap

__all__ = ["WIDTH", "counted", "wrapped"]

#: The default width of a terminal in columns.
WIDTH = 80


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun in singular or plural.

    :param count: the count.
    :param noun: the singular noun.
    :param plural: the plural, if it is not the noun with an s.

    >>> counted(1, "request"), counted(20_000, "call"), counted(0, "box", "boxes")
    ('1 request', '20,000 calls', '0 boxes')
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def wrapped(text: str, indent: int = 0) -> list[str]:
    """Wrap a text to lines of at most :data:`WIDTH` columns; longer words are not broken.

    :param text: the text; line ends in it count as spaces.
    :param indent: the indentation of the first line; further lines are indented by two more.

    >>> [len(line) for line in wrapped("word " * 20, indent=4)]
    [78, 30]
    """
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 2),
        break_long_words=False,  # users copy paths and names from the output
        break_on_hyphens=False,
    )
