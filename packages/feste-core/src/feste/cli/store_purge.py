"""``feste store purge``: delete answers, after asking."""

from __future__ import annotations

import argparse
import re
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feste.errors import ConfigError
from feste.wording import counted, printable, wrapped

if TYPE_CHECKING:
    from feste.store.contents.purge import Purged

__all__ = ["add_options", "run"]

_SECONDS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def add_options(purge: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    :param purge: its parser.
    """
    add = purge.add_argument
    add(
        "--before",
        type=_moment,
        metavar="WHEN",
        help="what is older: 30d, 12h, 2w, or a local date such as 2026-01-31",
    )
    add("--session", type=int, metavar="N", help="what this session bought")
    add("--model", metavar="M", help="what was asked of this model")
    add("--key", metavar="K", help="the answers to one request, by its key")
    add(
        "--tasks",
        choices=["failed", "unknown", "all"],
        help="once=True tasks that ended so; they may run again",
    )
    add("--prompts", action="store_true", help="prompts only; their answers stay")
    add("--all", action="store_true", help="everything")
    add("--dry-run", action="store_true", help="count only")
    add("--yes", action="store_true", help="do not ask")


def run(path: Path, arguments: argparse.Namespace) -> int:
    """Delete what the options choose; return the exit code.

    :param path: the store.
    :param arguments: the options.
    """
    from feste.store.contents.purge import purge

    choice: dict[str, Any] = {
        name: getattr(arguments, name) for name in ("before", "session", "model", "key", "tasks")
    }
    choice.update(prompts_only=arguments.prompts, everything=arguments.all)
    if not any(value is not None and value is not False for value in choice.values()):
        raise ConfigError(
            "say what is deleted: --before, --session, --model, --key, --tasks, --prompts or --all"
        )
    if choice["everything"] and sum(value not in (None, False) for value in choice.values()) > 1:
        raise ConfigError("--all takes no other choice")
    if choice["prompts_only"] and choice["tasks"]:
        raise ConfigError("--prompts and --tasks exclude each other")
    planned = purge(path, **choice, dry_run=True)
    shown = printable(str(path))
    if arguments.dry_run:
        _tell(f"{shown}: {_counts(planned)} would be deleted", planned)
        return 0
    fits = planned.answers or planned.prompts or planned.requests or planned.quarantine
    if fits and not arguments.yes:  # else it only overwrites what a purge that was killed left
        _tell(f"{shown}: {_counts(planned)} will be deleted", planned)
        if not _confirmed():
            print("nothing was deleted")
            return 1
    done = purge(path, **choice)
    _tell(f"{shown}: {_counts(done)} deleted", done)
    return 0


def _confirmed() -> bool:
    if not sys.stdin.isatty():
        raise ConfigError(
            "there is no terminal to ask on: add --yes to delete, or --dry-run to look"
        )
    print("Delete them for good? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _counts(purged: Purged) -> str:
    parts = [
        counted(purged.answers, "answer"),
        counted(purged.prompts, "prompt"),
        counted(purged.requests, "request"),
    ]
    if purged.quarantine:
        parts.append(counted(purged.quarantine, "damaged row"))
    return ", ".join(parts)


def _tell(headline: str, purged: Purged) -> None:
    lines = wrapped(headline)
    if purged.tasks_left:
        said = f"{counted(purged.tasks_left, 'start')} of once=True tasks fit too and are left: "
        lines += wrapped(f"{said}add --tasks all for those, which then run again", 2)
    if purged.copies:
        names = ", ".join(printable(copy.name) for copy in purged.copies)
        lines += wrapped(f"not touched, and may hold the same texts: {names}", 2)
    print("\n".join(lines))


def _moment(text: str) -> float:
    """Return a moment in seconds since 1970, of an age such as 30d or of a local date.

    >>> _moment("1970-01-02T00:00+00:00")
    86400.0
    """
    age = re.fullmatch(r"([0-9]{1,9})([mhdw])", text)
    if age is not None:
        return time.time() - int(age[1]) * _SECONDS[age[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        said = f"{text!r} is neither an age such as 30d nor a date such as 2026-01-31"
        raise argparse.ArgumentTypeError(said) from None
