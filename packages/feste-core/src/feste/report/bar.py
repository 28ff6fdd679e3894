"""A bar in the last line of a terminal; what the program prints goes above it, as it was written."""

from __future__ import annotations

import io
import os
import sys
import threading
from typing import Any

__all__ = ["Bar", "is_terminal"]

#: The columns of the bar itself, and of a terminal that does not tell its own.
_WIDTH, _COLUMNS = 12, 80
_DONE, _TO_DO, _PLAIN = "\x1b[35m", "\x1b[90m", "\x1b[0m"
_CLEAR = "\r\x1b[2K"
#: What a terminal may be whose stream raises: missing, closed, gone, replaced by anything.
_GONE = (AttributeError, OSError, ValueError)


class Bar:
    """A line at the bottom of the terminal of a stream, from :meth:`open` to :meth:`close`.

    Meanwhile :data:`sys.stdout` and :data:`sys.stderr` are replaced, where they are this terminal:
    who writes to them clears the bar first, and it is drawn again when the text has ended its line.
    A stream that breaks is the bar's trouble only.
    """

    def __init__(self) -> None:
        #: Taken for each change of the terminal; again by what is printed meanwhile, as by a signal.
        self.lock = threading.RLock()
        self._stream: Any = None
        self._drawn = False
        #: Whether the last thing that was printed has not ended its line.
        self._midline = False
        #: What stands before the streams. They are kept: to ``print`` that runs in another thread
        #: ``sys.stdout`` is a borrowed reference, and freeing it crashes Python before 3.14.
        self._above: list[_Above] = []

    def open(self, stream: Any) -> None:
        """Take the last line of a terminal.

        :param stream: the terminal, such as :data:`sys.stderr`.
        """
        with self.lock:
            self._stream, self._midline = _own(stream), False
            for name in "stdout", "stderr":
                printed = _own(getattr(sys, name))
                if _same_terminal(printed, self._stream):
                    if all(one._stream is not printed for one in self._above):
                        self._above.append(_Above(printed, self))
                    setattr(sys, name, next(a for a in self._above if a._stream is printed))

    def close(self) -> None:
        """Give the line back."""
        with self.lock:
            self._clear()
            self.drop()

    def drop(self) -> None:
        """Give the streams back, and leave the line as it is."""
        with self.lock:
            self._stream = None
            for name in "stdout", "stderr":
                printed = getattr(sys, name)
                if type(printed) is _Above:  # else somebody has replaced it, or taken it along
                    setattr(sys, name, printed._stream)

    def room(self, name: str) -> int:
        """Return how many characters of words a line has room for.

        :param name: what stands before the bar.
        """
        return self._columns() - len(name) - _WIDTH - 3  # two spaces, the cursor

    def _columns(self) -> int:
        """Return the columns of the terminal, which stdout need not be."""
        told = os.environ.get("COLUMNS", "")
        if told.isdecimal() and int(told):
            return int(told)
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or _COLUMNS
        except _GONE:
            return _COLUMNS

    def draw(self, name: str, share: float | None, words: str) -> None:
        """Draw it, unless the program is in the middle of a line.

        :param name: what stands before the bar.
        :param share: how much is done, from 0 to 1; None draws no bar.
        :param words: what stands behind it.
        """
        with self.lock:
            if self._stream is not None and not self._midline:
                drawn = " ".join(filter(None, (name, self._bar(share), words)))
                self._drawn = self._write(f"\r{drawn}\x1b[K")

    def _bar(self, share: float | None) -> str:
        if share is None:
            return ""
        halves = round(min(1.0, share) * 2 * _WIDTH)
        full, half = "━", "╸"
        try:
            (full + half).encode(getattr(self._stream, "encoding", None) or "ascii")
        except UnicodeError:
            full, half = "=", "-"
        done = full * (halves // 2) + half * (halves % 2)
        rest = full * (_WIDTH - len(done))
        if os.environ.get("NO_COLOR"):
            return done + " " * len(rest)
        return f"{_DONE}{done}{_TO_DO}{rest}{_PLAIN}"

    def _clear(self) -> None:
        if self._drawn:
            self._drawn = False
            self._write(_CLEAR)

    def _write(self, text: str) -> bool:
        try:
            self._stream.write(text)
            self._stream.flush()
        except _GONE as error:  # there is nobody to tell
            _reraise_foreign(error)
            self._stream = None
            return False
        return True

    def above(self, stream: Any, text: str) -> Any:
        """Write above the bar what the program prints.

        :param stream: where it prints.
        :param text: what it prints.
        """
        if self._stream is None:
            return stream.write(text)
        with self.lock:
            self._clear()
            written = stream.write(text)
            if text:
                self._midline = not text.endswith("\n")
            stream.flush()  # the beginning of a line too, before the bar is drawn again
            return written

    def make_way(self) -> None:
        """Stay away until the program ends a line that is written by other means."""
        with self.lock:
            self._clear()
            self._midline = True


class _Above:
    """What :data:`sys.stdout` is while there is a bar; afterwards it only passes on."""

    def __init__(self, stream: Any, bar: Bar) -> None:
        self._stream = stream
        self._bar = bar

    def write(self, text: str) -> Any:
        return self._bar.above(self._stream, text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def fileno(self) -> Any:
        """Who asks for it is to write beside this, as ``input`` does or a child process."""
        self._bar.make_way()
        return self._stream.fileno()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal.

    :param stream: a stream, or what a program has put in its place.
    """
    try:
        return bool(stream.isatty())
    except _GONE as error:
        _reraise_foreign(error)
        return False


def _reraise_foreign(error: Exception) -> None:
    """Raise an OSError without a number, if it may be that of a signal's handler and no stream's."""
    if isinstance(error, io.UnsupportedOperation) or not isinstance(error, OSError):
        return
    if error.errno is None and threading.current_thread() is threading.main_thread():
        raise error


def _own(stream: Any) -> Any:
    """Return a stream without what an earlier bar has put before it, and somebody has kept."""
    while type(stream) is _Above:
        stream = stream._stream
    return stream


def _same_terminal(printed: Any, stream: Any) -> bool:
    try:
        return bool(
            printed is stream
            or (printed.isatty() and os.path.sameopenfile(printed.fileno(), stream.fileno()))
        )
    except _GONE:
        return False
