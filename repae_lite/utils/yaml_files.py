"""YAML files with names and values, written by hand."""

from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: Path, what: str) -> dict:
    """A YAML file with names and values; `what` is for errors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: something else in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the {what} {path} does not exist: check the path")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the {what} {path} is not YAML ({reason}): see reproduce/presets") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"the {what} {path} holds a {kind}: give names and values, one a line")
    return content


def converted(value: Any, kind: type, what: str) -> Any:
    """A YAML value as the type of its option: 1e-4 is a string to YAML, and 1 no float.

    Raises:
        ValueError: it is of another type.
    """
    try:
        fits = isinstance(value, str | int | float) and isinstance(value, bool) == (kind is bool)
        if fits and (kind is not int or float(value).is_integer()):
            return kind(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{what} is {value!r}: it must be of type {kind.__name__}")
