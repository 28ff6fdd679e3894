"""What this plugin offers. It is read at every discovery, so it imports nothing heavy."""

from __future__ import annotations

from feste.hookspecs import hookimpl


@hookimpl
def feste_backends() -> dict[str, str]:
    """Offer the OpenAI backend."""
    return {"openai": "feste.backend.openai:OpenAI"}
