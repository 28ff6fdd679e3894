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
PROGRAM = """
import importlib, pkgutil
import feste
names = ["feste"] + [m.name for m in pkgutil.walk_packages(feste.__path__, "feste.")]
for name in names:
    if not any(part.startswith("_") for part in name.split(".")):
        importlib.import_module(name)
assert {"feste.backend.openai", "feste.backend.cohere", "feste.scheduler.dask"} <= set(names)
at_import = list(seen)
from feste.backend.cohere import Cohere
from feste.backend.openai import OpenAI
llms = [OpenAI("m", base_url=sys.argv[1] + "/v1"), Cohere("m", base_url=sys.argv[1])]
assert feste.compute([llm.chat(f"REPLY: {i}") for llm in llms for i in range(8)])[0] == [*"01234567"] * 2
print(json.dumps([at_import, sorted(set(seen))]))
"""


def test_importing_connects_to_nothing_and_a_run_to_its_servers_alone() -> None:
    """All public modules with the SDKs that they import; neither Feste nor an SDK reports to others.

    Sockets of files are left out.
    """
    wires = ["feste.backend.openai.testing:OpenAIWire", "feste.backend.cohere.testing:CohereWire"]
    with SimServer(wires) as server:
        command = [sys.executable, "-c", HOOK + PROGRAM, server.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        here = server.url.removeprefix("http://")

    assert done.returncode == 0, done.stderr[-3000:]
    imported, run = json.loads(done.stdout.splitlines()[-1])
    assert imported == []
    assert {place for place in run if place != "look-up 127.0.0.1"} == {here}
