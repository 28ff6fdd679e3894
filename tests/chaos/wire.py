"""The wire of the chaos suite's provider: OpenAI's, with a look into the program's store."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import time
from contextlib import closing
from typing import Any

from feste.backend.openai.testing import OpenAIWire
from feste.testing.wire import Call, Plan, Refusal, last_user_text

__all__ = ["ChaosWire"]


class ChaosWire(OpenAIWire):
    """OpenAI's wire format.

    :param store: refuse each chat that is ahead of this store: it has to have the request as sent,
        and the answers that the prompt is made of.
    :param storm: after how many requests to refuse a share of them for rate; for how many seconds;
        the share.
    :param refusal: refuse all requests while there is this file; with which status and code.
    :param seed: of which requests a storm refuses, by the order of their arrival.
    :param options: those of :class:`OpenAIWire`.
    """

    def __init__(
        self,
        store: str | None = None,
        storm: tuple[int, float, float] | None = None,
        refusal: tuple[str, int, str | None] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.store, self.storm, self.refusal = store, storm, refusal
        self.requests, self.begun = 0, 0.0
        self.chance = random.Random(seed)

    def plan(self, call: Call) -> Plan:
        self.requests += 1
        if self.storm is not None and self.requests > self.storm[0]:
            self.begun = self.begun or time.monotonic()
            is_on = time.monotonic() < self.begun + self.storm[1]
            if is_on and self.chance.random() < self.storm[2]:
                raise Refusal(429, "A storm.", headers={"retry-after": "0.3"})
        if self.refusal is not None and os.path.exists(self.refusal[0]):
            _, status, code = self.refusal
            raise Refusal(status, "This account is refused.", code=code)
        if self.store is not None:
            with closing(sqlite3.connect(f"file:{self.store}?mode=ro", uri=True)) as conn:
                _look(conn, last_user_text(call.body["messages"]))
        return super().plan(call)


def _look(conn: sqlite3.Connection, prompt: str) -> None:
    """Refuse a prompt that the store does not know as sent, or that has answers it does not have."""
    sent = "SELECT calls FROM requests WHERE outcome = 'sent'"
    under_way = {key for (calls,) in conn.execute(sent) for key, _ in json.loads(calls)}
    found = "SELECT 1 FROM prompts WHERE key = ? AND instr(request, ?)"
    if not any(conn.execute(found, (key, json.dumps(prompt))).fetchone() for key in under_way):
        raise Refusal(400, f"sent before it was noted: {prompt}")
    for answer in prompt.split("\n")[1:]:
        kept = "SELECT 1 FROM answers WHERE instr(response, ?)"
        if conn.execute(kept, (json.dumps(answer),)).fetchone() is None:
            raise Refusal(400, f"sent before the answer that it needs was kept: {answer}")
