"""Format names of classes, counts with their nouns and places of errors, and make texts safe to show."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable

__all__ = [
    "a_kind",
    "class_name",
    "counted",
    "how_plain",
    "kinds_first",
    "printable",
    "raised_at",
    "width",
    "wrapped",
]

#: The columns of a text that goes to no terminal, and the most that are used of a wide one.
_LEAST, _MOST = 80, 120


def width(usual: int = _LEAST, most: int = _MOST) -> int:
    """Return how many columns a line may have: as many as the terminal, from 80 to 120.

    :param usual: how many a text has that goes to no terminal.
    :param most: how many are used of a wide terminal.
    """
    return min(most, max(_LEAST, shutil.get_terminal_size((usual, 0)).columns))


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun in singular or plural.

    :param count: the count.
    :param noun: the singular noun.
    :param plural: the plural, if it is not the noun with an s.

    >>> counted(1, "request"), counted(20_000, "call"), counted(0, "box", "boxes")
    ('1 request', '20,000 calls', '0 boxes')
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def class_name(kind: type) -> str:
    """Return the name of a class with its module, unless it is one of Python's builtins.

    :param kind: the class.

    >>> from collections import deque
    >>> class_name(bool), class_name(deque)
    ('bool', 'collections.deque')
    """
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def a_kind(value: object) -> str:
    """Return the name of a value's class, as :func:`class_name` does, with an article.

    :param value: the value.

    >>> a_kind(1), a_kind("text")
    ('an int', 'a str')
    """
    name = class_name(type(value))
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def how_plain(value: object) -> str:
    """Return what to give in place of a value that is not plain data.

    :param value: the value; arrays and their numbers know the way, which is looked up in the class.

    >>> from array import array
    >>> how_plain(array("f")), how_plain(object())
    ('its .tolist()', 'text, numbers, lists or dicts of what is needed of it')
    """
    kind = type(value)
    if hasattr(kind, "item") and getattr(value, "ndim", None) == 0:
        return "its .item()"
    if hasattr(kind, "tolist"):
        return "its .tolist()"
    return "text, numbers, lists or dicts of what is needed of it"


def kinds_first(errors: Iterable[str]) -> list[str]:
    """Return texts of errors that differ, one of each kind before the others.

    :param errors: the texts; each begins with the name of its class, and that of the cause.

    >>> kinds_first(["Odd: a", "Odd: b", "Odd: a", "NodeError: OSError: c", "NodeError: KeyError: c"])
    ['Odd: a', 'NodeError: OSError: c', 'NodeError: KeyError: c', 'Odd: b']
    """
    texts = list(dict.fromkeys(errors))
    first: dict[tuple[str, ...], str] = {}
    for text in texts:
        name, *rest = text.split(": ", 2)
        first.setdefault((name, *(rest[:1] if name == "NodeError" else ())), text)
    return list(dict.fromkeys([*first.values(), *texts]))


def printable(text: str, *, but: str = "") -> str:
    """Return a text with everything escaped that a terminal could obey instead of showing it.

    :param text: the text, perhaps from a provider.
    :param but: characters that stay as they are, such as line ends.

    >>> printable("\x1b[2Jcafé\u202e")
    '\\\\x1b[2Jcafé\\\\u202e'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in but else ascii(c)[1:-1] for c in text)


def raised_at(error: BaseException) -> str:
    """Return ``file:line`` of the place where an error was raised.

    :param error: the error, as it was caught.
    """
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    return "nowhere" if step is None else f"{step.tb_frame.f_code.co_filename}:{step.tb_lineno}"


def wrapped(text: str, indent: int = 0, hang: int = 2, columns: int = 0) -> list[str]:
    """Wrap a text to lines of at most :func:`width` columns; longer words are not broken.

    :param text: the text; line ends in it count as spaces.
    :param indent: the indentation of the first line.
    :param hang: how much more further lines are indented.
    :param columns: other than :func:`width`.

    >>> [len(line) for line in wrapped("word " * 20, indent=4)]
    [78, 30]
    """
    return textwrap.wrap(
        text,
        columns or width(),
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + hang),
        break_long_words=False,  # users copy paths and names from the output
        break_on_hyphens=False,
    )
