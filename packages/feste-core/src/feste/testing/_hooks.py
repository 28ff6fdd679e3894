"""What the test kit offers: the fake backend, so that examples run without a key."""

from __future__ import annotations

from feste.hookspecs import hookimpl


@hookimpl
def feste_backends() -> dict[str, str]:
    """Offer the fake backend."""
    return {"fake": "feste.testing.fake_backend:FakeBackend"}
