"""The identity of a node's draw: determinism classes, fingerprints, ordinals.

Two calls that look alike are two draws from a model, unless the user wrote one node and used it
twice. A draw is identified by (scope, fingerprint, n): *scope* is the main program or the emitting
task; *fingerprint* hashes the operation, its client, its parameters and the draws of its inputs, so
it is known before anything runs; *n* counts equal ones in creation order. So the same program gives
its nodes the same identities in every run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from feste.node import Node

__all__ = [
    "MAIN",
    "Determinism",
    "Draw",
    "assign",
    "enter",
    "forget",
    "inside",
    "is_collected",
    "scope",
]

MAIN = "main"


class Determinism(Enum):
    """How the results of repeated equal calls relate."""

    PURE = "pure"
    """Same inputs, same output, no effects: prompts, embeddings."""
    GREEDY = "greedy"
    """The caller asks for determinism: temperature explicitly 0, or a seed."""
    SAMPLE = "sample"
    """A fresh draw each time: the default of LLM calls."""
    EFFECT = "effect"
    """Visible outside: the default of ``@feste.task``."""


class Draw(NamedTuple):
    """The identity of one draw.

    :param scope: ``"main"``, or the :attr:`inner` scope of the draw whose task emitted the node.
    :param fingerprint: a hex digest of the call's content.
    :param n: the ordinal among equal draws of the scope, from 0; always 0 for PURE nodes.
    """

    scope: str
    fingerprint: str
    n: int

    def __str__(self) -> str:
        return f"{self.scope}/{self.fingerprint}.{self.n}"

    @property
    def inner(self) -> str:
        """The scope of the nodes that this draw's task emits; of constant length at any depth."""
        return hashlib.blake2b(str(self).encode(), digest_size=12).hexdigest()


class _Scope:
    """The scope of calls made inside a task, named and counted from 0 when the first is made.

    :param drawn: the task's own draw.
    :param used: receives the name when it is used, so that the counts can be forgotten.
    """

    __slots__ = ("_drawn", "_name", "used")

    def __init__(self, drawn: Draw, used: set[str]) -> None:
        self._drawn = drawn
        self.used = used
        self._name = ""

    @property
    def name(self) -> str:
        if not self._name:
            self._name = self._drawn.inner
            self.used.add(self._name)
            forget(self._name)
        return self._name


_scope: ContextVar[_Scope | None] = ContextVar("feste_scope", default=None)


def scope() -> str:
    """Return the scope of calls made here: of the task that runs, or the main one."""
    inner = _scope.get()
    return MAIN if inner is None else inner.name


def enter(drawn: Draw, used: set[str] | None = None) -> None:
    """Give calls made in this context the draws they would have if a task had returned them.

    :param drawn: the task's own draw.
    :param used: receives the names of scopes to :func:`forget` when the run ends; None is the set
        of the surrounding scope.
    """
    if used is None:
        around = _scope.get()
        used = set() if around is None else around.used
    _scope.set(_Scope(drawn, used))


@contextmanager
def inside(drawn: Draw) -> Iterator[None]:
    """Do what :func:`enter` does, for a ``with`` block.

    :param drawn: the task's own draw.
    """
    used: set[str] = set()
    token = _scope.set(_Scope(drawn, used))
    try:
        yield
    finally:
        _scope.reset(token)
        for name in used:
            forget(name)


#: How often a fingerprint was given, by scope. It is held as a number, because an entry stays as long
#: as the process: a later call that is equal must not take the draw of an earlier one.
_counters: dict[str, dict[int, int]] = {}
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # in a forked child, nothing would release the lock
    os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))


def assign(nodes: Iterable[Node], scope: str = MAIN) -> None:
    """Assign draws to nodes that have none, in creation order.

    :param nodes: newly collected nodes; their inputs must have draws or be among them.
    :param scope: the scope of the draws.
    """
    with _lock:
        counters = _counters.setdefault(scope, {})
        for node in sorted((n for n in nodes if n.draw is None), key=lambda n: n.seq):
            fingerprint = _fingerprint(node)
            n = 0
            if node.determinism is not Determinism.PURE:
                known = int(fingerprint, 16)
                n = counters.get(known, 0)
                counters[known] = n + 1
            node.draw = Draw(scope, fingerprint, n)


def is_collected(drawn: Draw) -> bool:
    """Whether this process has a node with this draw.

    :param drawn: the draw.
    """
    with _lock:
        try:
            known = int(drawn.fingerprint, 16)
        except ValueError:  # of a store that something else has written
            return False
        return _counters.get(drawn.scope, {}).get(known, 0) > drawn.n


def forget(scope: str | None = None) -> None:
    """Restart the counting from 0: in one scope when its task runs again, or in all for tests.

    :param scope: the scope, or None for all.
    """
    with _lock:
        if scope is None:
            _counters.clear()
        else:
            _counters.pop(scope, None)


_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
_ATOMS = frozenset((str, int, float, bool, type(None)))
_BASES: Any = ((str, str.__str__), (int, int.__int__), (float, float.__float__))


def _fingerprint(node: Node) -> str:
    try:
        text = _encode([node.op.identity, _content(node.args), _content(node.kwargs)])
    except (ValueError, RecursionError):  # for example numbers with thousands of digits
        text = node.op.identity
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12)
    for dep in node.deps:
        draw = dep.draw
        assert draw is not None, "inputs are collected before their consumers"
        # only equal SAMPLE inputs may differ; other equal inputs count as one, as in eager mode
        n = draw.n if dep.determinism is Determinism.SAMPLE else 0
        digest.update(f"{draw.fingerprint}.{n}".encode())
    return digest.hexdigest()


def _content(value: Any) -> Any:
    """Convert to JSON that keeps Python's distinctions: list or tuple, key 1 or key "1"."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if isinstance(value, (list, tuple)):
        return [kind.__name__, *map(_content, value)]
    if isinstance(value, dict):
        pairs = [[_content(k), _content(v)] for k, v in value.items()]
        return [kind.__name__, *sorted(pairs, key=lambda pair: _encode(pair[0]))]
    for base, exactly in _BASES:
        if isinstance(value, base):
            return exactly(value)
    return ["object", _content(_plain(value))]


def _plain(value: object) -> Any:
    """Reduce constants of JSON and bytes to their content, any other object to its type's name."""
    if isinstance(value, bytes):
        return {"bytes": hashlib.blake2b(value, digest_size=12).hexdigest()}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    fingerprint = getattr(value, "__feste_fingerprint__", None)
    if fingerprint is not None and not isinstance(value, type):
        return fingerprint()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        fields = {name: getattr(value, name) for name in names if hasattr(value, name)}
        return {type(value).__qualname__: fields}
    kind = value if isinstance(value, type) else type(value)
    return f"<{kind.__module__}.{kind.__qualname__}>"
