"""Importing connects to nothing, and a run to the servers that it was given."""

from __future__ import annotations

import json
import subprocess
import sys

from feste.testing import SimServer

HOOK = """
import json, sys
seen = []
def hook(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple):
        seen.append(f"{args[1][0]}:{args[1][1]}")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        seen.append(f"look-up {args[0]}")
sys.addaudithook(hook)
"""
IMPORTS = """
import importlib, pkgutil
import feste
names = ["feste"] + [m.name for m in pkgutil.walk_packages(feste.__path__, "feste.")]
for name in names:
    if not any(part.startswith("_") for part in name.split(".")):
        importlib.import_module(name)
assert {"feste.backend.openai", "feste.backend.cohere", "feste.scheduler.dask"} <= set(names)
print(json.dumps(seen))
"""
RUN = """
import feste
from feste.backend.cohere import Cohere
from feste.backend.openai import OpenAI
llms = [OpenAI("m", base_url=sys.argv[1] + "/v1"), Cohere("m", base_url=sys.argv[1])]
assert feste.compute([llm.chat(f"REPLY: {i}") for llm in llms for i in range(8)])[0] == [*"01234567"] * 2
print(json.dumps(sorted(set(seen))))
"""


def seen(program: str, *arguments: str) -> list[str]:
    """Return the places that a new process connects to or looks up, sockets of files left out."""
    command = [sys.executable, "-c", HOOK + program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_importing_connects_to_nothing() -> None:
    """Not one of the public modules, those of SDKs that they import included."""
    assert seen(IMPORTS) == []


def test_a_run_connects_to_its_servers_alone() -> None:
    """Neither Feste nor an SDK reports to anybody else."""
    wires = ["feste.backend.openai.testing:OpenAIWire", "feste.backend.cohere.testing:CohereWire"]
    with SimServer(wires) as server:
        found = seen(RUN, server.url)
        here = server.url.removeprefix("http://")

    assert {place for place in found if place != "look-up 127.0.0.1"} == {here}
