"""An API key is in the memory of the process that calls and in the request to its own host, nowhere else."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import pty
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from feste.backend import create
from feste.backend.clients import close_clients
from feste.testing import Fault, SimServer

pytest.importorskip("feste.backend.openai")
pytest.importorskip("feste.backend.cohere")
pytest.importorskip("feste.scheduler.dask")
pytest.importorskip("rich")
pytest.importorskip("pyarrow")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
try:
    from canary import KEY, forms, hits
finally:
    sys.path.remove(str(HERE))

WIRES = ["feste.backend.openai.testing:OpenAIWire", "feste.backend.cohere.testing:CohereWire"]
LONG = 240.0
pytestmark = pytest.mark.timeout(300)  # starts a cluster and three programs
_SAID = f"bad key {KEY}, Authorization: Bearer {KEY}"
ECHO = {"error": {"message": _SAID, "code": KEY, "type": KEY}, "message": _SAID, "id": KEY}
HEADERS = {
    "x-request-id": KEY,
    "x-debug-trace-id": KEY,
    "location": f"http://127.0.0.1/{KEY}",
    "retry-after": "1000",  # longer than any call waits, so it fails at once
}


def status(code: int, text: str = "") -> Fault:
    body = {**ECHO, "error": {"message": f"{text} {_SAID}"}, "message": f"{text} {_SAID}"}
    return Fault(status=code, body=body if text else ECHO, headers=HEADERS)


#: What a provider does, with the key in all that it says: one for each class of errors, and each way
#: in which its text is read.
FAULTS: dict[str, Fault] = {
    "unauthorized": status(401),
    "no_model": status(404),
    "bad": status(400),
    "too_long": status(400, "context_length_exceeded"),
    "filtered": status(400, "content_filter"),
    "redirect": status(307),
    "no_method": status(405),
    "no_money": status(429, "insufficient_quota"),
    "garbage": Fault(kind="garbage", body=f"<p>Bearer {KEY}</p>" * 2000, headers=HEADERS),
    "encoded": Fault(kind="garbage", body=f"{quote(KEY, safe='')}, {KEY[:20]}\n{KEY[20:]}"),
    "wrong_count": Fault(kind="wrong_count", headers=HEADERS),
    "truncated": Fault(kind="truncated", headers=HEADERS),
    "throttled": status(429),
    "broken": status(500),
    "hang": Fault(kind="hang"),
}
FULL = os.environ.get("CHAOS") == "full"
if FULL:
    FAULTS |= {
        "forbidden": status(403),
        "wrong_shape": Fault(kind="garbage", body={**ECHO, "choices": [], "id": KEY}),
        "reset": Fault(kind="reset_before"),
        "reset_late": Fault(kind="reset_after"),
        "overloaded": status(529),
        "page": Fault(kind="html", body=f"<p>{KEY}</p>", headers=HEADERS),
        "gateway": Fault(kind="bad_gateway", body=f"<p>{KEY}</p>", headers=HEADERS),
        "drip": Fault(kind="drip", pause=0.2),
    }
#: The errors that must have been there, else the search says nothing of them.
CLASSES = """AuthFailed ModelNotFound InvalidRequest ContextTooLong ContentFiltered QuotaExhausted Rejected
MalformedResponse CountMismatch OutputMismatch ConnectionLost CallTimeout RateLimited ServerError
Unreachable BackendUnavailable RunFailed NodeError UpstreamFailed NotStarted BudgetExceeded CacheMiss
MissingKey ConfigError""".split()
#: What is searched, each of which must be there: the names of folders and files.
_OBJECTS = "client request response operation secret node graph report event error".split()
KINDS = [
    *(f"{name}: repr" for name in _OBJECTS),
    *(f"{name}: variables" for name in ("client", "error", "event", "report")),
    *(
        f"{name}: dumps"
        for name in ("client", "request", "response", "node", "graph", "error", "event")
    ),
    *(f"{name}: deepcopy" for name in ("client", "request", "response", "report", "error")),
    *(f"{name}: fields" for name in ("request", "response", "event")),
    *"report: JSON|report: HTML|report: timeline|graph: picture|explanation|saved".split("|"),
    *"traceback|traceback with variables|traceback by rich|commands|command lines".split("|"),
    *"store|store-wal|store-shm|store.lock|store.reserve|cache|runs|export|parquet|logs".split("|"),
    *"crashed.db|crashed.db-wal|faulthandler|uncaught|progress|standard output".split("|"),
    *"names of files|output of workers".split("|"),
    *"report on Dask|spilled|worker logs|scheduler logs|command lines of workers".split("|"),
]


@dataclass
class Found:
    """All that the programs have left, and what they said."""

    files: dict[str, list[Path]]
    classes: set[str]
    accepted: set[str]


def read_all(terminal: int, shown: bytearray) -> None:
    """Read what is written to a terminal until the other side is closed."""
    with suppress(OSError):  # how Linux says that it is
        while part := os.read(terminal, 65536):
            shown += part


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Found]:
    """Run three programs beside each other: one with all failures, one that crashes, one with a cluster."""
    folder = tmp_path_factory.mktemp("left")
    faults = [replace(fault, match=f"fault {name}:", times=None) for name, fault in FAULTS.items()]
    environment = {
        **os.environ,
        "OPENAI_API_KEY": KEY,
        "CO_API_KEY": KEY,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TMPDIR": str(folder / "temporary"),
        "TERM": "xterm",
        "DASK_DISTRIBUTED__WORKER__MEMORY__TARGET": "0.002",  # 2 MB; the rest is spilled
        "DASK_DISTRIBUTED__WORKER__MEMORY__SPILL": "False",
        "DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE": "False",
        **{f"DASK_LOGGING__{name}": "debug" for name in ("OPENAI", "HTTPX", "HTTPCORE", "FESTE")},
    }
    (folder / "temporary").mkdir()
    with (
        SimServer(WIRES, wire_options=[{"require_key": KEY}] * 2, faults=faults) as server,
        ExitStack() as stack,
    ):
        running: dict[str, subprocess.Popen[bytes]] = {}
        terminal, side = pty.openpty()  # for the progress
        stack.callback(os.close, terminal)
        for part in ("local", "crash", "dask"):
            todo = {
                "url": server.url,
                "left": str(folder / part),
                "part": part,
                "faults": list(FAULTS),
                "workers": 2 if FULL else 1,
            }
            running[part] = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, str(HERE / "program.py"), json.dumps(todo)],
                    stdout=subprocess.PIPE,
                    stderr=side if part == "local" else subprocess.PIPE,
                    env=environment,
                )
            )
            stack.callback(running[part].kill)
        os.close(side)
        shown = bytearray()
        reader = threading.Thread(target=read_all, args=(terminal, shown))
        reader.start()
        said = {part: process.communicate(timeout=LONG) for part, process in running.items()}
        reader.join()
        accepted = {r.path for r in server.requests() if r.status == 200}
    codes = {part: process.returncode for part, process in running.items()}
    assert codes == {"local": 0, "crash": -9, "dask": 0}, said
    (folder / "said").mkdir()
    assert b"openai" in said["dask"][1] and b"distributed.worker" in said["dask"][1]
    for name, data in (
        ("uncaught", said["crash"][1]),
        ("progress", bytes(shown)),
        ("standard output", b"".join(out for out, _ in said.values())),
        ("output of workers", said["dask"][1]),
    ):
        (folder / "said" / name).write_bytes(data)
    files: dict[str, list[Path]] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            parts = path.relative_to(folder).parts
            kind = parts[1] if len(parts) > 1 else parts[0]
            files.setdefault(kind, []).append(path)
    classes = {
        word for out, _ in said.values() for word in out.decode().split() if word[0].isupper()
    }
    yield Found(files, classes, accepted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_key_is_not_there(found: Found, kind: str) -> None:
    """Each kind of thing that a program leaves is there, and has no piece of the key in any form."""
    data = {path.read_bytes() for path in found.files.get(kind, ())}

    assert any(data), f"nothing of this kind was left, but {sorted(found.files)}"
    assert [(kind, hits(one)) for one in data if hits(one)] == []


def test_the_key_is_in_nothing_else(found: Found) -> None:
    """Files that nobody thought of, such as temporary ones, do not have it either."""
    others = [path for kind in found.files.keys() - set(KINDS) for path in found.files[kind]]

    assert len(set(KINDS)) == len(KINDS) >= 25
    assert [path for path in others if hits(path.read_bytes())] == []


def test_the_programs_met_every_failure(found: Found) -> None:
    """A class of errors that did not come would have been searched for nothing."""
    assert set(CLASSES) <= found.classes


def test_the_key_was_used(found: Found) -> None:
    """Both providers took no other key, so the programs had it."""
    assert found.accepted == {"/v1/chat/completions", "/v1/embeddings", "/v2/chat", "/v2/embed"}


def openai_piece(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


def cohere_piece(text: str) -> dict[str, Any]:
    return {"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": text}}}}


ENDS = {
    "openai": {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    "cohere": {"type": "message-end", "delta": {"finish_reason": "COMPLETE"}},
}
WHOLES = {
    "openai": {"choices": [{"index": 0, "message": {"content": KEY}, "finish_reason": "stop"}]},
    "cohere": {
        "message": {"content": [{"type": "text", "text": KEY}]},
        "finish_reason": "COMPLETE",
    },
}


def streamed(plugin: str, *texts: str) -> str:
    """The events of a stream, and its end."""
    piece = openai_piece if plugin == "openai" else cohere_piece
    return "".join(f"data: {json.dumps(one)}\n\n" for one in [*map(piece, texts), ENDS[plugin]])


@pytest.mark.parametrize("plugin", ["openai", "cohere"])
def test_an_answer_that_repeats_the_key_is_blanked(plugin: str) -> None:
    """In headers, with characters that JSON has escaped, and in pieces of a stream, also over them."""
    whole = json.dumps(WHOLES[plugin])
    escaped = "".join(f"\\u{ord(char):04X}" for char in KEY)
    one = KEY.replace("+", "\\u002b").replace("a", "\\u0061")
    echoes = {
        "x-request-id": KEY,
        "set-cookie": f"a={KEY}",
        "x-echo": KEY,
        "x-ratelimit-reset": KEY,
    }
    json_kind = {**echoes, "content-type": "application/json"}
    events = {**echoes, "content-type": "text/event-stream"}
    bodies = [
        (body, json_kind) for body in (whole, whole.replace(KEY, escaped), whole.replace(KEY, one))
    ]
    split = [(KEY,), tuple(f"the {KEY} is"), ("the ", KEY[:9], KEY[9:], f" {KEY[:5]}")]
    bodies += [(streamed(plugin, *texts), events) for texts in split]
    params = importlib.import_module(f"feste.backend.{plugin}").ChatParams()
    pieces: list[str] = []
    with SimServer(WIRES, wire_options=[{"require_key": KEY}] * 2) as server:
        base = server.url + ("/v1" if plugin == "openai" else "")
        llm: Any = create(plugin, model="m", base_url=base, api_key=KEY)
        for number, (body, headers) in enumerate(bodies):
            server.add(Fault(kind="garbage", match=f"n{number}.", body=body, headers=headers))

        async def go() -> list[Any]:
            try:
                found = []
                for number, (_, headers) in enumerate(bodies):
                    bound = [f"n{number}.", params, None]
                    shown = pieces.append if headers is events else None
                    response = await llm.chat.send(llm.chat.prepare(bound), shown)
                    found.append((response, llm.chat.parse(response, bound)))
                return found
            finally:
                await close_clients(asyncio.get_running_loop())

        found = asyncio.run(go())

    assert [str(value) for _, value in found] == [
        *("***", "***", "***"),
        *("***", "the *** is", f"the *** {KEY[:5]}"),
    ]
    assert "".join(pieces) == f"***the *** isthe *** {KEY[:5]}"
    for response, value in found:
        headers = dict(response.headers)
        assert hits(repr(response) + repr((headers, response.payload, value, vars(value)))) == []
        assert not headers.keys() & {"set-cookie", "x-echo"} and "x-request-id" in headers


@pytest.mark.parametrize(
    "text",
    [
        KEY,
        f"x{KEY[9:30]}x",
        quote(KEY, safe=""),
        json.dumps(KEY).replace("/", "\\/"),
        repr({"authorization": f"Bearer {KEY}".encode()}),
        f"{KEY[:13]}\n    {KEY[13:]}",
        f"'{KEY[:3]}'\n '{KEY[3:17]}'",
        "\x1b[1m".join(KEY),
        "</b><b>".join([KEY[:5], KEY[5:11], KEY[11:]]),
        " ".join(KEY),
        b64encode(f"user:{KEY}".encode()).decode(),
        *(b64encode(b"x" * i + KEY.encode()).decode() for i in range(3)),
        KEY.encode().hex(),
        KEY[::-1],
        KEY.encode("utf-16").decode("latin-1"),
    ],
)
def test_the_search_finds_it(text: str) -> None:
    """Whole or in pieces, plain, encoded or split; and not in what is something else."""
    assert hits(f"before {text} after".encode("latin-1"))
    assert hits("an ordinary text about keys, canaries and 0123456789") == []
    assert len(forms()) == 11
