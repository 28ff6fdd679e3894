"""The cache: answers that programs and tests share."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import feste
from feste import context, draw, errors
from feste.backend import Backend, Operation, Reply, Request, Response, Usage
from feste.prompt import Prompt
from feste.testing import FakeBackend, FakeParams

bought = 0


class Counter(Backend):
    """Answers with a new number each time; some prompts are filtered, and keys are needed."""

    plugin = "counter"

    def _prepare(self, prompt: str) -> Request:
        return Request(self.plugin, "chat", "plugin:counter", {"prompt": prompt})

    async def _send(self, request: Request, on_chunk: Any = None) -> Response:
        global bought
        bought += 1
        why = "content_filter" if "rude" in request.body["prompt"] else "stop"
        return Response({"text": f"answer {bought}", "why": why}, Usage(10, 5))

    def _parse(self, response: Response, arguments: Any) -> Reply:
        return Reply(response.payload["text"], finish_reason=response.payload["why"])

    chat = Operation(prepare=_prepare, send=_send, parse=_parse)


@pytest.fixture
def path(tmp_path: Path, restart: Callable[[], None]) -> Path:
    global bought
    bought = 0
    return tmp_path / "answers.db"


def report() -> Any:
    found = feste.last_report()
    assert found is not None
    return found


def program(*prompts: str, **settings: Any) -> list[Any]:
    llm = Counter()
    return feste.compute([llm.chat(p) for p in prompts], **settings)[0]


def test_replay_takes_what_is_known_and_buys_the_rest(
    path: Path, restart: Callable[[], None]
) -> None:
    first = program("a", "b", cache=path)
    restart()
    assert program("a", "b", "c", cache=path)[:2] == first and bought == 3
    assert report().states == {"done": 1, "cached": 2}
    assert (report().reused_input_tokens, report().reused_output_tokens) == (20, 10)
    assert len(report().requests) == 1 and "2 answers not bought again" in str(report())


def test_record_buys_all_and_replaces(path: Path, restart: Callable[[], None]) -> None:
    first = program("a", "a", cache=path)
    restart()
    second = program("a", "a", cache=path, cache_mode="record")
    assert not {*first} & {*second} and bought == 4
    restart()
    assert program("a", "a", cache=path) == second


def test_replay_only_sends_nothing(path: Path, restart: Callable[[], None]) -> None:
    """Neither a key nor a network is needed; what is missing fails alone."""
    first = program("a", cache=path)
    restart()
    (known, missing) = program("a", "b", cache=path, cache_mode="replay-only", on_error="return")
    assert [known] == first and bought == 1
    assert isinstance(missing, errors.CacheMiss) and missing.billed == "no"
    assert 'cache_mode="replay"' in str(missing) and "test_cache.py" in str(missing)


def test_replay_only_needs_no_key(path: Path, restart: Callable[[], None]) -> None:
    class Keyless(Counter):
        plugin = "counter"

        def preflight(self) -> None:
            raise errors.MissingKey("A_KEY is not set")

    first = program("a", cache=path)
    restart()
    llm = Keyless()
    with pytest.raises(errors.MissingKey):
        llm.chat("a").compute(cache=path)
    for eager in (False, True):
        restart()
        with context.set(cache=path, cache_mode="replay-only", eager=eager):
            assert feste.compute([llm.chat("a")])[0] == first


def test_replay_only_reads_a_file_that_cannot_be_written(
    path: Path, restart: Callable[[], None]
) -> None:
    """As a checked-in file in a read-only checkout, read by several processes."""
    first = program("a", cache=path)
    restart()
    os.chmod(path, 0o400)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    assert program("a", cache=path, cache_mode="replay-only") == first
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_a_missing_cache_is_an_error_in_replay_only_mode(path: Path) -> None:
    with pytest.raises(errors.JournalError, match="there is no"):
        program("a", cache=path, cache_mode="replay-only")
    assert not path.exists()


@pytest.mark.parametrize("eager", [False, True])
def test_replay_only_without_a_cache_sends_nothing(
    path: Path, restart: Callable[[], None], eager: bool
) -> None:
    """A cache that was forgotten must not cost money; a store is no cache."""
    for store in (None, path):
        with context.set(store=store, cache_mode="replay-only", eager=eager):
            with pytest.raises(errors.ConfigError, match="no cache is named"):
                program("a")
            assert feste.compute(feste.task(abs)(-1)) == (1,)
        restart()
    assert bought == 0


def test_an_answer_of_the_store_serves_no_other_call_from_the_cache(
    path: Path, tmp_path: Path, restart: Callable[[], None]
) -> None:
    """The cache has the same answer; two equal calls of a rewritten program are still two samples."""
    stored = tmp_path / "runs.db"
    text = Prompt("{{ text }}")(text="a")
    first = Counter().chat(text).compute(cache=path, store=stored)
    restart()
    one, other = program("a", "a", cache=path, store=stored)
    assert one == first != other and bought == 2


def test_filtered_and_failed_answers_are_not_cached(
    path: Path, restart: Callable[[], None]
) -> None:
    program("rude", "nice", cache=path)
    restart()
    program("rude", "nice", cache=path)
    assert report().states == {"done": 1, "cached": 1} and bought == 3
    failing = FakeBackend(fail={"bad": errors.InvalidRequest("no")})
    with pytest.raises(errors.RunFailed):
        failing.chat("bad", FakeParams()).compute(cache=path, on_error="stop")
    restart()
    FakeBackend().chat("bad").compute(cache=path)
    assert report().states == {"done": 1}


def test_a_store_beside_a_cache(path: Path, restart: Callable[[], None]) -> None:
    """A cached answer is put into the store, a stored one into the cache; each is shown as its own."""
    stored = path.with_name("runs.db")
    first = program("a", cache=path)
    restart()
    assert program("a", cache=path, store=stored) == first
    assert report().states == {"cached": 1}
    restart()
    assert program("a", store=stored) == first and report().states == {"replayed": 1}
    restart()
    other = path.with_name("other.db")
    assert program("a", store=stored, cache=other) == first
    restart()
    assert program("a", cache=other, cache_mode="replay-only") == first
    assert bought == 1


def test_draws_stay_draws(path: Path, restart: Callable[[], None]) -> None:
    five = program(*"aaaaa", cache=path)
    assert len({*five}) == 5
    restart()
    assert program(*"aaaaa", cache=path) == five
    restart()
    with context.set(eager=True, cache=path):
        assert [Counter().chat("a") for _ in range(5)] == five
    assert bought == 5


def test_one_file_cannot_be_both(path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="same file"):
        program("a", cache=path, store=path)


def test_a_wrong_mode_is_refused(path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="'replay-only'"):
        program("a", cache=path, cache_mode="never")


def test_embeddings_are_cached(path: Path, restart: Callable[[], None]) -> None:
    texts = [f"text {i}" for i in range(10)]
    first = feste.compute([FakeBackend().embed(t) for t in texts], cache=path)
    restart()
    assert feste.compute([FakeBackend().embed(t) for t in texts], cache=path) == first
    assert report().states == {"cached": 10}


def test_an_answer_that_was_taken_is_not_added_again(
    path: Path, restart: Callable[[], None]
) -> None:
    """Else one answer could serve two samples later."""
    first = program("a", cache=path)
    restart()
    with context.set(eager=True, cache=path):
        assert Counter().chat(Prompt("{{ x }}")(x="a")) == first[0]
    restart()
    llm = Counter()
    lazy = feste.compute(llm.chat(Prompt("{{ x }}")(x="a")), cache=path)
    assert lazy == tuple(first) and bought == 1
    restart()
    two = program("a", "a", cache=path)
    assert two[0] == first[0] != two[1] and bought == 2


def test_what_a_store_replays_is_taken_in_the_cache_too(
    path: Path, restart: Callable[[], None]
) -> None:
    """Else the same answer would serve a second draw."""
    stored = path.with_name("runs.db")
    program("a", cache=path)
    restart()
    with context.set(cache=path, store=stored):
        program("a")
        restart()
        three = program("a", "a", "a")
    assert len({*three}) == 3 and bought == 3


@pytest.mark.parametrize(
    "payload",
    [
        {"choices": [{"finish_reason": "content_filter"}]},
        {"choices": [{"finish_reason": "stop"}, {"finish_reason": "CONTENT_FILTER"}]},
        {"candidates": [{"finishReason": "SAFETY"}]},
        {"candidates": [{"finishReason": "RECITATION"}]},
        {"choices": [{"finish_reason": "content_filter: PROHIBITED_CONTENT"}]},
        {"stop_reason": "refusal"},
        {"stopReason": "guardrail_intervened"},
        {"finish_reason": "ERROR_TOXIC"},
        {
            "choices": [
                {"finish_reason": "stop", "message": {"refusal": "I cannot", "content": None}}
            ]
        },
    ],
)
def test_what_a_filter_withheld_is_not_cacheable(payload: Any) -> None:
    from feste.store.answers import is_cacheable

    assert not is_cacheable(payload)
    assert not is_cacheable({"text": "x"}, [Reply("x", finish_reason="content_filter")])


@pytest.mark.parametrize(
    "payload",
    [
        {"choices": [{"finish_reason": "length", "message": {"refusal": None}}]},
        {"data": [{"embedding": [0.1, 0.2]}]},
        {"finish_reason": "COMPLETE", "text": "a refusal is content_filter"},
        {"answers": ["content_filter"]},
        [],
        "content_filter",
        None,
    ],
)
def test_what_is_whole_is_cacheable(payload: Any) -> None:
    from feste.store.answers import is_cacheable

    assert is_cacheable(payload, Reply("x", finish_reason="stop"))


def test_a_cache_that_is_only_read_sees_what_was_added(
    path: Path, restart: Callable[[], None]
) -> None:
    """By the same process, and by others."""
    first = program("a", cache=path)
    restart()
    assert program("a", cache=path, cache_mode="replay-only") == first
    second = program("b", cache=path)
    draw.forget()
    assert program("a", "b", cache=path, cache_mode="replay-only") == [*first, *second]


def test_a_run_that_may_buy_is_not_failed_by_one_that_may_not(path: Path) -> None:
    """Two runs share a node; for one the cache has no answer."""
    program("other", cache=path)
    node = Counter().chat("a")
    outcomes: list[Any] = []

    def run(**settings: Any) -> None:
        try:
            outcomes.append(feste.compute(node, **settings)[0])
        except errors.RunFailed as failed:
            outcomes.append(failed.errors[0])

    for _ in range(50):
        node = Counter().chat("a")
        outcomes.clear()
        threads = [
            threading.Thread(target=run, kwargs={"cache": path, "cache_mode": "replay-only"}),
            threading.Thread(target=run),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert any(isinstance(outcome, Reply) for outcome in outcomes)
        assert not any(
            isinstance(o, errors.FesteError) and not isinstance(o, errors.CacheMiss)
            for o in outcomes
        )


def test_the_mode_holds_for_all_threads(path: Path) -> None:
    program("b", cache=path)
    failed: list[Any] = []

    def run() -> None:
        try:
            Counter().chat("a").compute()
        except errors.RunFailed as error:
            failed.append(error.errors[0])

    with context.set(cache=path, cache_mode="replay-only"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert isinstance(failed[0], errors.CacheMiss) and bought == 1


def test_the_mode_given_to_compute_holds_inside_its_tasks(path: Path) -> None:
    @feste.task
    def inner() -> Any:
        return Counter().chat("a").compute()

    program("b", cache=path)
    with pytest.raises(errors.RunFailed, match="CacheMiss"):
        inner().compute(cache=path, cache_mode="replay-only")
    assert bought == 1


def test_a_run_that_only_reads_goes_on_when_the_cache_is_added_to(
    path: Path, restart: Callable[[], None]
) -> None:
    """Another run of this process that begins meanwhile does not take its journal away."""
    first = program("a", "b", cache=path)
    restart()

    @feste.task
    def meanwhile(x: str) -> str:
        program("new", cache=path, cache_mode="replay")
        program("other", cache=path, cache_mode="replay-only", on_error="return")
        return x

    llm = Counter()
    calls = [llm.chat("a"), llm.chat(meanwhile("b"))]
    assert feste.compute(calls, cache=path, cache_mode="replay-only")[0] == first


def test_a_damaged_answer_in_a_cache_that_is_only_read_costs_itself(path: Path) -> None:
    import sqlite3
    from contextlib import closing

    first = program("a", "b", cache=path)
    feste.store.close()
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("UPDATE answers SET response = response || ' ' WHERE id = 1")
        conn.commit()
    draw.forget()
    values = program("a", "b", cache=path, cache_mode="replay-only", on_error="return")
    assert sorted(isinstance(v, errors.CacheMiss) for v in values) == [False, True]
    assert {v for v in values if isinstance(v, Reply)} < set(first)
