"""The scheduler: the brain decides what runs next, and executors do the work."""

from pkgutil import extend_path

from feste.blocking import inside
from feste.packing import COLLECTION
from feste.scheduler.emission import Emission
from feste.scheduler.executor import QUICK, Executor, PyTask, Reporter, Scheduler
from feste.scheduler.hands.local import LocalExecutor
from feste.scheduler.hands.requests import Requests
from feste.scheduler.inputs import Later
from feste.scheduler.work import context_of, describe, evaluate, result_of

__path__ = extend_path(__path__, __name__)

__all__ = [
    "COLLECTION",
    "QUICK",
    "Emission",
    "Executor",
    "Later",
    "LocalExecutor",
    "PyTask",
    "Reporter",
    "Requests",
    "Scheduler",
    "context_of",
    "describe",
    "evaluate",
    "inside",
    "result_of",
]
