"""What is known of installed plugins from their metadata, before any of them is imported."""

from __future__ import annotations

import ast
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, distributions
from pathlib import Path
from pkgutil import extend_path

from feste import __version__
from feste.errors import suggest
from feste.wording import printable

__all__ = ["GROUP", "PluginInfo", "installed", "look_into", "misnamed", "names_in"]

GROUP = "feste"
_CORE = "feste-core"
#: No module of hooks is longer; a file that is, is not read.
_LONGEST = 1 << 20
_LISTS = ("DISABLED_PLUGINS", "LOAD_PLUGINS")


@dataclass(slots=True)
class PluginInfo:
    """One plugin; a row of ``feste plugins``.

    :param name: the entry point's name.
    :param module: the module that the entry point names.
    :param distribution: the distribution that ships it.
    :param version: the distribution's version.
    :param state: ``"enabled"`` (not imported yet), ``"loaded"``, ``"disabled"`` or ``"broken"``.
    :param offers: the names that it registers, by hook.
    :param error: why it is broken, or an empty string.
    :param file: the module's file, where it was looked for.
    """

    name: str
    module: str
    distribution: str
    version: str
    state: str = "loaded"
    offers: dict[str, list[str]] = field(default_factory=dict)
    error: str = ""
    file: str = ""

    @property
    def origin(self) -> str:
        """The distribution with its version."""
        return f"{self.distribution} {self.version}"


def installed() -> list[PluginInfo]:
    """Return the plugins of all installed distributions, whatever their order of installation.

    Those that the environment keeps out are disabled, and those made for another version of
    feste-core broken. None is imported. Control characters in metadata are escaped.
    """
    found: dict[tuple[str, str], PluginInfo] = {}
    for dist in distributions():
        try:
            points = [point for point in dist.entry_points if point.group == GROUP]
        except Exception:  # damaged metadata: the distribution cannot even be named
            continue
        for point in points:
            info = PluginInfo(printable(point.name), printable(point.value), *_title(dist))
            # the first on sys.path wins, as for imports
            if found.setdefault((info.distribution, info.name), info) is info:
                info.error = _misfit(dist)
    allowed, blocked = names_in("FESTE_LOAD_PLUGINS"), names_in("FESTE_DISABLED_PLUGINS") or set()
    for info in found.values():
        off = info.name in blocked or (allowed is not None and info.name not in allowed)
        info.state = "disabled" if off else "broken" if info.error else "enabled"
    return [found[key] for key in sorted(found)]


def _title(dist: Distribution) -> tuple[str, str]:
    """Return a distribution's name and version, or placeholders if its metadata is damaged."""
    try:
        name, version = dist.metadata["Name"], dist.version
    except Exception:
        name, version = None, None
    # a header that is no text, or goes over several lines, is neither by this
    texts = [printable(" ".join(str(text or "").split())) for text in (name, version)]
    return texts[0] or "(a distribution without a name)", texts[1] or "?"


def _misfit(dist: Distribution) -> str:
    """Return what a distribution requires of feste-core if this is another version, else ""."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    try:
        lines = [str(line) for line in dist.requires or ()]
    except Exception:  # damaged metadata requires nothing
        return ""
    for line in lines:
        try:
            needed = Requirement(line)
            # "; extra == ..." and other systems do not count
            if canonicalize_name(needed.name) != _CORE or (
                needed.marker is not None and not needed.marker.evaluate({"extra": ""})
            ):
                continue
        except (InvalidRequirement, ValueError, LookupError):
            continue
        if not needed.specifier.contains(__version__, prereleases=True):
            return f"it was made for {_CORE}{needed.specifier}, and this is {__version__}"
    return ""


def names_in(variable: str) -> set[str] | None:
    """Return the names that a variable of the environment lists; None if it is not set.

    :param variable: the variable's name.
    """
    text = os.environ.get(variable)
    return None if text is None else {n.strip() for n in text.split(",") if n.strip()}


def misnamed(plugins: Iterable[str], settings: Iterable[str]) -> list[str]:
    """Return what to tell of variables of the environment that do nothing, perhaps by a mistake.

    :param plugins: the names of all installed plugins.
    :param settings: the names of all settings.
    """
    known = sorted(plugins)
    told = [
        printable(
            f"FESTE_{end} names {name!r}, but no plugin has that name, so this does nothing."
            f"{suggest(name, known)} (FESTE_LOAD_PLUGINS= without a name loads none)"
        )
        for end in _LISTS
        for name in sorted(names_in(f"FESTE_{end}") or ())
        if name not in known
    ]
    variables = {*_LISTS, *map(str.upper, settings)}
    for variable in sorted(os.environ):
        prefix, _, end = variable.partition("FESTE_")
        if not prefix and end and end not in variables:
            near = suggest(end, variables)
            if "Did you mean" in near:  # another one may be a key, or a program's own
                told.append(printable(f"{variable} is not read by Feste.{near.replace(_Q, _F)}"))
    return told


_Q, _F = "mean '", "mean 'FESTE_"


def look_into(info: PluginInfo) -> None:
    """Note a plugin's file, and what its source says that it offers; nothing is run.

    A name that is made when the plugin runs cannot be seen: its hook has fewer names then, or none.

    :param info: the plugin.
    """
    module = info.module.partition(":")[0].strip()
    info.file = _file(module)
    if not info.file.endswith(".py"):
        return
    try:
        with open(info.file, "rb") as file:
            source = file.read(_LONGEST + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler, about a stranger's source
            tree = ast.parse(source if len(source) <= _LONGEST else b"")
        for hook, names in _hooks(tree):
            info.offers.setdefault(hook, []).extend(map(printable, names))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return  # loading it tells what is wrong


def _file(module: str) -> str:
    """Return a module's file without importing the packages around it; "" if it is not found."""
    path: list[str] | None = None
    file = name = ""
    for part in module.split("."):
        if not part.isidentifier():
            return ""
        name = f"{name}.{part}".lstrip(".")
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            return ""
        file = spec.origin or ""
        # feste's own packages have the folders of plugins in them, too
        path = list(extend_path(list(spec.submodule_search_locations or ()), name))
    return printable(str(Path(file))) if file else ""


def _hooks(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """Yield the hooks that a source defines, each with the names that stand in it."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not node.name.startswith("feste_"):
            continue
        kind = node.name.removeprefix("feste_")
        if kind not in ("backends", "optimizations", "schedulers", "settings"):
            yield "observes", [kind]
            continue
        tables = [n.value for n in ast.walk(node) if isinstance(n, ast.Return)]
        keys = [key for table in tables if isinstance(table, ast.Dict) for key in table.keys]
        yield (
            kind,
            [k.value for k in keys if isinstance(k, ast.Constant) and isinstance(k.value, str)],
        )
