"""``feste plugins``: list the installed plugins without importing any SDK."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any

from feste.errors import PluginWarning
from feste.plugins import registry

__all__ = ["plugins_table"]


def plugins_table() -> tuple[list[dict[str, Any]], bool]:
    """Return a row for each plugin, and whether one is broken.

    Feste's own parts come first.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # the table shows the error
        rows = [asdict(info) for info in registry().plugins]
    return rows, any(row["state"] == "broken" for row in rows)
