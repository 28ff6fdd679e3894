"""The ``feste`` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import feste
from feste.cli.plugins_command import plugins_table
from feste.errors import FesteError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    :param argv: the arguments; None uses the process's.
    :returns: the exit code.
    """
    parser = argparse.ArgumentParser(prog="feste", description="Graphs of LLM calls.")
    parser.add_argument("--version", action="version", version=f"feste {feste.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    plugins = commands.add_parser("plugins", help="list the plugins and what each registers")
    plugins.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    try:
        rows, broken = plugins_table()
    except FesteError as error:
        print(f"feste: {error}", file=sys.stderr)
        return 1
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
