"""Run this folder's numbered notebooks and put their results on one page: the runner behind `make tour`.

Each notebook runs in a fresh kernel of this Python; the executed copy goes to runs/tour/NAME.ipynb and
appears there only when it is complete. runs/tour/pages/index.html then shows, for every notebook, the minutes
it took and what it found (cells tagged `finding`, `signature` or `scoreboard`); the whole of it is one click
away. `site/build.py` makes these pages as it makes the project's.

    python notebooks/tour.py                      all notebooks, in order
    python notebooks/tour.py --only 03 --only 05  some of them; the page keeps the results of earlier runs
    python notebooks/tour.py --smoke              few steps: does everything run?
    python notebooks/tour.py --param seed=1       set a parameter in each notebook that has it
"""

import argparse
import ast
import contextlib
import datetime
import hashlib
import os
import platform
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

TITLE = "REPA-E, the tour"
CLAIM = (
    "A VAE and a latent diffusion transformer can be tuned together, end to end, when the "
    "representation-alignment loss is what reaches the VAE and the diffusion loss is kept from it."
)


class UserError(Exception):
    """A mistake that one sentence explains; it becomes exit code 2."""


class Interrupted(BaseException):
    """A signal asked for a stop; `number` is which."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


# ---------------------------------------------------------------- choosing


def choose(folder: Path, only: list[str]) -> list[Path]:
    """The numbered notebooks of `folder` in order; with `only`, those that start with one of its entries.

    Raises:
        UserError: there is none, or an entry of `only` matches none.
    """
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise UserError(f"There are no numbered notebooks (such as 01_vae.ipynb) in {folder.name}/.")
    wanted = [part.removesuffix(".ipynb") for entry in only for part in entry.split(",") if part]
    for prefix in wanted:
        if not any(path.stem.startswith(prefix) for path in found):
            names = ", ".join(path.stem for path in found)
            raise UserError(f"--only {prefix} matches no notebook; there are {names}.")
    return [path for path in found if not wanted or any(path.stem.startswith(prefix) for prefix in wanted)]


def parameters_of(path: Path, given: dict[str, object]) -> dict[str, object]:
    """Those of the `given` parameters that the notebook's `parameters` cell declares."""
    import papermill

    declared = papermill.inspect_notebook(str(path)) if given else {}
    return {name: given[name] for name in declared if name in given}


def parse_parameter(text: str) -> tuple[str, object]:
    """`NAME=VALUE` as a pair; VALUE is a Python literal (number, True, list ...) or else plain text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


# ---------------------------------------------------------------- running


@dataclass
class Run:
    """One notebook being executed: what the terminal line shows, and the handle that stops it."""

    name: str
    cells: int = 0
    cell: int = 0  # code cells begun
    started: float = field(default_factory=time.monotonic)
    client: object = None
    notebook: object = None
    error: Exception | None = None
    stalled: bool = False
    # When the kernel was last looked at, and its processor time then.
    looked: tuple[float, float] = (0.0, 0.0)
    stderr: object = field(default_factory=tempfile.TemporaryFile)  # the kernel's: noise, unless it dies

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def line(self) -> str:
        minutes, seconds = divmod(int(self.seconds()), 60)
        return f"{self.name}  cell {self.cell}/{self.cells}  {minutes:02d}:{seconds:02d}"

    def pid(self) -> int | None:
        """The kernel's, when there is one."""
        return getattr(getattr(getattr(self.client, "km", None), "provisioner", None), "pid", None)

    def watch(self, patience: float) -> None:
        """Kill a kernel that has been idle for `patience` seconds: papermill may have missed a cell's end."""
        now = time.monotonic()
        if not self.cell or now - self.looked[0] < patience:
            return
        try:
            import psutil  # comes with the kernel

            times = psutil.Process(self.pid()).cpu_times()
        except (ImportError, ValueError, psutil.Error):
            return
        before, self.looked = self.looked, (now, times.user + times.system)
        if before[0] and self.looked[1] - before[1] < patience / 100:
            self.stalled = True
            self.kill_kernel()

    def kill_kernel(self) -> None:
        """Kill the kernel and what it started; harmless when there is none (yet)."""
        if pid := self.pid():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # a kernel leads its own process group


def engine(run: Run):
    """A papermill engine that tells `run` which cell is on and which client holds the kernel."""
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import NBClientEngine

    class TourEngine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, start_timeout=120, **_):
            run.cells = sum(cell.cell_type == "code" for cell in nb_man.nb.cells)
            begin = nb_man.cell_start

            def cell_start(cell, cell_index=None, **options):
                run.cell += cell.cell_type == "code"
                begin(cell, cell_index, **options)

            nb_man.cell_start = cell_start
            run.client = PapermillNotebookClient(
                nb_man, kernel_name=kernel_name, timeout=None, startup_timeout=start_timeout
            )
            return run.client.execute(stderr=run.stderr)

    return TourEngine


class Progress:
    """The terminal line of the running notebook: rewritten in place, or else repeated every half minute."""

    def __init__(self, stream=sys.stdout):
        self.stream, self.live, self.last = stream, stream.isatty(), time.monotonic()

    def show(self, text: str) -> None:
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", file=self.stream, flush=True)
        elif time.monotonic() - self.last > 30:
            self.end(text)

    def end(self, text: str) -> None:
        """Write a line that stays."""
        print(("\r\x1b[K" if self.live else "") + text, file=self.stream, flush=True)
        self.last = time.monotonic()


def execute(
    path: Path,
    out: Path,
    parameters: dict[str, object],
    progress: Progress,
    patience: float = 120,
    again: bool = True,
) -> str | None:
    """Run one notebook into out/NAME.ipynb; if it fails, into out/NAME.failed.ipynb, and return why.

    A kernel that has been idle for `patience` seconds in the middle of a cell is killed, and the notebook is
    started over, once. Only finished files ever get their final names; an interruption leaves none behind.

    Raises:
        Interrupted: a signal came; the kernel is gone by then.
    """
    import nbformat
    import papermill
    from papermill.engines import papermill_engines

    from repae_lite.utils.files import write_text

    final, failed = out / f"{path.stem}.ipynb", out / f"{path.stem}.failed.ipynb"
    partial = out / f"{path.stem}.ipynb.partial"
    run = Run(path.stem)
    papermill_engines.register("tour", engine(run))

    def work() -> None:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The specified file .* does not end in one of")
                run.notebook = papermill.execute_notebook(
                    str(path), str(partial), parameters, engine_name="tour", kernel_name="python3",
                    language="python", progress_bar=False, cwd=str(path.parent),
                )  # fmt: skip
        except Exception as error:
            run.error = error

    # papermill runs in a thread so that this one is free to show the time and to hear Ctrl-C.
    worker = threading.Thread(target=work, daemon=True)
    try:
        worker.start()
        while worker.is_alive():
            progress.show(run.line())
            run.watch(patience)
            worker.join(0.25)
    except Interrupted:
        for _ in range(60):  # the kernel may only just be starting: keep killing until papermill has given up
            run.kill_kernel()
            worker.join(0.25)
            if not worker.is_alive():
                break
        partial.unlink(missing_ok=True)
        progress.end(run.line())
        raise

    if run.stalled and again:
        partial.unlink(missing_ok=True)
        progress.end(f"{run.line()}  the kernel stopped answering: starting over")
        return execute(path, out, parameters, progress, patience, again=False)
    sentence = explain(run) if run.error else None
    if run.notebook is None and partial.exists():
        run.notebook = nbformat.read(partial, as_version=4)
    if run.notebook is not None:
        drop_dead_widgets(run.notebook)
        note = {
            "seconds": round(run.seconds(), 1),
            "finished": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "smoke": "CI" in os.environ,
            "parameters": {name: repr(value) for name, value in parameters.items()},
            "source": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        run.notebook.metadata["tour"] = note | ({"error": sentence} if sentence else {})
        run.notebook.metadata.get("papermill", {}).pop("output_path", None)
        run.notebook.metadata.get("papermill", {})["input_path"] = path.name
        write_text(failed if sentence else final, nbformat.writes(run.notebook))
    partial.unlink(missing_ok=True)
    if not sentence:
        failed.unlink(missing_ok=True)
    progress.end(f"{run.line()}  {'failed' if sentence else 'done'}")
    return sentence


VIEW, STATE = (f"application/vnd.jupyter.widget-{part}+json" for part in ("view", "state"))


def drop_dead_widgets(notebook) -> None:
    """Removes widgets that nothing moves without their kernel; their picture or their text stays."""
    models = notebook.metadata.get("widgets", {}).get(STATE, {}).get("state", {})

    def inside(model: str) -> set[str]:
        """A model and all that it is made of."""
        found, waiting = set(), {model}
        while waiting:
            found.add(model := waiting.pop())
            waiting |= set(re.findall(r"IPY_MODEL_(\w+)", str(models.get(model)))) - found
        return found

    kept: set[str] = set()
    for cell in notebook.cells:
        for data in (output["data"] for output in cell.get("outputs", []) if VIEW in output.get("data", {})):
            parts = inside(data[VIEW]["model_id"])
            if any(models.get(part, {}).get("state", {}).get("maps") for part in parts):
                kept |= parts
            else:
                del data[VIEW]
    for model in set(models) - kept:
        del models[model]
    if not models:
        notebook.metadata.pop("widgets", None)


def explain(run: Run) -> str:
    """What stopped the notebook, in one sentence: its name, the cell as Jupyter numbers it, the error."""
    kind, text = type(run.error).__name__, str(run.error)
    if kind == "PapermillExecutionError":
        text = re.sub(r"\x1b\[[0-9;]*m", "", run.error.evalue).strip()
        text = f"{run.error.ename}: {text.splitlines()[0]}" if text else run.error.ename
        return f"{run.name} failed in cell [{run.error.exec_count}]: {text}"
    if run.stalled:
        return f"{run.name} failed in cell [{run.cell}]: its kernel stopped answering, twice"
    if kind == "DeadKernelError":
        run.stderr.seek(0)
        said = run.stderr.read().decode(errors="replace").strip().splitlines()
        said = [line for line in said if not line.startswith("[IPKernelApp]")]
        why = f"its last words: {said[0]}" if said else "most often for lack of memory"
        return f"{run.name} failed in cell [{run.cell}]: its kernel died ({why})"
    where = f"in cell [{run.cell}]" if run.cell else "before its first cell"
    return f"{run.name} failed {where}: {kind}: {(text.strip().splitlines() or [''])[-1]}"


# ---------------------------------------------------------------- the pages

FOUND = ("finding", "signature", "scoreboard")  # tags of the cells that the summary shows


def executed_copy(path: Path, out: Path) -> Path | None:
    """A notebook's newest run in `out`, failed or not; None when it has not run there."""
    copies = (out / f"{path.stem}.failed.ipynb", out / f"{path.stem}.ipynb")
    return next((copy for copy in copies if copy.exists()), None)


def facts_of(path: Path, notebook) -> list[str]:
    """When and how a notebook ran, and what was unusual about it."""
    note = notebook.metadata.get("tour", {})
    seconds = note.get("seconds", 0.0)
    facts = [f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"]
    facts += [note.get("finished", "")[:16].replace("T", " ")]
    facts += ["smoke run: few steps, numbers mean nothing"] if note.get("smoke") else []
    facts += [f"{name} = {value}" for name, value in note.get("parameters", {}).items()]
    if note.get("source") != hashlib.sha256(path.read_bytes()).hexdigest():
        facts.append("the notebook has changed since")
    return [*facts, f"**{note['error']}**"] if note.get("error") else facts


def summary(notebooks: list[Path], out: Path):
    """A notebook of what was found: of each run in `out` the outputs of its tagged cells."""
    import nbformat

    text, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    when = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    cells, seconds = [], 0.0
    for path in notebooks:
        if (copy := executed_copy(path, out)) is None:
            continue
        notebook = nbformat.read(copy, as_version=4)
        seconds += notebook.metadata.get("tour", {}).get("seconds", 0.0)
        first = next((cell.source for cell in notebook.cells if cell.cell_type == "markdown"), "")
        title = re.search(r"^#+\s+(.+)$", first, flags=re.M)
        heading = f"## [{title[1] if title else path.stem}]({path.name})"
        cells.append(text(f"{heading}\n\n" + " · ".join(facts_of(path, notebook))))
        for cell in notebook.cells:
            if not set(FOUND) & set(cell.metadata.get("tags", [])):
                continue
            outputs = {"outputs": cell.outputs} if cell.cell_type == "code" else {}
            shown = (code if outputs else text)(cell.source, **outputs)
            shown.metadata["tags"] = ["remove-input"]
            cells.append(shown)
    count = sum(executed_copy(path, out) is not None for path in notebooks)
    end = (
        f"{count} of {len(notebooks)} notebooks, {seconds / 60:.1f} minutes in all; a kernel of the last run "
        f"used at most {peak_gib():.1f} GiB of memory."
    )
    start = text(f"# {TITLE}\n\n{CLAIM}\n\n{when} · {machine()}")
    return nbformat.v4.new_notebook(cells=[start, *cells, text(end)])


def build_pages(notebooks: list[Path], out: Path) -> Path:
    """Writes out/index.html, the summary, and a page for each executed notebook; they need no network."""
    import nbformat

    sys.path.insert(0, str(HERE / "site"))
    from build import build

    with tempfile.TemporaryDirectory(prefix="repae-tour-") as place:
        for copy in filter(None, (executed_copy(path, out) for path in notebooks)):
            shutil.copy(copy, Path(place) / copy.name.replace(".failed", ""))
        made = summary(notebooks, out)
        made.cells.append(nbformat.v4.new_markdown_cell("```{toctree}\n:hidden:\n:glob:\n\n0*\n```"))
        nbformat.write(made, Path(place) / "index.ipynb")
        build(Path(place), out / "pages")
    return out / "pages" / "index.html"


def machine() -> str:
    """CPU, cores, Python, torch and, in a git checkout, the commit: one line."""
    from repae_lite.training.run_log import commit
    from repae_lite.utils.cores import core_count

    cpu = None
    with contextlib.suppress(OSError):
        cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.M)
    facts = [cpu[1] if cpu else platform.machine(), f"{core_count()} core{'s' * (core_count() != 1)}"]
    facts += [f"Python {platform.python_version()}", f"torch {version('torch')}"]
    if found := commit():
        facts.append(f"commit {found[:7]}" + (" with local changes" if found.endswith("+") else ""))
    return " · ".join(facts)


def peak_gib() -> float:
    """The peak memory of any finished child process (a kernel, here), in GiB."""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


# ---------------------------------------------------------------- the command


def prepare_environment(smoke: bool) -> None:
    """What the kernels inherit: this Python's kernel first, figures in the notebook, no stray warnings."""
    share = str(Path(sys.prefix) / "share" / "jupyter")
    known = os.environ.get("JUPYTER_PATH", "").split(os.pathsep)
    os.environ["JUPYTER_PATH"] = os.pathsep.join([share, *(p for p in known if p and p != share)])
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    os.environ.pop("MPLBACKEND", None)  # a user's Agg would keep every figure out of the notebooks
    if smoke:
        os.environ["CI"] = "1"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tour.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", action="append", default=[], metavar="05", help="run only the notebooks so numbered")
    add("--smoke", action="store_true", help="few steps (sets CI=1): shows that everything runs")
    add("--out", type=Path, default=ROOT / "runs" / "tour", help="where the results go (runs/tour)")
    add("--patience", type=float, default=120, metavar="SECONDS",
        help="restart a kernel that has been idle in a cell for this long, once (120)")  # fmt: skip
    add("--param", action="append", default=[], type=parse_parameter, metavar="NAME=VALUE",
        help="set a parameter in each notebook that has it")  # fmt: skip
    return parser.parse_args(arguments)


def tour(options: argparse.Namespace) -> int:
    """Run the chosen notebooks up to the first that fails, write the page, return the exit code."""
    everything = choose(HERE, [])
    chosen = choose(HERE, options.only)
    prepare_environment(options.smoke)
    try:
        import papermill  # noqa: F401
    except ImportError:
        raise UserError("papermill is not installed for this Python; `make tour` sets it up.") from None
    given = dict(options.param)
    parameters = {path: parameters_of(path, given) for path in chosen}
    for name in given:
        if not any(name in mine for mine in parameters.values()):
            raise UserError(f"--param {name}: none of the chosen notebooks has a parameter of that name.")

    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    progress = Progress()
    smoke = ", in smoke mode: few steps, numbers mean nothing" if "CI" in os.environ else ""
    progress.end(f"Running {len(chosen)} notebook{'s' * (len(chosen) != 1)}{smoke}.")
    sentence = None
    for path in chosen:
        sentence = execute(path, out, parameters[path], progress, options.patience)
        if sentence:
            break
    index = build_pages(everything, out)
    print(f"Results: {os.path.relpath(index)}", flush=True)
    if sentence:
        kept = out / f"{path.stem}.failed.ipynb"
        where = f" (what ran is in {os.path.relpath(kept)})" if kept.exists() else ""
        print(f"{sentence}{where}.", file=sys.stderr)
    return 1 if sentence else 0


def main(arguments: list[str] | None = None) -> int:
    """Run the tour; returns 0, or 1 if a notebook failed, 2 for a wrong option, 130 if interrupted."""
    options = parse_arguments(arguments)

    def stop(number, _frame):
        signal.signal(number, signal.SIG_IGN)  # once is enough
        raise Interrupted(number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        return tour(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except Interrupted as interruption:
        print("Interrupted: finished notebooks are kept, the one that was running is not.", file=sys.stderr)
        return 128 + interruption.number


if __name__ == "__main__":
    sys.exit(main())
