"""Register the backend. This is imported whenever plugins are listed, so it must be light."""

from __future__ import annotations

from feste.hookspecs import hookimpl


@hookimpl
def feste_backends() -> dict[str, str]:
    """Return the OpenAI backend."""
    return {"openai": "feste.backend.openai:OpenAI"}
