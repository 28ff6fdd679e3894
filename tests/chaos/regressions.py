"""Seeds that have once found something; the tests of these names run with them too, for ever."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["REGRESSIONS"]

REGRESSIONS: Mapping[str, tuple[int, ...]] = {}
