"""Choose the rows of a store that are deleted.

The choice is made in temporary tables, ``gone_answers`` and so on, so that counting and deleting see
the same rows, and a store of any size fits.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from feste.store import schema

__all__ = ["Choice", "Tasks", "choose", "delete"]

Tasks = Literal["failed", "unknown", "all"]

_NAMED = {"answers": "id", "prompts": "key", "requests": "id", "quarantine": "id"}
_TASKS = {
    "failed": "outcome = 'failed'",
    "unknown": "outcome IN ('unknown', 'sent')",
    "all": "TRUE",
}
_TASK_IDS = "SELECT id FROM requests WHERE plugin = 'task'"
#: When a request, and an answer, fits a choice.
_REQUEST = MappingProxyType(
    {
        "before": "sent < :before",
        "session": "session = :session",
        "model": "model = :model",
        "key": "instr(calls, :key) AND names_only(calls, :key)",
    }
)
_ANSWER = MappingProxyType(
    {
        "before": "kept < :before",
        "session": "request IN (SELECT id FROM requests WHERE session = :session)",
        # an answer from a cache has no request
        "model": "(request IN (SELECT id FROM requests WHERE model = :model) OR request IS NULL AND "
        "key IN (SELECT key FROM prompts WHERE model_of(request) = :model))",
        "key": "key = :key",
    }
)
_LEFT = "SELECT {} FROM answers WHERE id NOT IN (SELECT id FROM gone_answers)"


class Choice(NamedTuple):
    """What is deleted; the fields are the parameters of :func:`~feste.store.contents.purge.purge`."""

    before: float | None = None
    session: int | None = None
    model: str | None = None
    key: str | None = None
    tasks: Tasks | None = None
    prompts_only: bool = False
    everything: bool = False

    @property
    def spares_tasks(self) -> bool:
        """Whether ``once=True`` tasks are left, so that none runs twice by mistake."""
        return not (self.tasks or self.key or self.prompts_only or self.everything)


def choose(conn: sqlite3.Connection, choice: Choice) -> tuple[dict[str, int], int]:
    """Note the rows that go.

    :param conn: the connection; it may be read-only.
    :param choice: the choice.
    :returns: how many rows go by table, and how many starts of tasks are left although they fit.
    """
    conn.create_function("names_only", 2, _names_only)
    conn.create_function("model_of", 1, _model_of)
    conn.execute("CREATE TEMP TABLE touched (key TEXT PRIMARY KEY)")
    conn.execute("CREATE TEMP TABLE open_keys (key TEXT PRIMARY KEY)")
    for table, name in _NAMED.items():
        conn.execute(f"CREATE TEMP TABLE gone_{table} ({name} PRIMARY KEY)")
        if choice.everything:
            conn.execute(f"INSERT INTO gone_{table} SELECT {name} FROM {table}")
    tasks_left = 0
    if not choice.everything:
        tasks_left = _choose_bought(conn, choice)
        _choose_prompts(conn, choice)
        if choice.prompts_only:
            conn.execute("DELETE FROM gone_answers")
            conn.execute("DELETE FROM gone_requests")
        # what a damaged row belonged to cannot be told
        where = "FALSE" if choice.tasks else "place = 'prompts'" if choice.prompts_only else "TRUE"
        conn.execute(f"INSERT INTO gone_quarantine SELECT id FROM quarantine WHERE {where}")
    counts = {name: conn.execute(f"SELECT count(*) FROM gone_{name}").fetchone() for name in _NAMED}
    return {name: count for name, (count,) in counts.items()}, tasks_left


def delete(conn: sqlite3.Connection, choice: Choice) -> None:
    """Delete what :func:`choose` noted.

    :param conn: the connection, in a transaction.
    :param choice: the choice.
    """
    for table, name in _NAMED.items():
        conn.execute(f"DELETE FROM {table} WHERE {name} IN (SELECT {name} FROM gone_{table})")
    if choice.everything:
        conn.execute("DELETE FROM sessions")
    elif choice.key is not None and not choice.prompts_only:
        _clear_shared(conn, choice)


def _fits(choice: Choice, conditions: Mapping[str, str], *, but: str = "") -> str:
    given = [name for name in conditions if getattr(choice, name) is not None and name != but]
    return " AND ".join(conditions[name] for name in given) or "TRUE"


def _choose_bought(conn: sqlite3.Connection, choice: Choice) -> int:
    """Note answers and requests; return how many starts of tasks are left although they fit."""
    values = choice._asdict()
    request, answer = _fits(choice, _REQUEST), _fits(choice, _ANSWER)
    if choice.tasks:
        request = f"plugin = 'task' AND {_TASKS[choice.tasks]} AND {request}"
        conn.execute(f"INSERT INTO gone_requests SELECT id FROM requests WHERE {request}", values)
        of_tasks = "SELECT id FROM answers WHERE request IN (SELECT id FROM gone_requests)"
        conn.execute(f"INSERT INTO gone_answers {of_tasks}")
        return 0
    spared = f"(request IS NULL OR request NOT IN ({_TASK_IDS}))" if choice.spares_tasks else "TRUE"
    conn.execute(
        f"INSERT INTO gone_answers SELECT id FROM answers WHERE {answer} AND {spared}", values
    )
    spared = f"id NOT IN ({_TASK_IDS})" if choice.spares_tasks else "TRUE"
    bought = "SELECT request FROM answers WHERE id IN (SELECT id FROM gone_answers)"
    still = f"{_LEFT.format('request')} AND request IS NOT NULL"
    conn.execute(
        f"INSERT INTO gone_requests SELECT id FROM requests WHERE ({request} OR id IN ({bought})) "
        f"AND {spared} AND id NOT IN ({still})",
        values,
    )
    if not choice.spares_tasks:
        return 0
    left = f"SELECT count(*) FROM requests WHERE plugin = 'task' AND {request}"
    return int(conn.execute(left, values).fetchone()[0])


def _choose_prompts(conn: sqlite3.Connection, choice: Choice) -> None:
    """Note the prompts of what goes, but for those that answers or open requests still need."""
    if choice == Choice(prompts_only=True):
        conn.execute("INSERT INTO gone_prompts SELECT key FROM prompts")
        return
    conn.execute(
        "INSERT OR IGNORE INTO touched SELECT key FROM answers "
        "WHERE id IN (SELECT id FROM gone_answers)"
    )
    gone = "SELECT id FROM gone_requests"
    _note_keys(conn, "touched", f"SELECT calls FROM requests WHERE id IN ({gone})")
    open_now = f"outcome IN ('sent', 'unknown') AND id NOT IN ({gone})"
    _note_keys(conn, "open_keys", f"SELECT calls FROM requests WHERE {open_now}")
    if choice == Choice(key=choice.key):  # whoever asked it
        conn.execute("INSERT OR IGNORE INTO touched VALUES (?)", (choice.key,))
        conn.execute("DELETE FROM open_keys WHERE key = ?", (choice.key,))
    conn.execute(
        "INSERT INTO gone_prompts SELECT key FROM prompts WHERE key IN (SELECT key FROM touched) "
        f"AND key NOT IN ({_LEFT.format('key')}) AND key NOT IN (SELECT key FROM open_keys)"
    )


def _note_keys(conn: sqlite3.Connection, table: str, query: str) -> None:
    for (calls,) in conn.execute(query):
        keys = [(key,) for key in _keys(calls)]
        conn.executemany(f"INSERT OR IGNORE INTO {table} VALUES (?)", keys)


def _clear_shared(conn: sqlite3.Connection, choice: Choice) -> None:
    """Clear the texts of requests that stay because they answer other calls too."""
    fits = f"{_fits(choice, _REQUEST, but='key')} AND instr(calls, :key)"
    query = f"SELECT * FROM requests WHERE {fits} AND (raw IS NOT NULL OR error IS NOT NULL)"
    for values in conn.execute(query, choice._asdict()).fetchall():
        if schema.is_good("requests", values):
            row = schema.row_of("requests", values)
            schema.write(conn, "requests", {**row, "raw": None, "error": None})
        else:
            conn.execute("UPDATE requests SET raw = NULL, error = NULL WHERE id = ?", values[:1])


def _keys(calls: Any) -> list[str]:
    """Return the keys in a request's list of calls; none if it is damaged."""
    try:
        return [key for key, _ in json.loads(calls) if isinstance(key, str)]
    except (TypeError, ValueError):
        return []


def _names_only(calls: Any, key: str) -> bool:
    return {*_keys(calls)} == {key}


def _model_of(asked: Any) -> str | None:
    try:
        *_, body = json.loads(asked)
        return str(body["model"])
    except (KeyError, TypeError, ValueError):
        return None
