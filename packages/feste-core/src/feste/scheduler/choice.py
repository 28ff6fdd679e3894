"""Turn the setting ``scheduler`` into the object that runs the graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import Any

from feste.context import Settings
from feste.errors import ConfigError
from feste.plugins import registry
from feste.scheduler.driver import driver
from feste.scheduler.executor import Executor, Scheduler

__all__ = ["choose", "kind_of"]


def kind_of(target: Any) -> Any:
    """Resolve a setting to an Executor class, a Scheduler class, or a ``get`` function.

    A string is a registered name, or a URL looked up by its scheme. A function is taken as a Dask
    ``get``. An Executor or Scheduler gives its class. Anything else is looked up by the top-level
    module of its class.

    :param target: the value of the setting.
    :raises UnknownName: if no plugin offers that name.
    :raises ConfigError: if it is none of these.
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


def choose(settings: Settings) -> Executor | Scheduler | Callable[..., Any]:
    """Return the executor, the scheduler, or the ``get`` function that the settings select.

    :param settings: the settings of the run: ``scheduler``, and what its executor is made with.
    :raises UnknownName: if no plugin offers that name.
    """
    target = settings["scheduler"]
    found = kind_of(target)
    if isinstance(target, Scheduler):
        return target
    if isinstance(target, Executor):
        return driver().executor(id(target), lambda: target)
    if inspect.isclass(found) and issubclass(found, Executor):
        options = {name: settings[name] for name in found.options}
        values = [_hashable(value) for value in options.values()]
        name = (found, target if isinstance(target, str) else id(target), *values)
        return driver().executor(name, lambda: found(target, **options))
    if inspect.isclass(found) and issubclass(found, Scheduler):
        scheduler: Scheduler = found(target)
        return scheduler
    get: Callable[..., Any] = found
    return get


def _hashable(value: Any) -> Hashable:
    """Return a value, or what is equal for equal lists, dicts and sets of plain values."""
    try:
        hash(value)
    except TypeError:
        return (type(value), repr(value))
    return value  # type: ignore[no-any-return]
