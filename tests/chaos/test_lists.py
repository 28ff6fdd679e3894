"""Calls that share requests, at a provider that spoils lists: nothing crosses, one bad item costs itself."""

from __future__ import annotations

import array
import json
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import feste
from feste import context
from feste.backend import Limits
from feste.backend.cohere import Cohere
from feste.backend.openai import CompleteParams, OpenAI
from feste.errors import CallError, InvalidRequest
from feste.prompt import Prompt
from feste.testing import Fault, LoggedRequest, SimServer, fresh_draws
from feste.testing.wire import answer, embedding
from tests.chaos.driver import Chaos
from tests.chaos.work import POISON

pytestmark = pytest.mark.timeout(900)

OPENAI = "feste.backend.openai.testing:OpenAIWire"
COHERE = "feste.backend.cohere.testing:CohereWire"
ROOM = CompleteParams(max_tokens=16)
#: What is noticed where answers have indexes, and what is noticed where they have none.
NUMBERED = ("wrong_count", "shuffled", "duplicated", "extra")
COUNTED = ("wrong_count", "extra")


def spoiling(kinds: Sequence[Any], share: float = 0.1) -> list[Fault]:
    return [Fault(kind=kind, times=None, probability=share / len(kinds)) for kind in kinds]


def served(request: LoggedRequest) -> list[str]:
    """The texts of a request."""
    body = request.body
    given = body.get("prompt") or body.get("input") or body.get("texts")
    return [given] if isinstance(given, str) else given


@pytest.mark.parametrize("operation", ["complete", "embed", "cohere embed"])
def test_spoilt_lists_cross_no_answers(
    operation: str, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """10 % of the replies are spoilt, some lists have a bad text: each answer is to its own text.

    The bad text fails alone; any other call only after two answers that were for it alone.
    """
    rng = random.Random(f"{seed} {operation}")
    kinds = COUNTED if operation == "cohere embed" else NUMBERED
    wire, options = (COHERE if "cohere" in operation else OPENAI), {"poison": POISON}
    calls = failures = bad = lists = 0
    with SimServer(wire, wire_options=options, faults=spoiling(kinds), seed=seed) as server:
        for wave in range(
            amount(20, 100)
        ):  # a model each, since a spoilt list teaches shorter ones
            limits = Limits(max_items=rng.randint(1, 20), concurrency=32)
            texts = [f"text {rng.randrange(1_000)} of {wave}" for _ in range(20)]
            if rng.random() < 0.3:
                texts[rng.randrange(20)] = f"{POISON} {wave}"
            llm: Any
            if wire == COHERE:
                llm = Cohere(f"m{wave}", base_url=server.url, api_key="k", limits=limits)
            else:
                llm = OpenAI(f"m{wave}", base_url=f"{server.url}/v1", api_key="k", limits=limits)
            given = (ROOM,) if operation == "complete" else ()
            ask = getattr(llm, operation.rpartition(" ")[2])
            before = len(server.requests())
            (values,) = feste.compute([ask(t, *given) for t in texts], on_error="return")
            log = server.requests()[before:]
            alone = Counter(served(r)[0] for r in log if r.fault and len(served(r)) == 1)
            calls, lists = calls + len(texts), lists + sum(len(served(r)) > 1 for r in log)

            assert max(len(served(r)) for r in log) <= (limits.max_items or 0)
            for text, value in zip(texts, values, strict=True):
                if POISON in text:
                    assert type(value) is InvalidRequest
                    bad += 1
                elif isinstance(value, CallError):
                    assert alone[text] > 1, (text, value)
                    failures += 1
                elif operation == "complete":
                    assert value in {answer(text, sample) for sample in range(60)}, text
                else:
                    assert value == array.array("f", embedding(text, 16)), text
            if operation == "complete":  # equal prompts are draws of their own
                assert max(Counter(v for v in values if isinstance(v, str)).values()) == 1
        totals = server.totals()
    assert set(totals.faults) == set(kinds)
    assert bad > 0 and failures <= calls / 50 and lists > calls / 40
    tally(
        calls=calls, requests=totals.requests, **{f"fault {k}": n for k, n in totals.faults.items()}
    )


def test_graphs_of_lists_cross_no_answers(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """Random graphs, lists of random lengths, spoilt and lost replies, equal prompts, bad prompts.

    Most of what needs no bad prompt is delivered: a call that is alone in its request fails by two
    spoilt replies, and takes what needs it along.
    """
    lost = ("reset_after", "truncated", "garbage", "unavailable")
    faults = {**dict.fromkeys(NUMBERED, 0.05), **dict.fromkeys(lost, 0.02)}
    delivered = spared = requests = spoilt = 0
    for part in range(amount(1, 7)):
        folder = tmp_path / str(part)
        folder.mkdir()
        rng = random.Random(f"{seed} {part}")
        with Chaos(
            folder,
            "graphs",
            200,
            seed=1_000 * seed + part,
            equal=rng.randint(1, 4),
            poisoned=0.02,
            store=False,
            faults=faults,
            operation="complete",
            max_items=rng.randint(2, 20),
            rate=60_000,
        ) as listed:
            evidence = listed.check(listed.run())

        bad: set[int] = set()
        for i, step in enumerate(evidence.steps):
            if POISON in step.text or not bad.isdisjoint(step.parents):
                bad.add(i)
        delivered += evidence.delivered
        spared += len(evidence.steps) - len(bad)
        requests += evidence.totals.requests
        spoilt += sum(evidence.totals.faults.get(kind, 0) for kind in NUMBERED)
        tally(evidence)
    assert delivered >= 0.75 * spared
    assert spoilt > 0.005 * requests  # few where the lists happen to be short


# --- the same answers and keys, however a program is run ------------------------------------------

MODES: Mapping[str, Mapping[str, Any]] = {
    "lazy": {},
    "lazy, not optimized": {"optimize": False},
    "lazy, no lists": {"optimize": {"batch": False, "sample_fusion": False}},
    "eager": {"eager": True},
}
GREEDY = CompleteParams(max_tokens=16, temperature=0)
_ASK = Prompt("{{ text }}{% for answer in answers %}\n{{ answer }}{% endfor %}")


def program(rng: random.Random, llm: OpenAI) -> Iterator[Any]:
    """A random graph of calls whose answers depend on their prompts alone."""
    made: list[Any] = []
    for _ in range(rng.randint(4, 16)):
        text = f"step {rng.randrange(8)}"
        some = rng.sample(made, min(len(made), rng.randint(0, 2)))
        prompt = _ASK(text=text, answers=some) if some else text
        if rng.random() < 0.3:
            yield llm.embed(prompt)
        else:
            made.append(llm.complete(prompt, GREEDY))
            yield made[-1]


def stored_keys(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as conn:
        return {key for (key,) in conn.execute("SELECT key FROM answers")}


def test_answers_and_keys_are_the_same_in_all_modes(
    tmp_path: Path, seed: int, amount: Callable[..., int], tally: Callable[..., None]
) -> None:
    """Eager or lazy, optimized or not, with lists or without: equal values, equal keys in the store.

    The provider spoils a third of all lists, which the first mode alone has.
    """
    in_lists = [
        Fault(kind=kind, times=None, match=match, probability=0.08)
        for kind in NUMBERED
        for match in ('"prompt":["', '"input":["')
    ]
    calls = spoilt = 0
    requests = Counter[str]()
    with SimServer(OPENAI, faults=in_lists, seed=seed) as server:
        for graph in range(amount(12, 170)):
            found = {}
            for mode, settings in MODES.items():
                fresh_draws()
                server.reset()
                path = tmp_path / f"{graph} {mode}.db"
                rng = random.Random(f"{seed} {graph}")
                limits = Limits(max_items=rng.randint(1, 20), concurrency=32)
                llm = OpenAI(f"m{graph}", base_url=f"{server.url}/v1", api_key="k", limits=limits)
                with context.set(store=str(path), **settings):
                    nodes = list(program(rng, llm))
                    (values,) = feste.compute(nodes)
                requests[mode] += server.totals().requests
                spoilt += sum(server.totals().faults.values())
                calls += len(nodes)
                found[mode] = [json.dumps(v if isinstance(v, str) else list(v)) for v in values]
                found[mode].append(str(sorted(stored_keys(path))))

            assert all(one == found["lazy"] for one in found.values()), (graph, found)
    assert requests["lazy"] < requests["lazy, no lists"] == requests["eager"]
    assert spoilt > amount(12, 170) / 5
    tally(calls=calls, requests=requests.total(), **{"lists spoilt": spoilt})
