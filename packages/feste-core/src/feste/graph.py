"""The graph of nodes that optimizations rewrite and the scheduler runs.

A :class:`FesteGraph` maps keys to nodes. The inputs of a node are keys, resolved through the graph,
so an optimization can replace or merge nodes without touching their consumers. For Dask, the graph
is a mapping from key to a public ``dask.task_spec`` node, lowered on demand.
"""

from __future__ import annotations

import graphlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from types import MappingProxyType
from typing import Any

from feste import draw
from feste.errors import GraphError
from feste.lowering import Lowered, LoweredBatch, unwrap
from feste.node import PENDING, Node
from feste.packing import Deps, fill, pack
from feste.sharing import Batch, Group, Prefix

__all__ = ["Batch", "FesteGraph", "Group", "Prefix"]

Repack = Callable[[Sequence[Any]], tuple[Any, ...]]


class FesteGraph(Mapping[str, Any]):
    """Nodes by key, the requested outputs, and what optimizations have made of them.

    :param nodes: the nodes by key.
    :param outputs: the keys of the requested nodes.
    :param aliases: maps the key of each merged node to the key that replaces it.
    :param batches: calls that will share requests.
    :param groups: calls that may share requests while the graph runs.
    :param prefixes: calls that begin alike.
    :param ranks: the priority of each node, the highest first; empty if it is not planned.

    >>> import feste
    >>> @feste.task
    ... def add(a: int, b: int) -> int:
    ...     return a + b
    >>> total = add(add(1, 2), 3)
    >>> graph, keys, repack = FesteGraph.collect({"total": total})
    >>> len(graph), keys == [total.key], repack([6])
    (2, True, ({'total': 6},))
    """

    __slots__ = (
        "_batched",
        "aliases",
        "batches",
        "groups",
        "nodes",
        "outputs",
        "prefixes",
        "ranks",
    )

    def __init__(
        self,
        nodes: Mapping[str, Node],
        outputs: Iterable[str],
        aliases: Mapping[str, str] | None = None,
        batches: Iterable[Batch] = (),
        groups: Iterable[Group] = (),
        prefixes: Iterable[Prefix] = (),
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        self.nodes: Mapping[str, Node] = MappingProxyType(dict(nodes))
        self.outputs = tuple(outputs)
        self.aliases: Mapping[str, str] = MappingProxyType(dict(aliases or {}))
        self.batches = tuple(batches)
        self.groups = tuple(groups)
        self.prefixes = tuple(prefixes)
        self.ranks: Mapping[str, int] = MappingProxyType(dict(ranks or {}))
        #: Maps a batch's key to (batch, -1), and each member's key to (batch, position).
        self._batched = {b.key: (b, -1) for b in self.batches}
        for batch in self.batches:
            self._batched.update((m, (batch, i)) for i, m in enumerate(batch.members))

    # --- construction -----------------------------------------------------------------------------

    @classmethod
    def collect(cls, *objs: Any, scope: str = draw.MAIN) -> tuple[FesteGraph, list[str], Repack]:
        """Collect the nodes inside some objects and all their inputs into a graph.

        :param objs: nodes, and lists, dicts, sets and dataclasses that contain nodes.
        :param scope: the scope of the new nodes' draws: the main program or an emitting task.
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
        """Return the graph of some nodes and all their inputs, and assign draws to new nodes.

        :param roots: the requested nodes.
        :param scope: as for :meth:`collect`; None assigns no draws.
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

    # --- queries ----------------------------------------------------------------------------------

    def resolve(self, key: str) -> str:
        """Return the key that replaces a key after merges; an unmerged key gives itself.

        :param key: a key.
        """
        aliases = self.aliases
        while key in aliases:
            key = aliases[key]
        return key

    def dependencies(self, key: str) -> list[str]:
        """Return the keys of a node's inputs; none if its value is known.

        :param key: the node's key.
        """
        node = self.nodes[key]
        if not node.deps or node.value is not PENDING:
            return []
        if not self.aliases:
            return [dep.key for dep in node.deps]
        return [self.resolve(dep.key) for dep in node.deps]

    def wanted(self) -> list[str]:
        """Return the keys of the outputs after merges."""
        return [self.resolve(key) for key in self.outputs]

    def order(self, *, contract: Iterable[Batch] = ()) -> list[str]:
        """Return all keys in topological order: inputs before consumers.

        :param contract: batches to treat as one node each.
        :raises GraphError: if there is a cycle (the message names its keys) or an input is missing.
        """
        stands_for = {m: b.key for b in contract for m in b.members}
        if not stands_for and self._is_in_order():
            return list(self.nodes)
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

    def _is_in_order(self) -> bool:
        """Whether inputs stand before their consumers already, as they do when they are collected."""
        seen: set[str] = set()
        for key in self.nodes:
            if not seen.issuperset(self.dependencies(key)):
                return False
            seen.add(key)
        return True

    def check(self) -> None:
        """Check the graph's invariants.

        :raises GraphError: for a cycle (with all batches contracted at once), a missing input,
            output or member of a batch, group or prefix, an empty one of these, a call in two
            batches, draws that are not parts of their batch, a missing rank, or one that is no int.
        """
        self._check_aliases()
        for key in self.outputs:
            if self.resolve(key) not in self.nodes:
                raise GraphError(f"the output {key} is not in the graph")
        sharing: list[Batch | Group | Prefix] = [*self.batches, *self.groups, *self.prefixes]
        for shared in sharing:
            if not shared.members:
                raise GraphError(f"a {type(shared).__name__.lower()} has no calls")
        members = [m for b in self.batches for m in b.members]
        if len(members) != len(set(members)):
            raise GraphError("a call is in two batches")
        for batch in self.batches:
            drawn = [m for equal in batch.draws for m in equal]
            apart = len(drawn) == len(set(drawn)) and set(drawn) <= set(batch.members)
            if not apart or min(map(len, batch.draws), default=2) < 2:
                raise GraphError(
                    f"the draws of {batch.key} are not separate sets of two or more of its members"
                )
        for shared in sharing:
            for member in shared.members:
                if member not in self.nodes:
                    kind = type(shared).__name__.lower()
                    raise GraphError(f"the call {member} of a {kind} is not in the graph")
        if self.ranks and not self.ranks.keys() >= self.nodes.keys():
            raise GraphError("some nodes have a rank and others have none")
        for key, rank in self.ranks.items():
            if not isinstance(rank, Integral):  # numpy's ints too
                raise GraphError(f"the rank of {key} is {rank!r}, not an int")
        self.order(contract=self.batches)

    def _check_aliases(self) -> None:
        ends: set[str] = set()
        for key in self.aliases:
            trail: set[str] = set()
            while key in self.aliases and key not in ends:
                if key in trail:
                    raise GraphError(f"{key} is merged into itself")
                trail.add(key)
                key = self.aliases[key]
            ends |= trail

    def calls(self) -> list[Node]:
        """Return the calls that will be sent: those whose value is not known."""
        return [n for n in self.nodes.values() if n.op.kind == "call" and n.value is PENDING]

    # --- rewriting: each method returns a new graph -----------------------------------------------

    def replace(
        self,
        *,
        nodes: Mapping[str, Node] | None = None,
        aliases: Mapping[str, str] | None = None,
        batches: Iterable[Batch] | None = None,
        groups: Iterable[Group] | None = None,
        prefixes: Iterable[Prefix] | None = None,
        ranks: Mapping[str, int] | None = None,
    ) -> FesteGraph:
        """Return the graph with some parts replaced; removed nodes are dropped from the others.

        :param nodes: all nodes by key, or None to keep them; likewise the others.
        :param aliases: all aliases.
        :param batches: all batches.
        :param groups: all groups.
        :param prefixes: all prefixes.
        :param ranks: the ranks of all nodes.
        """
        nodes = self.nodes if nodes is None else nodes
        batches = self.batches if batches is None else tuple(batches)
        groups = self.groups if groups is None else tuple(groups)
        prefixes = self.prefixes if prefixes is None else tuple(prefixes)
        if nodes is not self.nodes:
            batches = [b for b in (b.within(nodes) for b in batches) if b.members]
            groups = [g for g in (g.within(nodes) for g in groups) if len(g.members) > 1]
            prefixes = [p for p in (p.within(nodes) for p in prefixes) if len(p.members) > 1]
        return FesteGraph(
            nodes,
            self.outputs,
            self.aliases if aliases is None else aliases,
            batches,
            groups,
            prefixes,
            self.ranks if ranks is None else ranks,
        )

    def cull(self) -> FesteGraph:
        """Return the graph without the nodes that no output needs."""
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
        """Return the graph with some nodes merged into others.

        :param pairs: maps each key to remove to the key that replaces it.
        :raises GraphError: if a key would replace itself, or its replacement is not in the graph.
        """
        nodes = {key: node for key, node in self.nodes.items() if key not in pairs}
        final: dict[str, str] = {}
        for key in pairs:
            trail: dict[str, None] = {}
            kept = key
            while kept not in final and kept not in trail:
                after = pairs.get(kept, self.aliases.get(kept))
                if after is None:
                    break
                trail[kept] = None
                kept = after
            kept = final.get(kept, kept)
            if kept not in nodes:
                raise GraphError(f"{key} cannot be merged into {pairs[key]}, which is not there")
            final.update(dict.fromkeys(trail, kept))
        return self.replace(nodes=nodes, aliases={**self.aliases, **final})

    def with_nodes(self, nodes: Iterable[Node]) -> FesteGraph:
        """Return the graph with nodes added; existing nodes with the same key are replaced.

        :param nodes: the nodes.
        """
        return self.replace(nodes={**self.nodes, **{n.key: n for n in nodes}})

    # --- Dask -------------------------------------------------------------------------------------

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
        # as plain Dask data, so that each task travels with its arguments only
        return (dict, (dict(self),))

    def visualize(self, path: str | Path | None = None) -> str:
        """Draw the graph.

        :param path: the file to write: ``.svg``, ``.mmd`` (Mermaid) or ``.html``; None writes none.
        :returns: the picture: Mermaid text for ``.mmd``, otherwise SVG.
        """
        from feste import _compute

        return _compute.draw(self, path)

    def __repr__(self) -> str:
        return f"<FesteGraph of {len(self.nodes)} nodes, {len(self.outputs)} outputs>"
