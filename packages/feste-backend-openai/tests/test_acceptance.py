"""Thousands of calls through the official SDK, against a provider that fails and that limits.

``CHAOS=full`` runs the long form: 10,000 calls.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

import feste
from feste.backend import Limits
from feste.backend.openai import ChatParams, OpenAI
from feste.errors import FesteError, InvalidRequest
from feste.report import RunReport
from feste.testing import Fault, ServerLimits, SimServer, Totals
from feste.testing.sim_faults import FaultKind

WIRE = "feste.backend.openai.testing:OpenAIWire"
CALLS = 10_000 if os.environ.get("CHAOS") == "full" else 3_000

#: What one try loses though it may have been paid for. Feste tries such a call once more.
LOST = {
    "hang", "gateway_timeout", "bad_gateway", "reset_before", "reset_after", "truncated",
    "garbage", "empty", "wrong_shape", "wrong_count", "wrong_length",
}  # fmt: skip


def compute(llm: OpenAI, prompts: Sequence[str]) -> tuple[list[Any], RunReport]:
    calls = [llm.chat(prompt, ChatParams(max_tokens=8)) for prompt in prompts]
    (found,) = feste.compute(calls, on_error="return")
    report = feste.last_report()
    assert report is not None
    return found, report


def test_five_percent_of_all_faults_at_once() -> None:
    """What is not poisoned arrives, nothing crosses, and the report owns up to all that was lost.

    A call may fail only after two of its answers were lost that may have been paid for.
    """
    # one of these ends the account, the others each call that they hit
    final = {"quota", "redirect", "content_filter"}
    floods = {"bomb", "deep", "endless", "endless_headers"}
    kinds = [kind for kind in get_args(FaultKind) if kind not in final | floods]
    faults = [
        Fault(kind=kind, times=None, probability=0.05 / len(kinds), pause=0.05) for kind in kinds
    ]
    prompts = [
        f"{'poison' if i % 100 == 50 else 'question'} {i}\nREPLY: answer {i}" for i in range(CALLS)
    ]
    options = {"poison": "poison"}
    waits = ("fraction", "milliseconds", "none")
    with SimServer(WIRE, wire_options=options, faults=faults, waits=waits, seed=7) as server:
        found, report = compute(OpenAI("m", base_url=server.url + "/v1", timeout=4), prompts)
        totals = server.totals()
        lost = Counter[str]()
        for entry in server.requests():
            gone = entry.fault in LOST or entry.left is not None  # who left had waited too long
            lost[entry.body["messages"][-1]["content"]] += gone

    failed = {prompts[i]: one for i, one in enumerate(found) if isinstance(one, FesteError)}
    poisoned = {prompt for prompt in prompts if "poison" in prompt}
    assert {type(failed.get(prompt)) for prompt in poisoned} == {InvalidRequest}
    for prompt in failed.keys() - poisoned:
        assert lost[prompt] > 1, (prompt, failed[prompt])
    assert len(failed) - len(poisoned) <= CALLS / 200
    for prompt, one in zip(prompts, found, strict=True):
        assert prompt in failed or one == prompt.partition("REPLY: ")[2]
    owned_up = sum(r.items for r in report.requests if r.error and r.billed != "no")
    assert totals.generated - (CALLS - len(failed)) <= owned_up
    assert set(totals.faults) == set(kinds)
    assert 0.03 <= sum(totals.faults.values()) / totals.requests <= 0.07


def throttled(*, headers: bool, limits: Limits | None = None) -> tuple[Totals, list[int | None]]:
    """Want about twice of what a provider allows, which is 100 requests a second.

    Return the totals, and the statuses of all that came after the first second.
    """
    allowed = ServerLimits(requests_per_minute=6_000, bucket=1, headers=headers)
    with SimServer(WIRE, limits=allowed, base=0.1) as server:
        llm = OpenAI("m", base_url=server.url + "/v1", limits=limits)
        found, _ = compute(llm, [f"question {i}\nREPLY: {i}" for i in range(500)])
        totals, came = server.totals(), server.requests()

    assert found == [str(i) for i in range(500)]
    assert totals.delivered == totals.generated == 500
    first = min(request.started for request in came)
    return totals, [r.status for r in came if r.started > first + 1.0]


def test_a_provider_that_tells_its_limits() -> None:
    totals, _ = throttled(headers=True)

    assert totals.share(429) <= 0.01
    assert totals.requests_used is not None and totals.requests_used >= 0.95


def test_a_user_who_tells_the_limits() -> None:
    totals, _ = throttled(headers=False, limits=Limits(requests_per_minute=6_000))

    assert totals.share(429) <= 0.01
    assert totals.requests_used is not None and totals.requests_used >= 0.95


def test_a_provider_whose_limits_nobody_tells() -> None:
    """The first second goes into finding the rate."""
    totals, later = throttled(headers=False)

    assert later.count(429) <= 0.05 * len(later)
    assert totals.requests_used is not None and totals.requests_used >= 0.80
