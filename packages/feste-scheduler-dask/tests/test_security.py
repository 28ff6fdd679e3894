"""Whoever can read or join a connection of Dask can run code: it is TLS, or does not leave the machine."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import distributed
import psutil
import pytest

import feste
from feste.errors import ConfigError, UnknownName
from feste.scheduler import Reporter
from feste.scheduler.dask import DaskExecutor
from feste.scheduler.dask._hooks import feste_settings
from feste.scheduler.dask.cluster.link import check_target
from feste.testing import FakeBackend

QUIET: dict[str, Any] = {
    "dashboard_address": "127.0.0.1:0",
    "silence_logs": logging.CRITICAL,
    "scheduler_kwargs": {"dashboard": False},
}


def where() -> Any:
    """A node of a task that tells in which process it runs."""

    @feste.task
    def where_am_i(x: int) -> int:
        return os.getpid()

    return where_am_i(1)


# --- addresses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    """tcp://10.1.2.3:8786 tcp://scheduler.example:8786 tcp://[fe80::1]:8786 tcp://0.0.0.0:8786 tcp://:8786
    tcp://localhost.example:8786 tcp://127.0.0.1@example:8786 tcp://[::]:8786 ws://127.0.0.2.example:1
    ucx://10.1.2.3:8786 10.1.2.3:8786 tcp://128.0.0.1:8786""".split(),
)
def test_the_network_needs_tls(address: str) -> None:
    """An address on the network without encryption is refused, with what to do, before anything connects."""
    with pytest.raises(ConfigError, match=r"TLS .*tls://.* allow_insecure=True"):
        check_target(address)
    check_target(address, allow_insecure=True)


@pytest.mark.parametrize(
    "address",
    "tcp://127.0.0.1:1 tcp://[::1]:1 tcp://localhost:1 tls://example:1 wss://example:1".split(),
)
def test_this_machine_and_tls_are_safe(address: str) -> None:
    """Addresses of this machine, and those with TLS, need no permission."""
    check_target(address)


def test_a_refused_address_costs_nothing() -> None:
    """It is refused before anything is paid; a scheme that nobody knows, too."""
    llm = FakeBackend()
    with pytest.raises(ConfigError, match="TLS"):
        llm.chat("x").compute(scheduler="tcp://10.1.2.3:8786")
    with pytest.raises(UnknownName):
        llm.chat("x").compute(scheduler="gopher://127.0.0.1:8786")
    with pytest.raises(UnknownName, match="begins with its scheme"):
        llm.chat("x").compute(scheduler="127.0.0.1:8786")
    assert not llm.requests


#: Runs in a process of its own, since tests may not connect to an address of the network.
EXPOSED = """
import logging
import sys
import distributed
import feste
from feste.errors import ConfigError

node = feste.task(abs)(-1)

def attempt(what, *targets, **settings):
    for target in targets:
        try:
            print(what, *feste.compute(node, scheduler=target, **settings))
        except ConfigError as error:
            print(what, str(error).partition("://")[0], "on the network without TLS" in str(error))

quiet = dict(dashboard=False, dashboard_address="127.0.0.1:0")
def scheduler(host):
    return {"cls": distributed.Scheduler, "options": dict(quiet, host=host)}
def workers(host):
    return {0: {"cls": distributed.Worker, "options": dict(quiet, host=host, nthreads=1)}}

for hosts in (("0.0.0.0", "127.0.0.1"), ("127.0.0.1", distributed.utils.get_ip())):
    with distributed.SpecCluster(
        scheduler=scheduler(hosts[0]), workers=workers(hosts[1]), silence_logs=logging.CRITICAL
    ) as cluster:
        local = f"tcp://127.0.0.1:{cluster.scheduler_address.rpartition(':')[2]}"
        with distributed.Client(cluster, set_as_default=False) as client:
            client.wait_for_workers(1)
            attempt("refused", client, cluster, local)
            attempt("allowed", client, cluster, local, allow_insecure=True)
            with feste.context.set(allow_insecure=True):
                attempt("allowed", client)
"""


def test_clusters_that_listen_on_the_network_are_refused(
    script: Callable[[str], list[str]],
) -> None:
    """A client, a cluster and a loopback address are, where scheduler or worker are open; unless allowed."""
    if distributed.utils.get_ip().startswith("127."):
        pytest.skip("this machine has no network")
    done = subprocess.run(script(EXPOSED), capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    refused = [
        f"refused the Dask {who} tcp True" for who in ("scheduler", "worker") for _ in range(3)
    ]
    assert [line for line in told if line.startswith("refused")] == refused
    assert [line for line in told if line.startswith("allowed")] == ["allowed 1"] * 8


def test_it_is_allowed_by_the_environment_too() -> None:
    """FESTE_ALLOW_INSECURE is a switch as those of Feste itself are."""
    setting = feste_settings()["allow_insecure"]
    assert setting.parse("allow_insecure", "1") is True
    assert setting.parse("allow_insecure", "0") is False
    with pytest.raises(ConfigError, match="FESTE_ALLOW_INSECURE='x': use 1 or 0"):
        setting.parse("allow_insecure", "x")


# --- the cluster that Feste starts ----------------------------------------------------------------------


def test_a_cluster_of_its_own_listens_on_loopback_alone() -> None:
    """None of its processes opens a socket for others, for the dashboard neither."""

    def sockets() -> set[tuple[int, str, int]]:
        me = psutil.Process()
        return {
            (process.pid, link.laddr.ip, link.laddr.port)
            for process in (me, *me.children(recursive=True))
            for link in process.net_connections("inet")
            if link.laddr and (link.status == psutil.CONN_LISTEN or not link.raddr)
        }

    before = sockets()
    executor = DaskExecutor("dask")
    executor.start(Reporter(lambda _: None, executor))
    try:
        client = executor._link.client
        client.wait_for_workers(1)
        new = sockets() - before
    finally:
        executor.close()

    assert len({pid for pid, *_ in new}) >= 3  # scheduler, nannies and a worker
    assert {ip for _, ip, _ in new} == {"127.0.0.1"}


# --- TLS ----------------------------------------------------------------------------------------------


class Certificates:
    """A certificate that is its own authority, and the configuration that tells Dask of it."""

    def __init__(self, folder: Path, name: str) -> None:
        key, self.path = str(folder / f"{name}.key"), str(folder / f"{name}.pem")
        options = "-newkey rsa:2048 -nodes -days 2 -subj /CN=localhost".split()
        subprocess.run(
            ["openssl", "req", "-x509", *options, "-keyout", key, "-out", self.path],
            capture_output=True,
            check=True,
        )
        self.config = {"distributed.comm.tls.ca-file": self.path}
        for role in ("scheduler", "worker", "client"):
            self.config[f"distributed.comm.tls.{role}.cert"] = self.path
            self.config[f"distributed.comm.tls.{role}.key"] = key


@pytest.fixture
def certificates(tmp_path: Path) -> Callable[[str], Certificates]:
    """Make certificates with a name."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate")
    return lambda name: Certificates(tmp_path, name)


@contextmanager
def cluster_of(config: dict[str, str]) -> Iterator[Any]:
    """A cluster of one thread with TLS, configured like its clients."""
    with (
        dask.config.set(config),
        distributed.LocalCluster(
            n_workers=1, processes=False, protocol="tls://", **QUIET
        ) as cluster,
    ):
        yield cluster


def test_tls_works(
    certificates: Callable[[str], Certificates], disconnect: Callable[[], None]
) -> None:
    """With certificates in the configuration of Dask, an address with TLS is all that it takes."""
    llm = FakeBackend()
    with cluster_of(certificates("ours").config) as cluster:
        address = cluster.scheduler_address
        assert address.startswith("tls://")
        assert where().compute(scheduler=address) == os.getpid()
        assert llm.chat("Hi").compute(scheduler=address, requests_on="workers")
        report = feste.last_report()
        assert report is not None
        assert [request.worker for request in report.requests] == ["0"]
        disconnect()


def test_what_is_not_of_our_authority_is_refused(
    certificates: Callable[[str], Certificates],
) -> None:
    """Without certificates, or with those of others, there is no connection, and nothing is sent."""
    llm = FakeBackend()
    theirs = certificates("theirs")
    with cluster_of(certificates("ours").config) as cluster:
        address = cluster.scheduler_address
        for config, told in (
            (theirs.config, "TLS certificate does not match"),
            ({"distributed.comm.tls.ca-file": theirs.path}, "TLS certificate does not match"),
            (dict.fromkeys(theirs.config), "distributed.comm.tls"),
        ):
            for place in ("client", "workers"):
                with (
                    dask.config.set(config),
                    pytest.raises(ConfigError, match="no connection") as error,
                ):
                    llm.chat("x").compute(scheduler=address, requests_on=place)
                assert told in str(error.value)
    assert not llm.requests
