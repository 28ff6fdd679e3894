"""Backends: LLM providers, their operations, and requests as plain data."""

from pkgutil import extend_path

from feste.backend.address import is_local, proxy_for, server_url
from feste.backend.arguments import as_count, as_messages, as_params, as_text
from feste.backend.base import Backend, create
from feste.backend.batching import BatchRule, Outcome, PrefixRule, SampleRule
from feste.backend.bodies import (
    ACCEPT_ENCODING,
    ERROR_BYTES,
    MOST_BYTES,
    Body,
    from_json,
    is_deep,
    read_body,
)
from feste.backend.clients import PerLoop
from feste.backend.default_halves import operation
from feste.backend.fallback import FALL_BACK_ON
from feste.backend.limits import Limits
from feste.backend.operations import Call, OnChunk, Operation
from feste.backend.outputs import instance_of
from feste.backend.params import Params
from feste.backend.prices import price_of
from feste.backend.profile import Latency, Price, Profile, PromptCache
from feste.backend.rate_headers import RateLimit, kept_headers, rate_limits
from feste.backend.redaction import redact
from feste.backend.reply import Message, Reply
from feste.backend.request import Request, Response, Usage, canonical
from feste.backend.secret import BlankedPieces, Secret, redact_record
from feste.backend.statuses import error_for_status, retry_after
from feste.draw import Determinism
from feste.plain import plain
from feste.wording import a_kind

__path__ = extend_path(__path__, __name__)

__all__ = [
    "ACCEPT_ENCODING",
    "ERROR_BYTES",
    "FALL_BACK_ON",
    "MOST_BYTES",
    "Backend",
    "BatchRule",
    "BlankedPieces",
    "Body",
    "Call",
    "Determinism",
    "Latency",
    "Limits",
    "Message",
    "OnChunk",
    "Operation",
    "Outcome",
    "Params",
    "PerLoop",
    "PrefixRule",
    "Price",
    "Profile",
    "PromptCache",
    "RateLimit",
    "Reply",
    "Request",
    "Response",
    "SampleRule",
    "Secret",
    "Usage",
    "a_kind",
    "as_count",
    "as_messages",
    "as_params",
    "as_text",
    "canonical",
    "create",
    "error_for_status",
    "from_json",
    "instance_of",
    "is_deep",
    "is_local",
    "kept_headers",
    "operation",
    "plain",
    "price_of",
    "proxy_for",
    "rate_limits",
    "read_body",
    "redact",
    "redact_record",
    "retry_after",
    "server_url",
]
