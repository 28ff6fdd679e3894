"""The client as configuration: what it reads, shows, pickles and refuses; and what it imports."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import cloudpickle
import numpy
import pytest

import feste
from feste.backend import Limits, Params, Secret, create
from feste.backend.openai import ChatParams, CompleteParams, EmbedParams, OpenAI
from feste.draw import Determinism
from feste.errors import ConfigError, MissingKey, ParameterError
from feste.testing import SimServer

WIRE = "feste.backend.openai.testing:OpenAIWire"

LITERAL = "sk-literal-0123456789-canary"


class TestAddress:
    @pytest.mark.parametrize(
        ("given", "wanted"),
        [
            (None, "https://api.openai.com/v1"),
            ("https://API.Example.com:443/v1/", "https://api.example.com/v1"),
            ("https://api.example.com:8443/V1//", "https://api.example.com:8443/V1"),
            ("http://LOCALHOST:8080", "http://localhost:8080"),
            ("http://127.0.0.1:80/v1", "http://127.0.0.1/v1"),
            ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
            (" https://api.example.com/v1\n", "https://api.example.com/v1"),
        ],
    )
    def test_one_form_for_every_way_to_write_it(self, given: str | None, wanted: str) -> None:
        """Equal servers have equal endpoints: keys of stored answers are made of them."""
        assert OpenAI("m", base_url=given, api_key=LITERAL).endpoint == wanted

    @pytest.mark.parametrize(
        ("given", "why"),
        [
            ("http://api.example.com/v1", "in the clear"),
            ("http://192.168.1.5:8000/v1", "in the clear"),
            ("http://localhost.example.com/v1", "in the clear"),
            ("https://user:hunter2@api.example.com/v1", "name or password"),
            ("https://hunter2@api.example.com/v1", "name or password"),
            ("https://api.example.com/v1?key=hunter2", "query"),
            ("https://api.example.com/v1#hunter2", "fragment"),
            ("ftp://api.example.com/hunter2", "https://"),
            ("api.example.com/v1", "https://"),
            ("https://api.example.com:hunter2/v1", "no URL"),
            ("https:///hunter2", "host"),
        ],
    )
    def test_what_is_refused(self, given: str, why: str) -> None:
        """No key leaves in the clear, and no error repeats a password out of a URL."""
        with pytest.raises(ConfigError, match=why) as caught:
            OpenAI("m", base_url=given)
        assert "hunter2" not in str(caught.value)

    def test_the_environment_is_read_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """URL, organization and project are those of the moment when the client was made."""
        monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1/")
        monkeypatch.setenv("OPENAI_ORG_ID", "org-a")
        monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-b")
        llm = OpenAI("m")
        other = OpenAI(
            "m", api_key="k", base_url="https://x.example/v1", organization="o", project="p"
        )
        for name in ("OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
            monkeypatch.setenv(name, "")
        assert (llm.endpoint, llm.account) == ("http://127.0.0.1:8000/v1", "org-a/proj-b")
        assert (other.endpoint, other.account) == ("https://x.example/v1", "o/p")
        again = pickle.loads(pickle.dumps(llm))
        assert (again.endpoint, again.account) == (llm.endpoint, llm.account)
        assert OpenAI("m").endpoint == "https://api.openai.com/v1"


class TestConfig:
    def test_it_is_plain_json_with_the_key_by_name(self) -> None:
        """What is shown, hashed and logged of a client holds no key."""
        for llm in (
            OpenAI("m"),
            OpenAI("m", api_key=Secret("MY_KEY")),
            OpenAI("m", api_key=LITERAL),
        ):
            text = json.dumps(llm.config()) + repr(llm) + llm.identity + repr(llm.secrets)
            assert LITERAL not in text
        assert "MY_KEY" in repr(OpenAI("m", api_key=Secret("MY_KEY")))

    def test_equal_clients_may_stand_for_each_other(self) -> None:
        """Clients are equal by what decides their answers: not by timeout or limits."""
        one = OpenAI("m", timeout=5)
        assert one.token == OpenAI("m", limits=Limits(concurrency=3)).token
        for other in (
            OpenAI("n"),
            OpenAI("m", base_url="https://x.example/v1", api_key=Secret("OPENAI_API_KEY")),
            OpenAI("m", project="p"),
            OpenAI("m", api_key=Secret("OTHER")),
            OpenAI("m", api_key=LITERAL),
        ):
            assert one.token != other.token

    @pytest.mark.parametrize(
        "given",
        [
            {"timeout": 0},
            {"timeout": float("inf")},
            {"timeout": None},
            {"timeout": True},
            {"api_key": b"bytes"},
            {"model": 5},
            {"base_url": 5},
        ],
    )
    def test_wrong_arguments(self, given: dict[str, Any]) -> None:
        """A wrong argument is an error where the client is made."""
        with pytest.raises(ConfigError):
            OpenAI(**given)

    def test_the_request_is_data(self) -> None:
        """A request is plain JSON with its effective endpoint, and holds no key."""
        llm = OpenAI("m", api_key=LITERAL, organization="o", timeout=7)
        call: Any = llm.complete
        request = call.prepare(["Hi", CompleteParams(stop=("a", "b"))])
        assert request.endpoint == "https://api.openai.com/v1/completions"
        assert request.body == {"prompt": "Hi", "stop": ["a", "b"], "model": "m"}
        assert (request.plugin, request.timeout) == ("openai", 7.0)
        assert re.fullmatch(r"o literal-[0-9a-f]{12}", request.account)
        assert LITERAL.encode() not in pickle.dumps(request)
        assert LITERAL not in json.dumps(dataclasses.asdict(request))


class TestPickle:
    def test_a_key_by_name_travels_as_a_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A pickled client holds the name of its key, never the key."""
        monkeypatch.setenv("MY_KEY", LITERAL)
        llm = OpenAI("m", api_key=Secret("MY_KEY"), limits=Limits(concurrency=3), timeout=9)
        for dumps in (pickle.dumps, cloudpickle.dumps):
            data = dumps([llm, llm.chat])
            assert LITERAL.encode() not in data
            again, call = pickle.loads(data)
            assert again.token == llm.token and call.client.token == llm.token
            assert (again.limits, again.timeout) == (llm.limits, llm.timeout)
            assert again.key() == LITERAL
        assert copy.deepcopy(llm).token == llm.token

    def test_a_literal_key_never_leaves_the_process(self) -> None:
        """Pickling a client that holds a key is refused, with what to do instead."""
        llm = OpenAI("m", api_key=LITERAL)
        for thing in (llm, llm.chat, llm.chat("hello")):
            for dumps in (pickle.dumps, cloudpickle.dumps):
                with pytest.raises(ConfigError, match=r"api_key=Secret") as caught:
                    dumps(thing)
                assert LITERAL not in str(caught.value)


class TestKeys:
    def test_where_a_key_comes_from(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """None is OPENAI_API_KEY; a Secret is its variable; a text is the key; empty is None."""
        monkeypatch.setenv("OPENAI_API_KEY", "sk-default")
        monkeypatch.setenv("MY_KEY", "sk-mine")
        assert OpenAI("m").key() == OpenAI("m", api_key="").key() == "sk-default"
        assert OpenAI("m", api_key=Secret("MY_KEY")).key() == "sk-mine"
        assert OpenAI("m", api_key=LITERAL).key() == LITERAL

    @pytest.mark.parametrize("key", [f"{LITERAL}\n", f"Bearer {LITERAL}", f"{LITERAL}é"])
    def test_a_key_that_is_none(self, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A key that no header can carry is refused, and not shown, by tools that print locals too."""
        monkeypatch.setenv("MY_KEY", key)
        for llm in (OpenAI("m", api_key=key), OpenAI("m", api_key=Secret("MY_KEY"))):
            for ask in (llm.preflight, llm.key):
                with pytest.raises(ConfigError, match="holds a space") as caught:
                    ask()
                assert caught.tb is not None
                frames = traceback.TracebackException(
                    type(caught.value), caught.value, caught.tb.tb_next, capture_locals=True
                )
                assert LITERAL not in "".join(frames.format())

    def test_only_this_machine_needs_none(self) -> None:
        """A missing key is fine for a server on this machine, and for no other."""
        OpenAI("m", base_url="http://localhost:8080/v1").preflight()
        for url in (None, "https://127.0.0.1.example/v1"):
            with pytest.raises(MissingKey, match="OPENAI_API_KEY"):
                OpenAI("m", base_url=url, api_key=Secret("OPENAI_API_KEY")).preflight()


class TestParams:
    @pytest.mark.parametrize(
        ("kind", "resource", "ours"),
        [
            (ChatParams, "chat.completions", {"messages"}),
            (CompleteParams, "completions", {"prompt"}),
            (EmbedParams, "embeddings", {"input"}),
        ],
    )
    def test_every_parameter_of_the_sdk_is_there(
        self, kind: type[Params], resource: str, ours: set[str]
    ) -> None:
        """What the SDK's method takes, the record takes: less what Feste decides."""
        import openai

        method: Any = openai.AsyncOpenAI(api_key="x")
        for part in (*resource.split("."), "create"):
            method = getattr(method, part)
        decided = {"stream", "timeout", "extra_headers", "extra_query", "extra_body"}
        wanted = set(inspect.signature(method).parameters) - ours - decided
        known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
        assert wanted - known == set()
        assert known - wanted <= {"extra", "user"}

    @pytest.mark.parametrize("kind", [ChatParams, CompleteParams, EmbedParams])
    def test_misspelt_ones_are_refused(self, kind: Any) -> None:
        """An unknown parameter is refused with the nearest name; what Feste fills in is unknown too."""
        with pytest.raises(ParameterError, match="Did you mean 'model'"):
            kind(modell="m")
        for name in ("stream", "messages", "prompt", "input", "timeout"):
            with pytest.raises(ParameterError, match=name):
                kind(**{name: 1})

    def test_extra_cannot_go_behind_feste(self) -> None:
        """What has a field of its own is not taken from extra: batching would not see it."""
        with pytest.raises(ParameterError, match="give seed= itself"):
            CompleteParams(extra={"seed": 1})
        with pytest.raises(ParameterError, match="'stream'"):
            ChatParams(extra={"stream": True})

        @feste.task
        def given(value: Any) -> Any:
            return value

        for params in (ChatParams(extra=given({"seed": 1})), ChatParams(extra=given([1]))):
            node = OpenAI("m", base_url="http://127.0.0.1:9/v1").chat("x", params)
            (error,) = feste.compute(node, on_error="return")
            assert isinstance(error, ParameterError) and "extra" in str(error)
        with pytest.raises(ParameterError, match="extra must be a dict"):
            ChatParams(extra=[("top_k", 1)])  # type: ignore[arg-type]

    @pytest.mark.parametrize("n", ["2", 2.0, True, 0, -1])
    def test_the_number_of_answers(self, n: Any) -> None:
        """What is no whole number above 0 is refused before it is sent: its answers would be lost."""

        @feste.task
        def given() -> Any:
            return n

        for kind in (ChatParams, CompleteParams):
            with pytest.raises(ParameterError, match=f"{kind.__name__}: n={n!r}"):
                kind(n=n)
        with pytest.raises(ParameterError, match="best_of"):
            CompleteParams(best_of=n)
        node = OpenAI("m", base_url="http://127.0.0.1:9/v1").chat("x", ChatParams(n=given()))
        (error,) = feste.compute(node, on_error="return")
        assert isinstance(error, ParameterError)
        assert ChatParams(n=numpy.int64(2)).body() == {"n": 2}

    def test_parameters_of_another_backend(self) -> None:
        """Where two classes may share a name, the error names their modules."""
        call: Any = OpenAI("m").chat
        wanted = r"openai\.params\.ChatParams\(\.\.\.\), not .*openai\.params\.EmbedParams"
        with pytest.raises(ParameterError, match=wanted):
            call.prepare(["hello", EmbedParams(), None])

    def test_determinism(self) -> None:
        """An explicit temperature of 0 or a seed is GREEDY; nothing said is SAMPLE."""
        sample = Determinism.SAMPLE
        assert ChatParams().determinism(sample) is sample
        assert ChatParams(temperature=0).determinism(sample) is Determinism.GREEDY
        assert CompleteParams(seed=0).determinism(sample) is Determinism.GREEDY

    @pytest.mark.parametrize(
        ("params", "why"),
        [
            (ChatParams(temperature=float("nan")), "temperature is nan"),
            (ChatParams(tools=[{"x": {1, 2}}]), r"ChatParams.tools\[0\]\['x'\] is a set"),
            (ChatParams(prediction={"x": object()}), "not plain data"),
            ({"temperature": 0}, r"ChatParams\(\.\.\.\), not a dict"),
        ],
    )
    def test_what_is_no_json_is_refused_by_name(self, params: Any, why: str) -> None:
        """A parameter that JSON cannot say is an error before anything is sent."""
        call: Any = OpenAI("m").chat
        with pytest.raises(ConfigError, match=why):
            call.prepare(["hello", params, None])

    @pytest.mark.parametrize(
        ("prompt", "why"),
        [
            ([], "not an empty list"),
            ({"role": "user", "content": "x"}, "not a dict"),
            (None, "not a NoneType"),
            (["hello"], r"messages\[0\] must be a dict"),
            ([{"content": "x"}], "with a role"),
            (lambda: "x", "call it with its variables"),
        ],
    )
    def test_prompts_that_are_none(self, prompt: Any, why: str) -> None:
        """What is no text and no conversation is refused, with an example of one."""
        call: Any = OpenAI("m").chat
        with pytest.raises(ParameterError, match=why):
            call.prepare([prompt, ChatParams(), None])

    def test_a_list_of_texts_names_the_fix(self) -> None:
        """Whoever batches by hand is told that writing single calls is enough."""
        call: Any = OpenAI("m").embed
        with pytest.raises(ParameterError, match=r"\[llm.embed\(t\) for t in texts\]"):
            call.prepare([["a", "b"], EmbedParams()])

    def test_a_request_does_not_change_with_its_arguments(self) -> None:
        """What the caller changes after the call changes no request."""
        messages = [{"role": "user", "content": "before"}]
        call: Any = OpenAI("m").chat
        request = call.prepare([messages, ChatParams(), None])
        messages[0]["content"] = "after"
        assert request.body["messages"][0]["content"] == "before"


def test_discovery_imports_no_sdk(tmp_path: Path) -> None:
    """Finding the plugin, making a client, building and explaining a graph need no SDK."""
    metadata = tmp_path / "feste_backend_openai-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: feste-backend-openai\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text("[feste]\nopenai = feste.backend.openai._hooks\n")
    program = """
import sys
from feste.plugins import registry
assert "openai" in registry().backends, registry().plugins
heavy = {"openai", "pydantic", "pydantic_core", "aiohttp", "httpx2", "anyio", "jinja2", "numpy"}
print(sorted(heavy & set(sys.modules)))
import feste
from feste.backend import create
llm = create("openai", model="m", base_url="http://127.0.0.1:9/v1")
assert feste.explain([llm.embed(f"{i}") for i in range(9)], llm.chat("hello")).calls == 10
print(sorted(heavy & set(sys.modules)))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n")[:2] == ["[]", "[]"]


def test_the_sdk_is_imported_aside() -> None:
    """The first request imports the SDK in a thread of its own: the loop of requests goes on."""
    program = """
import sys, threading

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "openai":
            print(threading.current_thread().name)

sys.meta_path.insert(0, Watch())
import feste
from feste.backend.openai import OpenAI
feste.compute(OpenAI("m", base_url=sys.argv[1]).chat("hello"))
"""
    with SimServer(WIRE) as server:
        ran = subprocess.run(
            [sys.executable, "-c", program, f"{server.url}/v1"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=False,
        )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "feste-requests-aside-0\n"


def test_it_is_found_by_name_where_it_is_installed() -> None:
    """`create("openai")` gives a client, if the distribution's metadata is there."""
    from importlib.metadata import entry_points

    if "openai" not in {point.name for point in entry_points(group="feste")}:
        pytest.skip("the distribution is not installed here")
    assert isinstance(create("openai", model="m"), OpenAI)
