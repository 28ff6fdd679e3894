"""Hundreds of calls through the official SDK, against a provider that limits."""

from __future__ import annotations

import feste
from feste.backend import Limits
from feste.backend.openai import ChatParams, OpenAI
from feste.testing import ServerLimits, SimServer, Totals

WIRE = "feste.backend.openai.testing:OpenAIWire"


def throttled(*, headers: bool, limits: Limits | None = None) -> Totals:
    """Want about twice of what a provider allows, which is 100 requests a second."""
    allowed = ServerLimits(requests_per_minute=6_000, bucket=1, headers=headers)
    with SimServer(WIRE, limits=allowed, base=0.1) as server:
        llm = OpenAI("m", base_url=server.url + "/v1", limits=limits)
        prompts = [f"question {i}\nREPLY: {i}" for i in range(500)]
        (found,) = feste.compute([llm.chat(prompt, ChatParams(max_tokens=8)) for prompt in prompts])
        totals = server.totals()

    assert found == [str(i) for i in range(500)]
    assert totals.delivered == totals.generated == 500
    return totals


def test_a_provider_that_tells_its_limits() -> None:
    totals = throttled(headers=True)

    assert totals.share(429) <= 0.01
    assert totals.requests_used is not None and totals.requests_used >= 0.95


def test_a_user_who_tells_the_limits() -> None:
    totals = throttled(headers=False, limits=Limits(requests_per_minute=6_000))

    assert totals.share(429) <= 0.01
    assert totals.requests_used is not None and totals.requests_used >= 0.95


def test_a_provider_whose_limits_nobody_tells() -> None:
    """It is learnt from refusals, which come late where the machine is busy.

    So the bounds are wide: without learning a third is refused. How well it learns is measured on
    the virtual clock.
    """
    totals = throttled(headers=False)

    assert totals.share(429) <= 0.25
    assert totals.requests_used is not None and totals.requests_used >= 0.5
