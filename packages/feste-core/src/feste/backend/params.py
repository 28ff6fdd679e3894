"""The parameters of an operation as a typed, frozen record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from numbers import Integral
from typing import Any, ClassVar, dataclass_transform

from feste.draw import Determinism
from feste.errors import ParameterError, suggest
from feste.node import Lazy
from feste.wording import a_kind

__all__ = ["Params"]


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Params:
    """The base class of parameter records; a subclass only lists its fields.

    A field that is None is not sent, so the provider's default applies. A field named ``extra`` is
    merged into the body, for parameters that only some servers support.

    :raises ParameterError: for an unknown parameter, with the nearest known name, or a missing one.

    >>> class EchoParams(Params):
    ...     temperature: float | None = None
    ...     max_tokens: int | None = None
    >>> EchoParams(max_tokens=5)
    EchoParams(max_tokens=5)
    >>> EchoParams(max_tokens=5).body()
    {'max_tokens': 5}
    >>> EchoParams(max_token=5)
    Traceback (most recent call last):
    feste.errors.ParameterError: EchoParams has no parameter 'max_token'. Did you mean 'max_tokens'?
    """

    #: The fields that are whole numbers before anything is sent, because what a call costs at most is
    #: computed from them.
    whole_numbers: ClassVar[frozenset[str]] = frozenset({"max_tokens"})
    #: The names of the fields that are sent under their own name.
    _sends: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, kw_only=True, repr=False)(cls)
        init = cls.__init__
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        names = frozenset(f.name for f in fields)
        cls._sends = tuple(f.name for f in fields if f.name != "extra")
        none = dataclasses.MISSING
        needed = [f.name for f in fields if f.default is none and f.default_factory is none]

        def checked(self: Any, *args: Any, **given: Any) -> None:
            if args:
                raise ParameterError(
                    f"{cls.__name__} takes its parameters by name, for example "
                    f"{cls.__name__}({next(iter(sorted(names)), 'name')}=...)"
                )
            for name in given:
                if name not in names:
                    raise ParameterError(
                        f"{cls.__name__} has no parameter {name!r}.{suggest(name, names)}"
                    )
            for name in needed:
                if name not in given:
                    raise ParameterError(f"{cls.__name__} needs {name!r}")
            for name in cls.whole_numbers.intersection(given):
                value = given[name]
                whole = isinstance(value, Integral) and not isinstance(value, bool)
                if not whole and value is not None and not isinstance(value, Lazy):
                    told = f"{cls.__name__}: {name} is a whole number, not {a_kind(value)}"
                    raise ParameterError(told)
            init(self, **given)
            if not isinstance(given.get("extra"), Lazy):
                self._extra()

        checked.__wrapped__ = init  # type: ignore[attr-defined]
        cls.__init__ = checked  # type: ignore[method-assign]

    def __repr__(self) -> str:
        shown = (
            f"{f.name}={value!r}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if (value := getattr(self, f.name)) is not f.default
        )
        return f"{type(self).__name__}({', '.join(shown)})"

    def body(self) -> dict[str, Any]:
        """Return the given parameters, as the body of a request."""
        given = {name: value for name in self._sends if (value := getattr(self, name)) is not None}
        return {**given, **self._extra()}

    def _extra(self) -> Mapping[str, Any]:
        extra = getattr(self, "extra", None)
        if extra is None:
            return {}
        if not isinstance(extra, Mapping):
            name = type(self).__name__
            raise ParameterError(
                f"{name}: extra must be a dict of further parameters, not {a_kind(extra)}"
            )
        return extra

    def determinism(self, default: Determinism) -> Determinism:
        """Return GREEDY if these parameters ask for determinism, otherwise the operation's class.

        :param default: the operation's class. Only SAMPLE becomes GREEDY: by a temperature that is
            explicitly 0, or by a seed.
        """
        if default is not Determinism.SAMPLE:
            return default
        greedy = self._sent("temperature") == 0 or self._sent("seed") is not None
        return Determinism.GREEDY if greedy else default

    def max_output(self) -> int | None:
        """Return the maximum number of tokens one call may generate; None if there is no bound.

        The default is ``max_tokens``, times ``n``.
        """
        bound = self._sent("max_tokens")
        return None if bound is None else bound * (self._sent("n") or 1)

    def may_share(self) -> bool:
        """Return whether a call with these parameters may share a request with others.

        By default a ``seed`` forbids it, because list endpoints apply one seed to all items.
        """
        return self._sent("seed") is None

    def may_repeat(self) -> bool:
        """Return whether equal calls with these parameters may become one request for several draws.

        By default a ``seed`` forbids it, and an ``n`` above 1, since such a call asks for several
        answers itself. So does a value that is not known yet.
        """
        if isinstance(getattr(self, "extra", None), Lazy):
            return False
        n = self._sent("n")
        once = n is None or (isinstance(n, Integral) and n == 1)
        return once and self._sent("seed") is None

    def __feste_fingerprint__(self) -> Any:
        """Return the parts that identify the draw; new fields in the class do not change them."""
        return [type(self).__qualname__, Params.body(self)]  # a subclass may leave fields out

    def _sent(self, name: str) -> Any:
        """Return the value of a parameter as it will be sent, or None.

        :param name: its name in the body; ``extra`` overrides a field, as in :meth:`body`.
        """
        extra = getattr(self, "extra", None)
        if extra is not None and isinstance(extra, Mapping) and name in extra:  # else a lazy value
            return extra[name]
        return getattr(self, name, None)
