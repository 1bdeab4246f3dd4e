"""YAML files with names and values, written by hand.

A value is what is written: YAML's own guesses, by which `no` is False, 007 seven and 2026-01-01 a date, are
not made here. `converted` reads a value as the type that its option has.
"""

from pathlib import Path
from typing import Any

import yaml

LARGEST = 1_000_000  # bytes, of a file that somebody wrote by hand
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
PLAIN = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """A YAML file with names and values: strings, lists, sections (dicts), None where nothing is written.

    Args:
        path: of the file, in UTF-8 or UTF-16.
        what: to call it in errors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: something else in it; a name that is set twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the {what} {path} does not exist: check the path")
    if path.stat().st_size > LARGEST:
        raise ValueError(
            f"the {what} {path} is larger than {LARGEST:,} bytes: give a file of names and values"
        )
    try:
        node = yaml.compose(path.read_bytes(), Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = f"line {mark.line + 1}: {error.problem}" if mark else error.problem
        raise ValueError(f"the {what} {path} is not YAML ({reason}): see reproduce/presets") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the {what} {path} is not YAML ({reason}): see reproduce/presets") from None
    except RecursionError:
        raise ValueError(
            f"the {what} {path} is nested too deeply: give names and values, one a line"
        ) from None
    content = None if node is None else _plain(node, f"the {what} {path}", set())
    if not isinstance(content, dict):
        kind = {str: "string", list: "list"}.get(type(content))
        holds = f"holds a {kind}" if kind else "holds nothing"
        raise ValueError(f"the {what} {path} {holds}: give names and values, one a line")
    return content


def _plain(node: yaml.Node, where: str, seen: set[int]) -> Any:
    """What a part of the file says; `where` is for errors, `seen` are the lists and sections so far."""
    here = f"{where}, line {node.start_mark.line + 1}"
    if node.tag not in PLAIN:
        raise ValueError(f"{here}: the tag {node.tag} is not known here, take it out")
    if isinstance(node, yaml.ScalarNode):
        if not node.value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in node.value):
            raise ValueError(f"{here}: {node.value!r} is no text")
        return None if node.style is None and node.value.lower() in ("", "~", "null") else node.value
    if id(node) in seen:  # it may even hold itself
        raise ValueError(f"{here}: this list or section is used a second time by its &name, write it out")
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        return [_plain(each, where, seen) for each in node.value]
    found = {}
    for key, value in node.value:
        here = f"{where}, line {key.start_mark.line + 1}"
        name = _plain(key, where, seen)
        if not isinstance(name, str):
            raise ValueError(f"{here}: give a word as a name")
        if name in found:
            raise ValueError(f"{here}: {name!r} is set a second time, take one out")
        found[name] = _plain(value, where, seen)
    return found


def converted(value: Any, kind: type, what: str) -> Any:
    """A value of `read_yaml` as the type of its option, as the command line would read it.

    Numbers may be written as 1e3 or 1000.0 where a whole one is asked for; true, yes and on are the same.

    Raises:
        ValueError: it is of another type.
    """
    if isinstance(value, str):
        try:
            if kind is bool:
                return WORDS[value.lower()]
            if kind is int and not value.lstrip("+-").isdecimal():
                number = float(value)
                if not number.is_integer() or abs(number) > 2**53:
                    raise ValueError
                return int(number)
            if kind is float and value.lower().endswith((".inf", ".nan")):  # YAML's spelling
                value = value.replace(".", "")
            return kind(value)
        except (KeyError, ValueError):
            pass
    shown = repr(value) if value is None or isinstance(value, str) else f"a {type(value).__name__}"
    raise ValueError(f"{what} is {shown}: it must be of type {kind.__name__}")
