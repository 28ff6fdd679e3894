"""Register the test kit's fake backend, so that examples run without an API key."""

from __future__ import annotations

from feste.hookspecs import hookimpl


@hookimpl
def feste_backends() -> dict[str, str]:
    """Return the fake backend."""
    return {"fake": "feste.testing.fake_backend:FakeBackend"}
