"""Settings: process defaults, overlays for a block, and the snapshot that a run takes of both.

The value of a setting is the first of: the keyword given to ``compute``; the innermost ``with
context.set(...)`` block around the call; the newest ``context.set(...)`` of the process; the
environment variable ``FESTE_<NAME>``; the default.

>>> from feste import context
>>> context.get("on_error")
'raise'
>>> with context.set(on_error="return"):
...     context.get("on_error")
'return'
>>> context.get("on_error")
'raise'
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from feste.errors import ConfigError, UnknownName, suggest

__all__ = ["SETTINGS", "Layer", "Setting", "Settings", "get", "set", "settings"]


@dataclass(frozen=True, slots=True)
class Setting:
    """The declaration of one setting.

    :param default: its value when nobody sets it.
    :param type: what a value must be: a class, a ``Literal`` of allowed values, or a callable that
        takes the given value, returns the value to keep, and raises ValueError for a wrong one.
    :param help: one line for the reference.
    """

    default: Any
    type: Any
    help: str

    def check(self, name: str, value: Any) -> Any:
        """Return the value to keep.

        :param name: the setting's name, for the error.
        :param value: what the user gave.
        :raises ConfigError: if the value is not of the setting's type.
        """
        if get_origin(self.type) is Literal:
            allowed = get_args(self.type)
            if value in allowed:
                return value
            raise ConfigError(f"setting {name}={value!r}: allowed are {_names(allowed)}")
        if isinstance(self.type, type):
            if isinstance(value, self.type):
                return value
            if self.type is float and type(value) is int:
                return float(value)
            wanted = self.type.__name__
            raise ConfigError(f"setting {name}={value!r}: expected {wanted}, not {_kind(value)}")
        try:
            return self.type(value)
        except ValueError as error:
            raise ConfigError(f"setting {name}={value!r}: {error}") from None

    def parse(self, name: str, text: str) -> Any:
        """Return the value that an environment variable's text means.

        :param name: the setting's name, for the error.
        :param text: the variable's text.
        :raises ConfigError: if the text does not fit the setting's type.
        """
        choices = get_args(self.type) if get_origin(self.type) is Literal else ()
        if self.type is bool or any(isinstance(c, bool) for c in choices):
            word = text.strip().lower()
            if word in ("1", "true", "yes", "on"):
                return self.check(name, True)
            if word in ("", "0", "false", "no", "off"):
                return self.check(name, False)
            if self.type is bool:
                raise ConfigError(f"FESTE_{name.upper()}={text!r}: use 1 or 0")
        if self.type in (int, float):
            try:
                return self.type(text)
            except ValueError:
                wanted = self.type.__name__
                raise ConfigError(f"FESTE_{name.upper()}={text!r}: expected {wanted}") from None
        return self.check(name, text)


def _names(values: tuple[Any, ...]) -> str:
    return ", ".join(repr(v) for v in values)


def _kind(value: object) -> str:
    return type(value).__name__


def _optimize(value: Any) -> Any:
    """The form of ``optimize``: on, off, or passes switched by name."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return {name.strip(): True for name in value.split(",") if name.strip()}
    if isinstance(value, Mapping) and all(
        isinstance(k, str) and isinstance(v, bool) for k, v in value.items()
    ):
        return MappingProxyType(dict(value))
    raise ValueError("expected True, False or a mapping of pass names to True or False")


def _scheduler(value: Any) -> Any:
    if value is None or value == "":
        raise ValueError("expected a name, a URL, a get function or a client object")
    return value


#: The settings of feste-core. Plugins add theirs by the hook ``feste_settings``.
SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "eager": Setting(False, bool, "run every call at once, where it is written, for debugging"),
        "scheduler": Setting("local", _scheduler, "what runs the graph: a name, URL or object"),
        "optimize": Setting(True, _optimize, "optimize the graph; or passes by name: True, False"),
        "on_error": Setting(
            "raise",
            Literal["raise", "return", "stop"],
            "finish the rest and raise; put the error in its place; or stop and raise",
        ),
        "keep": Setting(
            "paid", Literal["paid", "all", "none"], "which nodes keep their value while they live"
        ),
        "progress": Setting("auto", Literal["auto", True, False], "show a progress bar"),
        "strict": Setting(False, bool, "check the graph after every pass; a failing pass raises"),
    }
)


class Settings(Mapping[str, Any]):
    """An immutable snapshot of all settings; what a run is given.

    >>> settings(keep="all").keep
    'all'
    """

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_values", dict(values))

    def __getitem__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise UnknownName(f"no setting {name!r}.{suggest(name, self._values)}") from None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("settings are immutable; use context.set(...)")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Settings, (self._values,))

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{k}={v!r}' for k, v in self._values.items())})"


_layers: list[Layer] = []
_overlays: ContextVar[tuple[Layer, ...]] = ContextVar("feste_settings", default=())
_lock = threading.RLock()
_extra: Callable[[], Mapping[str, Setting]] = dict
_base: dict[str, Any] = {}


class Layer:
    """Settings that hold for the process, or, once entered as a ``with`` block, for the block.

    :param values: settings by name, already checked.
    """

    __slots__ = ("_tokens", "values")

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self._tokens: list[Token[tuple[Layer, ...]]] = []

    def __enter__(self) -> Layer:
        with _lock:
            _layers[:] = [layer for layer in _layers if layer is not self]
        self._tokens.append(_overlays.set((*_overlays.get(), self)))
        return self

    def __exit__(self, *exc_info: object) -> None:
        _overlays.reset(self._tokens.pop())


def set(**values: Any) -> Layer:
    """Set settings for the process, or, used as a ``with`` block, for the block only.

    :param values: settings by name.
    :raises UnknownName: for a name that neither Feste nor a plugin declares, with the nearest one.
    :raises ConfigError: for a value of the wrong type.

    >>> with set(eager=True):
    ...     get("eager")
    True
    """
    layer = Layer({name: _declared(name).check(name, value) for name, value in values.items()})
    with _lock:
        _layers.append(layer)
    return layer


def _declared(name: str) -> Setting:
    known = SETTINGS.get(name)
    if known is None:
        declared = declarations()
        if name not in declared:
            raise UnknownName(f"no setting {name!r}.{suggest(name, declared)}")
        known = declared[name]
    return known


def declarations() -> dict[str, Setting]:
    """Return every declared setting, those of plugins included (this loads the plugins)."""
    return {**SETTINGS, **_extra()}


def _default(name: str) -> Any:
    """The value below all layers: the environment's, else the default; read once, on first use."""
    try:
        return _base[name]
    except KeyError:
        declared = _declared(name)
        text = os.environ.get(f"FESTE_{name.upper()}")
        value = declared.default if text is None else declared.parse(name, text)
        return _base.setdefault(name, value)


def get(name: str) -> Any:
    """Return the value of one setting, as it is here and now.

    :param name: the setting's name.
    :raises UnknownName: for a name that nobody declares.

    >>> get("keep")
    'paid'
    """
    for overlay in reversed(_overlays.get()):
        if name in overlay.values:
            return overlay.values[name]
    for layer in reversed(_layers):
        if name in layer.values:
            return layer.values[name]
    return _default(name)


def settings(**given: Any) -> Settings:
    """Return a snapshot of all settings, as they are here and now.

    :param given: values that go before all others: the keywords of a ``compute``.
    :raises UnknownName: for a name that nobody declares.
    :raises ConfigError: for a value of the wrong type.

    >>> settings(on_error="stop")["on_error"]
    'stop'
    """
    values = {name: _default(name) for name in declarations()}
    with _lock:
        layers = list(_layers)
    for layer in (*layers, *_overlays.get()):
        values.update(layer.values)
    values.update({k: _declared(k).check(k, v) for k, v in given.items()})
    return Settings(values)
