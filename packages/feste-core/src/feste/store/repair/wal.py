"""Frames of a write-ahead log, also of a damaged one.

SQLite ignores everything after the first frame with a wrong checksum. The checksum of a frame goes
on from the one that is stored in the frame before, so the frames after a damaged one can be checked
all the same. See https://www.sqlite.org/fileformat2.html#walformat.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator
from io import BytesIO
from operator import eq
from pathlib import Path
from typing import NamedTuple

from feste.store.schema import PAGE

__all__ = ["File", "Frame", "frames"]

_HEADER = struct.Struct(">8I")
_FRAME = struct.Struct(">6I")


class Frame(NamedTuple):
    """A page in a log.

    :param number: the number of the page, from 1.
    :param start: where its content begins in the log, in bytes.
    :param sound: whether its checksum is right.
    """

    number: int
    start: int
    sound: bool


class File:
    """The content of a file, read where it is asked for; what the disk cannot read is zeros.

    :param path: the file; one that does not exist counts as empty.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0) if path.exists() else BytesIO()
        self._size = self._file.seek(0, os.SEEK_END)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._size)
        self._file.seek(start)
        try:
            return self._file.read(max(0, stop - start))
        except OSError:
            return bytes(stop - start)

    def close(self) -> None:
        """Close it."""
        self._file.close()


def frames(log: File) -> Iterator[Frame]:
    """Yield the frames that were written since the log was last folded into the file, oldest first.

    Those of before, which are left at the end of the log, have other salts. The last frame may be
    cut off.

    :param log: the log.
    """
    if len(log) < _HEADER.size + _FRAME.size:
        return
    header = log[: _HEADER.size]
    *_, salt1, salt2, sum1, sum2 = _HEADER.unpack(header)
    orders = [order for order in "<>" if _checksum(header[:-8], (0, 0), order) == (sum1, sum2)]
    order = orders[0] if orders else {"little": "<", "big": ">"}[sys.byteorder]
    first = log[_HEADER.size : _HEADER.size + _FRAME.size]
    salts = (salt1, salt2) if orders else _FRAME.unpack(first)[2:4]
    before = (sum1, sum2)
    for at in range(_HEADER.size, len(log) - _FRAME.size + 1, _FRAME.size + PAGE):
        content = log[at : at + _FRAME.size + PAGE]
        number, _, *own, sum1, sum2 = _FRAME.unpack_from(content)
        page = content[_FRAME.size :]
        sound = len(page) == PAGE and _checksum(content[:8] + page, before, order) == (sum1, sum2)
        before = (sum1, sum2)
        if any(map(eq, own, salts)):  # of the two one may be damaged
            yield Frame(number, at + _FRAME.size, sound)


def _checksum(data: bytes, before: tuple[int, int], order: str) -> tuple[int, int]:
    first, second = before
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for one, two in zip(words[::2], words[1::2], strict=True):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + two + first) & 0xFFFFFFFF
    return first, second
