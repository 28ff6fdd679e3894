"""Answers of status 200 that no server should send, each with what a call may make of it."""

from __future__ import annotations

import array
import base64
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from feste.errors import CallError, MalformedResponse

__all__ = [
    "GOOD",
    "PATHS",
    "K",
    "Odd",
    "as_json",
    "good",
    "odd_server",
    "packed",
    "unreadable",
    "value_of",
]

#: The calls of a list.
K = 3
PATHS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "complete",
    "/v1/embeddings": "embed",
    "/v2/chat": "cohere.chat",
    "/v2/embed": "cohere.embed",
    "/v1/generate": "cohere.generate",
}


@dataclass(frozen=True)
class Odd:
    """An odd answer.

    :param name: a name for it.
    :param body: the answer.
    :param wants: the values of the calls, or the error with which all of them fail.
    :param kind: the content type.
    """

    name: str
    body: bytes
    wants: list[Any] | type[CallError] = MalformedResponse
    kind: str = "application/json"


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def packed(*numbers: float) -> str:
    return base64.b64encode(array.array("f", numbers).tobytes()).decode()


def good(operation: str, *words: str) -> dict[str, Any]:
    """The answer to calls with these words: its text, or as a vector the length of the word."""
    usage = {"prompt_tokens": 3, "completion_tokens": 3}
    billed = {"billed_units": {"input_tokens": 3, "output_tokens": 3}}
    match operation:
        case "chat":
            message = {"role": "assistant", "content": words[0]}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return {"model": "m", "choices": [choice], "usage": usage}
        case "complete":
            choices = [
                {"index": i, "text": w, "finish_reason": "stop"} for i, w in enumerate(words)
            ]
            return {"model": "m", "choices": choices, "usage": usage}
        case "embed":
            data = [{"index": i, "embedding": packed(len(w), 0.5)} for i, w in enumerate(words)]
            return {"data": data, "usage": usage}
        case "cohere.chat":
            message = {"role": "assistant", "content": [{"type": "text", "text": words[0]}]}
            return {"message": message, "finish_reason": "COMPLETE", "usage": billed}
        case "cohere.embed":
            return {"embeddings": {"float": [[len(w), 0.5] for w in words]}, "meta": billed}
        case _:
            made = [{"text": words[0], "finish_reason": "COMPLETE"}]
            return {"generations": made, "meta": billed}


#: The words of each case's calls.
GOOD = {name: ["zero", "twenty", "two"][: K if name in ("complete", "embed", "cohere.embed") else 1]
        for name in PATHS.values()}  # fmt: skip


def value_of(operation: str, word: str) -> Any:
    return [len(word), 0.5] if operation.endswith("embed") else word


def unreadable(operation: str) -> Iterator[Odd]:
    """What is no answer of any operation."""
    whole = as_json(good(operation, *GOOD[operation]))
    right = [value_of(operation, word) for word in GOOD[operation]]
    page = b"<!doctype html><title>Sign in</title>"
    bodies = {
        "nothing": b"",
        "spaces": b" \r\n ",
        "null": b"null",
        "true": b"true",
        "number": b"-0",
        "text": b'"zero"',
        "list": b"[]",
        "in a list": b"[" + whole + b"]",
        "open": b"{",
        "half": whole[: len(whole) // 2],
        "without its end": whole[:-1],
        "junk behind": whole + b"x",
        "NUL behind": whole + b"\0",
        "twice": whole + whole,
        "lines": whole + b"\n" + whole,
        "NaN": b'{"more": NaN, ' + whole[1:],
        "Infinity": b'{"more": [-Infinity], ' + whole[1:],
        "long number": b'{"more": ' + b"9" * 5_000 + b", " + whole[1:],
        "comma": whole[:-1] + b",}",
        "Python": repr(good(operation, *GOOD[operation])).encode(),
        "comment": b"/* */" + whole,
        "not UTF-8": b'{"more": "\xff\xfe", ' + whole[1:],
        "UTF-16": whole.decode().encode("utf-16"),
        "line end in a text": b'{"more": "\n", ' + whole[1:],
        "101 levels": b'{"more": ' + b"[" * 100 + b"]" * 100 + b", " + whole[1:],
        "10,000 levels": b'{"more": ' + b"[" * 10_000 + b"]" * 10_000 + b", " + whole[1:],
        "open levels": b"[" * 50_000,
    }
    for name, body in bodies.items():
        yield Odd(name, body)
    for body in (b"{}", b'{"object": "list"}', b'{"detail": "Not Found"}', b'{"error": null}'):
        yield Odd(
            body.decode(), body, right if operation in ("complete", "embed") else MalformedResponse
        )
    yield Odd("HTML", page, kind="text/html; charset=utf-8")
    yield Odd("HTML as JSON", page)
    yield Odd("events", b"data: " + whole + b"\n\ndata: [DONE]\n\n", kind="text/event-stream")
    yield Odd("gzip without saying so", b"\x1f\x8b\x08" + bytes(40))


@contextmanager
def odd_server(cases: dict[str, Odd]) -> Iterator[tuple[str, Counter[str]]]:
    """Serve the answers of cases to requests whose model or prompt is named so, and good ones to all others.

    A case of a list is an answer to lists: what is asked alone is answered.
    """
    served: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            operation = PATHS[self.path]
            words = body.get("prompt", body.get("input", body.get("texts")))
            if "messages" in body:
                words = body["messages"][-1]["content"]
            words = words if isinstance(words, list) else [words]
            name = body["model"] if body["model"] in cases else words[0]
            case = cases.get(name)
            if case is None or len(words) < len(GOOD[operation]):
                data, kind = as_json(good(operation, *words)), "application/json"
                served["good"] += 1
            else:
                data, kind = case.body, case.kind
                served[name] += 1
            head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(data)}\r\n\r\n"
            self.wfile.write(head.encode() + data)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 1_000

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", served
        finally:
            server.shutdown()
            thread.join()
