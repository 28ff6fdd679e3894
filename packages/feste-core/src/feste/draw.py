"""Which draw a node is: determinism classes, fingerprints, ordinals.

Two calls that look alike are two draws from a model unless the user wrote one node and used it
twice. The identity of a draw is (scope, fingerprint, n): *scope* is the main program or the task
that emitted the node; the *fingerprint* hashes the operation, its client, its parameters and the
draws of its inputs, so it is known before anything has run; *n* counts equals in creation order.
The same program therefore gives its nodes the same identities every time it runs.
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

__all__ = ["MAIN", "Determinism", "Draw", "assign", "forget", "inside", "scope"]

MAIN = "main"


class Determinism(Enum):
    """What a second run of the same call may be taken to give."""

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
    :param fingerprint: hex digest of what is asked.
    :param n: the ordinal among equal draws of the scope, from 0; always 0 for PURE nodes.
    """

    scope: str
    fingerprint: str
    n: int

    def __str__(self) -> str:
        return f"{self.scope}/{self.fingerprint}.{self.n}"

    @property
    def inner(self) -> str:
        """The scope of the nodes that this draw's task emits: of one size, however deep."""
        return hashlib.blake2b(str(self).encode(), digest_size=12).hexdigest()


_scope: ContextVar[str] = ContextVar("feste_scope", default=MAIN)


def scope() -> str:
    """Return the scope of calls that are made here: a task's that eager mode runs, else the main one."""
    return _scope.get()


@contextmanager
def inside(drawn: Draw) -> Iterator[None]:
    """Make calls in a block draws of a task, as if it had returned them.

    :param drawn: the task's own draw.
    """
    token = _scope.set(drawn.inner)
    try:
        yield
    finally:
        _scope.reset(token)
        forget(drawn.inner)


_counters: dict[str, dict[str, int]] = {}
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # whoever held it is not in the child
    os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))


def assign(nodes: Iterable[Node], scope: str = MAIN) -> None:
    """Give every node that has none its draw, in creation order.

    :param nodes: nodes newly collected; a node's inputs have their draws or are among them.
    :param scope: the scope they belong to.
    """
    with _lock:
        counters = _counters.setdefault(scope, {})
        for node in sorted((n for n in nodes if n.draw is None), key=lambda n: n.seq):
            fingerprint = _fingerprint(node)
            n = 0
            if node.determinism is not Determinism.PURE:
                n = counters.get(fingerprint, 0)
                counters[fingerprint] = n + 1
            node.draw = Draw(scope, fingerprint, n)


def forget(scope: str | None = None) -> None:
    """Count from 0 again: in one scope when its task runs again, or in all (for tests).

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
    except (ValueError, RecursionError):  # numbers of thousands of digits and the like
        text = node.op.identity
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12)
    for dep in node.deps:
        draw = dep.draw
        assert draw is not None, "inputs are collected before their consumers"
        # only equal samples are expected to differ; other equal inputs are one expression, as in eager
        n = draw.n if dep.determinism is Determinism.SAMPLE else 0
        digest.update(f"{draw.fingerprint}.{n}".encode())
    return digest.hexdigest()


def _content(value: Any) -> Any:
    """JSON that tells apart what Python does: lists and tuples, the key 1 and the key "1"."""
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
    """JSON and bytes constants count by content; any other object by its type's name only."""
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
