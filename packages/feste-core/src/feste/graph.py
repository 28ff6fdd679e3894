"""The graph: what will be computed, as passes rewrite it and the brain runs it.

A :class:`FesteGraph` binds keys to nodes. A node's inputs are *names*: what an input stands for is
looked up in the graph, so a pass replaces or merges nodes without touching their consumers.
Towards Dask the graph is a mapping from key to a public ``dask.task_spec`` node, lowered on demand.
"""

from __future__ import annotations

import graphlib
import hashlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feste import draw
from feste.errors import GraphError
from feste.node import PENDING, Node, process_name, travelled, travels
from feste.packing import Deps, fill, pack

__all__ = ["Batch", "FesteGraph", "Lowered", "draw_lowered", "lower"]

Repack = Callable[[Sequence[Any]], tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Batch:
    """Calls that will share requests.

    :param members: their keys, in order. A request holds as many as its limits allow, so a batch
        may become several.
    :param group: a text that is equal for calls that may share a request.
    """

    members: tuple[str, ...]
    group: str = ""
    key: str = field(init=False)
    """The batch's own key in a lowered graph: Dask may merge graphs that were batched apart."""

    def __post_init__(self) -> None:
        digest = hashlib.blake2b(" ".join(self.members).encode(), digest_size=4).hexdigest()
        object.__setattr__(self, "key", f"batch-{self.members[0]}-{digest}")


class FesteGraph(Mapping[str, Any]):
    """Nodes by key, which of them are wanted, and what passes have decided.

    :param nodes: the nodes by key.
    :param outputs: the keys of the wanted nodes.
    :param aliases: keys that stand for another key: merged nodes.
    :param batches: calls that will share requests.

    >>> import feste
    >>> @feste.task
    ... def add(a: int, b: int) -> int:
    ...     return a + b
    >>> total = add(add(1, 2), 3)
    >>> graph, keys, repack = FesteGraph.collect({"total": total})
    >>> len(graph), keys == [total.key], repack([6])
    (2, True, ({'total': 6},))
    """

    __slots__ = ("_batched", "aliases", "batches", "nodes", "outputs")

    def __init__(
        self,
        nodes: Mapping[str, Node],
        outputs: Iterable[str],
        aliases: Mapping[str, str] | None = None,
        batches: Iterable[Batch] = (),
    ) -> None:
        self.nodes = dict(nodes)
        self.outputs = tuple(outputs)
        self.aliases = dict(aliases or {})
        self.batches = tuple(batches)
        #: By key, a batch (with -1) and each of its members (with its position in it).
        self._batched = {b.key: (b, -1) for b in self.batches}
        for batch in self.batches:
            self._batched.update((m, (batch, i)) for i, m in enumerate(batch.members))

    # --- making one -------------------------------------------------------------------------------

    @classmethod
    def collect(cls, *objs: Any, scope: str = draw.MAIN) -> tuple[FesteGraph, list[str], Repack]:
        """Return the graph that some objects need, as it was built.

        :param objs: nodes, and lists, dicts, sets and dataclasses with nodes inside.
        :param scope: whose draws the new nodes are: the main program's or an emitting task's.
        :returns: the graph; the keys of the nodes found in the objects; and ``repack``, which takes
            the values of these keys and returns the objects with the values in place.
        :raises GraphError: if a container contains itself.
        """
        deps = Deps()
        packed = [pack(obj, deps) for obj in objs]

        def repack(values: Sequence[Any]) -> tuple[Any, ...]:
            return tuple([fill(part, values) for part in packed])

        graph = cls.of(deps.nodes, scope=scope)
        return graph, list(graph.outputs), repack

    @classmethod
    def of(cls, roots: Sequence[Node], *, scope: str | None = draw.MAIN) -> FesteGraph:
        """Return the graph that some nodes need, and give the new ones their draws.

        :param roots: the wanted nodes.
        :param scope: as for :meth:`collect`; None leaves the draws to :func:`draw_lowered`.
        """
        found: dict[int, Node] = {}
        stack = list(roots)
        while stack:
            node = stack.pop()
            if id(node) not in found:
                found[id(node)] = node
                if node.value is PENDING:
                    stack.extend(node.deps)
        order = sorted(found.values(), key=lambda n: n.seq)
        new = [n for n in order if n.draw is None]
        if new and scope is not None:
            draw.assign(new, scope)
        return cls({n.key: n for n in order}, [n.key for n in roots])

    # --- asking it --------------------------------------------------------------------------------

    def resolve(self, key: str) -> str:
        """Return the key that a key stands for, after merges.

        :param key: a key.
        """
        aliases = self.aliases
        while key in aliases:
            key = aliases[key]
        return key

    def dependencies(self, key: str) -> list[str]:
        """Return the keys that a node needs; none if its value is known.

        :param key: the node's key.
        """
        node = self.nodes[key]
        if node.value is not PENDING:
            return []
        if not self.aliases:
            return [dep.key for dep in node.deps]
        return [self.resolve(dep.key) for dep in node.deps]

    def wanted(self) -> list[str]:
        """Return the outputs' keys after merges."""
        return [self.resolve(key) for key in self.outputs]

    def order(self, *, contract: Iterable[Batch] = ()) -> list[str]:
        """Return all keys, inputs before consumers.

        :param contract: batches that count as one node each.
        :raises GraphError: if there is a cycle, with the keys in it; if an input is missing.
        """
        stands_for = {m: b.key for b in contract for m in b.members}
        sorter: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
        for key in self.nodes:
            needs = self.dependencies(key)
            for need in needs:
                if need not in self.nodes:
                    raise GraphError(f"{key} needs {need}, which is not in the graph")
            if stands_for:
                needs = [stands_for.get(n, n) for n in needs]
            sorter.add(stands_for.get(key, key), *needs)
        try:
            return list(sorter.static_order())
        except graphlib.CycleError as error:
            cycle = " -> ".join(error.args[1][:10])
            raise GraphError(f"the graph has a cycle: {cycle}") from None

    def check(self) -> None:
        """Raise what is wrong with the graph.

        :raises GraphError: for a cycle (batches contracted, all at once), a missing input or output,
            or a call in two batches.
        """
        for key in self.outputs:
            if self.resolve(key) not in self.nodes:
                raise GraphError(f"the output {key} is not in the graph")
        members = [m for b in self.batches for m in b.members]
        if len(members) != len(set(members)):
            raise GraphError("a call is in two batches")
        for member in members:
            if member not in self.nodes:
                raise GraphError(f"the batched call {member} is not in the graph")
        self.order(contract=self.batches)

    def calls(self) -> list[Node]:
        """Return the nodes that will cost a request: calls whose value is not known."""
        return [n for n in self.nodes.values() if n.op.kind == "call" and n.value is PENDING]

    # --- rewriting it: each returns a new graph ---------------------------------------------------

    def cull(self) -> FesteGraph:
        """Return the graph without nodes that no output needs."""
        needed: set[str] = set()
        stack = self.wanted()
        while stack:
            key = stack.pop()
            if key not in needed:
                needed.add(key)
                stack.extend(self.dependencies(key))
        if len(needed) == len(self.nodes):
            return self
        nodes = {key: node for key, node in self.nodes.items() if key in needed}
        aliases = {key: kept for key, kept in self.aliases.items() if self.resolve(key) in needed}
        left = [(tuple(m for m in b.members if m in needed), b.group) for b in self.batches]
        batches = [Batch(members, group) for members, group in left if members]
        return FesteGraph(nodes, self.outputs, aliases, batches)

    def merged(self, pairs: Mapping[str, str]) -> FesteGraph:
        """Return the graph with nodes replaced by others.

        :param pairs: for each key to drop the key that stands for it from now on.
        :raises GraphError: if a key would stand for itself, or for one that is not in the graph.
        """
        nodes = {key: node for key, node in self.nodes.items() if key not in pairs}
        aliases = {**self.aliases, **pairs}
        for key in pairs:
            seen, kept = {key}, aliases[key]
            while kept in aliases and kept not in seen:
                seen.add(kept)
                kept = aliases[kept]
            if kept not in nodes:
                raise GraphError(f"{key} cannot be merged into {pairs[key]}, which is not there")
        return FesteGraph(nodes, self.outputs, aliases, self.batches)

    def with_nodes(self, nodes: Iterable[Node]) -> FesteGraph:
        """Return the graph with nodes added, or replaced where the key is there already.

        :param nodes: the nodes.
        """
        return FesteGraph(
            {**self.nodes, **{n.key: n for n in nodes}}, self.outputs, self.aliases, self.batches
        )

    def with_batches(self, batches: Iterable[Batch]) -> FesteGraph:
        """Return the graph with calls that will share requests.

        :param batches: all batches; those of before are dropped unless they are among them.
        """
        return FesteGraph(self.nodes, self.outputs, self.aliases, batches)

    # --- towards Dask -----------------------------------------------------------------------------

    def __iter__(self) -> Iterator[str]:
        yield from self.nodes
        yield from self.aliases
        for batch in self.batches:
            yield batch.key

    def __len__(self) -> int:
        return len(self.nodes) + len(self.aliases) + len(self.batches)

    def __contains__(self, key: object) -> bool:
        return key in self.nodes or key in self.aliases or key in self._batched

    def __getitem__(self, key: str) -> Any:
        from dask.task_spec import Alias, DataNode, Task, TaskRef

        if key in self.aliases:
            return Alias(key, self.resolve(key))
        batch, position = self._batched.get(key, (None, -1))
        if batch is not None and position >= 0:
            return Task(key, _unwrap, TaskRef(batch.key), position)
        if batch is not None:
            members = [self.nodes[m] for m in batch.members]
            needs = [self.dependencies(m) for m in batch.members]
            lowered = LoweredBatch([Lowered(n) for n in members], [len(n) for n in needs])
            return Task(key, lowered, *[TaskRef(k) for keys in needs for k in keys])
        node = self.nodes[key]
        if node.value is not PENDING:
            return DataNode(key, node.value)
        return Task(key, Lowered(node), *[TaskRef(k) for k in self.dependencies(key)])

    def __reduce__(self) -> tuple[Any, ...]:
        # as Dask's own data: each task on its way has its arguments and no other node
        return (dict, (dict(self),))

    def visualize(self, path: str | Path | None = None) -> str:
        """Draw the graph.

        :param path: where to write it: ``.svg``, ``.mmd`` (Mermaid) or ``.html``; None writes none.
        :returns: the picture: Mermaid text for ``.mmd``, else SVG.
        """
        from feste import _compute

        return _compute.draw(self, path)

    def __repr__(self) -> str:
        return f"<FesteGraph of {len(self.nodes)} nodes, {len(self.outputs)} outputs>"


_lock = threading.Lock()
_without_draws: weakref.WeakSet[Node] = weakref.WeakSet()
_merged: weakref.WeakKeyDictionary[Node, weakref.WeakSet[Node]] = weakref.WeakKeyDictionary()


def lower(roots: Sequence[Node]) -> FesteGraph:
    """Return the graph of some nodes for Dask, which asks for one collection after the other.

    Their draws are counted when the first of them is optimized or run: together, in the order in
    which the nodes were made, as if all had been collected at once.

    :param roots: the wanted nodes.
    """
    graph = FesteGraph.of(roots, scope=None)
    with _lock:
        _without_draws.update(n for n in graph.nodes.values() if n.draw is None)
    return graph


def draw_lowered() -> None:
    """Give all nodes that were lowered and have no draws yet their draws."""
    if _without_draws:
        with _lock:
            nodes = list(_without_draws)
            _without_draws.clear()
            draw.assign(nodes)


class Lowered:
    """What a Dask task of the graph calls: the node's op on the values of its inputs.

    A paid call runs through the gate, retry and journal of the process that made the graph; in any
    other process it raises :class:`~feste.errors.UngatedCall`.

    :param node: the node.
    :param process: the name of the process that made the graph; empty for this one.
    :param is_whole: whether the node knows its inputs: not where it was sent to.
    """

    __slots__ = ("is_whole", "node", "own", "process")

    def __init__(self, node: Node, process: str = "", is_whole: bool = True) -> None:
        self.node = node
        self.process = process or process_name()
        self.is_whole = is_whole
        #: The user's node, where a pass has put another in its place.
        self.own = node

    @property
    def __name__(self) -> str:
        return self.node.op.name

    @property
    def keepers(self) -> tuple[Node, ...]:
        """The user's nodes that learn the value of a paid call: its own first, those merged into it."""
        return (self.own, *_merged.get(self.own, ()))

    def belongs_to(self, own: Node, *merged: Node) -> None:
        """Say for which of the user's nodes this stands; also wherever else they are lowered.

        :param own: the user's node of the same key.
        :param merged: those that an optimization has merged into it.
        """
        self.own = own
        if merged:
            _merged.setdefault(own, weakref.WeakSet()).update(merged)

    @property
    def is_here(self) -> bool:
        """Whether this is the process that made the graph."""
        return self.process == process_name()

    def __call__(self, *values: Any) -> Any:
        from feste import _compute

        return _compute.run_lowered(self, values)

    def __reduce__(self) -> tuple[Any, ...]:
        draw_lowered()
        n, drawn = self.node, self.own.draw
        if self.is_here:
            travels(self.own)
        # without its inputs: Dask hands their values over
        return (_lowered, (n.op, n.args, dict(n.kwargs), n.where, n.key, drawn, self.process))

    def __repr__(self) -> str:
        return f"<{self.node.op.name}>"


def _lowered(
    op: Any,
    args: Any,
    kwargs: Any,
    where: str,
    key: str,
    drawn: Any,
    process: str,
) -> Lowered:
    known = travelled(key) if process == process_name() else None
    if known is not None:
        return Lowered(known, process)
    node = Node(op, args, kwargs, (), where)
    node._key, node.draw = key, drawn
    return Lowered(node, process, is_whole=False)


class LoweredBatch:
    """What the Dask task of a batch calls: one outcome for each member.

    :param members: the members, lowered.
    :param counts: how many of the values belong to each.
    """

    __slots__ = ("counts", "members")

    def __init__(self, members: list[Lowered], counts: list[int]) -> None:
        self.members = members
        self.counts = counts

    @property
    def __name__(self) -> str:
        return f"batch-{self.members[0].node.op.name}"

    def __call__(self, *values: Any) -> list[Any]:
        from feste import _compute

        return _compute.run_lowered_batch(self, values)

    def __reduce__(self) -> tuple[Any, ...]:
        return (LoweredBatch, (self.members, self.counts))


def _unwrap(outcomes: list[Any], index: int) -> Any:
    outcome = outcomes[index]
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
