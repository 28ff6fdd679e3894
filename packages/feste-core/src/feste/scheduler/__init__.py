"""The scheduler: a brain that decides and hands that work."""

from pkgutil import extend_path

from feste.scheduler.executor import Executor, PyTask, Scheduler
from feste.scheduler.local import LocalExecutor

__path__ = extend_path(__path__, __name__)

__all__ = ["Executor", "LocalExecutor", "PyTask", "Scheduler"]
