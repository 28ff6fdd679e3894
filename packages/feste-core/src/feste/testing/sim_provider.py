"""The provider behind `SimServer` without its sockets: it plans, limits, spoils, and answers."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast, get_args

from feste.backend import Price, PromptCache
from feste.testing.sim_cache import Lookup, PrefixCache, PromptPart
from feste.testing.sim_faults import Fault, ListFault, Outage
from feste.testing.sim_http import Reply, Request
from feste.testing.sim_ledger import Ledger
from feste.testing.sim_limits import Limiter, ServerLimits, Wait, retry_after
from feste.testing.sim_lists import relisted
from feste.testing.sim_striking import DELIVERING, Chance, Faults, refusal_of, spoiled
from feste.testing.sim_types import Billed, Totals
from feste.testing.wire import Answer, Call, Plan, Refusal, Wire

__all__ = ["Provider", "faults_of"]

_encode = json.JSONEncoder(separators=(",", ":")).encode


class Provider:
    """The server without its connections.

    :param config: the configuration that `SimServer` sends.
    :param refuse: refuses connections for some seconds.
    """

    def __init__(self, config: Mapping[str, Any], refuse: Callable[[float], None]) -> None:
        self.wires = [_load(name, options) for name, options in config["wires"]]
        self.base: float = config["base"]
        self.slope: float = config["slope"]
        self.headers: dict[str, str] = config["headers"]
        self.limits = ServerLimits(**(config["limits"] or {}))
        self.given = faults_of(config["faults"])
        self.waits: Sequence[Wait] = config["waits"]
        self.log_bodies: bool = config["log_bodies"]
        self.seed: int = config["seed"]
        options = config["prompt_cache"] or {"minimum": sys.maxsize}  # which no prompt reaches
        self.prompt_cache = PromptCache(**options)
        price = None if config["price"] is None else Price(**config["price"])
        self.ledger = Ledger(config["ledger"], price)
        self.arrive, self.leave = self.ledger.arrive, self.ledger.leave
        self.refuse = refuse
        self.forget()

    def forget(self) -> None:
        """Clear the log, the added faults, all counters and limits, the bill and the cache."""
        self.ledger.forget()
        self.faults = Faults(self.given)
        self.chance = Chance(self.seed)
        self.limiters: dict[str, Limiter] = {}
        self.draws: Counter[tuple[str, str]] = Counter()
        self.prefixes = PrefixCache(self.prompt_cache)

    def totals(self) -> Totals:
        """Return the totals since the start or the last reset."""
        sums = [sum(column) for column in zip(*(one.used() for one in self.limiters.values()))]
        taken, allowed, tokens_taken, tokens_allowed = sums or [0.0] * 4
        return replace(
            self.ledger.totals(),
            requests_used=taken / allowed if allowed else None,
            tokens_used=tokens_taken / tokens_allowed if tokens_allowed else None,
            committed=self.prefixes.committed(),
        )

    async def answer(self, request: Request) -> Reply | None:
        """Answer one request; return None if its fault leaves it without a reply."""
        raw, request.body = request.body, request.body if self.log_bodies else b""
        outage = self._outage(request)
        if outage is not None and outage.refuse:
            return None
        chance = self.chance.draw(raw)
        fault = Fault(status=503) if outage else self.faults.strike(request.path, raw, chance[0])
        if fault is not None:
            self.ledger.strike(request, "outage" if outage else fault.kind)
            if fault.kind in ("hang", "reset_before"):
                return None
        wire, body = self._wire_of(request.path), {} if request.method == "GET" else _json(raw)
        limiter = self._limiter(request, body)
        spelling = self.waits[int(chance[1] * len(self.waits))]
        scripted = refusal_of(fault, spelling) if fault else None
        try:
            if scripted is not None:
                raise scripted
            if wire is None:
                raise Refusal(404, f"Invalid URL ({request.method} {request.path})")
            reply = await self._generated(request, body, wire, limiter, spelling, fault)
        except Refusal as refusal:
            reply = self._refused(wire, refusal)
            if fault is not None and refusal is not scripted:  # no answer that it could spoil
                self.ledger.spare(request)
                fault = None
        except Exception as error:
            traceback.print_exc()
            reply = self._refused(wire, Refusal(500, f"The wire failed: {error!r}"))
        told = self._told(wire, reply.status, limiter)
        reply.headers = {"x-request-id": request.id, **told, **self.headers, **reply.headers}
        return spoiled(reply, fault) if fault else reply

    def _outage(self, request: Request) -> Outage | None:
        log = self.ledger.log
        outage = self.faults.away(len(log), log[0].started, request.started)
        if outage is not None and outage.refuse:
            self.ledger.strike(request, "outage")
            assert outage.seconds is not None
            self.refuse(outage.seconds)
        return outage

    def _wire_of(self, path: str) -> Wire | None:
        for wire in self.wires:
            if any(path == own or path.startswith(own + "/") for own in wire.paths):
                return wire
        return None

    def _limiter(self, request: Request, body: Any) -> Limiter:
        """Return the limits of the account and the model of a request."""
        model = body.get("model") if isinstance(body, dict) else None
        scope = f"{request.headers.get('authorization')} {model}"
        limiter = self.limiters.get(scope)
        if limiter is None:
            limiter = self.limiters[scope] = Limiter(self.limits, request.started)
        return limiter

    def _told(self, wire: Wire | None, status: int, limiter: Limiter) -> Mapping[str, str]:
        """Return the headers that tell what is left of the limits."""
        tell = getattr(wire, "limit_headers", None)
        now = time.monotonic()
        requests, tokens = limiter.requests(now), limiter.tokens(now)
        if tell is None or not self.limits.headers or (requests is None and tokens is None):
            return {}
        return cast("Mapping[str, str]", tell(status, requests, tokens))

    def _refused(self, wire: Wire | None, refusal: Refusal) -> Reply:
        body = (wire or self.wires[0]).error(refusal)
        return Reply.whole(refusal.status, json.dumps(body).encode(), refusal.headers)

    async def _generated(
        self,
        request: Request,
        body: Any,
        wire: Wire,
        limiter: Limiter,
        spelling: Wait,
        fault: Fault | None,
    ) -> Reply:
        if not isinstance(body, dict):
            raise Refusal(400, "The body of the request must be a JSON object.")
        lookups: list[Lookup] = []
        plan = wire.plan(
            Call(
                request.id,
                request.method,
                request.path,
                request.headers,
                body,
                partial(self._draw, request.path),
                partial(self._read, request.path, lookups),
            )
        )
        wait = limiter.allow(time.monotonic(), plan.tokens)
        if wait > 0:
            headers = retry_after(spelling, wait, time.time())
            raise Refusal(429, "Rate limit reached.", code="rate_limit_exceeded", headers=headers)
        used = 0
        try:
            answer = await self._answer(request, body, plan, fault)
            used = answer.billed.input_tokens + answer.billed.output_tokens
        finally:
            limiter.settle(time.monotonic(), plan.tokens, used)
        for lookup in lookups:
            self.prefixes.write(lookup)
        delivers = fault is None or fault.kind in DELIVERING
        made = relisted(answer.body, fault.kind) if fault else answer.body
        if fault and fault.kind in get_args(ListFault) and made is answer.body:
            self.ledger.spare(request)  # it has a single answer, or is a stream
            delivers = True
        headers = dict(answer.headers)
        if answer.events is None:
            reply = Reply.whole(200, _encode(made).encode(), headers)
            reply.delivers = delivers
            return reply
        headers = {"content-type": "text/event-stream; charset=utf-8", **headers}
        pause = self.slope * plan.items / max(1, len(answer.events))
        return Reply(200, answer.events, headers, pause=pause, delivers=delivers)

    async def _answer(
        self, request: Request, body: dict[str, Any], plan: Plan, fault: Fault | None
    ) -> Answer:
        """Let the time pass that an answer takes, generate and bill it."""
        delay = self.base + (0 if body.get("stream") is True else self.slope * plan.items)
        if fault is not None and fault.kind == "slow":
            delay += fault.seconds
        if delay > 0:
            await asyncio.sleep(delay)
        answer = plan.generate()
        self.ledger.bill(request, answer)
        return answer

    def _draw(self, path: str, key: str) -> int:
        self.draws[path, key] += 1
        return self.draws[path, key] - 1

    def _read(
        self,
        path: str,
        lookups: list[Lookup],
        scope: Hashable,
        parts: Sequence[PromptPart],
        *,
        explicit: bool = False,
    ) -> Billed:
        lookups.append(self.prefixes.read((path, scope), parts, explicit=explicit))
        return lookups[-1].billed


def faults_of(given: Sequence[Mapping[str, Any]]) -> list[Fault | Outage]:
    """Return faults and outages from what `SimServer` sends of them.

    :param given: their fields.
    """
    return [Fault(**one) if "kind" in one else Outage(**one) for one in given]


def _load(name: str, options: Mapping[str, Any]) -> Wire:
    module, _, attribute = name.partition(":")
    return cast("Wire", getattr(importlib.import_module(module), attribute)(**options))


def _json(raw: bytes) -> Any:
    """Return a body as JSON, or None if it is none."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None
