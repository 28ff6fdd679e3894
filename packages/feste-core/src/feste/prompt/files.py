"""Read the files that templates include: only those under the folder that the developer named."""

from __future__ import annotations

import os
import stat
from typing import Final

from feste.prompt.limits import SOURCE_LIMIT

__all__ = ["read_under"]

_NO_FOLLOW: Final = getattr(os, "O_NOFOLLOW", 0)
#: Another process that puts a pipe in the file's place must not make us wait.
_READ: Final = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def read_under(root: str, name: str) -> str:
    """Return the text of a file under a folder.

    Links are followed as long as they stay under the folder. What is opened is what was looked at:
    a part of the path that becomes a link meanwhile is refused.

    :param root: the folder.
    :param name: the path from there, its parts separated by slashes.
    :raises ValueError: if the name leads out of the folder, or is no file, not text, or too large.
    :raises OSError: if the file cannot be read.
    """
    parts = name.split("/")
    if not all(map(_is_plain, parts)):
        raise ValueError(
            f"{name!r} is no name of a file under the folder of the environment: write the path "
            "from there, as in 'shared/rules.md'"
        )
    top = os.path.realpath(root, strict=True)
    path = os.path.realpath(os.path.join(top, *parts), strict=True)
    if os.path.commonpath([top, path]) != top:
        raise ValueError(f"{name!r} leads out of {root!r}, the folder of the environment")
    with open(_opened(top, os.path.relpath(path, top).split(os.sep), name), "rb") as stream:
        data = stream.read(SOURCE_LIMIT + 1)
    if len(data) > SOURCE_LIMIT:
        raise ValueError(f"{name!r} is larger than {SOURCE_LIMIT:,} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name!r} is not UTF-8: {error.reason} at byte {error.start}") from None


def _is_plain(part: str) -> bool:
    """Return True if a part of a path means the same on every system, and nothing else than itself.

    Neither an empty part nor ``..``, no drive, no name that Windows reads as another one.
    """
    return part.isprintable() and not set(part) & set("\\:") and part == part.rstrip(". ") != ""


def _opened(top: str, parts: list[str], name: str) -> int:
    """Open a file part by part, following no link, and return its descriptor."""
    if os.open not in os.supports_dir_fd:  # Windows
        return _regular(os.open(os.path.join(top, *parts), _READ), name)
    folder = os.open(top, os.O_RDONLY | os.O_DIRECTORY | _NO_FOLLOW)
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | _NO_FOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        _check(os.stat(parts[-1], dir_fd=folder, follow_symlinks=False), name)
        return _regular(os.open(parts[-1], _READ | _NO_FOLLOW, dir_fd=folder), name)
    finally:
        os.close(folder)


def _regular(opened: int, name: str) -> int:
    try:
        _check(os.fstat(opened), name)
    except ValueError:
        os.close(opened)
        raise
    return opened


def _check(status: os.stat_result, name: str) -> None:
    if not stat.S_ISREG(status.st_mode):  # to open a device may already do something
        raise ValueError(f"{name!r} is not a regular file")
