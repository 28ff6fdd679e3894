"""Settings: process defaults, ``with`` blocks, and the snapshot that a run takes of both.

A setting's value is the first one found in: the keyword given to ``compute``; the innermost ``with
context.set(...)`` block; the newest ``context.set(...)`` of the process; the environment variable
``FESTE_<NAME>``; the default.

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

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from feste.budget import Budget
from feste.errors import ConfigError, UnknownName, suggest
from feste.wording import printable

__all__ = ["SETTINGS", "Layer", "Setting", "Settings", "caps", "get", "set", "settings"]


@dataclass(frozen=True, slots=True)
class Setting:
    """The declaration of a setting.

    :param default: the value when nothing else sets it; one of the type.
    :param type: the check of a value: a class, a ``Literal`` of allowed values, a union of these, or a
        function that returns the value to store and raises ValueError for a wrong one.
    :param help: one line for the reference.
    :param everywhere: whether a ``with`` block sets it for all threads of the process, so that a call
        made in another thread is not forgotten.
    :raises ConfigError: if the type is none of these, or the default is not of the type.

    >>> Setting(None, int, "how deep")
    Traceback (most recent call last):
    feste.errors.ConfigError: Setting(None, int, 'how deep'): the default: expected int, not None
    """

    default: Any
    type: Any
    help: str
    everywhere: bool = False

    def __post_init__(self) -> None:
        declared = f"Setting({_shown(self.default)}, {_title(self.type)}, {_shown(self.help)})"
        if not self._is_function:
            wrong = [kind for kind in _kinds(self.type) if not _is_checkable(kind)]
            if wrong:
                raise ConfigError(
                    f"{declared}: no value can be checked against {_title(wrong[0])}: give a class such "
                    "as list, a Literal, a union of these, or a function that checks a value"
                )
            self._checked(f"{declared}: the default", self.default)

    @property
    def _is_function(self) -> bool:
        is_type = isinstance(self.type, type) or get_origin(self.type) is not None
        return not is_type and callable(self.type)

    def check(self, name: str, value: Any) -> Any:
        """Check a value and return the value to store.

        :param name: the setting's name, for the error.
        :param value: the user's value.
        :raises ConfigError: if the value does not fit the setting's type.
        """
        return self._checked(f"setting {name}={_shown(value)}", value)

    def _checked(self, what: str, value: Any) -> Any:
        if self._is_function:
            try:
                return self.type(value)
            except Exception as error:  # a value's own methods may raise anything
                raise ConfigError(f"{what}: {_clipped(str(error))}") from None
        kinds = _kinds(self.type)
        if any(_is_of(value, kind) for kind in kinds):
            return value
        if type(value) is int and float in kinds:
            with suppress(OverflowError):
                return float(value)
        if get_origin(self.type) is Literal:
            raise ConfigError(f"{what}: allowed are {', '.join(map(repr, get_args(self.type)))}")
        raise ConfigError(f"{what}: expected {_title(self.type)}, not {_title(type(value))}")

    def parse(self, name: str, text: str) -> Any:
        """Convert the text of an environment variable to the setting's value.

        :param name: the setting's name, for the error.
        :param text: the variable's text.
        :raises ConfigError: if the text does not fit the setting's type.
        """
        what = f"FESTE_{name.upper()}={_shown(text)}"
        kinds = () if self._is_function else _kinds(self.type)
        literally = any(get_origin(kind) is Literal and _is_of(text, kind) for kind in kinds)
        if kinds and not literally and object not in kinds:
            for value in _readings(text):
                with suppress(ConfigError):
                    return self._checked(what, value)
            if kinds == (bool,):
                raise ConfigError(f"{what}: use 1 or 0")
        return self._checked(what, text)


def _kinds(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union; of any other type itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _is_checkable(kind: Any) -> bool:
    """Whether it is a class or a Literal: not ``list[str]``, nor a tuple of classes."""
    if get_origin(kind) is not None or not isinstance(kind, type):
        return get_origin(kind) is Literal
    try:
        isinstance(None, kind)
    except TypeError:  # typing.Any, or a Protocol
        return False
    return True


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a class, or one of a Literal; True is no number."""
    if get_origin(kind) is Literal:
        return any(type(value) is type(a) and value == a for a in get_args(kind))
    return isinstance(value, kind) and (type(value) is not bool or kind in (bool, object))


def _readings(text: str) -> Iterator[Any]:
    """Yield what the text of a variable may stand for, besides itself."""
    if not text.strip():
        yield None
    if text.strip().lower() in _SWITCH:
        yield _SWITCH[text.strip().lower()]
    for kind in (int, float):
        with suppress(ValueError):
            yield kind(text)


def _shown(value: Any) -> str:
    """Return a value for an error: on one line, not at any length, and whatever its class does."""
    try:
        return _clipped(repr(value))
    except Exception:
        return f"<{type(value).__name__}>"


def _clipped(text: str) -> str:
    return printable(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")


def _title(kind: Any) -> str:
    """Return a type as it is written."""
    if get_origin(kind) is Literal:
        return " | ".join(map(repr, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(map(_title, get_args(kind)))
    if kind is type(None):
        return "None"
    return kind.__name__ if isinstance(kind, type) else str(kind)


#: The characters that an error tells of a value.
_LONGEST = 200
#: The values that an environment variable may have for a boolean setting.
_SWITCH: Mapping[str, bool] = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("", "0", "false", "no", "off"), False),
}


class _Switches(Mapping[str, bool]):
    """An immutable mapping of pass names to on or off; unlike ``MappingProxyType`` it pickles."""

    __slots__ = ("_pairs",)

    def __init__(self, pairs: Iterable[tuple[str, bool]]) -> None:
        self._pairs = tuple(dict(pairs).items())

    def __getitem__(self, name: str) -> bool:
        return dict(self._pairs)[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __repr__(self) -> str:
        return repr(dict(self._pairs))


def _optimize(value: Any) -> Any:
    """Check a value of ``optimize``: on, off, or a mapping of pass names to on or off."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        switch = _SWITCH.get(value.strip().lower())
        names = [name.strip() for name in value.split(",")]
        return _Switches((name, True) for name in names if name) if switch is None else switch
    if isinstance(value, Mapping) and all(
        isinstance(k, str) and isinstance(v, bool) for k, v in value.items()
    ):
        return _Switches(value.items())
    raise ValueError("expected True, False or a mapping of pass names to True or False")


def _count(value: Any) -> int | None:
    """Check a number of things: a whole number from 0, or None for no limit."""
    if isinstance(value, str):
        value = int(value) if value.strip() else None
    if value is not None and (type(value) is not int or value < 0):
        raise ValueError("expected a whole number from 0, or None for no limit")
    return value


def _failures(value: Any) -> int | float | None:
    """Check a number of failures from 1, a share of all calls, or None for no limit."""
    if isinstance(value, str):
        with suppress(ValueError):
            text = value.strip()
            value = None if not text else int(text) if text.isdecimal() else float(text)
    if value is None or (type(value) is int and value >= 1):
        return value
    if type(value) is float and 0 < value < 1:
        return value
    raise ValueError("expected a whole number from 1, a share such as 0.05 below 1, or None")


#: More seconds than any wait; clocks and timers of a system may overflow beyond.
_MOST_SECONDS = 1e9


def _seconds(value: Any) -> float | None:
    """Check a number of seconds above 0, or None for no limit."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value) if value.strip() else None
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 < value <= _MOST_SECONDS:
        raise ValueError("expected a number of seconds above 0, or None for no limit")
    return float(value)


def _wait(value: Any) -> float:
    """Check a number of seconds from 0; infinity waits as long as it takes."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if type(value) not in (int, float) or not (0 <= value <= _MOST_SECONDS or value == math.inf):
        raise ValueError("expected a number of seconds from 0")
    return float(value)


def _scheduler(value: Any) -> Any:
    is_data = type(value).__module__ == "builtins" and not callable(value)
    if value == "" or (is_data and not isinstance(value, str)):
        raise ValueError("expected a name, a URL, a get function or a client object")
    return value


def _file(value: Any) -> str | None:
    """Check the path of a file; relative ones mean the folder of this moment."""
    if value is None or value == "":
        return None
    if isinstance(value, (str, os.PathLike)) and "\0" not in os.fsdecode(value):
        return os.path.abspath(os.fsdecode(os.path.expanduser(value)))
    raise ValueError("expected the path of a file, or None for none")


#: The settings of feste-core. Plugins declare more with the hook ``feste_settings``.
SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "eager": Setting(False, bool, "run every call at once, where it is written, for debugging"),
        "scheduler": Setting("local", _scheduler, "what runs the graph: a name, URL or object"),
        "optimize": Setting(True, _optimize, "optimize the graph; or passes by name: True, False"),
        "max_rewrites": Setting(
            None, _count, "apply only the first so many rewrites, to find one that does harm"
        ),
        "objective": Setting(
            "balanced",
            Literal["balanced", "cost", "latency"],
            "what to prefer where money and time conflict",
        ),
        "on_error": Setting(
            "raise",
            Literal["raise", "return", "stop"],
            "finish the rest and raise; put the error in its place; or stop and raise",
        ),
        "max_failures": Setting(
            None, _failures, "stop when so many calls have failed: a number, or a share as a float"
        ),
        "deadline": Setting(
            None, _seconds, "seconds that a call may take, from its first attempt to its answer"
        ),
        "outage_patience": Setting(
            600.0, _seconds, "seconds to wait for a backend that is down before its calls fail"
        ),
        "budget": Setting(
            None, Budget.of, 'the most to spend: dollars as a number, or "200000 tokens"', True
        ),
        "keep": Setting(
            "paid", Literal["paid", "all", "none"], "which nodes keep their value while they live"
        ),
        "store": Setting(
            None,
            _file,
            "the file that keeps paid answers, so that a rerun buys only the rest",
            True,
        ),
        "store_wait": Setting(
            0.0, _wait, "seconds to wait while another process writes the store", True
        ),
        "store_prompts": Setting(
            True, bool, "keep prompts in the store; False keeps their hashes", True
        ),
        "cache": Setting(None, _file, "a file of answers that programs and tests share", True),
        "cache_mode": Setting(
            "replay",
            Literal["replay", "record", "replay-only"],
            "take known answers and buy the rest; buy all anew; or take known ones and send nothing",
            True,
        ),
        "progress": Setting("auto", Literal["auto", True, False], "show a progress bar"),
        "strict": Setting(False, bool, "check the graph after every pass; a failing pass raises"),
    }
)


class Settings(Mapping[str, Any]):
    """An immutable snapshot of all settings, taken for a run.

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
        try:
            return self[name]
        except UnknownName as error:
            raise AttributeError(str(error)) from None

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("settings are immutable; use context.set(...)")

    def replace(self, **values: Any) -> Settings:
        """Return a snapshot with other values.

        :param values: checked values by name.
        """
        return Settings({**self._values, **values})

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Settings, (self._values,))

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{k}={v!r}' for k, v in self._values.items())})"


_layers: list[Layer] = []
#: Entered layers with settings that hold everywhere.
_held: list[Layer] = []
_overlays: ContextVar[tuple[Layer, ...]] = ContextVar("feste_settings", default=())
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # in a forked child, nothing would release the lock
    os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.RLock()))
_base: dict[str, Any] = {}


class Layer:
    """Settings for the process or, once entered as a ``with`` block, for that block only.

    :param values: checked settings by name.
    """

    __slots__ = ("values",)

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def __repr__(self) -> str:
        return f"context.set({', '.join(f'{k}={v!r}' for k, v in self.values.items())})"

    def __enter__(self) -> Layer:
        with _lock:
            _layers[:] = [layer for layer in _layers if layer is not self]
            if any(_declared(name).everywhere for name in self.values):
                self._hold()
        _overlays.set((*_overlays.get(), self))
        return self

    def _hold(self) -> None:
        """Make settings that hold everywhere known to all threads."""
        around = _overlays.get()
        for name, value in self.values.items():
            for other in _held:
                if (
                    _declared(name).everywhere
                    and other.values.get(name, value) != value
                    and not any(layer is other for layer in around)
                ):
                    raise ConfigError(
                        f"{name}={value!r} while another thread is inside a block that sets "
                        f"{name}={other.values[name]!r}: it holds for the whole process"
                    )
        _held.append(self)

    def __exit__(self, *exc_info: object) -> None:
        with _lock:
            for i in reversed(range(len(_held))):
                if _held[i] is self:
                    del _held[i]
                    break
        # no token: several threads and tasks may be inside the block of the same layer
        overlays = _overlays.get()
        for i in reversed(range(len(overlays))):
            if overlays[i] is self:
                _overlays.set(overlays[:i] + overlays[i + 1 :])
                return


def everywhere(chosen: Settings) -> Layer:
    """Return the settings of a run that hold inside it too: its store and such, and those of plugins.

    :param chosen: the run's settings.
    """
    return Layer({k: v for k, v in chosen.items() if k not in SETTINGS or SETTINGS[k].everywhere})


def caps(chosen: Settings) -> tuple[Budget, ...]:
    """Return the budgets that a run counts against: its own, and that of each block around it.

    :param chosen: the run's settings.
    """
    with _lock:
        layers = [*_overlays.get(), *_held]
    found = [chosen["budget"], *(layer.values.get("budget") for layer in layers)]
    return tuple({id(one): one for one in found if one is not None}.values())


def enter(layer: Layer) -> None:
    """Let settings hold in the rest of this context.

    :param layer: the settings.
    """
    _overlays.set((*_overlays.get(), layer))


@contextmanager
def within(layer: Layer) -> Iterator[None]:
    """Let settings hold in a ``with`` block, in this context alone.

    :param layer: the settings.
    """
    token = _overlays.set((*_overlays.get(), layer))
    try:
        yield
    finally:
        _overlays.reset(token)


def set(**values: Any) -> Layer:
    """Change settings for the process or, used as a ``with`` block, for that block only.

    :param values: settings by name.
    :raises UnknownName: for a name that is not declared; the message suggests the nearest one.
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
    """Return all declared settings, including those of plugins (this loads the plugins)."""
    return {**SETTINGS, **_extra()}


def declare(source: Callable[[], Mapping[str, Setting]]) -> None:
    """Register the source of the settings that plugins declare.

    :param source: returns the settings by name.
    """
    global _extra
    _extra = source


def _of_plugins() -> Mapping[str, Setting]:
    import_module("feste.plugins")  # calls declare() with its own source
    return _extra()


_extra: Callable[[], Mapping[str, Setting]] = _of_plugins


def _default(name: str) -> Any:
    """Return the value from the environment, or the default; read once, on first use."""
    try:
        return _base[name]
    except KeyError:
        declared = _declared(name)
        text = os.environ.get(f"FESTE_{name.upper()}")
        value = declared.default if text is None else declared.parse(name, text)
        return _base.setdefault(name, value)


def get(name: str) -> Any:
    """Return the current value of a setting.

    :param name: the setting's name.
    :raises UnknownName: for a name that is not declared.

    >>> get("keep")
    'paid'
    """
    for overlay in reversed(_overlays.get()):
        if name in overlay.values:
            return overlay.values[name]
    for layer in _held[::-1]:  # copies, because another thread may remove its layer
        if name in layer.values and _declared(name).everywhere:
            return layer.values[name]
    for layer in _layers[::-1]:
        if name in layer.values:
            return layer.values[name]
    return _default(name)


def settings(**given: Any) -> Settings:
    """Return a snapshot of the current values of all settings.

    :param given: values that override all others: the keywords of ``compute``.
    :raises UnknownName: for a name that is not declared.
    :raises ConfigError: for a value of the wrong type.

    >>> settings(on_error="stop")["on_error"]
    'stop'
    """
    values = {name: _default(name) for name in declarations()}
    with _lock:
        layers, held = list(_layers), list(_held)
    for layer in layers:
        values.update(layer.values)
    for layer in held:
        values.update({k: v for k, v in layer.values.items() if _declared(k).everywhere})
    for layer in _overlays.get():
        values.update(layer.values)
    values.update({k: _declared(k).check(k, v) for k, v in given.items()})
    return Settings(values)
