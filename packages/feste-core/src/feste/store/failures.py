"""The errors of a store: what stopped it, said so that the user knows what to do."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from feste.errors import FesteError, JournalDamaged, JournalError, JournalFailed

__all__ = ["BUSY", "damaged", "described", "gone", "is_damage"]

#: Seconds to wait for another program that holds the file, such as a shell of SQLite.
BUSY = 30


def damaged(path: Path, said: str) -> JournalDamaged:
    """Return the error for a store that is damaged.

    :param path: the store's file.
    :param said: what is wrong with it.
    """
    return JournalDamaged(
        f"{path} is damaged ({said}). Nothing was sent or changed. `feste store salvage {path}` makes a "
        "new store of all that is good in it and keeps the damaged file"
    )


def is_damage(error: sqlite3.Error) -> bool:
    """Whether an error of SQLite says that the file is damaged.

    :param error: the error.
    """
    name = getattr(error, "sqlite_errorname", "")
    return name == "SQLITE_NOTADB" or name.startswith("SQLITE_CORRUPT")


def gone(path: Path) -> JournalFailed:
    """Return the error for a store that was removed or replaced while it was open.

    :param path: the store's file.
    """
    return JournalFailed(
        f"{path}, or the .lock file beside it, was removed or replaced while it was in use: nothing "
        "more is sent. What was not written before is in .partial only"
    )


def described(error: BaseException, path: Path) -> FesteError:
    """Return the Feste error for what stopped a journal.

    :param error: the exception.
    :param path: the store's file.
    """
    if isinstance(error, FesteError):
        return error
    made: JournalError
    if isinstance(error, sqlite3.Error):
        name = getattr(error, "sqlite_errorname", "")
        if is_damage(error):
            made = damaged(path, str(error))
        elif name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            made = JournalFailed(
                f"{path} could not be written: another program has held it for {BUSY} seconds, perhaps a "
                "shell of SQLite. Nothing more is sent; end it, then run the program again"
            )
        else:
            made = JournalFailed(
                f"{path} could not be written ({error}; {name}): nothing more is sent. Make room, then "
                "run the program again: it buys only what is missing"
            )
    elif isinstance(error, OSError):
        made = JournalFailed(f"{path} cannot be used: {error.strerror or error}; nothing was sent")
    else:
        made = JournalError(f"{path} cannot be used: {type(error).__name__}: {error}")
    made.__cause__ = error
    return made
