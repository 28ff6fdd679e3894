"""Finds, checks, lists and switches off plugins.

Installed distributions name their plugin modules in the entry-point group ``feste``. Nothing is
loaded at ``import feste``; the first look-up loads all of them, each guarded: one that fails is
named in a :class:`~feste.errors.PluginWarning` and skipped, the others work. Two environment
variables, read at that moment, take entry-point names separated by commas:
``FESTE_DISABLED_PLUGINS`` blocks those named, ``FESTE_LOAD_PLUGINS`` loads no others (empty: none).
"""

from __future__ import annotations

import importlib
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Any

import pluggy

from feste import context, hookspecs
from feste.context import Setting
from feste.errors import PluginError, PluginWarning, UnknownName, suggest

__all__ = ["PluginInfo", "Registry", "registry", "resolve"]

GROUP = "feste"
_BUILTINS = ("feste.optimization._hooks", "feste.scheduler._hooks", "feste.testing._hooks")


@dataclass(slots=True)
class PluginInfo:
    """What is known of one plugin; one row of ``feste plugins``.

    :param name: the entry point's name.
    :param module: the module that the entry point names.
    :param distribution: the distribution that ships it, with its version.
    :param state: ``"loaded"``, ``"disabled"`` or ``"broken"``.
    :param offers: what it registers, by hook: the names.
    :param error: why it is broken.
    """

    name: str
    module: str
    distribution: str
    state: str = "loaded"
    offers: dict[str, list[str]] = field(default_factory=dict)
    error: str = ""


def _entry_points() -> Iterator[tuple[Distribution, EntryPoint]]:
    """The entry points of the group, sorted so that nothing depends on the order of installation."""
    found: dict[tuple[str, str], tuple[Distribution, EntryPoint]] = {}
    for dist in distributions():
        for point in dist.entry_points:
            if point.group == GROUP:
                # the first on sys.path wins, as for imports
                found.setdefault((dist.name, point.name), (dist, point))
    yield from (found[key] for key in sorted(found))


def _names(variable: str) -> set[str] | None:
    text = os.environ.get(variable)
    return None if text is None else {n.strip() for n in text.split(",") if n.strip()}


class Registry:
    """The loaded plugins and what they offer.

    :param discover: look for installed distributions; False gives Feste's own parts only.

    >>> "local" in Registry(discover=False).schedulers
    True
    """

    def __init__(self, *, discover: bool = True) -> None:
        self.manager = pluggy.PluginManager(GROUP)
        self.manager.add_hookspecs(hookspecs)
        self.plugins: list[PluginInfo] = []
        self._owners: dict[tuple[str, str], str] = {}
        self.backends: dict[str, Any] = {}
        self.schedulers: dict[str, Any] = {}
        self.settings: dict[str, Setting] = {}
        self.optimizations: dict[str, Any] = {}
        for module in _BUILTINS:
            self._load(PluginInfo(module.split(".")[1], module, "feste-core"))
        if discover:
            self._discover()

    def _discover(self) -> None:
        allowed, blocked = _names("FESTE_LOAD_PLUGINS"), _names("FESTE_DISABLED_PLUGINS") or set()
        for dist, point in _entry_points():
            info = PluginInfo(point.name, point.value, f"{dist.name} {dist.version}")
            if point.name in blocked or (allowed is not None and point.name not in allowed):
                info.state = "disabled"
                self.plugins.append(info)
                continue
            try:
                self._load(info)
            except PluginError:
                raise
            except Exception as error:  # a plugin may raise anything at import
                self._broken(info, error)

    def _broken(self, info: PluginInfo, error: Exception) -> None:
        info.state, info.error = "broken", f"{type(error).__name__}: {error}"
        self.plugins.append(info)
        warnings.warn(
            f"plugin {info.name!r} of {info.distribution} ({info.module}) is skipped: "
            f"{info.error}. Repair or uninstall it, or set FESTE_DISABLED_PLUGINS={info.name}",
            PluginWarning,
            stacklevel=2,
        )

    def _load(self, info: PluginInfo) -> None:
        module = importlib.import_module(info.module)
        self.manager.register(module, name=f"{info.distribution}:{info.name}")
        try:
            self.manager.check_pending()
            offers = self._offers(module)
        except PluginError:
            raise
        except Exception:
            self.manager.unregister(module)
            raise
        for kind, offered in offers.items():
            for name, value in offered.items():
                self._add(kind, name, value, info)
        self.plugins.append(info)

    def _offers(self, module: Any) -> dict[str, dict[str, Any]]:
        """Ask one module what it offers, before anything of it is kept."""
        found: dict[str, dict[str, Any]] = {}
        for kind in _KINDS:
            caller = getattr(self.manager.hook, f"feste_{kind}")
            for impl in caller.get_hookimpls():
                if impl.plugin is not module:
                    continue
                offered = impl.function()
                if kind == "optimizations":
                    offered = {_pass_name(p): p for p in offered}
                if not isinstance(offered, Mapping):
                    raise TypeError(f"feste_{kind}() must return a mapping, not {offered!r}")
                found[kind] = dict(offered)
        return found

    def _add(self, kind: str, name: str, value: Any, info: PluginInfo) -> None:
        table: dict[str, Any] = getattr(self, kind)
        if kind == "settings" and name in context.SETTINGS:
            self._owners.setdefault((kind, name), "feste-core")
        owner = self._owners.setdefault((kind, name), info.distribution)
        if name in table or owner != info.distribution:
            raise PluginError(
                f"two plugins offer {kind} {name!r}: {owner} and {info.distribution}. Uninstall "
                f"one, or set FESTE_DISABLED_PLUGINS to the entry point of the other"
            )
        table[name] = value
        info.offers.setdefault(kind, []).append(name)

    def find(self, kind: str, name: str) -> Any:
        """Return what a plugin offers under a name; a ``"module:attribute"`` is imported.

        :param kind: ``"backends"`` or ``"schedulers"``.
        :param name: the name.
        :raises UnknownName: if no loaded plugin offers it, with the nearest name.
        """
        table: dict[str, Any] = getattr(self, kind)
        if name not in table:
            off = [p.name for p in self.plugins if p.state != "loaded"]
            hint = f" Not loaded: {', '.join(off)} (see `feste plugins`)." if off else ""
            package = f" Is feste-{kind[:-1]}-{name} installed?"
            raise UnknownName(f"no {kind[:-1]} {name!r}.{suggest(name, table)}{package}{hint}")
        return resolve(table[name])


_KINDS = ("backends", "optimizations", "schedulers", "settings")


def _pass_name(optimization: Any) -> str:
    name = getattr(optimization, "name", None)
    if not isinstance(name, str) or not callable(getattr(optimization, "apply", None)):
        raise TypeError(f"an optimization needs `name` and `apply(graph, cx)`: {optimization!r}")
    return name


def resolve(target: Any) -> Any:
    """Return the object that ``"module:attribute"`` names; anything else is returned as it is.

    :param target: a string of that form, or an object.
    :raises PluginError: if the string names nothing.

    >>> resolve("feste.errors:FesteError").__name__
    'FesteError'
    """
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError:
        raise PluginError(f"a plugin names {target!r}, but {module} has no {attribute!r}") from None
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            raise PluginError(f"a plugin names {target!r}, but there is no {module}") from None
        raise  # the module is there; something that it imports is not


_registry: Registry | None = None
_lock = threading.RLock()


def registry() -> Registry:
    """Return the registry of this process; the first call loads the plugins."""
    global _registry
    with _lock:
        if _registry is None:
            _registry = Registry()
    return _registry


def _declared() -> Mapping[str, Setting]:
    return registry().settings


context._extra = _declared
