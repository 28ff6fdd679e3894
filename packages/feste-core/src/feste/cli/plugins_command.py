"""``feste plugins``: list the installed plugins without importing any of them."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict
from typing import Any

from feste import context
from feste.errors import PluginError, PluginWarning
from feste.installed import PluginInfo, installed, look_into, misnamed
from feste.optimization import Optimizer
from feste.plugins import Registry, registry
from feste.wording import printable

__all__ = ["add"]


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command.

    :param commands: the commands of ``feste``.
    """
    plugins = commands.add_parser("plugins", help="list the plugins and what each registers")
    plugins.add_argument(
        "--check", action="store_true", help="import each one, and say which do not work"
    )
    plugins.add_argument("--json", action="store_true", help="print JSON")
    plugins.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    """Print the table, Feste's own parts first; return 1 if a plugin is broken."""
    plugins = _loaded() if arguments.check else _listed()
    if arguments.json:
        print(json.dumps([asdict(info) for info in plugins], indent=1))
    else:
        for info in plugins:
            print("\n".join(_lines(info)))
    contradicts = arguments.check and _contradicts()
    return 1 if contradicts or any(info.state == "broken" for info in plugins) else 0


def _loaded() -> list[PluginInfo]:
    """Return all plugins, imported."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PluginWarning)
        found = registry().plugins
    for one in caught:
        if "is skipped" not in str(one.message):  # the table shows that
            print(f"feste: {one.message}", file=sys.stderr)
    return found


def _contradicts() -> bool:
    """Return whether passes each want to go before the other, and tell which."""
    try:
        Optimizer(registry().optimizations.values())
    except PluginError as error:
        print(f"feste: {error}", file=sys.stderr)
        return True
    return False


def _listed() -> list[PluginInfo]:
    """Return all plugins as their metadata and sources tell them."""
    own = Registry(discover=False)
    found = installed()
    offered: set[str] = set()
    for info in found:
        look_into(info)
        offered.update(info.offers.get("settings", ()))
    for told in misnamed({i.name for i in found}, {*context.SETTINGS, *own.settings, *offered}):
        print(f"feste: {told}", file=sys.stderr)
    return [*own.plugins, *found]


def _lines(info: PluginInfo) -> list[str]:
    """Return the lines of a plugin in the table."""
    below = [f"{kind}: {', '.join(n) or 'see --check'}" for kind, n in info.offers.items()]
    below += [text for text in (info.file, info.error) if text]
    head = f"{info.name:<14} {info.state:<9} {info.origin}"
    return [head, *(printable(f"{'':<14} {line}") for line in below)]
