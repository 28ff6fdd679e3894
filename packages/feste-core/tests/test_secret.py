"""API keys: known by name, resolved where the call is made, shown nowhere."""

from __future__ import annotations

import copy
import pickle
import traceback
from typing import Any

import pytest

from feste.backend import Secret, redact
from feste.errors import ConfigError, MissingKey

KEY = "sk-proj-0123456789abcdef"
NAME = "A_KEY_OF_THESE_TESTS"


def test_a_secret_knows_its_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is read when the key is needed, and again the next time."""
    secret = Secret(NAME)
    monkeypatch.setenv(NAME, KEY)
    first = secret.reveal()
    monkeypatch.setenv(NAME, "sk-another-9876543210")

    assert (first, secret.reveal()) == (KEY, "sk-another-9876543210")
    assert (secret.is_set, secret.is_literal) == (True, False)
    assert KEY not in repr(vars(type(secret)))


@pytest.mark.parametrize("value", [None, ""])
def test_a_missing_key_names_the_variable(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not set and empty are the same; the message says what to do."""
    monkeypatch.delenv(NAME, raising=False)
    if value is not None:
        monkeypatch.setenv(NAME, value)

    assert Secret(NAME).is_set is False
    with pytest.raises(MissingKey, match=f"{NAME} is not set. Set it, or give api_key="):
        Secret(NAME).reveal()


BAD = ["sk-with space", "sk-line\n", "sk-zürich", "Bearer sk-0123456789\r\n"]


@pytest.mark.parametrize("key", BAD)
def test_a_key_that_cannot_be_sent_shows_in_no_frame(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused as such, and a traceback that prints all variables does not print it."""
    monkeypatch.setenv(NAME, key)
    for secret, where in ((Secret(NAME), NAME), (Secret.of(key, "OTHER"), "api_key")):
        for ask in (secret.check, secret.reveal):
            with pytest.raises(ConfigError, match=f"key in {where} holds a space") as caught:
                ask()

            assert caught.tb is not None and caught.tb.tb_next is not None
            frames = traceback.TracebackException(
                type(caught.value), caught.value, caught.tb.tb_next, capture_locals=True
            )
            shown = "".join(frames.format())
            assert "self = Secret" in shown
            assert key not in shown and repr(key) not in shown
        assert secret.blank(f"<{key}>") == "<***>"


@pytest.mark.parametrize("key", [5, b"sk-0123", ["sk-0123"]])
def test_a_key_is_a_text_or_a_secret(key: Any) -> None:
    """Anything else is refused by type, without being shown."""
    with pytest.raises(ConfigError, match="must be a str or a Secret, not") as caught:
        Secret.of(key, NAME)

    assert "0123" not in str(caught.value)


def test_a_literal_key_is_held_but_never_shown() -> None:
    """A key given as text works, and shows in no form of the object."""
    secret = Secret.of(KEY, NAME)
    shown = [
        repr(secret),
        str(secret),
        f"{secret}",
        f"{[secret]}",
        f"{secret!a}",
        f"{hash(secret)}",
    ]

    assert (secret.reveal(), secret.is_literal, secret.is_set) == (KEY, True, True)
    assert [text for text in shown if KEY in text] == []
    assert repr(secret) == "Secret(<literal>)"


@pytest.mark.parametrize("leave", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_literal_key_does_not_leave(leave: Any) -> None:
    """Pickling a literal key is refused, with the fix, and without the key in the traceback."""
    with pytest.raises(ConfigError, match=r"api_key=Secret\('MY_KEY'\)") as caught:
        leave(
            {"api_key": [Secret.of(KEY, NAME)]} if leave is not copy.copy else Secret.of(KEY, NAME)
        )

    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_a_named_key_pickles_without_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """What travels is the name."""
    monkeypatch.setenv(NAME, KEY)
    data = pickle.dumps(Secret(NAME))

    assert KEY.encode() not in data
    assert pickle.loads(data) == Secret(NAME)


@pytest.mark.parametrize("key", [KEY, "my key", "", "1KEY", "KEY=1", "a.b"])
def test_a_key_in_the_place_of_a_name_is_refused_unseen(key: str) -> None:
    """``Secret("sk-...")`` is a likely mistake: it must not be printed as a name ever after."""
    with pytest.raises(ConfigError, match="takes the name of an environment variable") as caught:
        Secret(key)

    assert not key or key not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "literal", "name"),
    [
        (KEY, True, "DEFAULT"),
        (None, False, "DEFAULT"),
        ("", False, "DEFAULT"),
        (Secret("OTHER"), False, "OTHER"),
    ],
)
def test_what_constructors_are_given(given: Any, literal: bool, name: str) -> None:
    """Text is the key, a Secret its name, None the provider's usual name."""
    secret = Secret.of(given, "DEFAULT")

    assert (secret.is_literal, secret.name) == (literal, name)


def test_secrets_compare_by_name_and_key() -> None:
    """Clients with different keys are different."""
    assert Secret("A") == Secret("A") != Secret("B")
    assert Secret.of("x", "A") == Secret.of("x", "A") != Secret.of("y", "A")
    assert Secret.of("x", "A") != Secret("A")
    assert hash(Secret.of("x", "A")) == hash(Secret("A"))
    assert Secret("A") != "A"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Incorrect API key provided: sk-proj-1234567890.", "Incorrect API key provided: ***."),
        ("Authorization: Bearer abc.def-ghi_123", "Authorization: Bearer ***"),
        ("'api_key': 'hunter2hunter2'", "'api_key': '***'"),
        ("https://x/?token=abcdef123456&n=1", "https://x/?token=***&n=1"),
        ("password=correct-horse", "password=***"),
        ("co-1234567890abcdef was refused", "*** was refused"),
        ("nothing to hide", "nothing to hide"),
        ("max_tokens: 5 is too small", "max_tokens: 5 is too small"),
    ],
)
def test_redact_blanks_what_looks_like_a_key(text: str, shown: str) -> None:
    """Keys in text from outside are blanked, the rest stays readable."""
    assert redact(text) == shown


def test_redact_blanks_given_keys_whatever_they_look_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key of an unusual form is known, so it is found; None and unset ones are no obstacle."""
    monkeypatch.setenv(NAME, "plain words")
    secrets = [Secret(NAME), Secret("NOT_SET_AT_ALL"), None, Secret.of("zürichsee", "X")]

    assert redact("these plain words from zürichsee", *secrets) == "these *** from ***"


def test_a_word_that_a_local_server_takes_for_a_key_stays_readable() -> None:
    """Else an error would have holes wherever that word, or letter, occurs."""
    text = "none of the validators ask ollama for x"

    assert redact(text, *(Secret.of(key, "X") for key in ("none", "ollama", "x"))) == text


def test_redact_bounds_the_length() -> None:
    """Text from outside is cut; keys are blanked before the cut, so none is cut in two."""
    long = "x" * 480 + " " + KEY + " " + "y" * 100
    found = redact(long)

    assert len(found) == 500
    assert "sk-" not in found
    assert redact("a" * 500) == "a" * 500
    assert redact("a" * 501) == "a" * 497 + "..."
