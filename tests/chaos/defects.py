"""Deliberate defects: each makes Feste wrong in one way, which a test of the suite has to notice."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["DEFECTS", "break_on_purpose"]

DEFECTS: dict[str, Callable[[], None]] = {}


def break_on_purpose(name: str | None) -> None:
    """Put a defect into this process.

    :param name: its name; None for none.
    """
    if name is not None:
        DEFECTS[name]()
