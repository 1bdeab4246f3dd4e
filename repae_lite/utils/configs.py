"""Configurations that were read from files, checked by pydantic before anything is built from them."""

import json
from typing import Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

Config = TypeVar("Config")


def checked_config(
    kind: type[Config], values: object, where: object, *, unknown: Literal["forbid", "ignore"] = "forbid"
) -> Config:
    """A dataclass from the JSON values of its fields, whose types must be the fields'; tuples are lists.

    Args:
        kind: the dataclass.
        values: of its fields.
        where: what to call their source in errors.
        unknown: what happens to values that are no fields.

    Raises:
        ValueError: another type, a missing or an unknown field, or values that `kind` itself refuses.
    """
    try:
        text = json.dumps(values, default=repr)
    except RecursionError:
        raise ValueError(f"{where} has a configuration that is nested too deeply: get it again") from None
    try:
        return TypeAdapter(kind).validate_json(text, strict=True, extra=unknown)
    except ValidationError as errors:
        error = errors.errors()[0]
    if not error["loc"]:
        reason = error["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where} has an impossible configuration: {reason}")
    field = error["loc"][0]
    if not isinstance(values, dict) or field not in values:
        raise ValueError(f"{where} has a configuration without {field}: get it again")
    raise ValueError(
        f"{where} has a configuration with {field}={values[field]!r} ({error['msg']}): this version builds "
        "no such network"
    )


def first_fault(errors: ValidationError) -> str:
    """Where pydantic first found something wrong, the value there, and what is wrong with it."""
    error = errors.errors()[0]
    return f"{'.'.join(map(str, error['loc']))} = {error['input']!r}: {error['msg']}"
