"""The prompt cache of `SimServer`: which prefix of a prompt the provider has read before.

Prefixes are known by a hash for each position, counted in words. So a prompt is compared with all
earlier ones in one pass over its words.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from feste.backend import PromptCache
from feste.testing.sim_types import Billed

__all__ = ["Lookup", "PrefixCache", "PromptPart", "prompt_parts"]

_BREAKPOINTS = 4  # the number of explicit breakpoints that one request writes at most
_WORD = re.compile(r"\s*\S+")  # as in tokenizers, the space before a word belongs to it


@dataclass(frozen=True, slots=True)
class PromptPart:
    """A part of a prompt in the order in which the provider reads it.

    :param text: the text, of which each word is a token.
    :param breakpoint: whether an explicit breakpoint ends a reusable prefix after this part.
    :param label: what else tells this part from another, such as a role; it costs no tokens.
    """

    text: str
    breakpoint: bool = False
    label: str = ""


@dataclass(frozen=True, slots=True)
class Lookup:
    """The result of reading a prompt: what its input costs, and the prefixes it has to write."""

    billed: Billed
    unwritten: Sequence[int] = ()


class PrefixCache:
    """The prefixes of all prompts that the provider read.

    :param options: the sizes, times and prices.
    :param clock: returns the time in seconds.

    >>> cache = PrefixCache(PromptCache(minimum=2, lag=0), clock=lambda: 0.0)
    >>> first = cache.read("model", [PromptPart("to be or not")])
    >>> cache.write(first)
    >>> second = cache.read("model", [PromptPart("to be or what")])
    >>> (first.billed.written_tokens, second.billed.cached_tokens, second.billed.written_tokens)
    (4, 3, 1)
    """

    def __init__(
        self, options: PromptCache, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.options, self.clock = options, clock
        # for the hash of each prefix: from when, and until when, it can be found
        self._spans: dict[int, tuple[float, float]] = {}

    def read(
        self, scope: Hashable, parts: Sequence[PromptPart], *, explicit: bool = False
    ) -> Lookup:
        """Look up a prompt as it arrives; its longest committed prefix counts as used now.

        :param scope: prompts of different scopes share nothing.
        :param parts: the whole prompt.
        :param explicit: look up and write prefixes that end at breakpoints only.
        :returns: the bill of the input, and what `write` needs once the answer was generated.
        """
        total = sum(len(part.text.split()) for part in parts)
        ends = self._ends(scope, parts, explicit) if total >= self.options.minimum else {}
        now = self.clock()
        found = {at: key for at, key in ends.items() if self._committed(key, now)}
        for key in found.values():  # whoever reads a prefix reads the shorter ones too
            self._spans[key] = (now, now + self.options.ttl)
        cached = max(found, default=0)
        written = max(ends, default=0) - cached
        units = self.options.read * cached + self.options.write * written
        billed = Billed(total, cached, written, input_units=units + total - cached - written)
        writable = list(ends.items())[-_BREAKPOINTS:] if explicit else ends.items()
        return Lookup(billed, [key for at, key in writable if at not in found])

    def write(self, lookup: Lookup) -> None:
        """Write the prefixes of a prompt whose answer is generated now.

        A prefix that is being written already keeps its own, earlier time.

        :param lookup: what `read` returned.
        """
        now = self.clock()
        ready = now + self.options.lag
        fresh = (ready, ready + self.options.ttl)
        for key in lookup.unwritten:
            start, end = self._spans.get(key, fresh)
            self._spans[key] = (start, fresh[1]) if end >= now else fresh

    def committed(self) -> int:
        """Return the number of prefixes that can be found now."""
        now = self.clock()
        return sum(self._committed(key, now) for key in self._spans)

    def _committed(self, key: int, now: float) -> bool:
        span = self._spans.get(key)
        return span is not None and span[0] <= now <= span[1]

    def _ends(self, scope: Hashable, parts: Sequence[PromptPart], explicit: bool) -> dict[int, int]:
        """Return where a reusable prefix may end: its length in tokens, and its hash."""
        minimum, step = self.options.minimum, self.options.step
        ends: dict[int, int] = {}
        key, at = hash(scope), 0
        for part in parts:
            if part.label:
                key = hash((key, part.label, None))
            for word in _WORD.findall(part.text):
                key, at = hash((key, word)), at + 1
                if not explicit and at >= minimum and at % step == 0:
                    ends[at] = key
            if part.breakpoint and at >= minimum:
                ends.setdefault(at, key)
        return ends


def prompt_parts(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[object] = (), breakpoint: str = ""
) -> list[PromptPart]:
    """Return a conversation as a provider's cache sees it: the tools, then the messages.

    :param messages: the messages; `content` is a text or a list of blocks.
    :param tools: the tools.
    :param breakpoint: the field of a block that marks the end of a reusable prefix.
    :returns: the parts.
    """
    parts = [PromptPart(json.dumps(tool)) for tool in tools]
    for message in messages:
        content = message.get("content")
        rest = {name: value for name, value in message.items() if name != "content"}
        parts.append(PromptPart("", label=json.dumps(rest, sort_keys=True)))
        for block in content if isinstance(content, list) else [{"text": content or ""}]:
            if isinstance(block, dict) and isinstance(block.get("text"), str):
                parts.append(PromptPart(block["text"], bool(block.get(breakpoint))))
            else:
                parts.append(PromptPart("", label=json.dumps(block, sort_keys=True)))
    return parts
