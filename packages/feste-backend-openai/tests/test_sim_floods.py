"""What `SimServer` sends that no client can, or should, read to its end, and what only looks odd."""

from __future__ import annotations

import json
import socket
import zlib
from contextlib import closing

import pytest

from feste.testing import Fault, SimServer

BODY = {"model": "m", "messages": [{"role": "user", "content": "REPLY: hello there"}]}


def received(server: SimServer, most: int = 1 << 30, **more: object) -> tuple[str, bytes]:
    """Send a chat, and return the head and the body of what comes, up to so many bytes."""
    data = json.dumps({**BODY, **more}).encode()
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    with closing(socket.create_connection(address, timeout=30)) as link:
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        )
        link.sendall(head % len(data) + data)
        found = bytearray()
        while len(found) < most and (piece := link.recv(1 << 16)):
            found += piece
    start, _, body = bytes(found).partition(b"\r\n\r\n")
    return start.decode("latin-1"), body


def counts(server: SimServer) -> tuple[int, int]:
    found = server.totals()
    return found.generated, found.delivered


def test_a_redirect_names_another_host(server: SimServer) -> None:
    server.add(Fault(kind="redirect"), Fault(kind="redirect", headers={"location": "/there"}))

    for place in ("https://elsewhere.example/", "/there"):
        head, _ = received(server)
        assert head.startswith("HTTP/1.1 307 ") and f"\r\nlocation: {place}\r\n" in head + "\r\n"
    assert counts(server) == (0, 0)


def test_a_content_filter_refuses_the_prompt_or_cuts_the_answer_off(server: SimServer) -> None:
    server.add(Fault(kind="content_filter"), Fault(kind="filtered"))
    refused = json.loads(received(server)[1])
    cut = json.loads(received(server)[1])

    assert refused["error"]["code"] == "content_filter"
    assert cut["choices"][0]["finish_reason"] == "content_filter"
    assert cut["choices"][0]["message"]["content"] == "hello there"
    assert counts(server) == (1, 1)


def test_a_filtered_stream_ends_with_the_filter(server: SimServer) -> None:
    server.add(Fault(kind="filtered"))
    body = received(server, stream=True)[1]

    assert b'"finish_reason":"content_filter"' in body and b'"stop"' not in body


def test_a_bomb_is_small_and_unpacks_to_a_gigabyte(server: SimServer) -> None:
    server.add(Fault(kind="bomb"))
    head, body = received(server)

    assert "\r\ncontent-encoding: gzip\r\n" in head and len(body) < 2 << 20
    assert int.from_bytes(body[-4:], "little") == 1 << 30  # what the format says of the whole
    reader = zlib.decompressobj(zlib.MAX_WBITS | 16)
    assert reader.decompress(body, 1 << 25) == b" " * (1 << 25)
    assert counts(server) == (1, 0)


def test_deep_json_is_as_deep_as_it_says(server: SimServer) -> None:
    server.add(Fault(kind="deep"))
    body = received(server)[1]

    assert body.count(b"[") == body.count(b"]") == 100_000
    assert counts(server) == (1, 0)


def test_what_is_endless_ends_with_the_client(server: SimServer) -> None:
    server.add(Fault(kind="endless"), Fault(kind="endless", body=": hm\n\n"))
    for piece in (b" " * 65_536, b": hm\n\n"):
        head, body = received(server, 3 << 20)
        assert "transfer-encoding: chunked" in head and body.count(piece) > 10

    server.add(Fault(kind="endless_headers"))
    head, body = received(server, 3 << 20)
    assert head.count("\r\nx-more: aaa") > 2_000 and not body
    assert counts(server) == (3, 0)


def test_the_wrong_length_is_half_or_as_told(server: SimServer) -> None:
    server.add(Fault(kind="wrong_length"))
    head, body = received(server)
    told = int(head.partition("content-length: ")[2].partition("\r\n")[0])
    assert told == len(body) // 2 and json.loads(body)["choices"]

    server.add(Fault(kind="wrong_length", headers={"content-length": "100000"}))
    head, body = received(server)
    assert "content-length: 100000" in head and json.loads(body)["choices"]
    assert counts(server) == (2, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_headers_that_drip_are_whole_in_the_end(server: SimServer, stream: bool) -> None:
    server.add(Fault(kind="drip_headers", pause=0.001))
    head, body = received(server, stream=stream)

    assert head.startswith("HTTP/1.1 200 OK\r\n") and b"hello" in body
    assert body.endswith(b"0\r\n\r\n") == stream
    assert counts(server) == (1, 1)
