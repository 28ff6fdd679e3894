"""Feste: a compiler and runtime for graphs of LLM calls.

Write ordinary calls to LLM backends, prompts and Python tools; each becomes a node of a graph. Feste
optimizes the graph, batching first of all, and runs it on one machine or on Dask.

>>> import feste
>>> from feste.prompt import Prompt
>>> with feste.context.set(eager=True):
...     print(Prompt("Hello {{message}}!")(message="world"))
Hello world!
"""

from importlib import import_module
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

__path__ = extend_path(__path__, __name__)
__version__ = "0.1.0"

if TYPE_CHECKING:
    from feste import backend, context, errors, store
    from feste._compute import acompute, as_completed, compute, explain, last_report, map, stream
    from feste.delayed import FesteDelayed, task
    from feste.hookspecs import hookimpl
    from feste.prompt import ChatPrompt, Prompt

__all__ = [
    "ChatPrompt",
    "FesteDelayed",
    "Prompt",
    "__version__",
    "acompute",
    "as_completed",
    "backend",
    "compute",
    "context",
    "errors",
    "explain",
    "hookimpl",
    "last_report",
    "map",
    "store",
    "stream",
    "task",
]

# Imported on first use, so that `import feste` stays fast.
_HOMES = {
    "ChatPrompt": "feste.prompt",
    "FesteDelayed": "feste.delayed",
    "Prompt": "feste.prompt",
    "acompute": "feste._compute",
    "as_completed": "feste._compute",
    "compute": "feste._compute",
    "explain": "feste._compute",
    "hookimpl": "feste.hookspecs",
    "last_report": "feste._compute",
    "map": "feste._compute",
    "stream": "feste._compute",
    "task": "feste.delayed",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in ("backend", "context", "errors", "store"):
        value = import_module(f"feste.{name}")
    else:
        raise AttributeError(f"module 'feste' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
