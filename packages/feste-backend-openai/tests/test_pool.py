"""The connections below the SDK, against servers that do what some providers do."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer

from feste.backend import Request
from feste.backend.clients import close_clients
from feste.backend.openai import OpenAI
from feste.backend.openai.sending import send
from feste.errors import CallError, ConfigError

ANSWER = {"choices": [{"index": 0, "message": {"content": "hello " * 99}}]}


class Server:
    """Answers whatever it is asked, compressed and with a cookie."""

    def __init__(self) -> None:
        self.asked: list[web.BaseRequest] = []

    async def answer(self, request: web.BaseRequest) -> web.Response:
        self.asked.append(request)
        response = web.Response(text=json.dumps(ANSWER), content_type="application/json")
        response.set_cookie("account", "1")
        response.enable_compression(web.ContentCoding.gzip)
        return response


async def asked(llm: OpenAI, times: int) -> list[object]:
    request = Request("openai", "chat", f"{llm.endpoint}/chat/completions", {"model": "m"})
    try:
        return [(await send(llm, request)).payload for _ in range(times)]
    finally:
        await close_clients(asyncio.get_running_loop())


def ask(times: int = 1) -> tuple[list[object], list[web.BaseRequest]]:
    """Send a request to a server; return the answers and what it was asked."""

    async def everything() -> list[object]:
        async with RawTestServer(server.answer) as running:
            llm = OpenAI(
                "m", base_url=str(running.make_url("/v1").with_host("localhost")), api_key="sk-none"
            )
            return await asked(llm, times)

    server = Server()
    return asyncio.run(everything()), server.asked


def test_compressed_answers() -> None:
    """An answer is decoded once: the client says what it can decode."""
    found, (request,) = ask()

    assert found == [ANSWER]
    assert "gzip" in request.headers["Accept-Encoding"]


def test_no_cookie_is_sent_back() -> None:
    """Accounts share connections, so a cookie of one would go out with another's request."""
    found, requests = ask(times=2)

    assert found == [ANSWER] * 2
    assert not any("Cookie" in request.headers for request in requests)


def test_a_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to another machine goes through the proxy that the environment names."""

    async def everything() -> None:
        async with RawTestServer(proxy.answer) as running:
            monkeypatch.setenv("https_proxy", str(running.make_url("/")))
            with pytest.raises(CallError):  # this proxy opens no tunnel
                await asked(OpenAI("m", base_url="https://model.example", api_key="sk-none"), 1)

    proxy = Server()
    asyncio.run(everything())

    assert [request.method for request in proxy.asked] == ["CONNECT"]


def test_a_server_whose_name_begins_like_its_own() -> None:
    """The key goes to its own server only, not to one whose name goes on."""
    llm = OpenAI("m", base_url="https://model.example", api_key="sk-none")
    request = Request("openai", "chat", "https://model.example.org/chat/completions", {})

    with pytest.raises(ConfigError, match=r"not for https://model\.example\.org"):
        asyncio.run(send(llm, request))
