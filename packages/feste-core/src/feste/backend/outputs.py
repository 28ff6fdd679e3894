"""Make an instance of the user's own model of an answer, and tell a mistake in the model apart."""

from __future__ import annotations

import traceback
from types import TracebackType
from typing import Any

from feste.backend.redaction import redact
from feste.backend.secret import Secret
from feste.errors import OutputMismatch
from feste.wording import class_name

__all__ = ["instance_of"]

#: Packages whose frames surround those of a model's own validators.
_NOT_THE_USERS = ("feste", "pydantic")


def instance_of(model: Any, text: str, *secrets: Secret | None) -> Any:
    """Return an instance of a pydantic model of a text that holds it as JSON.

    :param model: the model.
    :param text: the answer.
    :param secrets: keys that are redacted in errors.
    :raises ValueError: from pydantic, if the answer does not fit the model.
    :raises OutputMismatch: if a validator of the model raised anything else, which is a mistake in
        it, and no fault of the answer.
    """
    try:
        return model.model_validate_json(text)
    except ValueError:
        raise
    except Exception as error:
        kind, begin = type(error), _in_the_model(error)
        at = f" at {begin.tb_frame.f_code.co_filename}:{begin.tb_lineno}" if begin else ""
        said = redact(f"{class_name(kind)}: {error}", *secrets, limit=200)
        told = OutputMismatch(
            f"the validators of {model.__name__} raised {said}{at}. Correct them: the node, and a store, "
            "keep the answer, so computing again asks nothing anew"
        )
        trace = traceback.format_exception(kind, error, begin or error.__traceback__)
        told.traceback = redact("".join(trace), *secrets, limit=4_000)
        raise told from error


def _in_the_model(error: Exception) -> TracebackType | None:
    """Return where a traceback enters the user's code."""
    step = error.__traceback__
    while step is not None:
        package = str(step.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in _NOT_THE_USERS:
            return step
        step = step.tb_next
    return None
