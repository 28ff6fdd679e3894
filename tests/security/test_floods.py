"""A server that sends more than an answer can be costs one call: little time, little memory.

Each backend is asked in a process of its own, which measures itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from feste.testing import Fault, SimServer

PROGRAM = """
import json, resource, sys, time
import feste
from feste.backend import create

plugin, url, streamed, stored = sys.argv[1:5]
names = sys.argv[5:]
llm = create(plugin, model="m", base_url=url, api_key="sk-canary-0123456789", timeout=60)

def ask(word):
    call = llm.chat(f"REPLY: {word}")
    if streamed == "True":
        try:
            return "".join(feste.stream(call, store=stored))
        except feste.errors.RunFailed as failed:
            return failed.errors[0]
    return feste.compute(call, on_error="return", store=stored)[0]

for i in range(3):
    assert ask(f"fine {i}") == f"fine {i}"
for name in names:
    peak, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    got = ask(name)
    told = {"kind": name, "got": type(got).__name__, "said": str(got)[:300]}
    told["billed"] = getattr(got, "billed", None)
    told["cpu"] = time.process_time() - cpu
    told["grown"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    print(json.dumps(told), flush=True)
assert ask("fine again") == "fine again"
"""

SERVERS = {
    "openai": ("feste.backend.openai.testing:OpenAIWire", "/v1"),
    "cohere": ("feste.backend.cohere.testing:CohereWire", ""),
}


def measured(plugin: str, faults: dict[str, Fault], stored: str, streamed: bool) -> list[Any]:
    """Ask for one call with each fault, twice each since an unusable answer is bought once more."""
    wire, path = SERVERS[plugin]
    with SimServer(wire) as server:
        server.add(*faults.values())
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, plugin, server.url + path, str(streamed), stored]
            + list(faults),
            capture_output=True,
            text=True,
            timeout=100,
        )
        asked = len(server.requests())
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert asked <= 4 + 2 * len(faults)  # at most one purchase more for each
    return [json.loads(line) for line in done.stdout.splitlines()]


def fault(name: str, **given: Any) -> Fault:
    return Fault(**{"kind": name, "match": name, "times": 2, **given})


@pytest.mark.parametrize("plugin", list(SERVERS))
def test_a_flood_is_an_answer_that_cannot_be_used(plugin: str, tmp_path: Any) -> None:
    """In under 2 s of CPU and with under 64 MB more, and the next call is served."""
    faults = {
        "bomb": fault("bomb"),
        "deep": fault("deep"),
        "endless": fault("endless"),
        "endless_headers": fault("endless_headers"),
    }
    for told in measured(plugin, faults, str(tmp_path / "store"), streamed=False):
        assert (told["got"], told["billed"]) == ("MalformedResponse", "yes"), told
        assert told["cpu"] < 2 * 2 and told["grown"] < 64, told  # of two requests
    assert b"sk-canary" not in b"".join(p.read_bytes() for p in tmp_path.iterdir() if p.is_file())


@pytest.mark.parametrize("plugin", list(SERVERS))
def test_a_stream_without_end(plugin: str, tmp_path: Any) -> None:
    """Comments, empty events, one line that goes on, events that bring text for ever."""
    deep = "data: " + "[" * 100_000 + "]" * 100_000 + "\n\n"
    kind = {"content-type": "text/event-stream"}
    faults = {
        "comments": fault("endless", match="comments", body=": hm\n\n"),
        "nothing": fault("endless", match="nothing", body="data: {}\n\n"),
        "longline": fault("endless", match="longline"),
        "deepevent": fault("garbage", match="deepevent", body=deep, headers=kind),
        "bomb": fault("bomb"),
        "endless_headers": fault("endless_headers"),
    }
    for told in measured(plugin, faults, str(tmp_path / "store"), streamed=True):
        assert (told["got"], told["billed"]) == ("MalformedResponse", "yes"), told
        assert told["cpu"] < 2 * 2 and told["grown"] < 64, told
