"""Backends: LLM providers, their operations, and requests as plain data."""

from pkgutil import extend_path

from feste.backend.base import Backend, create
from feste.backend.default_halves import operation
from feste.backend.limits import Limits
from feste.backend.operations import BatchRule, Call, Operation
from feste.backend.params import Params
from feste.backend.reply import Message, Reply
from feste.backend.request import Request, Response, Usage
from feste.backend.secret import Secret, redact
from feste.backend.statuses import error_for_status, retry_after
from feste.draw import Determinism

__path__ = extend_path(__path__, __name__)

__all__ = [
    "Backend",
    "BatchRule",
    "Call",
    "Determinism",
    "Limits",
    "Message",
    "Operation",
    "Params",
    "Reply",
    "Request",
    "Response",
    "Secret",
    "Usage",
    "create",
    "error_for_status",
    "operation",
    "redact",
    "retry_after",
]
