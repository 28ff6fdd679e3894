"""From the setting ``scheduler`` to what runs the graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from feste.errors import ConfigError
from feste.plugins import registry
from feste.scheduler.driver import driver
from feste.scheduler.executor import Executor, Scheduler

__all__ = ["choose", "kind_of"]


def kind_of(target: Any) -> Any:
    """Return what a setting names: an Executor or Scheduler class, or a ``get`` function.

    A string is a name, or a URL looked up by its scheme; a function is a Dask ``get``; an Executor or
    Scheduler is itself; any other object is looked up by the top-level module of its class.

    :param target: the value of the setting.
    :raises UnknownName: if no plugin offers that name.
    :raises ConfigError: if it names something else.
    """
    found = target
    if isinstance(target, str):
        scheme, separator, _ = target.partition("://")
        found = registry().find("schedulers", scheme if separator else target)
    elif isinstance(target, (Executor, Scheduler)):
        return type(target)
    elif not callable(target):
        found = registry().find("schedulers", type(target).__module__.partition(".")[0])
    if inspect.isclass(found) and not issubclass(found, (Executor, Scheduler)):
        raise ConfigError(
            f"scheduler={target!r} is the class {found.__name__}, which derives neither from "
            "feste.scheduler.Executor nor from feste.scheduler.Scheduler"
        )
    if not callable(found):
        raise ConfigError(f"scheduler={target!r} is {found!r}, which cannot run a graph")
    return found


def choose(target: Any) -> Executor | Scheduler | Callable[..., Any]:
    """Return the hands, the whole scheduler, or the ``get`` function that a setting means.

    :param target: the value of the setting.
    :raises UnknownName: if no plugin offers that name.
    """
    found = kind_of(target)
    if isinstance(target, Scheduler):
        return target
    if isinstance(target, Executor):
        return driver().executor(id(target), lambda: target)
    if inspect.isclass(found) and issubclass(found, Executor):
        name = (found, target if isinstance(target, str) else id(target))
        return driver().executor(name, lambda: found(target))
    if inspect.isclass(found) and issubclass(found, Scheduler):
        scheduler: Scheduler = found(target)
        return scheduler
    get: Callable[..., Any] = found
    return get
