"""The two sides of the crash tests: a program that is killed, and the wire of its provider.

    python crash_program.py '{"url": ..., "store": ..., "shape": "steps", "calls": 300, ...}'

The program computes one of three graphs over real sockets. Each answer goes to a task as well, which
writes it to a side file at once: what is there was acknowledged before the program was killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import feste
from feste import context
from feste.backend import Backend, BatchRule, Limits, Operation, Request, Response
from feste.errors import RunInterrupted
from feste.prompt import Prompt
from feste.testing.wire import Answer, Call, Item, Plan, Refusal, answer, digest

#: Equal calls, so that draws matter.
EQUAL = 4
#: Calls in one request of the batched operation.
LISTED = 16


class Wire:
    """Answers a list of texts; each answer to an equal text is another one.

    :param store: check for every request that the program's store has it, and has the answers that
        it is made of: a request that is ahead of its store is refused.
    """

    def __init__(self, paths: Sequence[str] = ("/say",), store: str | None = None) -> None:
        self.paths, self.store = paths, store

    def plan(self, call: Call) -> Plan:
        texts = call.body["texts"]
        if self.store is not None:
            with closing(sqlite3.connect(f"file:{self.store}?mode=ro", uri=True)) as conn:
                self._check(conn, texts)

        def generate() -> Answer:
            items = []
            for text in texts:
                (sample,) = call.samples(text, 1)
                items.append(Item(text, answer(text, sample), digest(text), sample))
            return Answer({"texts": [item.answer for item in items]}, items)

        return Plan(len(texts), generate)

    def _check(self, conn: sqlite3.Connection, texts: Sequence[str]) -> None:
        sent = "SELECT calls FROM requests WHERE outcome = 'sent'"
        under_way = {key for (calls,) in conn.execute(sent) for key, _ in json.loads(calls)}
        for text in texts:
            asked = conn.execute("SELECT key FROM prompts WHERE instr(request, ?)", (quoted(text),))
            if under_way.isdisjoint(key for (key,) in asked):
                raise Refusal(400, f"sent before it was noted: {text}")
            source = text.rpartition(": ")[2] if "echo:" in text else ""
            found = "SELECT 1 FROM answers WHERE instr(response, ?)"
            if source and conn.execute(found, (quoted(source),)).fetchone() is None:
                raise Refusal(400, f"sent before the answer that it needs was kept: {text}")

    def error(self, refusal: Refusal) -> object:
        return {"message": refusal.args[0]}


def quoted(text: str) -> str:
    return json.dumps(text)


class Speaker(Backend):
    """A client of the wire, over sockets."""

    def __init__(self, url: str, limits: Limits | None = None) -> None:
        self.url = url
        self.limits = Limits.of(limits)
        self._links: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    @property
    def endpoint(self) -> str:
        return self.url

    def _prepare(self, text: str) -> Request:
        return Request(self.plugin, "say", self.endpoint, {"texts": [text]})

    async def _send(self, request: Request, on_chunk: Any = None) -> Response:
        host, _, path = self.url.removeprefix("http://").partition("/")
        if self._links:
            link = self._links.pop()
        else:
            link = await asyncio.open_connection(*host.split(":"))
        reader, writer = link
        body = json.dumps(request.body).encode()
        head = f"POST /{path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        headers = dict(line.split(": ", 1) for line in lines if line)
        payload = json.loads(await reader.readexactly(int(headers["content-length"])))
        self._links.append(link)
        if status.split()[1] != "200":
            raise RuntimeError(payload["message"])
        return Response(payload, request_id=headers["x-request-id"])

    def _parse(self, response: Response, arguments: Mapping[str, Any]) -> str:
        (text,) = response.payload["texts"]
        return str(text)

    @staticmethod
    def _pack(client: Speaker, requests: Sequence[Request]) -> Request:
        return replace(requests[0], body={"texts": [r.body["texts"][0] for r in requests]})

    @staticmethod
    def _unpack(client: Speaker, request: Request, response: Response) -> list[Response]:
        return [replace(response, payload={"texts": [t]}) for t in response.payload["texts"]]

    say = Operation(prepare=_prepare, send=_send, parse=_parse)
    say_together = Operation(
        prepare=_prepare,
        send=_send,
        parse=_parse,
        batch=BatchRule("text", "texts", LISTED, pack=_pack, unpack=_unpack),
    )


@feste.task
def note(side: str, i: int, text: str) -> None:
    """Acknowledge an answer: a line of one write, which a killed process leaves behind."""
    file = os.open(side, os.O_WRONLY | os.O_APPEND)
    os.write(file, (json.dumps([i, text]) + "\n").encode())
    os.close(file)


_review, _final = Prompt("review: {{ text }}"), Prompt("final: {{ text }}")


def calls_of(llm: Speaker, shape: str, calls: int) -> list[Any]:
    """The calls of a graph: ``"flat"``, ``"lists"``, or ``"steps"``, where two need one before."""
    if shape == "flat":
        return [llm.say(f"question {i // EQUAL}") for i in range(calls)]
    if shape == "lists":
        return [llm.say_together(f"line {i // EQUAL}") for i in range(calls)]
    made: list[Any] = []
    for i in range(calls // 3):
        draft = llm.say(f"topic {i // EQUAL}")
        review = llm.say(_review(text=draft))
        made += [draft, review, llm.say(_final(text=review))]
    return made


def prompts_of(shape: str, values: Sequence[str]) -> list[str]:
    """What each call asked, given what all of them got."""
    if shape == "steps":
        return [
            (f"topic {i // 3 // EQUAL}", f"review: {values[i - 1]}", f"final: {values[i - 1]}")[
                i % 3
            ]
            for i in range(len(values))
        ]
    return [f"{'question' if shape == 'flat' else 'line'} {i // EQUAL}" for i in range(len(values))]


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    todo = json.loads(sys.argv[1])
    context.set(store=todo["store"], eager=todo.get("eager", False), progress=False)
    llm = Speaker(todo["url"], limits=Limits(concurrency=todo["concurrency"]))
    nodes = []
    for i, node in enumerate(calls_of(llm, todo["shape"], todo["calls"])):
        nodes.append([node, note(todo["side"], i, node)])
    try:
        (pairs,) = feste.compute(nodes)
    except RunInterrupted:
        sys.exit(130)
    report = feste.last_report()
    told = {
        "values": [value for value, _ in pairs],
        "keys": [] if todo.get("eager") else [node.key for node, _ in nodes],
        "unknown": [[u.call, u.sent] for u in report.unknown] if report else [],
        "states": report.states if report else {},
    }
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
