"""The backend keeps the rules of all backends, over real sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from pydantic import BaseModel

from feste.backend import Backend, Secret
from feste.backend.cohere import ChatParams, Cohere, EmbedParams, GenerateParams
from feste.delayed import FesteDelayed
from feste.testing import BackendContract, SimServer


class City(BaseModel):
    name: str


class TestCohere(BackendContract):
    key_name = "FESTE_CONTRACT_KEY"

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _server(cls) -> Iterator[None]:
        options = {"require_key": cls.key}
        with SimServer("feste.backend.cohere.testing:CohereWire", wire_options=options) as server:
            cls.url = server.url
            yield

    def client(self, key: str = "FESTE_CONTRACT_KEY", **given: Any) -> Backend:
        return Cohere("m", api_key=Secret(key), **{"base_url": self.url, **given})

    def make(self) -> Backend:
        return self.client(timeout=30)

    def calls(self, llm: Any) -> Sequence[FesteDelayed[Any]]:
        forms = EmbedParams(embedding_types=["int8", "base64"])
        return [
            llm.chat("Hi", ChatParams(extra={"later": 1})),
            llm.chat([{"role": "user", "content": "Hi"}], output=City),
            llm.generate("Hi", GenerateParams(num_generations=2)),
            *(llm.embed(text) for text in ("one", "two \ud800", "three")),
            *(llm.embed(text, forms) for text in ("one", "two")),
        ]

    def broken(self) -> Sequence[Backend]:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            nobody = f"http://127.0.0.1:{bound.getsockname()[1]}"
        return [
            self.client(base_url=nobody),
            self.client(base_url=f"{self.url}/elsewhere"),
            self.client(key="A_KEY_THAT_IS_NOT_SET"),
        ]
