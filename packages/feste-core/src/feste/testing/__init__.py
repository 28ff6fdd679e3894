"""The test kit: a fake backend, a simulated provider, helpers for plugin authors."""

from feste.draw import forget as fresh_draws
from feste.testing.fake_backend import FakeBackend, FakeParams

__all__ = ["FakeBackend", "FakeParams", "fresh_draws"]
