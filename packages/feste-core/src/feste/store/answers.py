"""Where a run takes known answers from and keeps new ones: a store, a cache, or both.

A *store* is the record of what was paid for: every request is noted before it is sent and every
answer before anything depends on it, so a program that is run again buys only the rest. A *cache*
holds answers alone, shared by programs and tests; what a content filter refused is not put into it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from feste.backend import Reply
from feste.context import Settings
from feste.errors import ConfigError
from feste.store.journal import Journal, Then
from feste.store.opened import opened
from feste.store.rows import Answer, Found, Wanted

__all__ = ["Answers", "answers_of", "is_cacheable"]

Mode = Literal["replay", "record", "replay-only"]


class Answers:
    """The store and the cache of a run.

    :param store: the journal of the store, or None.
    :param cache: the journal of the cache, or None.
    :param mode: how the cache is used; see :func:`answers_of`.
    :param prompts: whether the store keeps what calls ask, not only its hash.
    """

    def __init__(
        self,
        store: Journal | None,
        cache: Journal | None = None,
        mode: Mode = "replay",
        prompts: bool = True,
    ) -> None:
        self.store = store
        self.cache = cache
        self.mode = mode
        self.prompts = prompts

    @property
    def replay_only(self) -> bool:
        """Whether nothing may be sent."""
        return self.cache is not None and self.mode == "replay-only"

    @property
    def fills_cache(self) -> bool:
        """Whether new answers are put into the cache."""
        return self.cache is not None and self.mode != "replay-only"

    def reserve(self, scope: str) -> None:
        """Let no other call take what calls of a task bought before, since the task will run.

        :param scope: the scope of the task's calls.
        """
        for journal in (self.store, self.cache):
            if journal is not None:
                journal.claims.reserved.add(scope)

    def recall(self, calls: Sequence[Wanted], then: Then) -> None:
        """Look up the answers of calls: in the store, then in the cache.

        :param calls: the calls.
        :param then: receives True and a :class:`Found` for each, or False and the error.
        """
        if self.store is None:
            self._ask_cache(calls, [Found()] * len(calls), then)
            return

        def stored(ok: bool, found: Any) -> None:
            if ok:
                self._ask_cache(calls, found, then)
            else:
                then(False, found)

        self.store.recall(calls, stored)

    def _ask_cache(self, calls: Sequence[Wanted], found: list[Found], then: Then) -> None:
        if self.cache is None or self.mode == "record":
            then(True, found)
            return
        self.cache.claim_twins(
            [
                (call, one.response)
                for call, one in zip(calls, found, strict=True)
                if one.response is not None and call.sample
            ]
        )
        missing = [i for i, one in enumerate(found) if one.response is None]
        if not missing:
            then(True, found)
            return

        def cached(ok: bool, value: Any) -> None:
            if not ok:
                then(False, value)
                return
            for i, one in zip(missing, value, strict=True):
                damaged = found[i].damaged + one.damaged
                source = "cached" if one.response is not None else ""
                equal = found[i].equal or one.equal
                found[i] = one._replace(
                    source=source, earlier=found[i].earlier, damaged=damaged, equal=equal
                )
            then(True, found)

        self.cache.recall([calls[i] for i in missing], cached)

    def remember(self, answer: Answer, then: Then) -> None:
        """Put an answer into the cache.

        :param answer: the answer.
        :param then: as for :meth:`Journal.record`.
        """
        assert self.cache is not None
        replace = self.mode == "record"
        self.cache.record([answer], then, prompts=self.prompts, replace=replace)


#: Names of fields that say why an answer ended, and what providers put there if a filter ended it.
_REASONS = frozenset(("finish_reason", "finishReason", "stop_reason", "stopReason"))
_FILTERED = re.compile(
    r"content.?filter|safety|prohibited|blocklist|recitation|spii|refus|guardrail|toxic|moderat",
    re.IGNORECASE,
)


def is_cacheable(payload: Any, value: Any = None) -> bool:
    """Whether an answer may be taken from a cache for ever: no content filter withheld it.

    :param payload: the response, as the provider sent it.
    :param value: what the backend made of it; a Reply tells its finish reason.

    >>> is_cacheable({"choices": [{"finish_reason": "stop", "message": {"content": "Hi"}}]})
    True
    >>> is_cacheable({"choices": [{"finish_reason": "content_filter"}]})
    False
    """
    replies = value if isinstance(value, list) else [value]
    if any(_is_filtered(r.finish_reason) for r in replies if isinstance(r, Reply)):
        return False
    stack = [payload]
    while stack:
        part = stack.pop()
        if isinstance(part, Mapping):
            if part.get("refusal") or any(_is_filtered(part.get(name)) for name in _REASONS):
                return False
            stack.extend(part.values())
        elif isinstance(part, list) and part and isinstance(part[0], (Mapping, list)):
            stack.extend(part)
    return True


def _is_filtered(reason: Any) -> bool:
    return isinstance(reason, str) and _FILTERED.search(reason) is not None


def _same(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return os.path.realpath(path) == os.path.realpath(other)


def answers_of(settings: Settings) -> Answers | None:
    """Open the store and the cache that settings name.

    :param settings: ``store``, ``store_wait`` (seconds), ``store_prompts``, ``cache`` and
        ``cache_mode``: ``"replay"`` takes an answer from the cache and buys and adds what is
        missing, ``"record"`` buys all and replaces what is there, ``"replay-only"`` buys nothing.
    :returns: None if they name neither.
    :raises JournalError: if one of them cannot be used.
    """
    path, cache = settings["store"], settings["cache"]
    if path is None and cache is None:
        return None
    if path is not None and cache is not None and _same(path, cache):
        raise ConfigError(
            f"store and cache are the same file, {path}: a store replays its answers by itself, so "
            "leave the cache out or give it a file of its own"
        )
    wait, mode = settings["store_wait"], settings["cache_mode"]
    kept = None if cache is None else opened(cache, wait=wait, read_only=mode == "replay-only")
    journal = None if path is None else opened(path, wait=wait)
    return Answers(journal, kept, mode, settings["store_prompts"])
