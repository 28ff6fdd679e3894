"""Find calls whose prompts begin alike, and let one of each go first, for the provider's prompt cache.

With ``w`` and ``r`` the prices of a written and a read token (a plain one costs 1), N calls that
share P tokens pay N * P for them without a cache, up to N * w * P if all are sent at once and each
writes, and (w + (N - 1) * r) * P if one goes first. For 64 calls, 4,000 tokens, w = 1.25, r = 0.1
that is 256,000, 320,000 and 30,200.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from feste.backend import PromptCache
from feste.backend.profile import profile_of
from feste.backend.request import BYTES_PER_TOKEN, text_bytes
from feste.graph import FesteGraph, Prefix
from feste.node import Node
from feste.optimization import rules
from feste.optimization.analysis.sketches import HOLE
from feste.optimization.analysis.tokens import bound_of, likely_output
from feste.optimization.base import Level, PassContext, Phase
from feste.wording import counted

__all__ = ["PrefixOptimization"]

#: A provider takes few marks in one request; a prefix inside four others is not planned.
MOST_NESTED = 4
#: With the objective "balanced" calls wait only if that saves so much of what they cost to read.
WORTH_WAITING = 0.25


class Text(NamedTuple):
    """What a prompt cache sees of one call's request, up to the first unknown text.

    :param parts: the known parts; the last one may be the beginning of a part only.
    :param whole: how many of them are whole.
    :param node: the call.
    :param draws: the keys of the calls that are answers to its prompt: its own first.
    :param tokens: the tokens of its request, with those beyond the known text.
    """

    parts: tuple[str, ...]
    whole: int
    node: Node
    draws: tuple[str, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Shared:
    """A text that some calls begin with.

    :param length: its characters.
    :param whole: how many whole parts it has.
    :param first: the first of these calls, in sorted order.
    :param last: the call after the last one.
    :param tokens: its tokens.
    :param saved: how much of what these calls read need not be paid for.
    """

    length: int
    whole: int
    first: int
    last: int
    tokens: int = 0
    saved: float = 0.0


class PrefixOptimization:
    """Plan the use of the provider's prompt cache, where the backend's profile knows one.

    Only metadata and the order of sending change. Which call goes first is decided as they come, so
    calls that become ready at different times are no obstacle; if one fails, another one goes first.
    """

    name = "prefix"
    level = Level.E0
    phase = Phase.PHYSICAL
    after = ("sample_fusion", "batch")

    def apply(self, graph: FesteGraph, cx: PassContext) -> FesteGraph:
        """Return the graph with the prefixes of its calls.

        :param graph: the graph.
        :param cx: receives a remark for each shared prefix.
        """
        found: list[Prefix] = []
        hasty: dict[str, Node] = {}
        for cache, texts in _caches(graph, cx):
            for shared in _worthwhile(texts, cache):
                prefix = _prefix(cache, texts, shared, cx.settings["objective"])
                useful = prefix.waits or prefix.whole or prefix.keyed
                if useful and not cx.allow():
                    continue
                if useful:
                    found.append(prefix)
                members = [text.node for text in texts[shared.first : shared.last]]
                if prefix.waits:
                    _remark(cx, prefix, cache, members)
                else:
                    hasty.update((node.key, node) for node in members)
        if hasty:
            why = "the objective is latency"
            if cx.settings["objective"] == "balanced":
                why = f"it would save less than {WORTH_WAITING:.0%} of what they cost to read"
            cx.missed(
                f"{counted(len(hasty), 'call')} could read their beginnings from the prompt cache, but do "
                f"not wait for another to write them: {why}",
                list(hasty.values()),
            )
        return graph.replace(prefixes=[*graph.prefixes, *found]) if found else graph


def _caches(graph: FesteGraph, cx: PassContext) -> list[tuple[PromptCache, list[Text]]]:
    """Return the sorted texts of the calls that use one prompt cache."""
    equal = {e[0]: e for batch in graph.batches for e in batch.draws}
    later = {m for draws in equal.values() for m in draws[1:]}
    found: dict[Hashable, tuple[PromptCache, list[Text]]] = {}
    for node in graph.calls():
        call = node.call
        if call is None or call.operation.prefix is None or node.key in later:
            continue
        model = call.model(node.args)
        cache = profile_of(call.client, model).prompt_cache
        if cache is None:
            continue
        text = _text(graph, node, equal.get(node.key, (node.key,)), cx)
        if text is not None:
            same = (rules.operation(node), model)
            found.setdefault(same, (cache, []))[1].append(text)
    for _, texts in found.values():
        texts.sort(key=lambda text: text.parts)
    return list(found.values())


def _text(graph: FesteGraph, node: Node, draws: tuple[str, ...], cx: PassContext) -> Text | None:
    call = node.call
    assert call is not None and call.operation.prefix is not None
    request = cx.sketches.of(graph, node).request
    if request is None:
        return None
    parts = call.operation.prefix.parts(request)
    for whole, part in enumerate(parts):
        if HOLE in part:
            known = (*parts[:whole], part.partition(HOLE)[0])
            return Text(known, whole, node, draws, request.tokens)
    return Text(tuple(parts), len(parts), node, draws, request.tokens)


def _worthwhile(texts: Sequence[Text], cache: PromptCache) -> Iterator[Shared]:
    """Yield the shared beginnings that cost less with the cache, outer ones first.

    A beginning inside another one is worth what it adds to it.
    """
    outer: list[Shared] = []
    for shared in _shared(texts, cache):
        while outer and outer[-1].last <= shared.first:
            outer.pop()
        tokens = _tokens(texts[shared.first], shared.length)
        more = tokens - (outer[-1].tokens if outer else 0)
        uses = shared.last - shared.first
        saved = more * ((uses - 1) * (1 - cache.read) - (cache.write - 1))
        if saved > 0 and tokens >= cache.minimum and len(outer) < MOST_NESTED:
            read = sum(text.tokens for text in texts[shared.first : shared.last])
            made = replace(shared, tokens=tokens, saved=saved / max(1, read))
            outer.append(made)
            yield made


def _shared(texts: Sequence[Text], cache: PromptCache) -> list[Shared]:
    """Return all beginnings that two or more of the sorted texts share, outer ones first."""
    found: list[Shared] = []
    stack: list[Shared] = []  # those that go on to the next text
    for i in range(1, len(texts) + 1):
        length, whole = _common(texts[i - 1], texts[i], cache) if i < len(texts) else (0, 0)
        first = i - 1
        while stack and stack[-1].length > length:
            longer = stack.pop()
            first = longer.first
            found.append(replace(longer, last=i))
        if length and (not stack or stack[-1].length < length):
            stack.append(Shared(length, whole, first, i))
    return sorted(found, key=lambda s: (s.first, -s.last))


def _common(one: Text, other: Text, cache: PromptCache) -> tuple[int, int]:
    """Return how many characters of the common beginning of two texts the cache can hold.

    :returns: the characters; and how many whole parts these are.
    """
    length = whole = 0
    for mine, others in zip(one.parts, other.parts, strict=False):
        if mine != others or whole >= min(one.whole, other.whole):
            if not cache.breakpoints:  # they mark the ends of whole parts
                length += _common_text(mine, others)
            break
        length += len(mine)
        whole += 1
    if not cache.breakpoints:
        length -= length % (BYTES_PER_TOKEN * cache.step)
    return length, whole


def _common_text(one: str, other: str) -> int:
    """Return the length of the common beginning of two texts; fast for long ones."""
    low, step = 0, 64
    most = min(len(one), len(other))
    while low < most and one[low : low + step] == other[low : low + step]:
        low = min(most, low + step)
        step *= 2
    high = min(most, low + step)
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _tokens(text: Text, length: int) -> int:
    """Return the tokens of the first characters of a text, counted as those of requests."""
    counted = 0
    for part in text.parts:
        counted += text_bytes(part[:length])
        length -= len(part)
        if length <= 0:
            break
    return counted // BYTES_PER_TOKEN


def _prefix(cache: PromptCache, texts: Sequence[Text], shared: Shared, objective: str) -> Prefix:
    digest = hashlib.blake2b(digest_size=12)
    left = shared.length
    for part in texts[shared.first].parts:
        digest.update(part[:left].encode("utf-8", "surrogatepass") + b"\0")
        left -= len(part)
        if left <= 0:
            break
    return Prefix(
        tuple(key for text in texts[shared.first : shared.last] for key in text.draws),
        digest.hexdigest(),
        shared.tokens,
        whole=shared.whole if cache.breakpoints else 0,
        keyed=cache.keys,
        waits=objective == "cost" or (objective == "balanced" and shared.saved >= WORTH_WAITING),
        lag=cache.lag,
        ttl=cache.ttl,
    )


def _remark(cx: PassContext, prefix: Prefix, cache: PromptCache, members: Sequence[Node]) -> None:
    count, tokens, call = len(members), prefix.tokens, members[0].call
    assert call is not None, "only calls have prefixes"
    latency = profile_of(call.client, call.model(members[0].args)).latency
    wait = "wait for it"
    if latency is not None:
        seconds = latency.seconds(1, likely_output(bound_of(members[0]))) + prefix.lag
        wait = f"wait ~{seconds:.2g} s for it"
    cx.applied(
        f"{count:,} calls of {members[0].op.name} begin with the same ~{tokens:,} tokens: one goes "
        f"first, the others {wait} and read them from the prompt cache "
        f"(~{cache.units(count, tokens):,.0f} tokens to pay instead of {count * tokens:,})",
        members,
    )
