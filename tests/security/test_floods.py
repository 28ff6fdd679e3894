"""A server that sends more than an answer can be costs one call: little time, little memory.

Each flood is received by a process of its own, a fork of one that has imported everything.
``CHAOS=full`` has more of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from feste.testing import Fault, SimServer

FULL = os.environ.get("CHAOS") == "full"
PROGRAM = """
import json, os, resource, sys, time
import feste, feste.backend.openai.sending
from feste.backend import create
from feste.backend.cohere.transport import load

load()

def ask(llm, word, streamed, store):
    call = llm.chat(f"REPLY: {word}")
    if not streamed:
        return feste.compute(call, on_error="return", store=store)[0]
    try:
        return "".join(feste.stream(call, store=store))
    except feste.errors.RunFailed as failed:
        return failed.errors[0]

def flooded(plugin, url, word, streamed):
    store = sys.argv[1]
    llm = create(plugin, model="m", base_url=url, api_key="sk-canary-0123456789", timeout=60)
    assert ask(llm, "fine", streamed, store) == "fine"
    peak, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    got = ask(llm, word, streamed, store)
    told = {"got": type(got).__name__, "said": str(got)[:300], "billed": getattr(got, "billed", None)}
    told["cpu"] = time.process_time() - cpu
    assert ask(llm, "fine again", streamed, store) == "fine again"
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes
    told["grown"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / unit
    print(json.dumps(told), flush=True)

for case in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        try:
            flooded(*case)
        finally:
            sys.stderr.flush()
            os._exit(sys.exc_info()[0] is not None)
    assert os.waitpid(child, 0)[1] == 0, case
"""
WIRES = ("feste.backend.openai.testing:OpenAIWire", "feste.backend.cohere.testing:CohereWire")
PATHS = {"openai": "/v1", "cohere": ""}
DEEP = "data: " + "[" * 100_000 + "]" * 100_000 + "\n\n"
EVENTS = {"content-type": "text/event-stream"}
SIZE = 15 << 20  # less than a reply may have


#: An event of a stream whose parts are kept until the answer is whole.
LOGGED = f'data: {{"choices":[{{"logprobs":{{"content":[{"{}," * 90_000}{{}}]}}}}]}}\n\n'


def dense(part: str) -> str:
    """JSON of small parts, which takes 25 times as much memory as bytes."""
    return f'{{"choices":[{(part + ",") * (SIZE // (len(part) + 1))}{part}]}}'


WHOLE: dict[str, dict[str, Any]] = {
    "bomb": {},
    "deep": {},
    "endless": {},
    "endless_headers": {},
    "objects": {"kind": "garbage", "body": dense("{}")},
    "lists": {"kind": "garbage", "body": dense("[]")},
    "texts": {"kind": "garbage", "body": dense('"ab"')},
}
#: Replies that are errors by their status, of which the beginning is enough.
REFUSED: dict[str, dict[str, Any]] = {
    "refusal": {"kind": "status", "status": 400, "body": dense("[]")},
    "refusal_without_end": {"kind": "status", "status": 400, "body": "no " * (SIZE // 3)},
}
STREAMED: dict[str, dict[str, Any]] = {
    "comments": {"kind": "endless", "body": ": hm\n\n"},
    "nothing": {"kind": "endless", "body": "data: {}\n\n"},
    "longline": {"kind": "endless"},
    "events": {"kind": "endless", "body": LOGGED, "headers": EVENTS},
    "deepevent": {"kind": "garbage", "body": DEEP, "headers": EVENTS},
}


CASES = [("openai", name, name in STREAMED) for name in (*WHOLE, *STREAMED)]
CASES += [("cohere", name, name in STREAMED) for name in ("bomb", "endless_headers", "nothing")]
CASES += [("cohere", "objects", False)]
CASES += [(one, name, False) for one in PATHS for name in REFUSED]
MORE = [("cohere", name, name in STREAMED) for name in ("deep", "endless", "comments", "longline")]
MORE += [("cohere", "deepevent", True), ("openai", "comments", False)]
MORE += [(one, name, True) for one in PATHS for name in ("bomb", "deep", "endless_headers")]


def test_a_flood_is_an_answer_that_cannot_be_used(tmp_path: Path) -> None:
    """In under 2 s of CPU and with under 64 MB more each, and the next call is served.

    Each is received twice, since an answer that cannot be used is bought once more.
    """
    cases = CASES + MORE * FULL
    asks = []
    with SimServer(list(WIRES), log_bodies=False) as server:
        for number, (plugin, name, streamed) in enumerate(cases):
            given = {**WHOLE, **STREAMED, **REFUSED}[name]
            word = f"flood {number} of {name}"
            server.add(Fault(**{"kind": name, "match": word, "times": 2, **given}))
            asks.append([plugin, server.url + PATHS[plugin], word, streamed])
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "store")],
            input=json.dumps(asks),
            capture_output=True,
            text=True,
            timeout=100,
        )
        asked = server.totals().requests

    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for case, told in zip(cases, found, strict=True):
        wanted = ("InvalidRequest", "no") if case[1] in REFUSED else ("MalformedResponse", "yes")
        assert (told["got"], told["billed"]) == wanted, (case, told)
        most = 256 if case[1] == "events" else 64  # streams repeat their frames, so may have more
        assert told["cpu"] < 2 * 2 and told["grown"] < most, (case, told)
    refused = sum(name in REFUSED for _, name, _ in cases)  # which are not sent again
    assert asked == 2 * len(PATHS) + 2 * len(cases) - refused  # other good answers are in the store
    kept = b"".join(p.read_bytes() for p in tmp_path.iterdir() if p.is_file())
    assert b"fine again" in kept and b"sk-canary" not in kept
