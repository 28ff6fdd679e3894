"""What a program leaves, written to files to be searched: objects in every form, errors, tracebacks."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import itertools
import json
import pickle
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle

from feste.errors import ConfigError, FesteError


class Left:
    """What the program leaves: files, in a folder for each kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.classes: set[str] = set()
        self.by_rich: set[type] = set()
        self.numbers = itertools.count()
        self.errors: list[BaseException] = []

    def add(self, kind: str, *data: Any) -> None:
        place = self.folder / kind
        place.mkdir(parents=True, exist_ok=True)
        for one in data:
            number = next(self.numbers)
            whole = one if isinstance(one, bytes) else str(one).encode("utf-8", "surrogatepass")
            (place / str(number)).write_bytes(whole)

    def object(self, kind: str, it: Any, *, travels: bool = True) -> None:
        """Keep an object in every form that it has."""
        self.add(f"{kind}: repr", repr(it), ascii(it), f"{it!s}")
        self.add(f"{kind}: variables", repr(getattr(it, "__dict__", {})))
        if dataclasses.is_dataclass(it):
            self.add(f"{kind}: fields", repr(dataclasses.asdict(it)))  # type: ignore[call-overload]
        if hasattr(it, "to_json"):
            self.add(f"{kind}: JSON", json.dumps(it.to_json(), default=repr))
        if hasattr(it, "_repr_html_"):
            self.add(f"{kind}: HTML", it._repr_html_())
        for dump in (pickle.dumps, cloudpickle.dumps, copy.deepcopy):
            try:
                found = dump(it)
            except ConfigError as error:  # a literal key does not leave the process
                assert not travels
                self.error(error)
            else:
                self.add(
                    f"{kind}: {dump.__name__}", found if isinstance(found, bytes) else repr(found)
                )

    def error(self, error: BaseException) -> None:
        """Keep an error, those that it has, and its tracebacks with all variables."""
        if any(error is other for other in self.errors):
            return
        self.errors.append(error)
        self.classes.add(type(error).__name__)
        self.object("error", error)
        self.add("traceback", "".join(traceback.format_exception(error)))
        told = traceback.TracebackException(
            type(error), error, error.__traceback__, capture_locals=True
        )
        self.add("traceback with variables", "".join(told.format()))
        if type(error) not in self.by_rich:  # it takes its time
            self.add("traceback by rich", *self._by_rich(error))
        inner = [*getattr(error, "errors", ()), error.__cause__, error.__context__]
        self.returned([*inner, *getattr(error, "roots", ())])
        self.returned(getattr(error, "partial", None) or ())

    def _by_rich(self, error: BaseException) -> Iterator[str]:
        """All that rich shows of the variables, and once its whole picture, which takes its time."""
        from rich.console import Console
        from rich.traceback import Traceback

        trace = Traceback.extract(
            type(error), error, error.__traceback__, show_locals=True,
            locals_max_string=1000, locals_max_length=1000,
        )  # fmt: skip
        for frame in itertools.chain.from_iterable(stack.frames for stack in trace.stacks):
            for name, node in (frame.locals or {}).items():
                yield f"{name} = {node.render(max_width=200)}"
        self.by_rich.add(type(error))
        if len(self.by_rich) == 1:
            console = Console(file=io.StringIO(), width=200)
            console.print(Traceback(trace, show_locals=True))
            yield console.file.getvalue()  # type: ignore[attr-defined]

    def returned(self, results: Any) -> None:
        """Keep the errors among results."""
        for one in results:
            if isinstance(one, BaseException):
                self.error(one)

    @contextlib.contextmanager
    def fails(self) -> Iterator[None]:
        try:
            yield
        except FesteError as error:
            self.error(error)
        else:
            raise AssertionError("it did not fail")
