"""Write the answers of a store to a file that other programs read: JSON lines or Parquet."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from feste.errors import ConfigError, JournalError
from feste.store.contents import parquet
from feste.store.contents.reader import Reader
from feste.store.contents.records import dumps, record_of

__all__ = ["Exported", "Format", "export"]

Format = Literal["jsonl", "parquet"]


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote.

    :param answers: the number of answers.
    :param damaged: the rows that were left out because they are damaged, as table and id.
    """

    answers: int
    damaged: tuple[tuple[str, Any], ...]


def export(
    path: str | Path,
    out: str | Path,
    format: Format = "jsonl",
    *,
    session: int | None = None,
    force: bool = False,
) -> Exported:
    """Write each answer with its request to a file; another process may be writing the store.

    The file can be read by its owner only, and appears under its name when it is complete.

    :param path: the store.
    :param out: the file to write, or ``"-"`` for standard output.
    :param format: ``"jsonl"``, one object a line, or ``"parquet"``.
    :param session: the number of the session that bought the answers, or None for all.
    :param force: whether an existing file is replaced.
    :raises ConfigError: if the file exists, or the format needs something else.
    :raises JournalError: if the store cannot be read, or the file cannot be written.
    """
    if format == "parquet" and str(out) == "-":
        raise ConfigError("Parquet needs a file: give --out FILE, or --format jsonl")
    write = parquet.write if format == "parquet" else _write_lines
    with Reader(path) as reader:
        records = (record_of(kept) for kept in reader.answers(session))
        if str(out) == "-":
            count = write(sys.stdout.buffer, records)
            sys.stdout.buffer.flush()
        else:
            _refuse_own(Path(path), Path(out))
            count = _into(Path(out), force, lambda file: write(file, records))
        return Exported(count, tuple(sorted(reader.damaged, key=str)))


def _refuse_own(store: Path, out: Path) -> None:
    """Raise if the file to write is one of the store's own."""
    own = [store.with_name(store.name + end) for end in ("", "-wal", "-shm", ".lock", ".reserve")]
    if out.resolve() in [path.resolve() for path in own]:
        raise ConfigError(f"{out} is a part of the store: give another file")


def _into(out: Path, force: bool, write: Callable[[IO[bytes]], int]) -> int:
    """Write a new file beside ``out`` and give it that name at the end."""
    if os.path.lexists(out) and not force:
        raise ConfigError(f"{out} exists: give another name, or --force to replace it")
    if out.is_dir():
        raise ConfigError(f"{out} is a folder: give the name of a file")
    try:
        number, name = tempfile.mkstemp(".partial", f"{out.name}.", out.absolute().parent)
        try:
            with open(number, "wb") as file:
                count = write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, out)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise JournalError(f"{out} cannot be written: {error.strerror or error}") from error
    return count


def _write_lines(file: IO[bytes], records: Iterable[dict[str, Any]]) -> int:
    count = 0
    for record in records:
        file.write(f"{dumps(record)}\n".encode())
        count += 1
    return count
