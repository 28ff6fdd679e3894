"""Check and normalize the URL of a server."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from feste.errors import ConfigError

__all__ = ["is_loopback", "normal_url"]

_DEFAULT_PORTS = {"http": 80, "https": 443}


def normal_url(url: str) -> str:
    """Check a base URL and normalize it: lower-case host, no default port, no trailing slash.

    Plain ``http`` is allowed for this machine only, because it exposes key and prompts to the
    network. Errors do not show the URL, since it may contain a password.

    :param url: the base URL.
    :raises ConfigError: if it is not a URL, or not a safe one.

    >>> normal_url("HTTPS://API.OpenAI.com:443/v1/")
    'https://api.openai.com/v1'
    """
    if not isinstance(url, str):
        raise ConfigError(f"base_url must be a str, not {type(url).__name__}")
    try:
        parts = urlsplit(url.strip())
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:
        raise ConfigError("base_url is no URL; it looks like https://host/v1") from None
    if scheme not in _DEFAULT_PORTS or not host:
        raise ConfigError(
            "base_url must begin with https:// (or http:// on this machine) and a host"
        )
    if "@" in parts.netloc:
        raise ConfigError("base_url must not hold a name or password; give the key as api_key=")
    if parts.query or parts.fragment:
        raise ConfigError("base_url must end with its path; a query or fragment is not sent")
    if scheme == "http" and not is_loopback(host):
        raise ConfigError(
            f"base_url: http:// would send key and prompts to {host} in the clear. Use https://, "
            "or a tunnel to this machine: ssh -L 8000:localhost:8000 ..., then "
            "base_url='http://127.0.0.1:8000/v1'"
        )
    shown = f"[{host}]" if ":" in host else host
    if port is not None and port != _DEFAULT_PORTS[scheme]:
        shown = f"{shown}:{port}"
    return f"{scheme}://{shown}{parts.path.rstrip('/')}"


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine.

    :param host: the host of a URL, in lower case.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("example.com")
    (True, True, False)
    """
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
