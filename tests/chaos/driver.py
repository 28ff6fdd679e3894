"""Runs programs of the chaos suite, and kills them by the progress of the provider's ledger.

Kills by time would hit mostly the start of a program, on a busy machine all the more; the number of
answers made says how far a run is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from feste.backend import Price
from feste.testing import Fault, Outage, ServerLimits, SimServer, Totals
from tests.chaos.checker import Evidence, check, check_end, check_kill
from tests.chaos.work import POISON, Shape, make

__all__ = ["CANARY", "PRICE", "Chaos", "Ledger"]

#: The API key of all programs. It must be nowhere afterwards.
CANARY = "sk-CANARY-5f2c9a7be1d04836"
#: Dollars for a million tokens read and written, which program and provider know.
PRICE = {"input": 2.0, "output": 8.0}
#: Seconds that end a test that is broken; nothing here needs them.
LONG = 120.0


class Ledger:
    """Counts the answers that a provider has made, reading only what is new.

    :param path: the file of the ledger.
    """

    def __init__(self, path: Path) -> None:
        self.file, self.count = path.open("rb"), 0

    def made(self) -> int:
        """Return how many answers the provider has made."""
        while piece := self.file.read(1 << 20):
            self.count += piece.count(b"\n")
        return self.count

    def wait_for(self, count: int, process: subprocess.Popen[bytes]) -> None:
        """Wait until the provider has made so many answers.

        :param count: how many.
        :param process: the program, which must go on until then.
        """
        deadline = time.monotonic() + LONG
        while self.made() < count:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, f"no progress after {self.count} answers"
            time.sleep(0.001)


class Chaos:
    """A provider, and the programs that do one piece of work with it, one after the other.

    :param folder: the folder of all files; the programs' temporary files go there too.
    :param shape: of the work.
    :param calls: how many calls it has.
    :param seed: of all that is random: the work, the faults, the kills.
    :param window: the most requests in flight.
    :param equal: as in :func:`~tests.chaos.work.make`.
    :param poisoned: likewise.
    :param store: whether the programs have a store.
    :param look: whether the provider looks into the store at each request.
    :param bodies: whether the provider's log has the bodies of the requests.
    :param python: how Python is told to run the program, options first.
    :param todo: more that the program is told, such as ``settings={"budget": 1.0}``.
    """

    def __init__(
        self,
        folder: Path,
        shape: Shape,
        calls: int,
        *,
        seed: int,
        window: int = 32,
        equal: int = 2,
        poisoned: float = 0.0,
        store: bool = True,
        look: bool = False,
        bodies: bool = False,
        python: Sequence[str] = ("-m", "tests.chaos.program"),
        base: float = 0.01,
        faults: Mapping[Any, float] | Sequence[Fault | Outage] = (),
        limits: ServerLimits | None = None,
        wire: Mapping[str, Any] | None = None,
        waits: Sequence[Any] = ("fraction", "milliseconds", "none"),
        **todo: Any,
    ) -> None:
        self.folder, self.seed, self.window, self.python = folder, seed, window, python
        work = {"equal": equal, "poisoned": poisoned}
        self.steps = make(shape, calls, seed, **work)
        self.store = folder / "runs.db" if store else None
        self.side = folder / "side.jsonl"
        self.side.touch()
        if isinstance(faults, Mapping):
            faults = [
                Fault(kind=kind, times=None, probability=share, pause=0.05)
                for kind, share in faults.items()
            ]
        options = {"poison": POISON, "seed": seed, **(wire or {})}
        if look:
            options["store"] = str(self.store)
        self.server = SimServer(
            "tests.chaos.wire:ChaosWire",
            base=base,
            wire_options=options,
            faults=faults,
            limits=limits,
            waits=waits,
            price=Price(**PRICE),
            seed=seed,
            log_bodies=bodies,
            ledger_path=folder / "ledger.jsonl",
        )
        self.todo = {
            "shape": shape,
            "calls": calls,
            "seed": seed,
            "work": work,
            "concurrency": window,
            "price": PRICE,
            "side": str(self.side),
            **todo,
        }
        if self.store is not None:
            self.todo["settings"] = {"store": str(self.store), **todo.get("settings", {})}
        self.runs = self.kills = 0
        #: How many workers of a cluster the test has killed.
        self.workers_killed = 0
        #: What goes before the command of a program.
        self.prefix: Sequence[str] = ()
        self._open: list[int] = []

    def __enter__(self) -> Chaos:
        self.server.start()
        self.ledger = Ledger(self.server.ledger_path)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.server.close()
        self.ledger.file.close()

    @contextmanager
    def program(self, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
        """Start the program in a session of its own; it is killed at the end, if it has not ended.

        :param more: what it is told besides.
        :raises Violation: if it printed the key, or ended by itself and left a temporary file.
        """
        self.runs += 1
        scratch = self.folder / f"tmp{self.runs}"
        scratch.mkdir()
        settings = {**self.todo.get("settings", {}), **more.pop("settings", {})}
        todo = {"url": self.server.url, "run": self.runs, **self.todo, **more, "settings": settings}
        process = subprocess.Popen(
            [*self.prefix, sys.executable, *self.python, json.dumps(todo)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OPENAI_API_KEY": CANARY, "TMPDIR": str(scratch)},
            cwd=Path(__file__).parents[2],
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            output = process.communicate()
            check_end(output, None if process.returncode < 0 else scratch, CANARY)

    def stop_at(
        self,
        count: int,
        sign: int = signal.SIGKILL,
        *,
        times: int = 1,
        spoiled: int = 0,
        **more: Any,
    ) -> int:
        """Send a signal to the program once the provider has made so many answers.

        ``ending`` is how many seconds it took to stop after the last one, ``errors`` what it wrote.

        :param count: how many.
        :param sign: the signal.
        :param times: how often it is sent.
        :param spoiled: as in :class:`~tests.chaos.checker.Evidence`.
        :param more: what the program is told besides.
        :returns: its exit code.
        """
        with self.program(**more) as process:
            self.ledger.wait_for(count, process)
            process.send_signal(sign)
            for _ in range(times - 1):
                time.sleep(0.3)  # a program that has not seen the first one takes two for one
                process.send_signal(sign)
            sent = time.monotonic()
            out, errors = process.communicate(timeout=LONG)
            ended = json.loads(out)["stopped"] if out else time.monotonic()
            self.ending, self.errors = ended - sent, errors.decode()
        self._settled()  # what is still made belongs to no later program
        if sign == signal.SIGKILL:
            assert process.returncode == -sign, f"it ended before it was killed: {self.errors}"
        if process.returncode < 0:
            self.kills += 1
            if self.store is not None:
                made = self.server.ledger()
                self._open = check_kill(self.store, made, self.window, self._open, spoiled)
        return process.returncode

    def kill(self, times: int) -> None:
        """Kill the program at random points of its progress.

        :param times: how often.
        """
        last = len(self.steps) * 9 // 10
        for point in sorted(Random(self.seed).sample(range(1, last), times)):
            self.stop_at(max(point, self.ledger.made() + 1))

    def run(
        self,
        meanwhile: Callable[[subprocess.Popen[bytes]], object] | None = None,
        *,
        warns: str = "",
        **more: Any,
    ) -> dict[str, Any]:
        """Run the program until it ends by itself.

        :param meanwhile: is called with the program while it runs.
        :param warns: what it must say on stderr; without it, nothing.
        :param more: what it is told besides.
        :returns: what it tells.
        """
        with self.program(**more) as process:
            if meanwhile is not None:
                meanwhile(process)
            out, errors = process.communicate(timeout=LONG * 3)
        assert process.returncode == 0, errors.decode()
        assert (warns in errors.decode()) if warns else (errors == b""), errors.decode()
        told: dict[str, Any] = json.loads(out)
        return told

    def check(self, told: dict[str, Any], spoiled: int = 0) -> Evidence:
        """Hold what the last run told, and all that it left, against the invariants.

        :param told: what :meth:`run` returned.
        :param spoiled: as in :class:`~tests.chaos.checker.Evidence`.
        :returns: what was looked at.
        :raises Violation: if one of them does not hold.
        """
        totals = self._settled()
        evidence = Evidence(
            steps=self.steps,
            told=told,
            side=self.side,
            folder=self.folder,
            store=self.store,
            ledger=self.server.ledger(),
            log=self.server.requests(),
            totals=totals,
            runs=self.runs,
            kills=self.kills,
            window=self.window,
            canary=CANARY,
            workers_killed=self.workers_killed,
            spoiled=spoiled,
            longest=self.todo.get("max_items") or 1,
        )
        check(evidence)
        return evidence

    def _settled(self) -> Totals:
        """Wait until nothing is under way: the provider notices after a moment that one has left."""
        deadline = time.monotonic() + LONG
        while (totals := self.server.totals()).in_flight and time.monotonic() < deadline:
            time.sleep(0.01)
        return totals
