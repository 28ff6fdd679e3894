"""What each kind of fault may do to a call, and which calls have to fail by a provider's log."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, get_args

from feste.testing import Fault, LoggedRequest
from feste.testing.sim_faults import FaultKind
from tests.chaos.checker import Evidence
from tests.chaos.work import POISON, Step

__all__ = ["EXPECTED", "TWICE", "Effect", "doomed", "everything"]


class Effect(Enum):
    """What becomes of a call that a fault hits."""

    AGAIN = "it was not served, and is sent again as long as attempts are left"
    AMBIGUOUS = "it may have been paid for; the second one that is lost fails it"
    UNREADABLE = "it was paid for; the second answer that cannot be read fails it"
    DELIVERED = "it gets its answer, later"
    REFUSED = "it fails"
    LISTS = "it is spoilt only where it shares a request; see test_lists.py"
    ACCOUNT = "it ends the account; see test_outages.py"


#: A kind that is not here fails :func:`everything`.
EXPECTED: Mapping[str, Effect] = {
    "status": Effect.AGAIN,
    "rate_limit": Effect.AGAIN,
    "overloaded": Effect.AGAIN,
    "unavailable": Effect.AGAIN,
    "html": Effect.AGAIN,
    "bad_gateway": Effect.AMBIGUOUS,
    "gateway_timeout": Effect.AMBIGUOUS,
    "reset_before": Effect.AMBIGUOUS,
    "reset_after": Effect.AMBIGUOUS,
    "hang": Effect.AMBIGUOUS,
    "truncated": Effect.AMBIGUOUS,
    "wrong_length": Effect.AMBIGUOUS,
    "garbage": Effect.UNREADABLE,
    "empty": Effect.UNREADABLE,
    "wrong_shape": Effect.UNREADABLE,
    "wrong_count": Effect.UNREADABLE,
    "bomb": Effect.UNREADABLE,
    "deep": Effect.UNREADABLE,
    "endless": Effect.UNREADABLE,
    "endless_headers": Effect.UNREADABLE,
    "filtered": Effect.DELIVERED,
    "drip_headers": Effect.DELIVERED,
    "drip": Effect.DELIVERED,
    "slow": Effect.DELIVERED,
    "redirect": Effect.REFUSED,
    "content_filter": Effect.REFUSED,
    "shuffled": Effect.LISTS,
    "duplicated": Effect.LISTS,
    "extra": Effect.LISTS,
    "quota": Effect.ACCOUNT,
}


#: Kinds that hit one call twice for sure, which fails it.
TWICE = ("reset_after", "garbage")


def everything(steps: Sequence[Step], share: float = 0.05) -> list[Fault]:
    """Return faults of all kinds that hit calls which share no request.

    :param steps: the calls; some of the first are hit for sure, so that no kind is left out.
    :param share: the share of requests that they hit together.
    :raises AssertionError: if it is not known what a kind does.
    """
    unknown = set(get_args(FaultKind)) - EXPECTED.keys()
    assert not unknown, f"say in EXPECTED what becomes of a call that is hit by {unknown}"
    apart = (Effect.LISTS, Effect.ACCOUNT)
    kinds: list[Any] = [kind for kind in get_args(FaultKind) if EXPECTED[kind] not in apart]
    first = [s.text for s in steps if not s.parents and POISON not in s.text][3::5]
    return [
        *(
            Fault(kind=kind, match=f'{text}"', times=1 + (kind in TWICE), pause=0.05)
            for kind, text in zip(kinds, first, strict=False)
        ),
        *(
            Fault(kind=kind, times=None, probability=share / len(kinds), pause=0.05)
            for kind in kinds
        ),
    ]


def doomed(evidence: Evidence) -> tuple[set[int], set[int]]:
    """Return the calls that must have failed themselves, and those that need one of them.

    :param evidence: what a run left, with the bodies of its requests; no two prompts are equal.
    """
    fates = _fates(evidence.log)
    own: set[int] = set()
    gone: set[int] = set()
    for i, step in enumerate(evidence.steps):
        if not (own | gone).isdisjoint(step.parents):
            gone.add(i)
            continue
        fate = fates[step.prompt(evidence.values)]
        lost_twice = fate[Effect.AMBIGUOUS] > 1 or fate[Effect.UNREADABLE] > 1
        if POISON in step.text or lost_twice or fate[Effect.REFUSED]:
            own.add(i)
    return own, gone


def _fates(log: Sequence[LoggedRequest]) -> Mapping[str, Counter[Effect]]:
    """Return what befell the requests of each prompt."""
    fates: dict[str, Counter[Effect]] = defaultdict(Counter)
    for request in log:
        effect = EXPECTED[request.fault] if request.fault else Effect.DELIVERED
        if effect is Effect.DELIVERED and request.left is not None:
            effect = Effect.AMBIGUOUS  # it took too long on a busy machine
        body = request.body if isinstance(request.body, dict) else json.loads(request.body)
        fates[body["messages"][-1]["content"]][effect] += 1
    return fates
