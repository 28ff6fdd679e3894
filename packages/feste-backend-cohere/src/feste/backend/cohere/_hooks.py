"""Register the backend. This is imported whenever plugins are listed, so it must be light."""

from __future__ import annotations

from feste import hookimpl


@hookimpl
def feste_backends() -> dict[str, str]:
    """Return the Cohere backend; its module is imported on first use."""
    return {"cohere": "feste.backend.cohere:Cohere"}
