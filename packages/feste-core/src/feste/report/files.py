"""Write reports and pictures to files; the file extension selects the format."""

from __future__ import annotations

import html
from pathlib import Path

from feste.errors import ConfigError
from feste.wording import printable

__all__ = ["ending", "page", "write"]


def ending(path: str | Path, *known: str) -> str:
    """Return the extension of a file name, in lower case.

    :param path: the file.
    :param known: the extensions that can be written.
    :raises ConfigError: for any other.

    >>> ending("run.SVG", ".json", ".svg")
    '.svg'
    >>> ending("run.png", ".json", ".svg")
    Traceback (most recent call last):
    feste.errors.ConfigError: cannot write run.png: use .json or .svg
    """
    suffix = Path(path).suffix.lower()
    if suffix not in known:
        *first, last = known
        raise ConfigError(f"cannot write {path}: use {', '.join(first)} or {last}")
    return suffix


def page(title: str, body: str) -> str:
    """Return an HTML page for light and dark screens.

    :param title: its title.
    :param body: its elements as HTML.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(printable(title))}</title><style>body{{font-family:sans-serif;margin:2em}}"
        "td,th{padding:.2em .8em;text-align:right}svg{max-width:100%;height:auto}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def write(path: str | Path, text: str) -> None:
    """Write a text file; characters that UTF-8 cannot encode are escaped, as errors may quote any.

    :param path: the file.
    :param text: the text.
    """
    Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
