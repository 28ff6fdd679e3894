"""Where a run takes known answers from and keeps new ones: a store, a cache, or both.

A *store* is the record of what was paid for: every request is noted before it is sent and every
answer before anything depends on it, so a program that is run again buys only the rest. A *cache*
holds answers alone, shared by programs and tests; what a content filter refused is not put into it.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        missing = [i for i, one in enumerate(found) if one.response is None]
        if self.cache is None or self.mode == "record" or not missing:
            then(True, found)
            return

        def cached(ok: bool, value: Any) -> None:
            if not ok:
                then(False, value)
                return
            for i, one in zip(missing, value, strict=True):
                damaged = found[i].damaged + one.damaged
                source = "cached" if one.response is not None else ""
                found[i] = one._replace(source=source, earlier=found[i].earlier, damaged=damaged)
            then(True, found)

        self.cache.recall([calls[i] for i in missing], cached)

    def remember(self, answer: Answer, then: Then) -> None:
        """Put an answer into the cache.

        :param answer: the answer.
        :param then: as for :meth:`Journal.record`.
        """
        assert self.cache is not None
        self.cache.record([answer], then, prompts=self.prompts)


def is_cacheable(value: Any) -> bool:
    """Whether a value may be taken from a cache for ever: no content filter refused it.

    :param value: the value of a call.

    >>> is_cacheable(Reply("Hi", finish_reason="stop"))
    True
    >>> is_cacheable([Reply("Hi"), Reply("", finish_reason="content_filter")])
    False
    """
    if isinstance(value, Reply):
        return not value.filtered
    return not isinstance(value, list) or all(map(is_cacheable, value))


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
    if path == cache:
        raise ConfigError(
            f"store and cache are the same file, {path}: a store replays its answers by itself, so "
            "leave the cache out or give it a file of its own"
        )
    wait, mode = settings["store_wait"], settings["cache_mode"]
    kept = None if cache is None else opened(cache, wait=wait, read_only=mode == "replay-only")
    journal = None if path is None else opened(path, wait=wait)
    return Answers(journal, kept, mode, settings["store_prompts"])
