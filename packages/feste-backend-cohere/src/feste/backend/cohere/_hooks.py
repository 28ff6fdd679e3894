"""What this distribution offers to Feste; so light that looking for plugins costs nothing."""

from __future__ import annotations

from feste import hookimpl


@hookimpl
def feste_backends() -> dict[str, str]:
    """Offer the backend; its module is imported when it is first asked for."""
    return {"cohere": "feste.backend.cohere:Cohere"}
