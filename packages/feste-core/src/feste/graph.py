"""The graph: what will be computed, as passes rewrite it and the brain runs it.

A :class:`FesteGraph` binds keys to nodes. A node's inputs are *names*: what an input stands for is
looked up in the graph, so a pass replaces or merges nodes without touching their consumers.
Towards Dask the graph is a mapping from key to a public ``dask.task_spec`` node, lowered on demand.
"""

from __future__ import annotations

import graphlib
import hashlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feste import draw
from feste.errors import GraphError
from feste.lowering import Lowered, LoweredBatch, unwrap
from feste.node import PENDING, Node
from feste.packing import Deps, fill, pack

__all__ = ["Batch", "FesteGraph"]

Repack = Callable[[Sequence[Any]], tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Batch:
    """Calls that will share requests.

    :param members: their keys, in order. A request holds as many as its limits allow, so a batch
        may become several.
    """

    members: tuple[str, ...]
    key: str = field(init=False)
    """The batch's own key in a lowered graph: Dask may merge graphs that were batched apart."""

    def __post_init__(self) -> None:
        digest = hashlib.blake2b(" ".join(self.members).encode(), digest_size=4).hexdigest()
        first = self.members[0] if self.members else ""
        object.__setattr__(self, "key", f"batch-{first}-{digest}")

    def within(self, keys: Container[str]) -> Batch:
        """Return the batch without members that are gone; itself if all are there.

        :param keys: the keys that are there.
        """
        left = tuple(m for m in self.members if m in keys)
        return self if len(left) == len(self.members) else Batch(left)


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
        :param scope: as for :meth:`collect`; None leaves them without.
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

    def replace(
        self,
        *,
        nodes: Mapping[str, Node] | None = None,
        aliases: Mapping[str, str] | None = None,
        batches: Iterable[Batch] | None = None,
    ) -> FesteGraph:
        """Return the graph with some of its parts replaced; a batch loses members that are gone.

        :param nodes: all nodes by key, or None to keep them; likewise the others.
        :param aliases: all keys that stand for another key.
        :param batches: all calls that will share requests.
        """
        nodes = self.nodes if nodes is None else nodes
        kept = self.batches if batches is None else tuple(batches)
        if kept and nodes is not self.nodes:
            kept = tuple(b for b in (b.within(nodes) for b in kept) if b.members)
        return FesteGraph(nodes, self.outputs, self.aliases if aliases is None else aliases, kept)

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
        return self.replace(nodes=nodes, aliases=aliases)

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
        return self.replace(nodes=nodes, aliases=aliases)

    def with_nodes(self, nodes: Iterable[Node]) -> FesteGraph:
        """Return the graph with nodes added, or replaced where the key is there already.

        :param nodes: the nodes.
        """
        return self.replace(nodes={**self.nodes, **{n.key: n for n in nodes}})

    def with_batches(self, batches: Iterable[Batch]) -> FesteGraph:
        """Return the graph with calls that will share requests.

        :param batches: all batches; those of before are dropped unless they are among them.
        """
        return self.replace(batches=batches)

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
            return Task(key, unwrap, TaskRef(batch.key), position)
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
