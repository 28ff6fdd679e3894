"""Where a backend may send keys and prompts: the rules for addresses, the same for all backends.

A name that leads to a forbidden address is not looked up: `https` needs a certificate for the name,
which services at such addresses do not have.
"""

from __future__ import annotations

import ipaddress
import re
import urllib.request
from typing import Final
from urllib.parse import urlsplit

from feste.errors import ConfigError
from feste.wording import a_kind

__all__ = ["is_local", "proxy_for", "server_url"]

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
#: One label of a host; underscores occur in names of private networks.
_LABEL: Final = r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?"
_LONGEST_LABEL: Final = 63
_HOST: Final = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
#: What resolvers take for IPv4 in an older spelling: 127.1, 0x7f000001, 2130706433.
_NUMBER: Final = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
_CONTROL: Final = re.compile(r"[\x00-\x20\x7f\\]")

#: Services that hand out credentials of a cloud machine to whoever asks from it.
_METADATA_NAMES: Final = frozenset(
    ("metadata", "metadata.google.internal", "metadata.goog", "metadata.azure.internal")
    + ("metadata.tencentyun.com", "instance-data", "instance-data.ec2.internal")
)
_METADATA: Final = frozenset(
    ipaddress.ip_address(one)
    for one in ("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd20:ce::254")
)
_EC2: Final = ipaddress.ip_network("fd00:ec2::/32")
#: Addresses of IPv6 that end in one of IPv4: of NAT64, translated, and in an older form.
_ENDING: Final = tuple(
    ipaddress.IPv6Network(one)
    for one in ("64:ff9b::/96", "64:ff9b:1::/48", "::ffff:0:0:0/96", "::/96")
)

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def server_url(url: object, name: str = "base_url") -> str:
    """Check the address of a server and return its only spelling.

    It is ``https``, or ``http`` on this machine; it holds no name, password, query or fragment; and
    it is not one at which clouds hand out credentials. The spelling has a lower-case host without a
    dot at its end, no default port and no slash at its end. Errors do not show the URL, which may
    hold a password.

    :param url: the URL, from code or configuration, never from an answer or a record.
    :param name: the name of the parameter, for the errors.
    :raises ConfigError: if it is not a URL, or not a safe one.

    >>> server_url("HTTPS://API.OpenAI.com.:443/v1/")
    'https://api.openai.com/v1'
    """
    if not isinstance(url, str):
        raise ConfigError(f"{name} must be a str, not {a_kind(url)}")
    url = url.strip()
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        if _CONTROL.search(url) or port == 0 or ("[" in url and ":" not in host):
            raise ValueError  # urlsplit overlooks some of these, and other programs do not
    except ValueError:
        raise ConfigError(f"{name} is no URL; it looks like https://host/v1") from None
    if parts.scheme not in _DEFAULT_PORTS or not host:
        raise ConfigError(
            f"{name} must begin with https:// (or http:// on this machine) and a host"
        )
    if "@" in parts.netloc:
        raise ConfigError(f"{name} must not hold a name or password; give the key as api_key=")
    if "?" in url or "#" in url:
        raise ConfigError(f"{name} must end with its path; a query or fragment is not sent")
    host = _host(host, name)
    if parts.scheme == "http" and not _is_loopback(host):
        raise ConfigError(
            f"{name}: http:// would send key and prompts to {host} in the clear. Use https://, "
            "or a tunnel to this machine: ssh -L 8000:localhost:8000 ..., then "
            f"{name}='http://127.0.0.1:8000/v1'"
        )
    shown = f"[{host}]" if ":" in host else host
    if port is not None and port != _DEFAULT_PORTS[parts.scheme]:
        shown = f"{shown}:{port}"
    return f"{parts.scheme}://{shown}{parts.path.rstrip('/')}"


def _host(host: str, name: str) -> str:
    """Check a host and return its only spelling."""
    if not host.isascii():  # programs do not agree on what it becomes: straße or strasse
        raise ConfigError(
            f"{name}: its host is not ASCII; write it as the DNS has it: xn--bcher-kva.example for "
            "bücher.example"
        )
    if ":" not in host:
        host = host.removesuffix(".")
        if not _HOST.fullmatch(host) or max(map(len, host.split("."))) > _LONGEST_LABEL:
            raise ConfigError(f"{name} is no URL: its host is no name of a machine")
    address = _address(host)
    if address is None and (":" in host or _NUMBER.fullmatch(host)):
        raise ConfigError(
            f"{name}: {host} is no address as programs agree on them; write IPv4 as four plain "
            "decimal numbers, such as 127.0.0.1, and IPv6 without a zone"
        )
    if address is not None and address.is_unspecified:
        raise ConfigError(
            f"{name}: {host} stands for all addresses of a machine; write 127.0.0.1 for this one"
        )
    if host in _METADATA_NAMES or (address is not None and any(map(_forbidden, _inner(address)))):
        raise ConfigError(
            f"{name}: {host} is no address of a server of models, but one at which clouds and "
            "networks serve the machines themselves, so no key or prompt is sent there"
        )
    return host if address is None else str(address)


def _address(host: str) -> _Address | None:
    try:
        return None if "%" in host else ipaddress.ip_address(host)
    except ValueError:
        return None


def _inner(address: _Address) -> list[_Address]:
    """Return an address, and those of IPv4 which it stands for."""
    found: list[_Address] = [address]
    if isinstance(address, ipaddress.IPv6Address):
        inside = (address.ipv4_mapped, address.sixtofour, *(address.teredo or ()))
        found += [one for one in inside if one is not None]
        if any(address in network for network in _ENDING):
            found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return found


def _forbidden(address: _Address) -> bool:
    return (
        address.is_link_local
        or address.is_multicast
        or address in _METADATA
        or address in _EC2
        or (isinstance(address, ipaddress.IPv6Address) and address.is_site_local)
        or str(address) == "255.255.255.255"
    )


def is_local(url: str) -> bool:
    """Return whether a URL names this machine, judged by its text.

    :param url: the URL, as :func:`server_url` returns it.

    >>> is_local("http://127.0.0.1:8000"), is_local("http://[::1]/"), is_local("https://x.com")
    (True, True, False)
    """
    return _is_loopback(urlsplit(url).hostname or "")


def _is_loopback(host: str) -> bool:
    if host == "localhost":  # names below it are asked for at the DNS by some systems
        return True
    address = _address(host)
    return address is not None and address.is_loopback


def proxy_for(url: str) -> str | None:
    """Return the proxy that the environment names for a server: its host and port; None without.

    Feste's own backends send through it what does not go to this machine.

    :param url: the URL of the server.

    >>> proxy_for("http://127.0.0.1:8000") is None
    True
    """
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    given = proxies.get(parts.scheme) or proxies.get("all")
    if not given or not parts.netloc or is_local(url) or urllib.request.proxy_bypass(parts.netloc):
        return None
    try:
        proxy = urlsplit(given if "://" in given else f"http://{given}")
        host, port = proxy.hostname or "?", proxy.port
    except ValueError:
        return "?"
    return f"{host}:{port}" if port else host
