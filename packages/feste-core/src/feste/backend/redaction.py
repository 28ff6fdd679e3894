"""Redact API keys in texts from outside: known ones in any spelling, others by name or by form."""

from __future__ import annotations

import re
from base64 import b64encode
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from feste.backend.secret import Secret

__all__ = ["SHORTEST", "every_spelling", "redact"]

#: The characters of the shortest text that is taken for a key, and not for a word such as "none".
SHORTEST = 8

# --- keys that are known ------------------------------------------------------------------------------

#: What may stand between two characters: the end of a line, of which a repr makes ``\n``, or of a
#: string that is continued in the next one. Nothing of it is tried twice, so no text is slow.
_BREAK = r"""(?:[\s\\"']++(?:(?<=\\)[nrt][\s\\"']*+)*+)?+"""


@lru_cache(maxsize=64)
def every_spelling(key: str) -> re.Pattern[str]:
    """Return a pattern that finds a key as it is, as in JSON, URLs and reprs, in base64 and in hex.

    A line may end in the middle of it, and the text too, if what is left has eight characters. The
    time is at most proportional to the lengths of text and key, whoever has chosen the text.

    :param key: the key.

    >>> every_spelling("canary/01").sub("***", "?a=canary%2F01 or 'canary\\\\n/01'")
    "?a=*** or '***'"
    """
    first, *rest = list(re.sub(r"\\+", r"\\", key))
    found = [_first(first) + "".join(map(_spelled, rest)), *map(re.escape, _coded(key))]
    within = re.sub(r"""[\s\\"']""", "", key)
    if len(within) >= SHORTEST:
        start = r"(?<!\\)" if within[0] in "nrt" else ""  # else each end of a line would begin it
        found.append(start + _first(within[0]) + "".join(map(_continued, within[1:])))
    if len(key) > SHORTEST:
        begun = ""
        for char in reversed(rest[SHORTEST - 1 : -1]):
            begun = f"(?:{_spelled(char)}{begun})?+"
        cut = _first(first) + "".join(map(_spelled, rest[: SHORTEST - 1]))
        found.append(cut + begun + r"[.…]{0,3}\Z")
    return re.compile("|".join(found))


def _first(char: str) -> str:
    """Return a pattern of the first character; a run of backslashes before it is read only once."""
    spelled = _spelled(char)
    return spelled if spelled == char else rf"(?<!\\){spelled}"


def _spelled(char: str) -> str:
    """Return a pattern of one character, which JSON and URLs may have escaped."""
    if char.isalnum() and char.isascii():
        return char  # is escaped by nothing, and so finding a key is fast
    if char == "\\":
        return r"(?i:\\++(?:u005c)?+|%5c)"
    in_url = "".join(f"%{byte:02x}" for byte in char.encode(errors="surrogatepass"))
    return rf"\\*+(?:{re.escape(char)}|(?i:{in_url}|(?<=\\)u{ord(char):04x}))"


def _continued(char: str) -> str:
    """Return a pattern of one character, which may stand in the next line or string."""
    spelled = _spelled(char)
    return rf"""{_BREAK}(?:b[\\"']++(?={spelled}))?+{spelled}"""


def _coded(key: str) -> set[str]:
    """Return the key in hex and what base64 makes of it, wherever it begins in what is encoded."""
    found = {key.encode(errors="surrogatepass").hex()}
    for before in range(3):
        data = b"\0" * before + key.encode(errors="surrogatepass")
        text = b64encode(data).decode()[(0, 2, 3)[before] : len(data) * 8 // 6]
        if len(text) >= SHORTEST:
            found |= {text, text.translate({43: 45, 47: 95})}  # as it is, and as in URLs
    return found


# --- keys that are not --------------------------------------------------------------------------------

#: What joins a name to its value: in headers, URLs, JSON, JSON inside of JSON, and reprs of pairs.
_JOINED = (
    r"""(?:\\*["']?\s*(?:[=:]|%3[ad]|=>)\s*b?\\*["']?"""
    r"""|\\*["']\s*,\s*(?:["']value["']\s*:\s*)?b?\\*["'])"""
)
_NAMES = (
    r"(?:api[-_ ]?key|(?:access|secret|subscription|private)[-_]?key|token|secret|passw(?:or)?d|pwd"
    r"|cookie)"
)
_KEYS = re.compile(
    # its place, and perhaps the scheme before it
    rf"(?i)(?P<place>authorization{_JOINED}(?P<scheme>(?:bearer|basic|token)\s+)?"
    rf"|bearer(?:\s+|%20|\+)|(?P<name>{_NAMES}){_JOINED}|[?&](?:key|sig|auth)=)"
    r"""(?P<value>[^\s"'&,;<>{}\\]{6,})"""
    r"|(?P<user>://[^\s/@:]*:)[^\s/@]+(?=@)"
    # its form
    r"|\b(?:sk|pk|rk)[-_](?P<own>[\w*-]{8,})"
    r"|\b(?:key|co|gsk|xai|pplx|hf|r8|gh[pousr]|github_pat|glpat)[-_](?P<run>[a-z0-9]{12,})\w*"
    r"|(?<![\w-])(?:aiza[\w-]{30,}|eyj[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
#: Words, also joined ones such as ``os.environ``, or what is called or looked up.
_WORDS = re.compile(r"[A-Za-z_.]+[0-9]?(?:[(\[].*)?[.:)\]]*")
#: The longest word that is no key.
_LONGEST = 24


def _redacted(found: re.Match[str]) -> str:
    """Return what takes the place of a candidate: itself, if it is ordinary text."""
    value, run = found["value"], found["run"] or ""
    if value is not None:
        certain = found["scheme"] is not None
        is_key = certain or len(value) > _LONGEST or _WORDS.fullmatch(value) is None
        return found["place"] + "***" if is_key else found[0]
    if found["own"] is not None:
        run = max(re.split("[-_]", found["own"]), key=len)
        is_key = (len(run) >= 10 and any(map(str.isdigit, run))) or "**" in run or len(run) >= 32
        return "***" if is_key else found[0]
    if run and not any(map(str.isdigit, run)):
        return found[0]
    return (found["user"] or "") + "***"


def redact(text: str, *secrets: Secret | None, limit: int = 500) -> str:
    """Redact API keys in a text from outside and limit its length.

    :param text: the text of a provider or an SDK.
    :param secrets: keys to redact in addition to those found by their name or form.
    :param limit: the maximum number of characters.

    >>> redact("Incorrect API key provided: sk-proj-1234567890")
    'Incorrect API key provided: ***'
    >>> redact("curl -H 'x-api-key: 0123456789' gives max_tokens: 5")
    "curl -H 'x-api-key: ***' gives max_tokens: 5"
    """
    for secret in secrets:
        if secret is not None:
            text = secret.blank(text, SHORTEST)
    text = _KEYS.sub(_redacted, text)
    return text if len(text) <= limit else text[: limit - 3] + "..."
