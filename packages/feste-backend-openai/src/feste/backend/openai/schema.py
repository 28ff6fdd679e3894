"""Support ``output=Model``: make the JSON schema of a pydantic model, in the providers' subset.

The SDK can make such schemas too, but importing it takes half a second of CPU and requests are
prepared without it. Pydantic is not imported here, because the user who wrote the model has
imported it.
"""

from __future__ import annotations

import re
import sys
import weakref
from typing import Any

from feste.backend import a_kind
from feste.errors import ConfigError, ParameterError

__all__ = ["check_model", "response_format", "strict_schema"]

_made: weakref.WeakKeyDictionary[type, dict[str, Any]] = weakref.WeakKeyDictionary()


def check_model(output: Any) -> None:
    """Check that ``output`` is a pydantic model.

    :param output: the argument.
    :raises ParameterError: if it is not a class derived from ``pydantic.BaseModel``.
    """
    pydantic = sys.modules.get("pydantic")  # imported already if there is a model
    if pydantic is None or not (
        isinstance(output, type) and issubclass(output, pydantic.BaseModel)
    ):
        shown = output.__name__ if isinstance(output, type) else a_kind(output)
        raise ParameterError(
            f"output must be a class derived from pydantic.BaseModel, not {shown}; for other JSON "
            "give response_format= and read the text"
        )


def response_format(model: Any) -> dict[str, Any]:
    """Return the parameter ``response_format`` that requests instances of a model.

    :param model: a class derived from ``pydantic.BaseModel``.
    :raises ConfigError: if the model has no JSON schema.
    """
    made = _made.get(model)
    if made is None:
        try:
            schema = model.model_json_schema()
        except Exception as error:  # of pydantic, which is not imported here
            raise ConfigError(f"{model.__name__} has no JSON schema: {error}") from None
        name = re.sub(r"[^A-Za-z0-9_-]", "_", model.__name__)[:64]
        described = {"name": name, "strict": True, "schema": strict_schema(schema)}
        made = _made[model] = {"type": "json_schema", "json_schema": described}
    return made


def strict_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON schema in the strict subset that providers enforce during generation.

    Objects require all their properties and allow no others, unions are ``anyOf``, there are no
    defaults, and a reference has no siblings.

    :param schema: a schema made by pydantic.

    >>> strict_schema({"type": "object", "properties": {"n": {"type": "integer", "default": 1}}})
    ... # doctest: +NORMALIZE_WHITESPACE
    {'type': 'object', 'properties': {'n': {'type': 'integer'}},
     'additionalProperties': False, 'required': ['n']}
    """
    root = schema
    if "$ref" in schema:  # a recursive model; the outermost schema must be an object
        root = {**_target(schema, schema["$ref"]), "$defs": schema["$defs"]}
    made: dict[str, Any] = _strict(root, schema, ())
    return made


def _strict(part: Any, root: dict[str, Any], inside: tuple[str, ...]) -> Any:
    """Make one part strict; ``inside`` are the references being expanded around it."""
    if isinstance(part, list):
        return [_strict(item, root, inside) for item in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return _referred(part, root, inside)
    if len(part.get("allOf", ())) == 1:
        part = {**{k: v for k, v in part.items() if k != "allOf"}, **part["allOf"][0]}
        return _strict(part, root, inside)
    made: dict[str, Any] = {}
    for name, value in part.items():
        if name in ("properties", "$defs"):  # the keys inside are users' names, not keywords
            made[name] = {key: _strict(item, root, inside) for key, item in value.items()}
        elif name == "oneOf":
            made["anyOf"] = _strict(value, root, inside)
        elif name in ("enum", "const", "examples"):
            made[name] = value
        elif name not in ("default", "discriminator"):
            made[name] = _strict(value, root, inside)
    if made.get("type") == "object":
        made.setdefault("additionalProperties", False)
    if "properties" in made:
        made["required"] = list(made["properties"])
    return made


def _referred(part: dict[str, Any], root: dict[str, Any], inside: tuple[str, ...]) -> Any:
    """Expand a reference that has siblings, unless that would recurse without end."""
    name = part["$ref"]
    beside = {k: v for k, v in part.items() if k not in ("$ref", "default")}
    if not beside or name in inside:
        return {"$ref": name}
    return _strict({**_target(root, name), **beside}, root, (*inside, name))


def _target(root: dict[str, Any], reference: str) -> dict[str, Any]:
    found: Any = root
    for name in reference.removeprefix("#/").split("/"):
        found = found[name.replace("~1", "/").replace("~0", "~")]
    return dict(found)
