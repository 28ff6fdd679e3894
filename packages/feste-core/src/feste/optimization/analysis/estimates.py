"""What a plan will take: requests, dollars, seconds. What is not known stays unknown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from feste.backend import Limits
from feste.graph import FesteGraph
from feste.node import PENDING, Node
from feste.optimization.analysis.forming import form_requests
from feste.optimization.analysis.paths import Paths
from feste.optimization.analysis.profiles import Profiles
from feste.optimization.analysis.ranges import NOTHING, UNKNOWN, Range
from feste.optimization.analysis.sketches import Sketches
from feste.optimization.analysis.tokens import CallEstimate, count_tokens
from feste.optimization.analysis.waiting import Gate, Waits, waits_of

__all__ = ["SOME_REQUEST", "SOME_WORK", "Estimates", "PlannedRequest"]

#: The seconds of work that is no request, and of a request of unknown latency: for ranking only.
SOME_WORK, SOME_REQUEST = 0.001, 1.0


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request of a plan.

    :param calls: the calls that it answers.
    :param seconds: how long it takes; unknown without a latency.
    """

    calls: Sequence[CallEstimate]
    seconds: Range


class Estimates:
    """The estimates of a plan; made in linear time.

    :param graph: the optimized graph.
    :param sketches: the requests of its calls.

    >>> from feste.testing import FakeBackend, FakeParams
    >>> first = FakeBackend().complete("some words", FakeParams(max_tokens=64))
    >>> graph, _, _ = FesteGraph.collect(FakeBackend().complete(first))
    >>> estimates = Estimates(graph, Sketches())
    >>> [call.input.likely for call in estimates.calls.values()], estimates.depth
    ([3, 33], 2)
    """

    def __init__(self, graph: FesteGraph, sketches: Sketches) -> None:
        self.graph = graph
        self._sketches = sketches
        self.paths = Paths(graph)
        #: The keys of the nodes whose values are not known; a later run changes nothing here.
        self.open = frozenset(k for k, node in graph.nodes.items() if node.value is PENDING)
        self._profiles = Profiles()
        #: The calls that will be answered, by key.
        self.calls = count_tokens(graph, self.paths, sketches)
        formed = form_requests(graph, sketches)
        for items in formed:
            for item in items:
                for node in item[1:]:  # equal draws pay their prompt once
                    self.calls[node.key].input = NOTHING
        #: The tokens that calls read from the prompt cache, and write to it, at best.
        self._luck: dict[str, tuple[int, int]] = {}
        self._plan_cache()
        for call in self.calls.values():
            self._count_dollars(call)
        #: The requests that the plan sends, if none fails.
        self.requests = [self._request([n for item in items for n in item]) for items in formed]

    # --- dollars ----------------------------------------------------------------------------------

    def _plan_cache(self) -> None:
        """Count what the prompt cache serves: one call of a prefix writes it, the others read it.

        Where they do not wait for it, that is luck: it counts for the lowest price only.
        """
        for lucky in (True, False):
            reads: dict[str, int] = defaultdict(int)
            writes: dict[str, int] = defaultdict(int)
            for prefix in self.graph.prefixes:
                members = [m for m in prefix.members if m in self.calls]
                if members and (prefix.waits or lucky):
                    writes[members[0]] = max(writes[members[0]], prefix.tokens)
                    for key in members[1:]:
                        reads[key] = max(reads[key], prefix.tokens)
            for key in {**writes, **reads}:
                call = self.calls[key]
                room = int(call.input.low or 0)
                if self._profiles.of(call.client, call.model).prompt_cache is None:
                    continue
                call.cached = min(reads[key], room)
                call.written = max(0, min(writes[key], room) - call.cached)
                if lucky:
                    self._luck[key] = call.cached, call.written
                    call.cached = call.written = 0

    def _count_dollars(self, call: CallEstimate) -> None:
        price = self._profiles.price(call.client, call.model)
        if price is None:
            return
        call.is_priced = True
        cached, written = self._luck.get(call.node.key, (0, 0))
        ways: tuple[Callable[..., float], ...] = (
            partial(price.dollars, cached=cached, written=written),
            partial(price.dollars, cached=call.cached, written=call.written),
            price.at_most,
        )
        parts: list[float | None] = []
        for read, made, cost in zip(call.input, call.output, ways, strict=True):
            known = read is not None and (made is not None or not price.output)
            parts.append(cost(read or 0, made or 0) if known else None)
        call.dollars = Range(*parts)

    @cached_property
    def unbounded(self) -> list[str]:
        """The names of operations and tasks without which the worst price would be known."""
        names: dict[str, None] = {}
        for call in self.calls.values():
            if not call.is_priced or call.error or call.dollars.worst is not None:
                continue
            if call.output.worst is None:
                names[call.node.op.name] = None
            else:
                sources = (
                    self.graph.nodes[key]
                    for key in self._sketches.of(self.graph, call.node).unknown
                )
                names.update((n.op.name, None) for n in sources if self._adds_any(n))
        return list(names)

    def _adds_any(self, node: Node) -> bool:
        call = self.calls.get(node.key)
        return call is None or call.output.worst is None

    # --- time -------------------------------------------------------------------------------------

    def _request(self, nodes: Sequence[Node]) -> PlannedRequest:
        calls = [self.calls[node.key] for node in nodes]
        latency = self._profiles.of(calls[0].client, calls[0].model).latency
        if latency is None:
            return PlannedRequest(calls, UNKNOWN)
        parts: list[float | None] = []
        for outputs in zip(*(call.output for call in calls), strict=True):
            longest = _longest(outputs) if latency.token else 0
            parts.append(None if longest is None else latency.seconds(len(calls), longest))
        return PlannedRequest(calls, Range(*parts))

    @cached_property
    def _sent(self) -> dict[str, Range]:
        """The seconds of each call's request."""
        return {call.node.key: r.seconds for r in self.requests for call in r.calls}

    @cached_property
    def _weights(self) -> list[float]:
        """The weight of each node for ranking, by position."""
        return [
            (self.seconds_of(node).likely or _usual(node)) if key in self.open else 0.0
            for key, node in self.graph.nodes.items()
        ]

    @property
    def depth(self) -> int:
        """The number of requests on the longest path: each waits for the one before."""
        paths, lags, _ = self._waits
        ends = paths.ends([key in self.calls for key in paths.keys] + [0] * len(lags))
        return int(max(ends, default=0))

    @cached_property
    def seconds(self) -> Range:
        """How long the run takes, if no request fails; unknown if the latency of a call is.

        That is the longest path, or all requests of an account at the concurrency and the rates that its
        gate allows, if that takes longer. Those that read a prefix wait for the one that writes it.
        """
        return Range(*map(self._duration, range(3)))

    @cached_property
    def path_seconds(self) -> Range:
        """How long the longest path takes; unknown if the latency of a call is."""
        return Range(*map(self._longest_path, range(3)))

    def seconds_of(self, node: Node) -> Range:
        """Return how long the request of a call takes.

        :param node: the call.
        """
        return self._sent.get(node.key, NOTHING)

    @cached_property
    def _waits(self) -> Waits:
        sent = {call.node.key: i for i, r in enumerate(self.requests) for call in r.calls}
        return waits_of(self.paths, self.graph.prefixes, self._weights, sent)

    def _ends(self, part: int, waits: Waits | None) -> list[float] | None:
        """Return when each node ends, by position; at best, nothing waits for the prompt cache."""
        weights = [self.seconds_of(node)[part] for node in self.graph.nodes.values()]
        known = [weight for weight in weights if weight is not None]
        if len(known) < len(weights):
            return None
        if waits is None or not part:
            return self.paths.ends(known)
        return waits.paths.ends(known + waits.lags)

    def _longest_path(self, part: int) -> float | None:
        ends = self._ends(part, self._waits)
        return None if ends is None else max(ends, default=0.0)

    def _duration(self, part: int) -> float | None:
        early, ends = self._ends(part, None), self._ends(part, self._waits)
        if early is None or ends is None:
            return None
        late = {key: b - a for key, a, b in zip(self.paths.keys, early, ends, strict=False)}
        gates: dict[Hashable, Gate] = {}
        for request in self.requests:
            client, model = request.calls[0].client, request.calls[0].model
            gate = gates.setdefault((client.endpoint, client.account, model), Gate())
            seconds = request.seconds[part] or 0.0
            keys = [call.node.key for call in request.calls]
            leads = not self._waits.leaders.isdisjoint(keys)
            gate.add(seconds, leads, late[keys[0]])
            gate.limits.add(Limits.of_client(client))
            used = [n for call in request.calls for n in (call.input[part], call.output[part])]
            known = [n for n in used if n is not None]
            if gate.tokens is not None:
                gate.tokens = gate.tokens + sum(known) if len(known) == len(used) else None
        longest = [gate.seconds() for gate in gates.values()]
        known = [seconds for seconds in longest if seconds is not None]
        return max([*ends, *known], default=0.0) if len(known) == len(longest) else None

    @cached_property
    def critical_path(self) -> list[tuple[Node | None, float | None]]:
        """The nodes of the path that takes longest, the first to run first, with their seconds.

        None stands for the time that the prompt cache has before others read what was written.
        """
        paths, lags, _ = self._waits
        nodes = [self.graph.nodes[key] for key in paths.keys]
        heaviest = paths.heaviest(self._weights + lags)
        return [
            (nodes[i], self.seconds_of(nodes[i]).likely)
            if i < len(nodes)
            else (None, lags[i - len(nodes)])
            for i in heaviest
        ]

    @cached_property
    def slack(self) -> dict[str, float]:
        """How many seconds later each node could end without delaying the run, by key.

        A request of unknown latency counts as one second.
        """
        paths, lags, _ = self._waits
        weights = self._weights + lags
        ends, begins = paths.ends(weights), paths.begins(weights)
        longest = max(ends, default=0.0)
        return {
            key: round(max(0.0, longest - (ends[i] + begins[i] - weights[i])), 6)
            for i, key in enumerate(paths.keys)
        }


def _longest(outputs: Sequence[float | None]) -> float | None:
    known = [tokens for tokens in outputs if tokens is not None]
    return max(known) if len(known) == len(outputs) else None


def _usual(node: Node) -> float:
    return SOME_REQUEST if node.op.kind == "call" else SOME_WORK
