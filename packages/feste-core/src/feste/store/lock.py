"""One writer process for each store: an advisory lock on a file beside it.

The same file notes how far the store has got, so that a store which lost what was acknowledged,
because a part of the file was cut off or replaced, does not go unnoticed. The lock is a POSIX record
lock: the system frees it when its process dies, and a forked child does not inherit it. It is also
freed when its process closes the file through another descriptor, so nothing else may open it, and
a process that holds it closes no other descriptor of it before.
"""

from __future__ import annotations

import os
import re
import time
import zlib
from pathlib import Path

from feste.errors import JournalError, JournalLocked

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Lock", "acknowledged"]

_PAUSE = 0.05
_LENGTH = 128
_NOTE = re.compile(rb"pid (\d+)\nrequests (\d+)\nanswers (\d+)\ncheck ([0-9a-f]{8})\n")
#: The locks that this process holds, by their files: the system lets one process in twice.
_held: dict[tuple[int, int], Lock] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_held.clear)


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
        self._identity = _identity(os.fstat(self._file))
        #: Descriptors of the same file that may be closed only with this lock.
        self._others: list[int] = []
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
                named = f"process {pid}" if pid else "another process"
                raise JournalLocked(
                    f"{path} is being written by {named}: wait for it to end (store_wait=60 waits a "
                    "minute for it), call feste.store.close() there, or give another file",
                    pid=pid,
                )
            time.sleep(_PAUSE)

    def _try(self) -> bool:
        if self._identity in _held:  # asked first: when that lock is closed, this one would go too
            return False
        try:
            if fcntl is not None:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except PermissionError:  # how some systems say that it is held
            return False
        except OSError as error:
            raise JournalError(
                f"{self.path} cannot be locked ({error}), and without a lock two programs could "
                "write the store at once: put it on another file system"
            ) from None
        return _held.setdefault(self._identity, self) is self  # another thread was faster

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
        try:
            self._write(0)
        finally:
            self._release()

    def _release(self) -> None:
        holder = _held.get(self._identity, self)
        if holder is not self:
            holder._others.append(self._file)
            return
        for file in (*self._others, self._file):
            os.close(file)
        _held.pop(self._identity, None)


def acknowledged(path: Path) -> tuple[int, int]:
    """Return the highest request and answer of a store that were acknowledged; zeros if unknown.

    :param path: the store's file.
    """
    name = path.with_name(path.name + ".lock")
    try:
        holder = _held.get(_identity(name.stat()))
        if holder is not None:
            return holder.acknowledged
        file = os.open(name, os.O_RDONLY)
    except OSError:
        return 0, 0
    try:
        return _read(file)[1:]
    finally:
        os.close(file)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _owner(file: int) -> int:
    """Return the process that holds the lock; one that just got it is given time to note itself."""
    until = time.monotonic() + 1.0
    while not _lives(pid := _read(file)[0]) and time.monotonic() < until:
        time.sleep(_PAUSE)
    return pid


def _lives(pid: int) -> bool:
    if os.name == "nt":  # where this would send Ctrl-C
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
