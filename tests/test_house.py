"""The house stands: every module is on a floor of repae_lite/__init__.py and imports only from floors below."""

import ast
import re
from pathlib import Path

import repae_lite

PACKAGE = Path(repae_lite.__file__).parent
NEIGHBOURS = {("method_map", "figures")}


def floors() -> dict[str, int]:
    rows = re.findall(r"^    (ground|\d)\s+([\w, ]+?)(?:  .*)?$", repae_lite.__doc__, re.MULTILINE)
    return {name: 0 if floor == "ground" else int(floor) for floor, names in rows for name in names.split(", ")}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("repae_lite"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names if alias.name in floors()}
    return found


def test_every_module_has_a_floor():
    modules = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert modules == set(floors())


def test_imports_go_down():
    floor = floors()
    for name in floor:
        for other in imports(PACKAGE / f"{name}.py"):
            assert floor[other] < floor[name] or (name, other) in NEIGHBOURS, f"{name} imports {other}"


def test_every_module_says_what_it_is_and_stays_readable():
    for path in PACKAGE.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), f"{path.name} has no docstring"
        assert len(text.splitlines()) <= 500, f"{path.name} is too long to be one idea"
