"""The rules by which several calls of an operation share one request: as a list, or as draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from feste.backend.request import Request, Response, canonical
from feste.errors import CallError

__all__ = ["BatchRule", "Outcome", "PrefixRule", "SampleRule", "even_parts"]

T = TypeVar("T")
Outcome = Response | CallError


@dataclass(frozen=True, slots=True)
class BatchRule:
    """How several calls of an operation are packed into one request.

    :param item: the parameter that differs between the calls; all others must be equal.
    :param field: the field of the body that holds it.
    :param max_items: the maximum number of calls in one request.
    :param max_tokens: the maximum number of tokens in one request, or None. Counts are estimates,
        so 5 % is kept in reserve.
    :param max_bytes: the maximum size of the body in bytes, or None; 5 % is kept in reserve.
    :param pack: ``pack(backend, requests) -> request``.
    :param unpack: ``unpack(backend, request, response) -> outcomes``: each call's own response or
        error, in the order of the calls. It may raise :class:`~feste.errors.CountMismatch`; the
        calls are then sent one by one.
    """

    item: str
    field: str
    max_items: int
    pack: Callable[[Any, Sequence[Request]], Request]
    unpack: Callable[[Any, Request, Response], Sequence[Outcome]]
    max_tokens: int | None = None
    max_bytes: int | None = None

    def signature(self, request: Request) -> str:
        """Return a text that is equal for requests that may be packed together.

        :param request: the request of one call.
        """
        body = {name: value for name, value in request.body.items() if name != self.field}
        r = request
        return canonical([r.plugin, r.operation, r.endpoint, r.account, r.parser, body])

    def lists(
        self,
        requests: Sequence[Request | None],
        max_items: int | None = None,
        allows: Callable[[int, int], bool] | None = None,
    ) -> list[list[int]]:
        """Return which requests become one list, by their positions; a single one stays alone.

        :param requests: one for each item; one that is not known yet, None, counts as an item only.
        :param max_items: a limit of items below the rule's, or None.
        :param allows: tells whether a server takes so many items of so many bytes, or None.
        """
        alike: dict[tuple[int, str] | None, list[int]] = {}
        for i, request in enumerate(requests):
            same = None if request is None else (request.samples, self.signature(request))
            alike.setdefault(same, []).append(i)
        formed: list[list[int]] = []
        for positions in alike.values():
            some = [requests[i] for i in positions]
            sizes = [(0, 0) if r is None else (r.tokens, r.size) for r in some]
            begin = 0
            for count in self.chunks(sizes, max_items, allows):
                formed.append(positions[begin : begin + count])
                begin += count
        return formed

    def chunks(
        self,
        sizes: Sequence[tuple[int, int]],
        max_items: int | None = None,
        allows: Callable[[int, int], bool] | None = None,
    ) -> list[int]:
        """Return the number of calls in each request, so that every limit is kept.

        Calls stay in order, and the last two requests are balanced: 17 calls with a limit of 16
        become 9 and 8.

        :param sizes: tokens and bytes of each call.
        :param max_items: a limit of items below the rule's, or None.
        :param allows: tells whether a server takes so many items of so many bytes, or None.

        >>> rule = BatchRule("prompt", "prompt", 16, pack=None, unpack=None, max_tokens=None)
        >>> rule.chunks([(1, 4)] * 17), rule.chunks([(1, 4)] * 32)
        ([9, 8], [16, 16])
        """
        top = min(self.max_items, max_items or self.max_items)

        def too_large(items: int, tokens: int, size: int) -> bool:
            refused = allows is not None and not allows(items, size)
            return refused or self.exceeds(items, tokens, size, top)

        counts: list[int] = []
        items = tokens = size = 0
        for token, byte in sizes:
            if items and too_large(items + 1, tokens + token, size + byte):
                counts.append(items)
                items = tokens = size = 0
            items, tokens, size = items + 1, tokens + token, size + byte
        if items:
            counts.append(items)
        if len(counts) > 1 and counts[-2] - counts[-1] > 1:
            both = counts[-2] + counts[-1]
            last = sizes[-(both // 2) :]
            if not too_large(len(last), sum(t for t, _ in last), sum(b for _, b in last)):
                counts[-2:] = [both - both // 2, both // 2]
        return counts

    def exceeds(self, items: int, tokens: int, size: int, most: int) -> bool:
        """Return whether a request would be too large.

        :param items: the number of calls in it.
        :param tokens: their tokens.
        :param size: their bytes.
        :param most: the maximum number of calls.

        >>> rule = BatchRule("prompt", "prompt", 16, pack=None, unpack=None, max_tokens=100)
        >>> rule.exceeds(2, 95, 400, 16), rule.exceeds(2, 96, 400, 16), rule.exceeds(3, 9, 36, 2)
        (False, True, True)
        """
        return (
            items > most
            or (self.max_tokens is not None and tokens > 0.95 * self.max_tokens)
            or (self.max_bytes is not None and size > 0.95 * self.max_bytes)
        )


@dataclass(frozen=True, slots=True)
class SampleRule:
    """How equal SAMPLE calls become one request that asks for several answers to one prompt.

    Only for endpoints whose answers to one request are independent draws.

    :param unpack: ``unpack(backend, request, response) -> responses``: for each distinct answer the
        response that a single call would have got; fewer if the server gave fewer.
    :param field: the field of the body that holds the number of answers.
    :param max_draws: the maximum number of answers in one request.
    """

    unpack: Callable[[Any, Request, Response], Sequence[Response]]
    field: str = "n"
    max_draws: int = 128

    def pack(self, request: Request, draws: int) -> Request:
        """Return the request that asks for several answers.

        :param request: the request of one call.
        :param draws: the number of answers.
        """
        if draws == 1:
            return request
        return replace(request, body={**request.body, self.field: draws}, samples=draws)


@dataclass(frozen=True, slots=True)
class PrefixRule:
    """What a provider's prompt cache sees of a request, and how a request tells it about prefixes.

    :param parts: ``parts(request) -> texts``: all texts that the cache compares, in its order, such
        as tools, then messages. A prefix may end after any of them, or inside one.
    :param mark: ``mark(request, key, ends) -> request``: the request with the cache's key (or None),
        and with a mark after each of these numbers of parts, as far as the user has not set them.
        It is called as the request is sent, and the answer must not depend on it.
    """

    parts: Callable[[Request], Sequence[str]]
    mark: Callable[[Request, str | None, Sequence[int]], Request]


def even_parts(calls: Sequence[T], most: int) -> list[list[T]]:
    """Divide equal calls into as few requests as a limit allows, of nearly equal size.

    :param calls: the calls.
    :param most: the maximum number in one request.

    >>> even_parts("abcde", 2)
    [['a', 'd'], ['b', 'e'], ['c']]
    """
    parts = -(-len(calls) // most)
    return [list(calls[part::parts]) for part in range(parts)]
