"""The test kit: a fake backend, a simulated provider, and contracts for plugin authors."""

from feste.testing.backend_contract import BackendContract
from feste.testing.fake_backend import FakeBackend, FakeParams
from feste.testing.fresh import fresh_draws
from feste.testing.random_graphs import random_graph
from feste.testing.sim_limits import Limiter
from feste.testing.sim_server import (
    Billed,
    Fault,
    LedgerEntry,
    LoggedRequest,
    Outage,
    ServerLimits,
    SimServer,
    Totals,
)
from feste.testing.soundness import differences
from feste.testing.traces import Example
from feste.testing.virtual_clock import VirtualClock

__all__ = [
    "BackendContract",
    "Billed",
    "Example",
    "FakeBackend",
    "FakeParams",
    "Fault",
    "LedgerEntry",
    "Limiter",
    "LoggedRequest",
    "Outage",
    "ServerLimits",
    "SimServer",
    "Totals",
    "VirtualClock",
    "differences",
    "fresh_draws",
    "random_graph",
]
