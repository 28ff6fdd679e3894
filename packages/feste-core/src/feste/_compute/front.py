"""The functions that users call; each collects the graph and then runs the steps in order."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

from feste import blocking, context, draw
from feste._compute.arrivals import Mailbox
from feste._compute.results import forget_report, hand_back
from feste._compute.steps import (
    make_plan,
    make_run,
    program_of,
    run_elsewhere,
    wait_for,
)
from feste.budget import Budget
from feste.context import Settings
from feste.delayed import FesteDelayed
from feste.garbage import no_collection
from feste.graph import FesteGraph
from feste.optimization import Optimizer
from feste.report import Explanation, RunReport
from feste.report.explanation.actual import as_before
from feste.report.progress import shown
from feste.scheduler.choice import choose, kind_of
from feste.scheduler.driver import driver
from feste.scheduler.executor import Executor
from feste.scheduler.run import Run

__all__ = ["acompute", "acompute_one", "compute", "explain"]

#: What is told besides of plans with prompts that are made of answers.
_BY_BYTES = (
    ", if a prompt that is made while it runs has as many tokens as the answers in it; a token for each "
    "of its bytes is set aside before it is sent"
)


def compute(*args: Any, **settings: Any) -> tuple[Any, ...]:
    """Run the nodes in the arguments, and return the arguments with values in place of nodes.

    :param args: lazy values, and lists, dicts, sets and dataclasses that contain them; plain values
        are returned unchanged.
    :param settings: settings for this run, which override all others; see :mod:`feste.context`.
    :returns: one value for each argument, in its shape.
    :raises RunFailed: if a node failed; the computed values are in its ``partial``.
    :raises ConfigError: if a setting, key or argument is wrong; nothing was sent then.
    :raises BlockingCallError: if blocking here would stop Feste itself.

    >>> import feste
    >>> @feste.task
    ... def add(a: int, b: int) -> int:
    ...     return a + b
    >>> feste.compute([add(1, 2), add(3, 4)], {"sum": add(5, 6)})
    ([3, 7], {'sum': 11})
    """
    chosen = context.settings(**settings)
    graph, _, repack = FesteGraph.collect(*args, scope=draw.scope())
    if not graph.outputs:
        return repack([])
    forget_report()
    with blocking.waiting():
        hands = choose(chosen)
        plan = make_plan(graph, chosen, hands)
        if not isinstance(hands, Executor):
            return run_elsewhere(hands, plan, repack, chosen)
        run = make_run(program_of(plan), chosen, hands)
        wait_for(run, repack, chosen)
    return hand_back(run, repack)


async def acompute(*args: Any, **settings: Any) -> tuple[Any, ...]:
    """Do what :func:`compute` does, without blocking the running event loop.

    Cancelling it, as Ctrl-C does under ``asyncio.run``, starts nothing new and gives up work under way;
    nodes keep the answers that were paid.

    :param args: as for :func:`compute`.
    :param settings: as for :func:`compute`.
    :returns: as :func:`compute`.
    :raises RunFailed: as :func:`compute`.

    >>> import asyncio, feste
    >>> double = feste.task(lambda x: 2 * x)
    >>> asyncio.run(acompute(double(21)))
    (42,)
    """
    chosen = context.settings(**settings)
    graph, _, repack = FesteGraph.collect(*args, scope=draw.scope())
    if not graph.outputs:
        return repack([])
    forget_report()
    with blocking.waiting(awaited=True):
        hands = await asyncio.to_thread(choose, chosen)  # may start a cluster
        plan = await asyncio.to_thread(make_plan, graph, chosen, hands)
        if not isinstance(hands, Executor):
            return await asyncio.to_thread(run_elsewhere, hands, plan, repack, chosen)
        program = await asyncio.to_thread(program_of, plan)
        run = await asyncio.to_thread(make_run, program, chosen, hands)
        await _ended(run, chosen)
    return hand_back(run, repack)


async def _ended(run: Run, settings: Settings) -> None:
    """Submit a run and wait until it has ended; stop it if the waiting is cancelled."""
    mail = Mailbox()
    run.on_finish(lambda: mail.put(run))
    try:
        with shown(run, settings["progress"], awaited=True):
            driver().submit(run)
            await mail.aget()
    except BaseException:  # cancelled, or the loop was closed in the meantime
        driver().stop(run, 0.0)
        raise


async def acompute_one(node: FesteDelayed[Any]) -> Any:
    """Return the value of one node; implements ``await node``.

    :param node: the node.
    """
    return (await acompute(node))[0]


def explain(*args: Any, analyze: RunReport | None = None, **settings: Any) -> Explanation:
    """Describe what :func:`compute` would do, without sending anything.

    :param args: as for :func:`compute`.
    :param analyze: the report of a run of these nodes: then the plan is the one of before that run,
        and what happened stands beside each estimate.
    :param settings: as for :func:`compute`.
    :returns: the plan with its figures; print it.
    :raises ConfigError: if ``analyze`` is no report, or one of other nodes.

    >>> from feste.testing import FakeBackend
    >>> llm = FakeBackend()
    >>> explanation = explain([llm.complete(f"word {i}") for i in range(40)])
    >>> explanation.calls, explanation.requests
    (40, 3)
    """
    chosen = context.settings(**settings)
    graph, _, _ = FesteGraph.collect(*args, scope=draw.scope())
    if analyze is not None:
        graph = as_before(graph, analyze, is_empty=not args)
    note = ""
    known = chosen["store"] or chosen["cache"]
    if known:
        note = f"answers in {known} are not bought again; all calls are counted here"
    if not inspect.isclass(kind_of(chosen["scheduler"])):
        note = "a plain get function runs this graph: only the batches planned here are formed"
    with no_collection():
        explained = Explanation(Optimizer().run(graph, chosen), note, analyze)
    told = [note, *(_told_of(budget, explained) for budget in context.caps(chosen))]
    explained.note = "; ".join(filter(None, told))
    return explained


def _told_of(budget: Budget, explained: Explanation) -> str:
    """Tell whether a plan fits into what is left of a budget.

    :param budget: the budget.
    :param explained: the plan.
    """
    needs = explained.dollars
    if budget.unit == "tokens":
        needs = explained.input_tokens + explained.output_tokens
    left, later = budget.left, any(row.unknown for row in explained.rows)
    whole = f"the budget has {budget.shown(left)} left"
    if budget.unit == "dollars" and explained.unpriced:
        return f"{whole}, and a price is not known, which is refused"
    if needs.worst is not None and needs.worst <= left:
        most = f"{whole}, and the plan needs at most {budget.shown(needs.worst)}"
        return f"{most}{_BY_BYTES if later else ''}"
    if needs.likely is not None and needs.likely > left:
        return f"{whole}, and the plan needs about {budget.shown(needs.likely)}: it will stop there"
    if needs.worst is None:
        return f"{whole}; what the plan needs at most is not known"
    return f"{whole}, and the plan may need up to {budget.shown(needs.worst)}: it may stop there"
