"""Keys and prompts go to the server that code or configuration names, and to no other."""

from __future__ import annotations

from typing import Any

import pytest

import feste
from feste.backend import Secret, proxy_for, server_url
from feste.backend.cohere import Cohere
from feste.backend.openai import OpenAI
from feste.errors import ConfigError, InvalidRequest
from feste.testing import Fault, SimServer

KEY = "sk-canary-0123456789"
WIRES: dict[Any, tuple[str, str]] = {
    OpenAI: ("feste.backend.openai.testing:OpenAIWire", "/v1"),
    Cohere: ("feste.backend.cohere.testing:CohereWire", ""),
}

REFUSED = [
    ("http://api.example.com", "in the clear"),
    ("http://10.0.0.5:8000/v1", "in the clear"),
    ("http://localhost.example.com", "in the clear"),
    ("http://models.localhost:8000", "in the clear"),
    ("https://user:hunter2@api.example.com", "name or password"),
    ("https://api.openai.com@evil.example/v1", "name or password"),
    ("https://api.example.com?key=hunter2", "query"),
    ("https://api.example.com#hunter2", "fragment"),
    ("ftp://api.example.com", "https://"),
    ("//api.example.com", "https://"),
    ("https:api.example.com", "https://"),
    ("https://api.example.com:hunter2", "no URL"),
    ("https://api.example.com:0", "no URL"),
    ("https://evil.example\\.api.openai.com", "no URL"),
    ("https://evil.example%2f.api.openai.com", "no URL"),
    ("https://api.exa\nmple.com", "no URL"),
    ("https://api.openai.com../v1", "no URL"),
    ("https://[v1.x]/", "no URL"),
    ("https://169.254.169.254/latest", "no address of a server"),
    ("https://[fd00:ec2::254]/", "no address of a server"),
    ("https://[fe80::1]/", "no address of a server"),
    ("https://[::ffff:169.254.169.254]/", "no address of a server"),
    ("https://[64:ff9b::a9fe:a9fe]/", "no address of a server"),
    ("https://[2002:a9fe:a9fe::]/", "no address of a server"),
    ("https://metadata.google.internal/", "no address of a server"),
    ("https://METADATA.google.internal./", "no address of a server"),
    ("https://[::a9fe:a9fe]/", "no address of a server"),
    ("https://[64:ff9b:1::a9fe:a9fe]/", "no address of a server"),
    ("https://[::ffff:0:a9fe:a9fe]/", "no address of a server"),
    ("https://[2001:0:a9fe:a9fe::]/", "no address of a server"),
    ("https://[2001:0:808:808::5601:5601]/", "no address of a server"),
    ("https://[fec0::1]/", "no address of a server"),
    ("https://[fd00:ec2::23]/", "no address of a server"),
    ("https://１６９。254。169。254/", "not ASCII"),
    ("https://bücher.example", "xn--bcher-kva.example"),
    ("https://straße.example", "not ASCII"),
    ("https://api.open\u00adai.com", "not ASCII"),
    (f"https://{'a' * 64}.example", "no URL"),
    ("https://2852039166/", "four plain decimal"),
    ("https://0xA9FEA9FE/", "four plain decimal"),
    ("https://0251.0376.0251.0376/", "four plain decimal"),
    ("https://169.254.43518/", "four plain decimal"),
    ("http://127.1:8000/", "four plain decimal"),
    ("https://[fe80::1%25eth0]/", "without a zone"),
    ("http://0.0.0.0:8000/v1", "127.0.0.1"),
]
TAKEN = [
    ("HTTPS://API.Example.com:443/v1/", "https://api.example.com/v1"),
    ("https://api.example.com./v1", "https://api.example.com/v1"),
    ("https://XN--bcher-kva.example", "https://xn--bcher-kva.example"),
    ("https://my_host.corp:8443/V1", "https://my_host.corp:8443/V1"),
    ("https://10.0.0.5/v1", "https://10.0.0.5/v1"),
    ("https://[2001:DB8:0::1]:8443/", "https://[2001:db8::1]:8443"),
    ("http://LOCALHOST.:80/v1", "http://localhost/v1"),
    ("http://[::1]:8000", "http://[::1]:8000"),
    ("https://[64:ff9b::808:808]", "https://[64:ff9b::808:808]"),
    ("https://[fd12::1]", "https://[fd12::1]"),
]


@pytest.mark.parametrize(("url", "why"), REFUSED)
def test_an_address_that_is_refused(url: str, why: str) -> None:
    """By each backend, where the client is made, and without a password in the error."""
    for make in (OpenAI, Cohere):
        with pytest.raises(ConfigError, match=why) as caught:
            make("m", base_url=url, api_key=KEY)
        assert "hunter2" not in str(caught.value) and KEY not in str(caught.value)


@pytest.mark.parametrize(("url", "spelled"), TAKEN)
def test_an_address_has_one_spelling(url: str, spelled: str) -> None:
    assert server_url(url) == server_url(spelled) == spelled
    assert OpenAI("m", base_url=url, api_key=KEY).endpoint == spelled
    assert Cohere("m", base_url=url, api_key=KEY).endpoint == spelled


@pytest.mark.parametrize(
    ("make", "name", "variable", "own"),
    [
        (OpenAI, "OPENAI_API_KEY", "OPENAI_BASE_URL", "https://eu.api.openai.com/v1"),
        (Cohere, "CO_API_KEY", "CO_API_URL", "https://api.cohere.ai"),
    ],
)
def test_a_default_key_goes_to_no_other_host(
    make: Any, name: str, variable: str, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that nobody named is for its own provider, this machine, and what stands beside it."""
    monkeypatch.setenv(name, KEY)
    for url in ("https://evil.example/v1", own.replace(".", "-", 1), f"{own}.evil.example"):
        with pytest.raises(ConfigError, match="is a key for"):
            make("m", base_url=url.replace("/v1.", "."))
    make("m", base_url=own).preflight()
    make("m", base_url="http://127.0.0.1:9").preflight()
    make("m", base_url="https://other.example", api_key=Secret(name)).preflight()
    monkeypatch.setenv(variable, "https://other.example")
    assert make("m").endpoint == "https://other.example"


def test_a_redirect_shows_nothing_to_the_other_host() -> None:
    """Neither key nor prompt; the error names the other host and what to do."""
    wires = [wire for wire, _ in WIRES.values()]
    with SimServer(wires) as here, SimServer(wires) as there:
        for make, (_, path) in WIRES.items():
            llm = make("m", base_url=here.url + path, api_key=KEY)
            for status in (301, 302, 303, 307, 308):
                where = there.url.replace("127.0.0.1", "localhost") + path
                here.add(Fault(status=status, headers={"location": where}))
                error = feste.compute(llm.chat(f"secret {status}"), on_error="return")[0]
                assert isinstance(error, InvalidRequest) and error.status == status
                assert "redirect to localhost" in str(error) and "as base_url" in str(error)
        assert there.totals().requests == 0 and here.totals().requests == 10


def test_a_proxy_of_the_environment_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For each server, where its run begins, without the proxy's password; at INFO."""
    monkeypatch.setenv("HTTPS_PROXY", "http://me:hunter2@proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "inside.example")
    with caplog.at_level("INFO", "feste"):
        for make in WIRES:
            for host in ("https://api.proxied.example", "https://inside.example"):
                make("m", base_url=host, api_key=KEY).preflight()
            make("m", base_url="http://127.0.0.1:9", api_key=KEY).preflight()

    said = [(r.name, r.levelname, r.getMessage()) for r in caplog.records]
    line = "the environment names a proxy for api.proxied.example: proxy.example:3128"
    assert said == [("feste.backend", "INFO", line)]
    assert proxy_for("https://inside.example/v1") is None
