"""Rows of a store read straight from its pages, without the trees that lead to them.

A row is found by the shape of its record header, wherever it stands in a page, and kept only if its
seal is right. So no damage elsewhere hides it, and nothing is taken for a row that was not written.
Pages that were freed or rewritten may hold older versions of rows; see :mod:`feste.store.repair.salvage`.

The record format is described in https://www.sqlite.org/fileformat2.html#record_format.
"""

from __future__ import annotations

import re
import sqlite3
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from feste.store import schema
from feste.store.repair import wal
from feste.store.schema import PAGE

__all__ = ["Row", "rows"]

#: The serial types that a column can have, by its declared type. Floats may be stored as integers.
_SHAPES = {
    "": rb"\x00",  # the row's number, which is not stored
    "INTEGER": rb"[\x00-\x06\x08\x09]",
    "REAL": rb"[\x00-\x09]",
    "TEXT": rb"(?:\x00|[\x0d-\x7f]|[\x80-\xff]{1,4}[\x00-\x7f])",
    "BLOB": rb"\x4c",  # the seal: 32 bytes
}
_INTEGERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}


class Row(NamedTuple):
    """A row whose seal is right.

    :param table: its table.
    :param id: its number in the table, also where that is no column.
    :param values: all its columns, the seal last.
    """

    table: str
    id: int
    values: list[Any]


class _Pages(NamedTuple):
    """The pages of a store at one moment: of the log where it has them, else of the file."""

    file: wal.File
    log: wal.File
    #: Where the log has a page, by its number.
    logged: dict[int, int]

    def page(self, number: int) -> bytes:
        """Return a page; it is shorter than others, or empty, if it is not there."""
        if number in self.logged:
            start = self.logged[number]
            return self.log[start : start + PAGE]
        start = (number - 1) * PAGE
        return self.file[start : start + PAGE] if number > 0 else b""

    def chain(self, number: int, size: int) -> bytes:
        """Return what a chain of overflow pages holds; less, if it breaks."""
        parts = []
        while size > 0 and len(page := self.page(number)) == PAGE:
            parts.append(page[4 : 4 + size])
            size -= PAGE - 4
            number = int.from_bytes(page[:4], "big")
        return b"".join(parts)


def rows(path: Path, log: Path) -> Iterator[Row]:
    """Yield every good row in the pages of a store, in no order; some more than once.

    :param path: the store's file.
    :param log: its write-ahead log.
    """
    with closing(wal.File(path)) as file, closing(wal.File(log)) as logged:
        frames = list(wal.frames(logged))
        newest = {frame.number: frame.start for frame in frames}
        sound = {frame.number: frame.start for frame in frames if frame.sound}
        moments = [_Pages(file, logged, newest)]
        if newest != sound:
            moments.append(_Pages(file, logged, sound))
        places = [(file, start) for start in range(0, len(file), PAGE)]
        places += [(logged, frame.start) for frame in frames]
        for source, start in places:
            page = source[start : start + PAGE]
            for header in _headers().finditer(page):
                found = (_read(page, header, pages) for pages in moments)
                yield from islice(filter(None, found), 1)


@cache
def _columns() -> dict[str, list[str]]:
    """Return the declared types of each table's columns; that of the row's number is ""."""
    conn = sqlite3.connect(":memory:")
    try:
        schema.create(conn)
        return {
            table: ["" if key and kind == "INTEGER" else kind for _, _, kind, _, _, key in found]
            for table in schema.TABLES
            for found in [conn.execute(f"PRAGMA table_info({table})").fetchall()]
        }
    finally:
        conn.close()


@cache
def _headers() -> re.Pattern[bytes]:
    """Return what finds the record headers of all tables, also those that overlap."""
    tables = (
        rb"(?P<%s>%s)" % (table.encode(), b"".join(map(_SHAPES.__getitem__, kinds)))
        for table, kinds in _columns().items()
    )
    # the first byte is the header's length; what follows is only looked at
    return re.compile(rb"[\x03-\x3f](?=%s)" % b"|".join(tables), re.DOTALL)


def _read(page: bytes, found: re.Match[bytes], pages: _Pages) -> Row | None:
    """Return the row that a header begins, or None if it is no good one."""
    table = str(found.lastgroup)
    at, start = found.start(), found.end(table)
    if page[at] != start - at:
        return None
    types = _varints(page[at + 1 : start])
    size = start - at + sum(map(_size, types))
    here = _local(size)
    if at + here > len(page) or size > len(pages.file) + len(pages.log):
        return None
    payload = page[at : at + here]
    if here < size:
        first = int.from_bytes(page[at + here : at + here + 4], "big")
        payload += pages.chain(first, size - here)
    if len(payload) < size:
        return None
    number = _before(page, at)
    values = _values(payload[start - at :], _columns()[table], types, number)
    return Row(table, number, values) if schema.is_good(table, values) else None


def _varints(data: bytes) -> list[int]:
    found, value = [], 0
    for byte in data:
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            found.append(value)
            value = 0
    return found


def _before(data: bytes, end: int) -> int:
    """Return the number that ends before a position: that of the row, before its header."""
    start = end - 1
    while start > max(0, end - 9) and data[start - 1] >= 0x80:
        start -= 1
    return (_varints(data[start:end]) or [0])[0]


def _size(serial: int) -> int:
    """Return the bytes that a value of a serial type takes."""
    if serial >= 12:
        return (serial - 12) // 2
    return 8 if serial == 7 else _INTEGERS.get(serial, 0)


def _local(size: int) -> int:
    """Return how many bytes of a record stand in its leaf page."""
    if size <= PAGE - 35:
        return size
    least = (PAGE - 12) * 32 // 255 - 23
    local = least + (size - least) % (PAGE - 4)
    return local if local <= PAGE - 35 else least


def _values(content: bytes, kinds: Sequence[str], types: Sequence[int], number: int) -> list[Any]:
    """Return the values of a record; one that is no valid text stays bytes, as no seal has it."""
    values: list[Any] = []
    at = 0
    for kind, serial in zip(kinds, types, strict=True):
        size = _size(serial)
        data, at = content[at : at + size], at + size
        value: Any = None
        if not kind:
            value = number
        elif serial == 7:
            (value,) = struct.unpack(">d", data)
        elif 0 < serial < 12:
            value = int.from_bytes(data, "big", signed=True) if serial < 7 else serial - 8
            value = float(value) if kind == "REAL" else value
        elif serial:
            value = data if serial % 2 == 0 else _text(data)
        values.append(value)
    return values


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data
