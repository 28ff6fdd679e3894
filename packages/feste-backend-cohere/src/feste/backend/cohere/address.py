"""Check and normalize the URL of the API, so that it is safe to send a key there."""

from __future__ import annotations

import ipaddress
from urllib.parse import SplitResult, urlsplit

from feste.errors import ConfigError

__all__ = ["is_local", "normal"]


def normal(url: str) -> str:
    """Check a base URL and normalize it: lower-case names, no trailing slash.

    Errors do not show the URL, since it may contain a password or a key.

    :param url: the URL.
    :raises ConfigError: if it is not a URL, contains a password, or would expose the key.

    >>> normal("https://API.cohere.com/v1/"), normal("http://localhost:8000/cohere/")
    ('https://api.cohere.com', 'http://localhost:8000/cohere')
    """
    if not isinstance(url, str):
        raise ConfigError(f"base_url must be a str, not {type(url).__name__}")
    if "@" in url:
        raise ConfigError("base_url must not hold a name or password; give api_key=")
    parts = _split(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("base_url is no URL of an API; it looks like https://api.cohere.com")
    if parts.query or parts.fragment:
        raise ConfigError(
            "base_url must end with its path: a query or fragment is not sent; give api_key="
        )
    if parts.scheme == "http" and not is_local(url):
        raise ConfigError(
            f"base_url must be https except on this machine: http:// would send key and prompts to "
            f"{parts.hostname} in the clear"
        )
    path = parts.path.rstrip("/")
    if parts.hostname.endswith((".cohere.com", ".cohere.ai")) and path in ("/v1", "/v2"):
        path = ""  # older versions of the SDK required the version here
    return f"{parts.scheme}://{parts.netloc.lower()}{path}"


def is_local(url: str) -> bool:
    """Return whether a URL names this machine, judged by its text.

    :param url: the URL.

    >>> is_local("http://127.0.0.1:8000"), is_local("http://[::1]/"), is_local("https://x.com")
    (True, True, False)
    """
    host = _split(url.strip()).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises if it is no number
        return parts
    except ValueError:
        raise ConfigError("base_url is no URL; it looks like https://api.cohere.com") from None
