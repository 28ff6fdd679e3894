"""Find, check, list and disable plugins.

Installed distributions name their plugin modules in the entry-point group ``feste``. Importing
Feste loads none of them; the first lookup loads all. One that fails is named in a
:class:`~feste.errors.PluginWarning` and skipped. Two environment variables, read at that time, take
comma-separated entry-point names: ``FESTE_DISABLED_PLUGINS`` blocks the named plugins, and
``FESTE_LOAD_PLUGINS`` loads only the named ones (empty: none). A name in them that no plugin has, or
a variable whose name is nearly that of a setting, is told in a warning, too.
"""

from __future__ import annotations

import importlib
import inspect
import os
import threading
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution
from typing import Any

import pluggy

from feste import __version__, context, hookspecs
from feste.context import Setting
from feste.errors import FesteWarning, PluginError, PluginWarning, UnknownName, suggest
from feste.installed import GROUP, PluginInfo, installed, misnamed
from feste.wording import printable

__all__ = ["PluginInfo", "Registry", "registry", "resolve"]

_BUILTINS = ("feste.optimization._hooks", "feste.scheduler._hooks", "feste.testing._hooks")


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
        found = installed()
        for info in found:
            if info.state == "enabled":
                self._load(info)
            elif info.state == "disabled":
                self.plugins.append(info)
            else:  # made for another version of feste-core: it is not even imported
                self._broken(info)
        for told in misnamed({info.name for info in found}, {*context.SETTINGS, *self.settings}):
            warnings.warn(told, PluginWarning, stacklevel=2)

    def _load(self, info: PluginInfo) -> None:
        name = f"{info.origin}:{info.name}"
        try:
            plugin = EntryPoint(info.name, info.module, GROUP).load()
            self.manager.register(plugin, name=name)
            self.manager.check_pending()
            self._check_hooks(plugin)
            offers = self._offers(plugin)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin may raise anything
            if self.manager.has_plugin(name):
                self.manager.unregister(name=name)
            if info.module in _BUILTINS:
                raise
            info.error = f"{type(error).__name__}: {error}"
            self._broken(info)
            return
        info.state = "loaded"
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

    def _broken(self, info: PluginInfo) -> None:
        info.state = "broken"
        info.error = printable(" ".join(info.error.split()))  # on one line
        self.plugins.append(info)
        warnings.warn(
            f"plugin {info.name!r} of {info.origin} ({info.module}) is skipped: {info.error}. "
            f"Repair or uninstall it, or set FESTE_DISABLED_PLUGINS={info.name}",
            PluginWarning,
            stacklevel=2,
        )

    def _check_hooks(self, plugin: Any) -> None:
        """Refuse hooks whose call would do nothing: nobody awaits or iterates over what it returns."""
        for caller in self.manager.get_hookcallers(plugin) or ():
            observes = caller.name.removeprefix("feste_") not in _KINDS
            for impl in caller.get_hookimpls():
                if impl.plugin is not plugin:
                    continue
                if inspect.iscoroutinefunction(impl.function) or inspect.isasyncgenfunction(
                    impl.function
                ):
                    raise TypeError(f"{caller.name} is an `async def`: write it as a `def`")
                if observes and inspect.isgeneratorfunction(impl.function):
                    raise TypeError(f"{caller.name} has a `yield`: it would never run")

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
                    if kind == "optimizations":  # by name, since they stand above plugins
                        resolve("feste.optimization.base:check_pass")(value)
                found[kind] = dict(offered)
        return found

    def _add(self, kind: str, name: str, value: Any, info: PluginInfo) -> None:
        table: dict[str, Any] = getattr(self, kind)
        if kind == "settings" and name in context.SETTINGS:
            self._owners.setdefault((kind, name), f"feste-core {__version__}")
        owner = self._owners.setdefault((kind, name), info.origin)
        if name in table or owner != info.origin:
            first, second, what = owner, info.origin, "Uninstall one, or set"
            other = self.plugin_of(kind, name)
            if owner == info.origin and other is not None:  # two entry points of one distribution
                first, second, what = f"{other.name!r}", f"{info.name!r} of {owner}", "Set"
            raise PluginError(
                f"two plugins offer {kind} {name!r}: {first} and {second}. {what} "
                f"FESTE_DISABLED_PLUGINS={info.name}"
            )
        table[name] = value
        info.offers.setdefault(kind, []).append(name)

    def plugin_of(self, kind: str, name: str) -> PluginInfo | None:
        """Return the plugin that registers a name, or None if none of the loaded ones does.

        :param kind: such as ``"backends"`` or ``"optimizations"``.
        :param name: the name.
        """
        return next((p for p in self.plugins if name in p.offers.get(kind, ())), None)

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
        try:
            return resolve(table[name])
        except Exception as error:
            error.add_note(
                f"{table[name]} is the {kind[:-1]} {name!r} of {self._owners[kind, name]}"
            )
            raise


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
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:  # it would end the program without a word
        what = f"{type(error).__name__}: {error}"
        raise PluginError(f"a plugin names {target!r}, whose import ended with {what}") from error


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
