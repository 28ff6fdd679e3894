"""``feste store``: look into a store of paid answers, copy them, delete them, check the file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from feste import context
from feste.cli import store_purge
from feste.errors import ConfigError
from feste.wording import counted, printable, wrapped

__all__ = ["add"]

_ROWS = ("session", "answer", "prompt", "request")


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command.

    :param commands: the commands of ``feste``.
    """
    text = "Look into a store of paid answers."
    store = commands.add_parser("store", help="look into a store of paid answers", description=text)
    inner = store.add_subparsers(dest="action", required=True)
    listing = _parser(inner, "list", _list, "list the sessions: the programs that wrote the store")
    listing.add_argument("--json", action="store_true", help="print JSON")
    show = _parser(inner, "show", _show, "show totals, and what ended without a known answer")
    show.add_argument("--session", type=int, metavar="N", help="only this session")
    show.add_argument("--json", action="store_true", help="print JSON")
    export = _parser(inner, "export", _export, "write the answers to a file")
    export.add_argument(
        "--out", required=True, metavar="FILE", help="the file; - for standard output"
    )
    export.add_argument(
        "--format",
        choices=["jsonl", "parquet"],
        help="without it the end of FILE tells: .parquet, else jsonl",
    )
    export.add_argument("--session", type=int, metavar="N", help="only what this session bought")
    export.add_argument("--force", action="store_true", help="replace an existing file")
    purge = _parser(inner, "purge", _purge, "delete answers for good")
    store_purge.add_options(purge)
    verify = _parser(inner, "verify", _verify, "check the whole file; exit code 1 if it is damaged")
    verify.add_argument("--json", action="store_true", help="print JSON")
    _parser(
        inner,
        "salvage",
        _salvage,
        "make a new store of all that is good in a damaged one, which is kept in a folder beside it",
    )


def _parser(
    inner: argparse._SubParsersAction[Any], name: str, run: Any, text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = inner.add_parser(
        name, help=text, description=f"{text.capitalize()}."
    )
    parser.add_argument(
        "path", nargs="?", metavar="PATH", help="the store; FESTE_STORE if not given"
    )
    parser.set_defaults(run=run)
    return parser


def _path(arguments: argparse.Namespace) -> Path:
    """Return the store that is meant: the argument, or the setting."""
    given = arguments.path or context.get("store")
    if not given:
        raise ConfigError("no store is named: give its path, or set FESTE_STORE")
    return Path(given)


def _list(arguments: argparse.Namespace) -> int:
    from feste.cli import store_text
    from feste.store.contents.reader import Reader
    from feste.store.contents.summary import summarize

    with Reader(_path(arguments)) as reader:
        summary = summarize(reader)
        if arguments.json:
            _print_json([store_text.session_as_json(s) for s in summary.sessions.values()])
        else:
            _print(store_text.sessions(summary))
        _warn(reader.damaged)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from feste.cli import store_text
    from feste.store.contents.reader import Reader
    from feste.store.contents.summary import summarize

    with Reader(_path(arguments)) as reader:
        summary = summarize(reader, arguments.session)
        quarantine = reader.quarantine()
        if arguments.json:
            _print_json(store_text.as_json(reader, summary, quarantine))
        else:
            _print(store_text.overview(reader, summary, quarantine))
        _warn(reader.damaged)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from feste.store.contents.export import export

    done = export(
        _path(arguments),
        arguments.out,
        arguments.format or ("parquet" if arguments.out.endswith(".parquet") else "jsonl"),
        session=arguments.session,
        force=arguments.force,
    )
    where = "standard output" if arguments.out == "-" else printable(arguments.out)
    print(f"{counted(done.answers, 'answer')} written to {where}", file=sys.stderr)
    return _warn(done.damaged)


def _purge(arguments: argparse.Namespace) -> int:
    return store_purge.run(_path(arguments), arguments)


def _verify(arguments: argparse.Namespace) -> int:
    from feste.store.repair.verify import verify

    path = _path(arguments)
    verdict = verify(path)
    if arguments.json:
        _print_json({**asdict(verdict), "quarantined": verdict.quarantined})
        return 1 if verdict.problems else 0
    name = printable(str(path))
    told = ", ".join(counted(verdict.good[f"{row}s"], row) for row in _ROWS)
    if verdict.quarantined:
        told += f", {counted(verdict.quarantined, 'damaged row')} in quarantine"
    said = f"{counted(len(verdict.problems), 'problem')} found" if verdict.problems else "good"
    _print(wrapped(f"{name}: {said}; {told}"))
    for problem in verdict.problems:
        _print(wrapped(printable(problem), 2))
    if verdict.problems:
        _print(wrapped(_advice(name, verdict.opens), 2))
    return 1 if verdict.problems else 0


def _advice(name: str, opens: bool) -> str:
    if opens:
        return "programs can use it: a damaged row is set aside when it is met, and bought again"
    return f"programs cannot use it: `feste store salvage {name}` makes a new store of what is good"


def _salvage(arguments: argparse.Namespace) -> int:
    from feste.store.repair.salvage import salvage

    for line in salvage(_path(arguments)).lines:
        print(printable(line))
    return 0


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def _warn(damaged: Iterable[tuple[str, Any]]) -> int:
    """Name the damaged rows that were left out; return the exit code."""
    names = [f"{table} {printable(str(name))}" for table, name in sorted(damaged, key=str)]
    if not names:
        return 0
    more = f" and {len(names) - 20:,} more" if len(names) > 20 else ""
    said = f"feste: {counted(len(names), 'damaged row')} left out: {', '.join(names[:20])}{more}"
    print(said, file=sys.stderr)
    return 1
