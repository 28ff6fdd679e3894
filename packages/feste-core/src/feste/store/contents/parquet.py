"""Write answers as Parquet, with pyarrow, which is an optional dependency."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import IO, Any

from feste.errors import ConfigError
from feste.store.contents.records import dumps

__all__ = ["write"]

#: A row group ends at so many rows, or characters of JSON.
_ROWS, _CHARACTERS = 10_000, 32 << 20
_TEXTS = ("key", "draw", "plugin", "operation", "endpoint", "model", "request", "response", "text")
_NUMBERS = ("input_tokens", "output_tokens", "cached_tokens", "session")


def write(file: IO[bytes], records: Iterable[dict[str, Any]]) -> int:
    """Write records as rows; bodies are JSON in a column of text. Return how many there were.

    :param file: the file.
    :param records: what :func:`~feste.store.contents.records.record_of` returns.
    :raises ConfigError: if pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "Parquet needs pyarrow: pip install 'feste-core[parquet]', or give --format jsonl"
        ) from error
    columns = [(name, pyarrow.string()) for name in (*_TEXTS, "request_id", "run", "source")]
    columns += [(name, pyarrow.int64()) for name in _NUMBERS]
    columns += [("kept", pyarrow.timestamp("ms", "UTC"))]
    table = pyarrow.schema(columns)
    count = 0
    with pyarrow.parquet.ParquetWriter(file, table, compression="zstd") as writer:
        for rows in _groups(map(_flat, records)):
            count += len(rows)
            writer.write_table(pyarrow.Table.from_pylist(rows, table))
    return count


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record as a row of texts and numbers: bodies as JSON, tokens in columns."""
    usage = record.pop("usage") or {}
    body = record["request"]
    record["request"] = None if body is None else dumps(body)
    record["response"] = dumps(record["response"])
    row = {name: _valid(v) if isinstance(v, str) else v for name, v in record.items()}
    row.update({f"{name}_tokens": usage.get(name) for name in ("input", "output", "cached")})
    row["kept"] = datetime.fromisoformat(record["kept"])
    return row


def _valid(text: str) -> str:
    """Return a text as UTF-8 can hold it: a lone surrogate becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(row["request"] or "") + len(row["response"])
        if len(group) >= _ROWS or size >= _CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group
