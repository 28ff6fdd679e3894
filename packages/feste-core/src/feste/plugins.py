"""Find, check, list and disable plugins.

Installed distributions name their plugin modules in the entry-point group ``feste``. Importing
Feste loads none of them; the first lookup loads all. One that fails is named in a
:class:`~feste.errors.PluginWarning` and skipped. Two environment variables, read at that time, take
comma-separated entry-point names: ``FESTE_DISABLED_PLUGINS`` blocks the named plugins, and
``FESTE_LOAD_PLUGINS`` loads only the named ones (empty: none).
"""

from __future__ import annotations

import importlib
import inspect
import os
import threading
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import (
    Distribution,
    EntryPoint,
    PackageNotFoundError,
    distribution,
    distributions,
)
from typing import Any

import pluggy

from feste import __version__, context, hookspecs
from feste.context import Setting
from feste.errors import FesteWarning, PluginError, PluginWarning, UnknownName, suggest

__all__ = ["PluginInfo", "Registry", "registry", "resolve"]

GROUP = "feste"
_BUILTINS = ("feste.optimization._hooks", "feste.scheduler._hooks", "feste.testing._hooks")


@dataclass(slots=True)
class PluginInfo:
    """One plugin; a row of ``feste plugins``.

    :param name: the entry point's name.
    :param module: the module that the entry point names.
    :param distribution: the distribution that ships it.
    :param version: the distribution's version.
    :param state: ``"loaded"``, ``"disabled"`` or ``"broken"``.
    :param offers: the names that it registers, by hook.
    :param error: why it is broken, or an empty string.
    """

    name: str
    module: str
    distribution: str
    version: str
    state: str = "loaded"
    offers: dict[str, list[str]] = field(default_factory=dict)
    error: str = ""

    @property
    def origin(self) -> str:
        """The distribution with its version."""
        return f"{self.distribution} {self.version}"


def _installed() -> list[PluginInfo]:
    """Return the entry points of the group, sorted to be independent of installation order."""
    found: dict[tuple[str, str], PluginInfo] = {}
    for dist in distributions():
        try:
            points = [p for p in dist.entry_points if p.group == GROUP]
        except Exception:  # damaged metadata: the distribution cannot even be named
            continue
        for point in points:
            name, version = _title(dist)
            # the first on sys.path wins, as for imports
            found.setdefault((name, point.name), PluginInfo(point.name, point.value, name, version))
    return [found[key] for key in sorted(found)]


def _title(dist: Distribution) -> tuple[str, str]:
    """Return a distribution's name and version, or placeholders if its metadata is damaged."""
    try:
        name, version = dist.metadata["Name"], dist.version
    except Exception:
        name, version = None, None
    return name or "(a distribution without a name)", version or "?"


def _tell_of_namesake() -> None:
    """Warn if the distribution ``feste`` of 2023 is installed, which uses the same folder."""
    with suppress(PackageNotFoundError):
        version = distribution("feste").version
        warnings.warn(
            f"the distribution feste {version} and feste-core write into the same folder. Run `pip "
            "uninstall feste`, then `pip install --force-reinstall feste-core`",
            FesteWarning,
            stacklevel=2,
        )


def _names(variable: str) -> set[str] | None:
    text = os.environ.get(variable)
    return None if text is None else {n.strip() for n in text.split(",") if n.strip()}


class Registry:
    """The loaded plugins and everything they register.

    :param discover: load installed distributions; False loads Feste's own parts only.

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
            self._load(PluginInfo(module.split(".")[1], module, "feste-core", __version__))
        if discover:
            self._discover()

    def _discover(self) -> None:
        _tell_of_namesake()
        allowed, blocked = _names("FESTE_LOAD_PLUGINS"), _names("FESTE_DISABLED_PLUGINS") or set()
        for info in _installed():
            if info.name in blocked or (allowed is not None and info.name not in allowed):
                info.state = "disabled"
                self.plugins.append(info)
            else:
                self._load(info)

    def _load(self, info: PluginInfo) -> None:
        name = f"{info.origin}:{info.name}"
        try:
            plugin = EntryPoint(info.name, info.module, GROUP).load()
            self.manager.register(plugin, name=name)
            self.manager.check_pending()
            offers = self._offers(plugin)
        except (Exception, SystemExit) as error:  # a plugin may raise anything
            if self.manager.has_plugin(name):
                self.manager.unregister(name=name)
            if info.module in _BUILTINS:
                raise
            self._broken(info, error)
            return
        self.plugins.append(info)
        for kind, offered in offers.items():
            for key, value in offered.items():
                self._add(kind, key, value, info)
        hooks = [caller.name for caller in self.manager.get_hookcallers(plugin) or ()]
        heard = sorted(
            h.removeprefix("feste_") for h in hooks if h.removeprefix("feste_") not in _KINDS
        )
        if heard:
            info.offers["observes"] = heard

    def _broken(self, info: PluginInfo, error: BaseException) -> None:
        info.state = "broken"
        info.error = " ".join(f"{type(error).__name__}: {error}".split())  # on one line
        self.plugins.append(info)
        warnings.warn(
            f"plugin {info.name!r} of {info.origin} ({info.module}) is skipped: {info.error}. "
            f"Repair or uninstall it, or set FESTE_DISABLED_PLUGINS={info.name}",
            PluginWarning,
            stacklevel=2,
        )

    def _offers(self, plugin: Any) -> dict[str, dict[str, Any]]:
        """Collect and check everything a plugin registers, before any of it is stored."""
        found: dict[str, dict[str, Any]] = {}
        for kind, check in _KINDS.items():
            caller = getattr(self.manager.hook, f"feste_{kind}")
            for impl in caller.get_hookimpls():
                if impl.plugin is not plugin:
                    continue
                offered = impl.function()
                if kind == "optimizations":
                    offered = _by_name(offered)
                if not isinstance(offered, Mapping):
                    raise TypeError(f"feste_{kind}() must return a mapping, not {offered!r}")
                for name, value in offered.items():
                    if not isinstance(name, str) or not check(value):
                        what = f"{name!r}: {value!r}"
                        raise TypeError(f"feste_{kind}() offers {what}, not {_FORMS[kind]}")
                found[kind] = dict(offered)
        return found

    def _add(self, kind: str, name: str, value: Any, info: PluginInfo) -> None:
        table: dict[str, Any] = getattr(self, kind)
        if kind == "settings" and name in context.SETTINGS:
            self._owners.setdefault((kind, name), f"feste-core {__version__}")
        owner = self._owners.setdefault((kind, name), info.origin)
        if name in table or owner != info.origin:
            raise PluginError(
                f"two plugins offer {kind} {name!r}: {owner} and {info.origin}. Uninstall one, or "
                f"set FESTE_DISABLED_PLUGINS={info.name}"
            )
        table[name] = value
        info.offers.setdefault(kind, []).append(name)

    def find(self, kind: str, name: str) -> Any:
        """Return what is registered under a name; a ``"module:attribute"`` string is imported.

        :param kind: ``"backends"`` or ``"schedulers"``.
        :param name: the name.
        :raises UnknownName: if no loaded plugin registers it; the message suggests the nearest one.
        """
        table: dict[str, Any] = getattr(self, kind)
        if name not in table:
            off = [p.name for p in self.plugins if p.state != "loaded"]
            hint = f" Not loaded: {', '.join(off)} (see `feste plugins`)." if off else ""
            package = f" Is feste-{kind[:-1]}-{name} installed?"
            if ":" in name:
                package = " An address begins with its scheme, as in tls://host:port."
            raise UnknownName(f"no {kind[:-1]} {name!r}.{suggest(name, table)}{package}{hint}")
        return resolve(table[name])


def _names_something(value: Any) -> bool:
    """Return True for a ``"module:attribute"`` string or a callable."""
    return callable(value) or (isinstance(value, str) and all(value.partition(":")))


def _is_pass(value: Any) -> bool:
    return not inspect.isclass(value) and callable(getattr(value, "apply", None))


#: The kinds of objects that plugins register, each with the check of its values.
_KINDS: dict[str, Any] = {
    "backends": _names_something,
    "optimizations": _is_pass,
    "schedulers": _names_something,
    "settings": lambda value: isinstance(value, Setting),
}
_FORMS = {
    "backends": 'a name and a Backend class or "module:Class"',
    "optimizations": "an object with `name` and `apply(graph, cx)`",
    "schedulers": 'a name and a scheduler, a get function or "module:attribute"',
    "settings": "a name and a Setting",
}


def _by_name(optimizations: Any) -> dict[Any, Any]:
    """Return optimizations by name; raise if a name occurs twice."""
    if not isinstance(optimizations, Iterable):
        raise TypeError(
            f"feste_optimizations() must return a list of passes, not {optimizations!r}"
        )
    named: dict[Any, Any] = {}
    for one in optimizations:
        name = getattr(one, "name", None)
        if name in named:
            raise TypeError(f"feste_optimizations() offers two passes {name!r}")
        named[name] = one
    return named


def resolve(target: Any) -> Any:
    """Return the object named by a ``"module:attribute"`` string; return other objects unchanged.

    :param target: a string of that form, or an object.
    :raises PluginError: if the string names nothing that exists.

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
        raise  # the module exists, but an import inside it fails


_registry: Registry | None = None
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # in a forked child, nothing would release the lock
    os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.RLock()))


def registry() -> Registry:
    """Return the registry of this process; the first call loads the plugins."""
    global _registry
    with _lock:
        if _registry is None:
            _registry = Registry()
    return _registry


def _declared() -> Mapping[str, Setting]:
    return registry().settings


context.declare(_declared)
