"""The backend keeps the rules of all backends, over real sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from pydantic import BaseModel

from feste.backend import Backend, Secret
from feste.backend.openai import ChatParams, CompleteParams, EmbedParams, OpenAI
from feste.delayed import FesteDelayed
from feste.testing import BackendContract, SimServer


class City(BaseModel):
    name: str


class TestOpenAI(BackendContract):
    key_name = "FESTE_CONTRACT_KEY"

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _server(cls) -> Iterator[None]:
        options = {"require_key": cls.key, "models": ["m"]}
        with SimServer("feste.backend.openai.testing:OpenAIWire", wire_options=options) as server:
            cls.url = server.url
            yield

    def client(self, model: str = "m", key: str = "FESTE_CONTRACT_KEY", **given: Any) -> Backend:
        return OpenAI(model, api_key=Secret(key), **{"base_url": f"{self.url}/v1", **given})

    def make(self) -> Backend:
        return self.client(timeout=30)

    def calls(self, llm: Any) -> Sequence[FesteDelayed[Any]]:
        greedy = CompleteParams(n=2, temperature=0)
        return [
            llm.chat("Hi", ChatParams(n=2, extra={"top_k": 1})),
            llm.chat([{"role": "user", "content": "Hi"}], output=City),
            *(llm.complete(text, greedy) for text in ("one", "two", "three")),
            *(llm.complete(text) for text in ("one", "two")),
            *(llm.embed(text, EmbedParams(dimensions=4)) for text in ("one", "two \ud800")),
        ]

    def broken(self) -> Sequence[Backend]:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            nobody = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        return [
            self.client(base_url=nobody),
            self.client(base_url=f"{self.url}/elsewhere"),
            self.client(model="unknown"),
            self.client(key="A_KEY_THAT_IS_NOT_SET"),
        ]
