"""Errors that can be known before a graph runs."""

from __future__ import annotations

from collections.abc import Iterable

from feste.backend import Backend
from feste.context import Settings, caps
from feste.errors import ConfigError, FesteError
from feste.node import PENDING, Node
from feste.optimization.analysis.profiles import Profiles
from feste.scheduler.executor import Executor
from feste.scheduler.halves import unknown_price
from feste.scheduler.hands.processes import check_picklable

__all__ = ["check_nodes"]


def check_nodes(nodes: Iterable[Node], settings: Settings, hands: Executor | None = None) -> None:
    """Raise what would keep a node from running, before anything is sent.

    :param nodes: the nodes that will run.
    :param settings: the settings of the run.
    :param hands: the executor of the run, which knows where requests are sent from; None for here.
    :raises FesteError: for the first node that cannot run, with its origin.
    """
    checked = set()
    priced = set[tuple[int, str]]()
    profiles = Profiles()
    in_dollars = any(budget.unit == "dollars" for budget in caps(settings))
    sends = settings["cache_mode"] != "replay-only"
    for node in nodes:
        if node.value is not PENDING:
            continue
        call = node.call
        try:
            if call is not None:
                if not sends and settings["cache"] is None:
                    raise ConfigError(
                        'cache_mode="replay-only" sends nothing, and no cache is named: '
                        'cache="answers.db", or FESTE_CACHE'
                    )
                for one in (call, *(other for other, _ in call.rest)) if sends else ():
                    if id(one.client) not in checked:  # clients may be unhashable
                        checked.add(id(one.client))
                        _check_client(one.client, hands)
                    model = one.model(node.args)  # empty if it is not known before the run
                    if in_dollars and model and (id(one.client), model) not in priced:
                        priced.add((id(one.client), model))
                        if profiles.price(one.client, model) is None:
                            raise unknown_price(one, model)
            elif getattr(node.op, "executor", "") == "process":
                check_picklable(node)
            elif getattr(node.op, "once", False) and settings["store"] is None:
                raise ConfigError(
                    f'{node.op.name} has once=True, which needs a store: store="runs.db"'
                )
        except FesteError as error:
            if not error.origin:
                error.origin = node.where
            raise


def _check_client(client: Backend, hands: Executor | None) -> None:
    if hands is None:
        client.preflight()
    else:
        hands.preflight([client])
