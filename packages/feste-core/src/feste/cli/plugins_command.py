"""``feste plugins``: list the installed plugins without importing any SDK."""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict
from typing import Any

from feste.errors import PluginWarning
from feste.plugins import registry

__all__ = ["add"]


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command.

    :param commands: the commands of ``feste``.
    """
    plugins = commands.add_parser("plugins", help="list the plugins and what each registers")
    plugins.add_argument("--json", action="store_true", help="print JSON")
    plugins.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    """Print the table; return 1 if a plugin is broken."""
    rows, broken = _table()
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        for row in rows:
            print(f"{row['name']:<14} {row['state']:<9} {row['distribution']} {row['version']}")
            for kind, names in row["offers"].items():
                print(f"{'':<14} {kind}: {', '.join(names)}")
            if row["error"]:
                print(f"{'':<14} {row['error']}")
    return 1 if broken else 0


def _table() -> tuple[list[dict[str, Any]], bool]:
    """Return a row for each plugin, and whether one is broken.

    Feste's own parts come first.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # the table shows the error
        rows = [asdict(info) for info in registry().plugins]
    return rows, any(row["state"] == "broken" for row in rows)
