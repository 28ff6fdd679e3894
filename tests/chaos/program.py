"""The program of the chaos suite: it computes some work, and is killed, starved or interrupted.

    python -m tests.chaos.program '{"url": ..., "shape": "chains", "calls": 300, "seed": 1, ...}'

Each answer goes to a task as well, which writes it to a side file at once: what is there was
acknowledged before the program was killed. What it found goes to stdout as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from typing import Any

import feste
from feste import context
from feste.backend import Limits, Price, Profile
from feste.backend.openai import ChatParams, CompleteParams, OpenAI
from feste.errors import (
    FesteError,
    NotStarted,
    RunFailed,
    RunInterrupted,
    StalledError,
    UpstreamFailed,
)
from feste.prompt import Prompt
from tests.chaos import full_disk
from tests.chaos.conditions import Order, impose, named
from tests.chaos.defects import break_on_purpose
from tests.chaos.work import Step, make

__all__ = ["ROOM", "acknowledge", "build", "client", "outcome"]

#: The most tokens of an answer: what the simulated model says has eight words.
ROOM = ChatParams(max_tokens=16)
_ASK = Prompt("{{ text }}{% for answer in answers %}\n{{ answer }}{% endfor %}")


@feste.task
def note(side: str, run: int, i: int, text: str) -> None:
    """Acknowledge an answer when it is there."""
    acknowledge(side, run, i, text)


def acknowledge(side: str, run: int, i: int, text: str) -> None:
    """Write down an answer: a line of one write, which a killed process leaves behind."""
    file = os.open(side, os.O_WRONLY | os.O_APPEND)
    os.write(file, (json.dumps([run, i, text]) + "\n").encode())
    os.close(file)


def client(todo: dict[str, Any]) -> OpenAI:
    """Return the client, whose key is in the environment; no timeout runs while its SDK loads."""
    llm = OpenAI(
        "m",
        base_url=todo["url"] + "/v1",
        timeout=todo.get("timeout", 30.0),
        limits=Limits(
            concurrency=todo["concurrency"],
            max_items=todo.get("max_items"),
            requests_per_minute=todo.get("rate"),
        ),
        profile=Profile(price=Price(**todo["price"]), max_draws=todo.get("max_draws")),
    )
    llm.warm_up()
    return llm


def build(llm: Any, steps: list[Step], operation: str = "chat") -> list[Any]:
    """Return the nodes of the work: calls of one operation."""
    nodes: list[Any] = []
    room = {"chat": ROOM, "complete": CompleteParams(max_tokens=ROOM.max_tokens)}[operation]
    ask = partial(getattr(llm, operation), params=room)
    for step in steps:
        answers = [nodes[parent] for parent in step.parents]
        nodes.append(ask(_ASK(text=step.text, answers=answers) if answers else step.text))
    return nodes


def outcome(values: list[Any], nodes: list[Any]) -> dict[str, Any]:
    """Return what a run found: an answer or an error in each place, and its report.

    Of an error: its class, those of its roots, its text, and the places of its roots.
    """
    place = {node.key: i for i, node in enumerate(nodes)}
    failed = {}
    for i, value in enumerate(values):
        if isinstance(value, FesteError):
            roots = value.roots if isinstance(value, UpstreamFailed) else [value]
            kinds = [type(root).__name__ for root in roots]
            places = [place.get(getattr(root, "node", "")) for root in roots]
            failed[i] = [type(value).__name__, kinds, str(value), places]
    report = feste.last_report()
    assert report is not None
    told = report.to_json()
    told["sent"] = report.sent
    told["unreached"] = sum(r.error in ("Unreachable", "ConnectionLost") for r in report.requests)
    told["times"] = [[r.sent, r.at, r.error] for r in report.requests]
    paid = sum(r.items for r in report.requests if r.billed != "no")
    bought = sum(isinstance(value, str) for value in values) - report.reused
    told["owned_up"] = paid - bought
    del told["requests"], told["task_spans"]
    return {
        "values": [None if i in failed else str(value) for i, value in enumerate(values)],
        "failed": failed,
        "unknown": [[place.get(u.call), u.sent] for u in report.unknown],
        "report": told,
    }


def left_over() -> dict[str, Any]:
    """Return the threads that this process has besides the main one, and how many sockets."""
    others = [thread.name for thread in threading.enumerate()][1:]
    sockets = 0
    for file in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else ():
        with suppress(OSError):  # that of the listing itself
            sockets += stat.S_ISSOCK(os.fstat(int(file)).st_mode)
    return {"threads": sorted(others), "sockets": sockets}


def main() -> None:
    """Do what the first argument says."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    todo = json.loads(sys.argv[1])
    break_on_purpose()
    impose(todo)
    order = Order()
    context.set(progress=False, **todo.get("settings", {}))
    if "scheduler" in todo:
        context.set(scheduler=named(todo["scheduler"]))
    if "disk" in todo:
        full_disk.limit(**todo["disk"])
    steps = make(todo["shape"], todo["calls"], todo["seed"], **todo.get("work", {}))
    nodes = build(client(todo), steps, todo.get("operation", "chat"))
    noted = [[node, note(todo["side"], todo["run"], i, node)] for i, node in enumerate(nodes)]
    error = ""
    try:
        (pairs,) = feste.compute(noted, on_error=todo.get("on_error", "return"))
    except RunInterrupted:
        sys.stdout.write(json.dumps({"stopped": time.monotonic()}))
        sys.exit(130)
    except StalledError as stalled:
        sys.stdout.write(json.dumps({"stalled": str(stalled)}))
        return
    except RunFailed as failed:  # `on_error="stop"`, an outage or the budget ended it
        (pairs,) = failed.partial
        error = str(failed)
        if todo.get("on_error") == "stop":
            for i, (value, noted_too) in enumerate(pairs):
                if isinstance(noted_too, NotStarted) and isinstance(value, str):
                    acknowledge(todo["side"], todo["run"], i, value)  # it is handed over here
    told = outcome([value for value, _ in pairs], nodes)
    told.update(left_over(), run=todo["run"], error=error, noted=full_disk.noted(), late=order.late)
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
