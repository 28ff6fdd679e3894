"""Keys in texts from outside are redacted, whatever the spelling; ordinary text stays as it is."""

from __future__ import annotations

import itertools
import json
import logging
import sys
import threading
import time
from base64 import b64encode, urlsafe_b64encode
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest

import feste
from feste.backend import Backend, Secret, operation, redact, redact_record
from feste.testing import FakeBackend

#: Of no known form, so that its place gives it away, or that it is known.
KEY = "7fQz3+Wk9vB2xR8/Lm4Tt6HjP1sDgN5cX0eUa"
WORD = "7fQz3Wk9vB2xR8Lm4Tt6HjP1sDgN5cX0eUa"

BY_PLACE = [
    f"Authorization: Bearer {KEY}",
    f"authorization: bearer {KEY}",
    f"AUTHORIZATION: BEARER {KEY}",
    f"Proxy-Authorization: Basic {b64encode(KEY.encode()).decode()}",
    f"Authorization: {KEY}",
    f"x-api-key: {KEY}",
    f"X-Api-Key:{KEY}",
    f"api-key: {KEY}",
    f"Ocp-Apim-Subscription-Key: {KEY}",
    f"x-goog-api-key: {KEY}",
    f"curl -H 'Authorization: Bearer {KEY}' https://x.com",
    f"the bearer {KEY} is unknown",
    f"OPENAI_API_KEY={KEY}",
    f'export CO_API_KEY="{KEY}"',
    f"api_key='{KEY}'",
    f"OpenAI(api_key='{KEY}', model='m')",
    f"password: {KEY}",
    f"client_secret={KEY}&x=1",
    f"https://x.com/v1?api_key={quote(KEY)}&n=1",
    f"https://x.com/v1?key={WORD}",
    f"https://x.com/v1?n=1&access_token={WORD}#top",
    f"https://x.com/v1?{urlencode({'token': KEY})}",
    f"https%3A%2F%2Fx.com%3Fapi_key%3D{WORD}",
    f"https://user:{WORD}@x.com/v1",
    json.dumps({"api_key": KEY}),
    json.dumps({"headers": {"Authorization": f"Bearer {KEY}"}}),
    json.dumps(json.dumps({"api_key": KEY})),
    json.dumps({"name": "x-api-key", "value": KEY}),
    repr({"x-api-key": KEY}),
    repr({b"authorization": f"Bearer {KEY}".encode()}),
    repr([(b"Authorization", f"Bearer {KEY}".encode())]),
    repr([("x-api-key", KEY)]),
    repr(f"token={KEY}".encode()),
    f"{{api_key => {KEY}}}",
    f"Cookie: {WORD}",
    "Incorrect API key provided: sk-proj-" + WORD,
    "sk-ant-api03-" + WORD,
    "Incorrect API key provided: sk-proj-*****************5cX0.",
    "gsk_" + WORD,
    "AIza" + WORD,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0." + WORD,  # pragma: allowlist secret
    "ghp_" + WORD,
]

BY_KEY = [
    KEY,
    f"<p>{KEY}</p>",
    quote(KEY, safe=""),
    json.dumps(KEY),
    json.dumps(KEY).replace("/", "\\/"),
    json.dumps(json.dumps(KEY).replace("/", "\\/")),
    KEY.replace("+", "\\u002b"),
    repr(KEY.encode()),
    f"{KEY[:9]}\n{KEY[9:]}",
    f"{KEY[:9]}\r\n    {KEY[9:]}",
    f"{KEY[:9]}\\n{KEY[9:]}",
    f"'{KEY[:9]}'\n '{KEY[9:]}'",
    f"(b'{KEY[:9]}'\n b'{KEY[9:]}')",
    " ".join(KEY),
    KEY.encode().hex(),
    urlsafe_b64encode(KEY.encode()).decode(),
    *(b64encode(b"x" * i + KEY.encode() + b":").decode() for i in range(3)),
    f"cut off: {KEY[:20]}",
    f"cut off: {KEY[:-1]}...",
]


def shown(text: str, key: str = KEY, run: int = 8) -> list[str]:
    """The pieces of a key that a text shows."""
    return [key[i : i + run] for i in range(len(key) - run + 1) if key[i : i + run] in text]


@pytest.mark.parametrize("text", BY_PLACE)
def test_a_key_is_known_by_its_place_or_form(text: str) -> None:
    """Nobody told which key it is."""
    found = redact(text)

    assert "***" in found
    assert shown(found) == shown(found, WORD) == shown(found, quote(KEY, safe="")) == []
    assert len(BY_PLACE) + len(BY_KEY) >= 60


@pytest.mark.parametrize("text", BY_KEY)
def test_a_key_that_is_known_is_found_in_any_spelling(text: str) -> None:
    """Encoded, escaped, split over lines, or cut off by the end of the text."""
    found = redact(f"before {text}", Secret.of(KEY, "X"))

    assert "***" in found and found.startswith("before ")
    codes = [KEY.encode().hex(), *(b64encode(b"x" * i + KEY.encode()).decode() for i in range(3))]
    assert shown(found) == [] and not any(shown(found, code[4:-4]) for code in codes)


_SUBJECTS = """the key-value store|a co-operative tokenizer|the sk-learn pipeline|key-performance
the secret of the model|a password field|the token bucket|the bearer of news|an api_key argument
the author of page 12|the risk-based ranking|rk-means|pk-column""".replace("\n", "|").split("|")
_VERBS = "counts|needs|returns|is slower than|was renamed to|has no".split("|")
_OBJECTS = """token: 5|max_tokens: 4096|"total_tokens": 123456, "prompt_tokens": 98765|password: required
api_key=Secret('MY_KEY')|token = tokenizer.encode(text)|key=lambda pair: pair[0]|secret=os.environ["NAME"]
/home/ann/key-files/sk-learn-contrib/model.bin|model="command-r-plus-08-2024"|gpt-4o-mini-2024-07-18
https://example.com:8080/docs/token?page=2&sort=key|Authorization is needed|token: string
password = getpass.getpass()|co-authored-by 3 people|the bearer certificates|give api_key=
2026-11-28T12:31:07Z INFO 3 requests|{"role": "user", "content": "Hello"}|secret: nobody knows"""
ORDINARY = [
    " ".join(parts)
    for parts in itertools.product(_SUBJECTS, _VERBS, _OBJECTS.replace("\n", "|").split("|"))
]


def test_ordinary_text_stays() -> None:
    """Words about keys, code, paths, models and counts of tokens are no keys."""
    known = [Secret.of(KEY, "X"), Secret.of("none", "Y")]

    assert len(set(ORDINARY)) >= 1000
    assert [text for text in ORDINARY if redact(text, *known) != text] == []


def test_what_takes_long_to_match_does_not() -> None:
    """A provider chooses the text, so no text is slow."""
    key = Secret.of(KEY, "X")
    hostile = ["sk-", "eyJ-", "://a:", "token", "7\n", "'", "bearer ", "AIza-", "\\", "a.", "key-a"]

    for piece in hostile:
        assert len(redact(piece * (64_000 // len(piece)), key)) <= 500


#: What stands between two characters of a key that is broken, and what looks like it.
GAPS = [
    "\\",
    "\n",
    "\\n",
    "\\\\n",
    "\\" * 10 + "n",
    "\\t",
    "'",
    "b'",
    '"\\n"',
    "'\n b'",
    " ",
    "\\u",
    "%",
]
#: Keys of all kinds: as providers make them, ones whose first character is also one of a gap, ones
#: that repeat, and ones in quotes.
KEYS = [KEY, f"sk-proj-{WORD}", f"nvapi-{WORD}", f"tgp_v1_{WORD}", f"r8_{WORD}", f"b{WORD}"]
KEYS += [f"+{KEY}", "a" * 40, "n" * 40, "nt" * 20, "+" * 40, "a" * 30 + "b", "\\a" * 20, f"'{KEY}'"]


def hostile(key: str, gap: str) -> list[str]:
    """Texts that look like a key for long, and are none."""
    broken = gap.join(key[:-1])
    one = key[0] + gap
    return [
        key[0] + gap * (60_000 // len(gap)),
        broken + "#",
        (broken + gap) * (60_000 // len(broken + gap)),
        one * (60_000 // len(one)),
        f"{gap * 100}".join(key[:-1])[:60_000],
        key[0] * 60_000,
    ]


@pytest.mark.parametrize("key", KEYS)
def test_no_text_takes_long_to_search_for_a_key(key: str) -> None:
    """The time is proportional to the length, however often a key seems to begin or to be broken."""
    secret, begun = Secret.of(key, "X"), time.process_time()
    for gap in GAPS:
        for text in hostile(key, gap):
            secret.blank(text)

    assert time.process_time() - begun < 10  # it takes 0.3 s, and 2 s for keys that repeat


def test_a_stored_answer_takes_no_long_search(tmp_path: Path) -> None:
    """What a provider answers is searched for the key before it is kept."""
    key = f"sk-proj-{WORD}"
    answers = ["s" + "\\" * 60_000, ("\\" * 10 + "n").join(key[:-1]) + "#", "a " + "\\n".join(key)]

    class Answering(Backend):
        plugin = "of_these_tests"
        secrets = (Secret.of(key, "X"),)

        @operation
        async def ask(self, number: int) -> str:
            return answers[number]

    llm, begun = Answering(), time.process_time()
    values = feste.compute([llm.ask(i) for i in range(len(answers))], store=tmp_path / "store")[0]

    assert time.process_time() - begun < 10
    assert values == answers
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"***" in kept and b"5cX0" not in kept


@pytest.mark.parametrize("key", [f"{KEY}b", f"b{KEY}", f"nb{KEY}", f'"{KEY}"', f"a\\n'{KEY}\\"])
def test_keys_of_characters_that_stand_in_gaps_are_found(key: str) -> None:
    """A ``b``, quotes and backslashes of a key are not taken for those of the strings around it."""
    broken = [
        f"'{key[:3]}'\n '{key[3:]}'",
        f"(b'{key[:-1]}'\n b'{key[-1]}')",
        f"{key[:9]}\n{key[9:]}",
    ]
    whole = [key, repr(key), json.dumps(key), quote(key, safe="")]
    for text in whole + broken * (not set(key) & set("'\"\\")):
        found = Secret.of(key, "X").blank(f"before {text}, after")
        assert "***" in found and shown(found) == [], text


def test_lines_of_logs_have_no_key(caplog: pytest.LogCaptureFixture) -> None:
    """Feste's own loggers redact what providers put into names, and those of any plugin may."""
    llm = FakeBackend(f"model {KEY}")
    secret = Secret.of(KEY, "X")
    other = logging.getLogger("feste.backend.of_these_tests")
    other.addFilter(redact_record)
    with caplog.at_level(logging.DEBUG, "feste"):
        llm.chat("Hello").compute()
        other.debug("sent %s to %d", f"x-api-key: {WORD}", 5)

    assert caplog.messages[-1] == "sent x-api-key: *** to 5"
    assert any("model ***" in line for line in caplog.messages)
    assert shown("".join(caplog.messages)) == [] and secret.is_literal


def test_no_line_of_a_log_raises() -> None:
    """A request that is paid for does not fail for a line that somebody logs meanwhile."""
    kept: list[Secret] = []

    line = logging.LogRecord("x", logging.INFO, "f", 1, "%d of %s", ("none",), None)
    stop = threading.Event()

    def make() -> None:
        while not stop.is_set():
            kept.append(Secret.of(KEY, "X"))
            if len(kept) > 500:
                kept.clear()

    assert redact_record(line) and line.msg == "%d of %s"
    maker, interval = threading.Thread(target=make), sys.getswitchinterval()
    maker.start()
    sys.setswitchinterval(1e-5)  # threads take turns within a line
    try:
        for _ in range(1000):
            redact_record(logging.LogRecord("x", logging.INFO, "f", 1, "sent", (), None))
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        maker.join()


def test_prompts_are_in_no_log(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Whatever runs, with a store and a cache, prompts and answers are in no line of Feste."""
    llm = FakeBackend()
    with caplog.at_level(logging.DEBUG, "feste"):
        with feste.context.set(store=str(tmp_path / "a.db"), cache=str(tmp_path / "b.db")):
            first = llm.chat("MARKED PROMPT")
            feste.compute(first, llm.chat(first), [llm.embed("MARKED PROMPT") for _ in range(3)])
            "".join(feste.stream(llm.chat("MARKED PROMPT again")))
        feste.store.close()

    lines = "".join(str(vars(r)) for r in caplog.records if r.name.startswith("feste"))
    assert " of fake.embed" in lines and "MARKED" not in lines
    assert first.compute() not in lines
