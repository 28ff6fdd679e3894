"""One writer process for each store: an advisory lock on a file beside it.

The same file notes how far the store has got, so that a store which lost what was acknowledged,
because a part of the file was cut off or replaced, does not go unnoticed. The system frees the lock
when its process dies. It belongs to the open file, so a second one in the same process is refused
too, and a forked child gives it up.
"""

from __future__ import annotations

import os
import re
import time
import zlib
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet

from feste.errors import JournalError, JournalLocked

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Lock", "acknowledged"]

_PAUSE = 0.05
_LENGTH = 128
_NOTE = re.compile(rb"pid (\d+)\nrequests (\d+)\nanswers (\d+)\ncheck ([0-9a-f]{8})\n")
_living: WeakSet[Lock] = WeakSet()


class Lock:
    """The lock of a store, held from construction until :meth:`close`.

    :param path: the store's file.
    :param wait: seconds to wait for another process to release it.
    :raises JournalLocked: if another process still holds it then; it names the process.
    """

    def __init__(self, path: Path, wait: float = 0.0) -> None:
        self.path = path.with_name(path.name + ".lock")
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        self._file = os.open(self.path, flags, 0o600)
        _living.add(self)
        try:
            self._wait(path, time.monotonic() + wait)
            #: The highest request and answer that were acknowledged; (0, 0) if nothing is known.
            self.acknowledged = _read(self._file)[1:]
            self._write(os.getpid())
        except BaseException:
            self._release()
            raise

    def _wait(self, path: Path, until: float) -> None:
        while not self._try():
            if time.monotonic() >= until:
                pid = _owner(self._file)
                raise JournalLocked(
                    f"{path} is being written by {_named(pid)}: wait for it to end (store_wait=60 "
                    "waits a minute for it), call feste.store.close() there, or give another file",
                    pid=pid,
                )
            time.sleep(_PAUSE)

    def _try(self) -> bool:
        if fcntl is None:
            return True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # different systems say that it is held
            return False
        except OSError as error:
            raise JournalError(
                f"{self.path} cannot be locked ({error}), and without a lock two programs could "
                "write the store at once: put it on another file system"
            ) from None
        return True

    @property
    def is_current(self) -> bool:
        """Whether the file that is locked is still there, so that it keeps others out."""
        try:
            return os.path.samestat(os.fstat(self._file), self.path.stat())
        except OSError:
            return False

    def note(self, requests: int, answers: int) -> None:
        """Note how far the store has got.

        It is not synced: what a power failure loses of it only makes the check weaker.

        :param requests: the highest id of a request that was acknowledged.
        :param answers: the highest id of an answer.
        """
        self.acknowledged = requests, answers
        self._write(os.getpid())

    def _write(self, pid: int) -> None:
        requests, answers = self.acknowledged
        text = f"pid {pid}\nrequests {requests}\nanswers {answers}\n"
        text += f"check {zlib.crc32(text.encode()):08x}\n"
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, text.encode().ljust(_LENGTH))

    def close(self) -> None:
        """Release the lock. The file stays: removing it would let two processes in."""
        if self._file >= 0:
            with suppress(OSError):  # a file system that has become read-only
                self._write(0)
            self._release()

    def _release(self) -> None:
        file, self._file = self._file, -1
        os.close(file)


def _give_up() -> None:
    """Close the files in a forked child; the locks stay with its parent."""
    for lock in list(_living):
        if lock._file >= 0:
            lock._release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_give_up)


def acknowledged(path: Path) -> tuple[int, int]:
    """Return the highest request and answer of a store that were acknowledged; zeros if unknown.

    :param path: the store's file.
    """
    try:
        file = os.open(path.with_name(path.name + ".lock"), os.O_RDONLY)
    except OSError:
        return 0, 0
    try:
        return _read(file)[1:]
    finally:
        os.close(file)


def _named(pid: int) -> str:
    if pid == os.getpid():
        return "this process"
    return f"process {pid}" if pid else "another process"


def _owner(file: int) -> int:
    """Return the process that holds the lock; one that just got it is given time to note itself."""
    until = time.monotonic() + 1.0
    while not _lives(pid := _read(file)[0]) and time.monotonic() < until:
        time.sleep(_PAUSE)
    return pid


def _lives(pid: int) -> bool:
    if os.name == "nt":  # a signal 0 is Ctrl-C there
        return pid > 0
    try:
        os.kill(pid, 0)
    except PermissionError:  # of another user
        return True
    except OSError:
        return False
    return pid > 0


def _read(file: int) -> tuple[int, int, int]:
    """Return the pid and how far the store had got, or zeros if the note is unreadable."""
    os.lseek(file, 0, os.SEEK_SET)
    found = _NOTE.match(os.read(file, _LENGTH))
    if found is None:
        return 0, 0, 0
    pid, requests, answers, check = found.groups()
    text = found.group().rpartition(b"check ")[0]
    if zlib.crc32(text) != int(check, 16):
        return 0, 0, 0
    return int(pid), int(requests), int(answers)
