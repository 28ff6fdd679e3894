"""What Feste finds by the entry point; light, because listing the plugins imports it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import feste
from feste.context import Setting
from feste.optimization import Optimization


@feste.hookimpl
def feste_optimizations() -> Iterable[Optimization]:
    """Register both passes."""
    from feste_squeeze.passes import Blanks, Squeeze

    return [Squeeze(), Blanks()]


@feste.hookimpl
def feste_settings() -> Mapping[str, Setting]:
    """Declare the share from which ``blanks`` speaks up."""
    return {
        "squeeze_worth": Setting(0.05, float, "the share of spare tokens that is worth a remark")
    }
