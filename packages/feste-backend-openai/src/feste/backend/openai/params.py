"""The parameters of each endpoint, as explicit fields: a misspelt one is refused.

They are the parameters of the SDK's ``create`` methods, except those that Feste sets itself: the
prompt, streaming, headers, timeout. Servers accept more values than OpenAI for some of them, so
texts are plain ``str``; parameters that only some servers support go into ``extra``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from feste import FesteDelayed
from feste.backend import Params, as_count
from feste.errors import ParameterError

__all__ = ["ChatParams", "Common", "CompleteParams", "EmbedParams"]

#: Fields of the body that Feste sets.
_OURS: Final = frozenset({"messages", "prompt", "input", "stream"})

#: What ``extra`` may hold in calls that become draws of one request: parameters of other servers
#: that act on each answer by itself. Any other may act on the request, as a beam search does.
_EACH: Final = frozenset(
    ("cache_prompt", "chat_template_kwargs", "grammar", "ignore_eos", "min_p", "min_tokens")
    + ("repeat_penalty", "repetition_penalty", "stop_token_ids", "top_a", "top_k", "typical_p")
)

Json = Mapping[str, Any]


class Common(Params):
    """The parameters that all endpoints share."""

    model: str | None = None
    user: str | None = None
    extra: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Check the numbers of answers, and refuse fields in ``extra`` that Feste must see.

        Determinism, batching and the shape of the answer are read from the fields: a ``seed``
        inside ``extra`` would be sent but not noticed. Lazy values are skipped.

        :raises ParameterError: if a parameter is wrong; the message names it.
        """
        for name in ("n", "best_of"):
            value = getattr(self, name, None)
            if not isinstance(value, FesteDelayed):
                as_count(value, f"{type(self).__name__}: {name}")
        if not isinstance(self.extra, Mapping):
            return
        known = {f.name for f in dataclasses.fields(self)}
        for name in self.extra:
            if name in known:
                raise ParameterError(
                    f"{type(self).__name__}: give {name}= itself, not in extra: Feste has to see it"
                )
            if name in _OURS:
                raise ParameterError(
                    f"{type(self).__name__}: extra must not hold {name!r}, which Feste fills in"
                )

    def may_repeat(self) -> bool:
        """Return whether equal calls with these parameters may become draws of one request."""
        return super().may_repeat() and (self.extra is None or self.extra.keys() <= _EACH)


class ChatParams(Common):
    """Parameters of :meth:`OpenAI.chat`; None is not sent, so the provider's default applies.

    ``model`` overrides the backend's. ``extra`` is merged into the body, for parameters that only
    some servers support, such as ``extra={"top_k": 40}``. ``stream_options`` is sent with streams
    only.

    :raises ParameterError: for an unknown parameter; the message suggests the nearest name.

    >>> ChatParams(top_P=1)
    Traceback (most recent call last):
    feste.errors.ParameterError: ChatParams has no parameter 'top_P'. Did you mean 'top_p'?
    """

    whole_numbers = Params.whole_numbers | {"max_completion_tokens"}

    def max_output(self) -> int | None:
        """Return the maximum number of tokens one call may generate; None if there is no bound."""
        bound = self.max_completion_tokens or self.max_tokens
        return None if bound is None else bound * (self.n or 1)

    def may_repeat(self) -> bool:
        """Return whether equal calls with these parameters may become draws of one request.

        Not with what a provider does once a request: it moderates all answers together, searches
        once for all, stores one record, predicts a single answer, speaks a single one.
        """
        once = (self.audio, self.moderation, self.prediction, self.web_search_options)
        stored = self.store is not None and self.store is not False
        return super().may_repeat() and not stored and all(given is None for given in once)

    audio: Json | None = None
    frequency_penalty: float | None = None
    function_call: str | Json | None = None
    functions: Sequence[Json] | None = None
    logit_bias: Mapping[str, int] | None = None
    logprobs: bool | None = None
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    metadata: Mapping[str, str] | None = None
    modalities: Sequence[str] | None = None
    moderation: Json | None = None
    n: int | None = None
    parallel_tool_calls: bool | None = None
    prediction: Json | None = None
    presence_penalty: float | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Json | None = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | None = None
    response_format: Json | None = None
    safety_identifier: str | None = None
    seed: int | None = None
    service_tier: str | None = None
    stop: str | Sequence[str] | None = None
    store: bool | None = None
    stream_options: Json | None = None
    temperature: float | None = None
    tool_choice: str | Json | None = None
    tools: Sequence[Json] | None = None
    top_logprobs: int | None = None
    top_p: float | None = None
    verbosity: str | None = None
    web_search_options: Json | None = None


class CompleteParams(Common):
    """Parameters of :meth:`OpenAI.complete`; None is not sent.

    Calls with equal parameters share requests, except with a ``seed``, because servers apply one
    seed to a whole list. ``model``, ``extra`` and ``stream_options`` as for :class:`ChatParams`.

    :raises ParameterError: for an unknown parameter; the message suggests the nearest name.

    >>> CompleteParams(max_tokens=16, extra={"cache_prompt": False}).body()
    {'max_tokens': 16, 'cache_prompt': False}
    """

    def max_output(self) -> int | None:
        """Return the maximum number of tokens one call may generate; None if there is no bound.

        A provider generates, and counts, ``best_of`` answers to return ``n``.
        """
        bound = self.max_tokens
        return None if bound is None else bound * max(self.n or 1, self.best_of or 1)

    def may_repeat(self) -> bool:
        """Return whether equal calls with these parameters may become draws of one request.

        Not with ``best_of``: the best of many are no independent draws.
        """
        return super().may_repeat() and self.best_of is None

    best_of: int | None = None
    echo: bool | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[str, int] | None = None
    logprobs: int | None = None
    max_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stream_options: Json | None = None
    suffix: str | None = None
    temperature: float | None = None
    top_p: float | None = None


class EmbedParams(Common):
    """Parameters of :meth:`OpenAI.embed`; None is not sent, except for ``encoding_format``.

    Vectors are requested as base64, which is twenty times cheaper to read than numbers; use
    ``encoding_format="float"`` for a server that refuses it. ``model`` and ``extra`` as for
    :class:`ChatParams`.

    :raises ParameterError: for an unknown parameter; the message suggests the nearest name.

    >>> EmbedParams(dimensions=256).body()
    {'dimensions': 256}
    """

    def max_output(self) -> int:
        """Return 0: vectors are not generated token by token."""
        return 0

    dimensions: int | None = None
    encoding_format: str | None = None
