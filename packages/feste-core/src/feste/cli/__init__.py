"""The ``feste`` command."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

import feste
from feste.cli import plugins_command, store_command
from feste.errors import FesteError
from feste.wording import printable

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    :param argv: the arguments; None uses the process's.
    :returns: the exit code.
    """
    parser = argparse.ArgumentParser(prog="feste", description="Graphs of LLM calls.")
    parser.add_argument("--version", action="version", version=f"feste {feste.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (plugins_command, store_command):
        command.add(commands)
    arguments = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name may have letters it cannot show
    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()
    except FesteError as error:
        print(f"feste: {printable(str(error))}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `feste ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # no permission, for example
        print(f"feste: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return code
