"""The files around the code agree with each other: dependencies, named paths, the set-up's refusals."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import repae_lite

yaml = pytest.importorskip("yaml")
pytest.importorskip("packaging")
from packaging.requirements import Requirement  # noqa: E402
from packaging.specifiers import SpecifierSet  # noqa: E402
from packaging.utils import canonicalize_name  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"pytorch": "torch"}  # conda-forge's name: the name everywhere else
CONDA_EXTRAS = ("notebooks", "site", "eval", "dev")


def bounds(requirements):
    """Name -> bounds of requirement strings."""
    parsed = [Requirement(text) for text in requirements]
    return {canonicalize_name(r.name): r.specifier for r in parsed}


def declared(*extras):
    optional = PROJECT["optional-dependencies"]
    return bounds([*PROJECT["dependencies"], *(text for extra in extras for text in optional[extra])])


def project_files():
    """Every file of the project: what git tracks or would track; without git, all but .venv and runs."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listing.returncode == 0 and listing.stdout:
        paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        hidden = {".git", ".venv", "runs", "__pycache__"}
        hidden |= {".pytest_cache", ".ruff_cache", ".ipynb_checkpoints"}
        paths = [p for p in ROOT.rglob("*") if not hidden & set(p.relative_to(ROOT).parts)]
        paths = [p for p in paths if not p.parent.name.endswith(".egg-info")]
    return [path for path in paths if path.is_file()]


# ---------------------------------------------------------------- dependencies


def test_conda_environment_equals_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert "-e ." in pip and "pip" in conda
    found = bounds([*conda, *(entry for entry in pip if not entry.startswith("-"))])
    found = {CONDA_NAMES.get(name, name): specifier for name, specifier in found.items() if name != "pip"}
    assert found.pop("python") == SpecifierSet(PROJECT["requires-python"])
    assert found == declared(*CONDA_EXTRAS)


@pytest.mark.network
def test_conda_finds_the_environment():
    tools = ("conda", "mamba", "micromamba")
    conda = next(filter(None, map(shutil.which, tools)), None)
    if conda is None:
        pytest.skip(f"none of {', '.join(tools)} is installed")
    create = ["create"] if Path(conda).name == "micromamba" else ["env", "create"]
    done = subprocess.run(
        [conda, *create, "--dry-run", "--name", "repae_lite_dry_run", "--file", "environment.yml"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_constraints_are_plain_pins_that_cover_and_satisfy_pyproject():
    text = (ROOT / "constraints.txt").read_text()
    pins = {}
    for line in filter(None, (line.split("#")[0].strip() for line in text.splitlines())):
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.!]*)", line)
        assert match, f"constraints.txt: {line!r} is not NAME==VERSION (no address, path or +local)"
        name = canonicalize_name(match[1])
        assert name not in pins, f"constraints.txt names {name} twice"
        pins[name] = match[2]
    for name, specifier in declared(*PROJECT["optional-dependencies"]).items():
        assert name in pins, f"constraints.txt does not pin {name}"
        assert specifier.contains(pins[name]), f"{name}=={pins[name]} is outside {specifier}"


def test_torch_and_torchvision_work_together():
    import torch
    import torchvision

    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9], [3.0, 3.0, 4.0, 4.0]])
    kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), iou_threshold=0.5)
    assert kept.tolist() == [0, 2]


def test_licence():
    assert PROJECT["license"] == "MIT"
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License") and "repae_lite contributors" in text


def test_versions_agree():
    version = PROJECT["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.search(r"^## \[(\d.*?)\] - (\S+)$", changes, flags=re.M)
    assert repae_lite.__version__ == citation["version"] == released[1] == version
    assert str(citation["date-released"]) == released[2]
    assert citation["license"] == PROJECT["license"]
    assert "2504.10483" in citation["preferred-citation"]["doi"]


def test_ci_runs_its_command_on_every_supported_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["test"]
    assert PROJECT["requires-python"] == f">={job['strategy']['matrix']['python'][0]}"
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert workflow["permissions"] == {"contents": "read"} and job["timeout-minutes"] == 90
    assert all(re.search(r"@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)


def test_the_image_is_made_by_its_script_alone():
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    words = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    script = "reproduce/cluster/image.sh"
    ran = [rest for word, rest in words if word == "RUN"]
    assert ran == [f"sh {script} system", f"sh {script} project"]
    assert {word for word, _ in words} == {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "CMD"}
    (base,) = [rest for word, rest in words if word == "FROM"]
    cuda = re.search(r"^cuda-toolkit==(\d+\.\d+)\.", (ROOT / "constraints.txt").read_text(), flags=re.M)
    assert base.startswith(f"nvidia/cuda:{cuda[1]}.")
    done = subprocess.run(["sh", ROOT / script, "all"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == "image.sh: say what to install: system or project\n"


SCRIPTS = [".ci/run", ".ci/setup", "reproduce/cluster/slurm.sh", "reproduce/cluster/image.sh"]


def test_shells_can_read_the_scripts():
    scripts = [ROOT / name for name in SCRIPTS]
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which("shellcheck") or shutil.which(Path(sys.executable).parent / "shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_readme_names_the_licence_of_every_dependency():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = canonicalize_name(readme[readme.index("## Licences") :])
    assert [name for name in declared() if name not in table] == []


# ---------------------------------------------------------------- what texts name

PRIVATE = re.compile(
    "|".join([
        r"(?<![\w.~-])/(?:work|root|mnt|old_root)/\w",
        r"(?<![\w.~-])/home/[a-z]", r"(?<![\w.~-])/Users/[A-Za-z]",
        r"pypi\.org/simple", r"files\.pythonhosted", r"download\.pytorch\.org/whl", r"registry\.npmjs",
        r"conda\.anaconda\.org", r"(?:extra-)?index-url\s*[= ]\s*http",
    ]).encode()
)  # fmt: skip


def test_no_machine_paths_and_no_registry_addresses():
    found = []
    for path in project_files():
        if path.name == Path(__file__).name:
            continue
        for match in PRIVATE.finditer(path.read_bytes()):
            found.append(f"{path.relative_to(ROOT)}: {match[0].decode()}")
    assert not found, "\n".join(found)


def texts():
    """(file, markdown) of every .md file and of every notebook's markdown cells."""
    for path in project_files():
        if path.suffix == ".md":
            yield path, path.read_text(encoding="utf-8")
        elif path.suffix == ".ipynb":
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            yield path, "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def named_paths(text, tops):
    """Relative link targets, and `code` spans that look like a path into one of the folders `tops`."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    links = re.findall(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)", text)
    for target in links + re.findall(r'src="([^"]+)"', text):
        if not re.match(r"[a-z][a-z0-9+.-]*:|#|//", target):
            yield target.split("#")[0].replace("%20", " "), True
    for span in re.findall(r"(?<!`)`([^`\s]+)`(?!`)", text):
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", span) and "/" in span and span.split("/")[0] in tops:
            yield span, False


def test_paths_that_readme_documents_and_notebooks_name_exist():
    missing = []
    tops = {path.relative_to(ROOT).parts[0] for path in project_files()}
    for path, text in texts():
        for name, is_link in named_paths(text, tops):
            places = [path.parent / name] if is_link else [ROOT / name, path.parent / name]
            if not any(place.exists() for place in places):
                missing.append(f"{path.relative_to(ROOT)} names {name}, which does not exist")
    assert not missing, "\n".join(missing)


def test_make_targets_that_texts_name_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for path, text in texts():
        for target in re.findall(r"(?:^|`)\$? ?make ([a-z-]+)", text, flags=re.M):
            assert target in targets, f"{path.relative_to(ROOT)} names `make {target}`, which does not exist"


# ---------------------------------------------------------------- set-up

OLD = 'case "$2" in *version_info*3,*11*) exit 1 ;; *version_info*) echo 3.9.18 ;; esac'  # a Python too old
posix = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def bare(tmp_path):
    """A checkout without .venv, in a folder with a space; `bin` beside it comes first on the PATH."""
    root = tmp_path / "a check out"
    (root / ".ci").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", ".ci/setup"):
        shutil.copy(ROOT / name, root / name)
    (tmp_path / "bin").mkdir()
    return root


def stand_in(bare, name, script):
    path = bare.parent / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def make(bare, *arguments):
    outer = ("PYTHON", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    environment["PATH"] = f"{bare.parent / 'bin'}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        ["make", *arguments], cwd=bare, env=environment, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip


@posix
def test_help_is_the_default_and_sets_nothing_up(bare):
    done = make(bare)
    assert done.returncode == 0
    assert all(f"make {target}" in done.stdout for target in ("tour", "lab", "test", "clean"))
    assert not (bare / ".venv").exists()


@posix
def test_old_python_is_refused_in_one_sentence(bare):
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        stand_in(bare, name, OLD)
    done = make(bare, "test")
    assert done.returncode != 0
    sentence = done.stderr.splitlines()[0]
    assert sentence.startswith("repae_lite needs Python 3.11 or newer, but python3 is Python 3.9.18: ")
    assert len([line for line in done.stderr.splitlines() if not line.startswith("make")]) == 1
    assert not (bare / ".venv").exists()


@posix
def test_a_newer_python_is_found_and_a_full_disk_is_refused(bare):
    stand_in(bare, "python3", OLD)
    for name in ("python3.13", "python3.12"):
        stand_in(bare, name, "exit 127")
    stand_in(bare, "python3.11", f'exec "{sys.executable}" "$@"')
    stand_in(bare, "df", "echo head; echo 'one disk 9999999 9 1048576 99% /a mount'")
    done = make(bare, "test")
    assert done.returncode != 0
    assert re.match(r"Not enough disk space here: .* about \d+ GB free .* there are 1 GB\.", done.stderr)
    assert not (bare / ".venv").exists()


@posix
def test_a_python_that_does_not_run_is_named(bare):
    done = make(bare, "test", "PYTHON=no such python")
    assert done.returncode != 0
    assert done.stderr.startswith("PYTHON=no such python does not run")
