"""The house stands: rooms import only from rooms below, and the public face opens."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import repae_lite

PACKAGE = Path(repae_lite.__file__).parent
FLOOR = {room: floor for floor, room in enumerate(repae_lite.ROOMS)}
ARROWS = 30  # between rooms: more of them, and a room no longer has one idea


def arrows() -> dict[tuple[str, str], set[str]]:
    """Imports from one room to another: (from, to) -> the files that do so."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in PACKAGE.glob("*/**/*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            if names == ["repae_lite"]:
                names = [f"repae_lite.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                other = re.match(r"repae_lite\.(\w+)", name or "")
                if other and other[1] in FLOOR and other[1] != room:
                    found.setdefault((room, other[1]), set()).add(str(path.relative_to(PACKAGE)))
    return found


def test_every_folder_is_a_room_and_says_what_it_is():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(repae_lite.ROOMS) and len(folders) <= 10
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no docstring"


def test_imports_go_down():
    for (room, other), files in arrows().items():
        assert FLOOR[other] < FLOOR[room], f"{', '.join(files)} in {room} import from {other}, which is above"
    assert len(arrows()) <= ARROWS, sorted(arrows())


def fresh(code: str) -> None:
    """Runs code in a Python of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(set(repae_lite.__all__)))
def test_every_public_name_resolves(name):
    assert getattr(repae_lite, name) is not None
    assert name in dir(repae_lite)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'SIT'"):
        _ = repae_lite.SIT


def test_the_face_is_light():
    fresh("import repae_lite, sys; sys.exit('torch' in sys.modules)")
    fresh("import repae_lite, sys; repae_lite.VAEConfig; sys.exit('torch' not in sys.modules)")


def test_help_and_image_workers_need_no_torch():
    rooms = ", ".join(f"repae_lite.{room}" for room in repae_lite.ROOMS)
    fresh(
        f"import {rooms}, repae_lite.data.image_files, repae_lite.commands.main, sys\n"
        "sys.exit('torch' in sys.modules)"
    )
    fresh(
        "import contextlib, io, sys\nfrom repae_lite.commands.main import main\n"
        "for words in (['--help'], ['train-repae', '--help'], ['preprocess', '--help']):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        main(words)\n"
        "sys.exit('torch' in sys.modules)"
    )
