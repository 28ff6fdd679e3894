"""Dask collections and futures among the inputs of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["Later", "compute_together"]


class Later:
    """Stands for the value of an input that is not known when its run begins.

    :param given: the argument that the input's node is run with: the input itself, or what the
        executor has made of it.
    """

    __slots__ = ("given",)

    def __init__(self, given: Any) -> None:
        self.given = given


def compute_together(inputs: Sequence[Any]) -> list[Any]:
    """Compute Dask collections in this thread, those with the same scheduler in one call.

    If a call fails, its collections are left to their nodes: each is computed by itself then, so that
    the others come through, and the error is that of one node.

    :param inputs: collections, and futures, which are left to their nodes.
    :returns: for each its value, or a :class:`Later`.
    """
    import dask
    from dask.base import get_scheduler

    values: list[Any] = [Later(given) for given in inputs]
    one = get_scheduler()  # type: ignore[no-untyped-call]
    groups: dict[Any, dict[Any, list[int]]] = {}
    for i, given in enumerate(inputs):
        if hasattr(given, "__dask_graph__"):
            # without a global scheduler, bags and arrays use different ones, which one call cannot mix
            own = None if one else getattr(given, "__dask_scheduler__", None)
            # Dask returns results grouped by kind of collection, so group the inputs in the same way
            kind = getattr(given, "__dask_optimize__", None)
            groups.setdefault(own, {}).setdefault(kind, []).append(i)
    for kinds in groups.values():
        places = [i for places in kinds.values() for i in places]
        try:
            computed = dask.compute(*[inputs[i] for i in places])  # type: ignore[attr-defined, no-untyped-call]
        except Exception:
            continue
        for i, value in zip(places, computed, strict=True):
            values[i] = value
    return values
