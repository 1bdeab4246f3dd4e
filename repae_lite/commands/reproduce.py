"""Run a published row from end to end, and judge what came out of it.

ROW is a preset of reproduce/presets that says where its numbers were published; --list shows all. Its stages
are the notebooks reproduce/01 … 06, which papermill executes into FOLDER: training images, training, latents,
samples, numbers. A stage starts the commands of --dry-run, with their output in FOLDER/logs. After an
interruption of any kind the same command goes on where it stopped. In the end FOLDER/result.json is judged.
"""

import argparse
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from repae_lite.commands.shared_flags import DEVICE

if TYPE_CHECKING:
    from repae_lite.commands.row_results import Result
    from repae_lite.commands.rows import Plan, Stage

IS_OUTSIDE, IS_NOT_COMPARABLE = 4, 5  # exit codes of --verify
EPILOG = f"""Exit codes: 0 done; 2 refused or failed, told in one sentence; 143 stopped by SIGTERM or SIGUSR1
and 130 by Ctrl-C, in both cases after training has written a checkpoint. With --verify: 0 if every number
that has a tolerance is within it; {IS_OUTSIDE} if one is outside; {IS_NOT_COMPARABLE} if none is outside
but one cannot be compared, or if nothing can be judged at this scale. How to add your run to the tables:
reproduce/README.md."""
FOLDERS = Path("runs") / "reproduce"
WIDTH = 110
FLAGS = {
    "what is run": {
        "row": {"nargs": "?", "metavar": "ROW", "help": "its name; --list shows all"},
        "--scale": {
            "choices": ("tiny", "mid", "full"),
            "default": "full",
            "help": "full: the paper's (default); mid: Imagenette on one consumer GPU, an evening; tiny: the "
            "embedded data on two CPU cores, minutes",
        },
        "--from": {"dest": "first", "metavar": "NN", "help": "the first stage, as in 02 (default: all)"},
        "--to": {"dest": "last", "metavar": "NN", "help": "the last stage"},
    },
    "where its files are": {
        "--folder": {"metavar": "FOLDER", "help": f"all that is written (default: {FOLDERS}/ROW-SCALE)"},
        "--images": {"metavar": "FOLDER", "help": "training images; needed at full scale"},
        "--validation": {
            "metavar": "FOLDER",
            "help": "images that VAEs reconstruct; needed at full scale, by rows that do",
        },
        "--data-dir": {
            "metavar": "FOLDER",
            "help": "preprocessed images and latents, which rows can share (default: FOLDER/data)",
        },
        "--reference": {
            "metavar": "FILE",
            "help": "what samples are compared with; at full scale ADM's VIRTUAL_imagenet256_labeled.npz",
        },
    },
    "how it runs": {
        "--processes": {
            "type": int,
            "default": 1,
            "metavar": "N",
            "help": "of commands that can share their work, one per GPU (default: 1)",
        },
        "--micro-batches": {
            "type": int,
            "metavar": "N",
            "help": "cut every process's training batch into so many parts: less memory, the same step, but "
            "that a discriminator's BatchNorm sees each part alone",
        },
        "--steps": {"type": int, "metavar": "N", "help": "train for fewer steps, to try it out"},
        "--samples": {"type": int, "metavar": "N", "help": "draw fewer images, to try it out"},
        "--seed": {
            "type": int,
            "default": 0,
            "metavar": "N",
            "help": "of training and samples; give each its --folder (default: 0)",
        },
        **DEVICE,
    },
    "instead of running": {
        "--list": {"action": "store_true", "help": "all rows: published number, protocol, cost, state"},
        "--dry-run": {"action": "store_true", "help": "the commands, and what they need; writes nothing"},
        "--verify": {
            "nargs": "?",
            "const": True,
            "metavar": "RESULT",
            "help": "judge a result again: that of FOLDER, or of another folder or file",
        },
        "--tables": {
            "action": "store_true",
            "help": "write the tables of reproduce/README.md from all rows and reproduce/results/*.json",
        },
        "--emit": {
            "choices": ("slurm", "k8s", "script"),
            "help": "print a job that runs the row: for SLURM, Kubernetes, or as a shell script",
        },
    },
}


def run(args: argparse.Namespace) -> None:
    """Does the one thing that was asked for; prints it, or what came of it."""
    from repae_lite.commands.row_results import RESULT

    others = ("list", "dry_run", "verify", "tables", "emit")
    asked = [f"--{name.replace('_', '-')}" for name in others if getattr(args, name)]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} are different things: give one of them")
    if args.row and (args.list or args.tables):
        raise ValueError(f"{asked[0]} is about all rows: leave {args.row} out")
    if args.emit and (args.first or args.last):
        raise ValueError("--emit writes the whole row, passing over what is done: leave --from and --to out")
    if args.list:
        print("\n".join(_list()))
    elif args.tables:
        _tables()
    elif args.verify:
        raise SystemExit(_verify(_result_path(args), args.row))
    elif args.row is None:
        raise ValueError("say which row: give its name, or --list to see all")
    elif args.dry_run:
        plan = _plan(args, write=False)
        print("\n".join(_dry_run(plan, _chosen(plan, args))))
    elif args.emit:
        from repae_lite.commands.emit import emit

        print(emit(_plan(args, write=False), args.emit), end="")
    else:
        _run(args, RESULT)


def _plan(args: argparse.Namespace, *, write: bool) -> "Plan":
    """What the flags say; a folder is only made with `write`, but always compared with them."""
    from repae_lite.commands.rows import Plan, read_row

    folder = Path(args.folder) if args.folder else FOLDERS / f"{args.row}-{args.scale}"
    options = {
        "images": args.images,
        "validation": args.validation,
        "data": Path(args.data_dir) if args.data_dir else None,
        "reference": args.reference,
        "processes": args.processes,
        "steps": args.steps,
        "samples": args.samples,
        "seed": args.seed,
        "device": args.device or "auto",
        "micro_batches": args.micro_batches,
    }
    if not write and not (folder / "plan.json").is_file():
        return Plan(row=read_row(args.row), scale=args.scale, folder=folder, **options)
    for name in ("processes", "steps", "samples", "micro_batches"):
        if options[name] == 0:
            raise ValueError(f"--{name.replace('_', '-')} is 0: give at least 1")
    return Plan.open(args.row, args.scale, folder, **options)


def _chosen(plan: "Plan", args: argparse.Namespace) -> list["Stage"]:
    """The stages from --from to --to."""
    stages = list(plan.stages)
    first = stages.index(plan.stage(args.first)) if args.first else 0
    last = stages.index(plan.stage(args.last)) if args.last else len(stages) - 1
    if first > last:
        raise ValueError(f"--from {args.first} comes after --to {args.last}: turn them round")
    return stages[first : last + 1]


# ---------------------------------------------------------------- running


def _run(args: argparse.Namespace, result: str) -> None:
    """Executes the notebooks, each in a kernel of its own, then judges."""
    from repae_lite.commands.row_results import checkout, write
    from repae_lite.utils.locks import locked

    notebooks = checkout()
    try:
        import papermill  # noqa: F401
    except ImportError:
        raise ValueError(
            "papermill, which executes the notebooks, is not installed: pip install -e '.[notebooks]'"
        ) from None
    stages = _chosen(_plan(args, write=False), args)
    missing = [words for stage in stages for words in _missing(stage)]
    if missing:
        raise ValueError(f"the row {args.row} needs more: give {', '.join(dict.fromkeys(missing))}")
    plan = _plan(args, write=True)
    with locked(plan.folder / ".reproduce.partial"), _terminable():
        try:
            for stage in stages:
                _execute(plan, stage, notebooks / f"{stage.name}.ipynb")
        except (KeyboardInterrupt, SystemExit):
            print("stopped: the same command goes on from here", flush=True)
            raise
    if stages[-1].name == plan.stages[-1].name:
        path = write(plan)
        print(f"written to {path}")
        _verify(path)


def _missing(stage: "Stage") -> list[str]:
    """Flags that unfinished commands of a stage lack."""
    from repae_lite.commands.rows import INPUTS

    return [
        f"{INPUTS[word][0]} ({INPUTS[word][1]})"
        for command in stage.commands
        for word in command.words
        if word in INPUTS and not command.finished
    ]


@contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 end the program as they end training: exit code 143."""

    def end(*_) -> None:
        raise SystemExit(143)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _execute(plan: "Plan", stage: "Stage", notebook: Path) -> None:
    """Executes a stage's notebook, unless it is done.

    papermill works in a thread: signals then reach this program, not a library in the middle of a message.

    Raises:
        ValueError: the notebook failed: with its last words.
    """
    from jupyter_client import KernelManager
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    output = plan.folder / notebook.name
    if _done(stage, output):
        print(f"{stage.name}: done already, see {output}", flush=True)
        return
    parameters = {
        "ROW": plan.row.name,
        "SCALE": plan.scale,
        "FOLDER": str(plan.folder),
        "IMAGES": plan.images or "",
        "VALIDATION": plan.validation or "",
        "DATA": str(plan.data or ""),
        "REFERENCE": plan.reference or "",
        "PROCESSES": plan.processes,
        "STEPS": plan.steps or 0,
        "SAMPLES": plan.samples or 0,
        "SEED": plan.seed,
        "DEVICE": plan.device,
        "MICRO_BATCHES": plan.micro_batches or 0,
    }
    kernel, failure = KernelManager(kernel_name="python3"), []
    over = threading.Event()  # Thread.join, interrupted by a signal, takes the thread for ended (Python 3.11)

    def work() -> None:
        try:
            execute_notebook(notebook, output, parameters, progress_bar=False, km=kernel)
        except BaseException as error:
            failure.append(error)
        finally:
            over.set()

    thread = threading.Thread(target=work, daemon=True)  # ends with this program, and the kernel with both
    log = plan.folder / "logs" / f"{stage.name}.log"
    log.parent.mkdir(exist_ok=True)
    print(f"{stage.name}: started; what its commands print is in {log}", flush=True)
    started = time.monotonic()
    with open(log.with_name("kernel.log"), "ab") as file:
        kernel.start_kernel(stdout=file, stderr=file, extra_arguments=["--HistoryManager.enabled=False"])
    try:
        thread.start()
        _follow(plan.folder, stage.name, over, log, kernel)
    except (KeyboardInterrupt, SystemExit):
        until = ", after training has written a checkpoint" if stage.preset else ""
        print(f"{stage.name}: stopping{until} …", flush=True)
        _stop(plan.folder, kernel, over)
        raise
    finally:
        if kernel.has_kernel:
            kernel.shutdown_kernel(now=True)
    if failure:
        error = failure[0]
        told = (
            error.evalue if isinstance(error, PapermillExecutionError) else f"{type(error).__name__}: {error}"
        )
        seen = f"{output} and {log}" if log.exists() else output  # no log: no command was started
        raise ValueError(
            f"stage {stage.name} failed: {told.strip().rstrip('.')} (see {seen}; the same command goes on "
            "from here)"
        )
    print(f"{stage.name}: done in {_duration(time.monotonic() - started)}", flush=True)


def _done(stage: "Stage", output: Path) -> bool:
    """Whether a stage's notebook was executed to its end and its commands have left what they make."""
    import nbformat

    if not output.is_file() or not all(command.finished for command in stage.commands if command.done):
        return False
    try:
        about = nbformat.read(output, as_version=4).metadata.get("papermill", {})
    except (ValueError, AttributeError):  # not whole: it is written again
        return False
    return bool(about.get("end_time")) and not about.get("exception")


def _follow(folder: Path, name: str, over: threading.Event, log: Path, kernel) -> None:
    """Waits for a stage, shows the last line of its log, and keeps count of its seconds.

    Raises:
        ValueError: the kernel has died, for which papermill would wait.
    """
    from repae_lite.commands.row_results import add_seconds

    live, shown, counted = sys.stdout.isatty(), "", time.monotonic()
    said = counted
    try:
        while not over.wait(0.5):
            if not kernel.is_alive() and not over.wait(2):
                raise ValueError(
                    f"the kernel of notebook {name} was killed, as happens when memory runs out; a command "
                    "that it started goes on, and the same command as before follows it"
                )
            now = time.monotonic()
            if now - counted > 30:
                add_seconds(folder, name, now - counted)
                counted = now
            line = _last_line(log) if live or now - said > 60 else shown
            if line != shown:
                shown, said = line, now
                print(
                    f"\r{line[: WIDTH - 1]:{WIDTH - 1}}" if live else line,
                    end="" if live else "\n",
                    flush=True,
                )
    finally:
        if live and shown:
            print(f"\r{'':{WIDTH - 1}}\r", end="", flush=True)
        add_seconds(folder, name, time.monotonic() - counted)


def _last_line(path: Path) -> str:
    """The last line of a log that is being written, as a terminal would show it."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode("utf-8", "replace").replace("\r", "\n").splitlines()
    except OSError:
        return ""
    shown = [line for line in lines if line.strip()]
    return "".join(c for c in shown[-1] if c.isprintable()) if shown else ""


def _stop(folder: Path, kernel, over: threading.Event) -> None:
    """Ends the notebook and the command that it has started, which may take as long as a checkpoint."""
    from repae_lite.utils.launch import stop

    with suppress(RuntimeError):  # there is no kernel any more
        kernel.interrupt_kernel()
    over.wait(15 if stop(folder) else 5)  # the notebook is written, if its kernel had started
    if kernel.has_kernel:
        kernel.shutdown_kernel(now=True)
    over.wait(2)
    stop(folder)  # what a kernel started that was too young to be interrupted


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


# ---------------------------------------------------------------- judging


def _result_path(args: argparse.Namespace) -> Path:
    """The result that --verify means."""
    from repae_lite.commands.row_results import RESULT
    from repae_lite.commands.rows import row_names

    if args.verify is True:
        if args.folder is None and args.row is None:
            raise ValueError("say what to verify: give ROW, or --verify RESULT")
        path = Path(args.folder or FOLDERS / f"{args.row}-{args.scale}")
    else:
        path = Path(args.verify)
        if not path.exists() and args.verify in row_names():
            path = FOLDERS / f"{args.verify}-{args.scale}"
    if path.suffix != ".json":
        path /= RESULT
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: run the row to its end, or give the folder or file of its result"
        )
    return path


def _verify(path: Path, name: str | None = None) -> int:
    """Prints what a result comes to, and returns the exit code.

    Raises:
        ValueError: the result is of another row than `name`.
    """
    from repae_lite.commands.row_results import (
        NOT_COMPARABLE,
        NOT_RUN,
        OUTSIDE,
        WITHIN,
        describe,
        read,
        shown,
        state,
        verify,
    )
    from repae_lite.commands.rows import Expected, read_row
    from repae_lite.evaluation.results import protocol_line

    result = read(path)
    if name not in (None, result.row):
        raise ValueError(f"{path} is a result of {result.row}, not of {name}: leave the row's name out")
    row = read_row(result.row)
    verdicts = verify(result, row)
    print(f"{row.name} at scale {result.scale}, {result.date}: {row.title}")
    for each in result.measured:
        entry = Expected(metrics={}, source="", protocol=each.protocol, scale=result.scale)
        numbers = [f"{shown(entry, name)} {value:.4g}" for name, value in each.result["metrics"].items()]
        step = "" if each.step is None else f"step {each.step:,}: "
        print(f"  {step}{', '.join(numbers)}; {protocol_line(each.result['protocol'])}")
    for verdict in verdicts:
        print(f"  {describe(verdict)}")
    found = state(verdicts)
    if found == NOT_RUN:
        print(f"{NOT_COMPARABLE}: nothing is published of {row.name} at scale {result.scale}")
        return IS_NOT_COMPARABLE
    rests = row.basis and result.scale == "full" and found != NOT_COMPARABLE
    print(found + (f" ({row.basis})" if rests else ""))
    return {OUTSIDE: IS_OUTSIDE, WITHIN: 0}.get(found, IS_NOT_COMPARABLE)


def _results() -> dict[str, "Result"]:
    """The results that were added to the checkout; none in an installed package."""
    from repae_lite.commands.row_results import checkout, contributed

    try:
        return contributed(checkout() / "results")
    except FileNotFoundError:
        return {}


def _tables() -> None:
    from repae_lite.commands.row_results import checkout, tables, with_tables
    from repae_lite.utils.files import write_text

    path = checkout() / "README.md"
    results = _results()
    write_text(path, with_tables(path.read_text("utf-8"), tables(results)))
    print(f"written to {path}: {len(results)} results in reproduce/results")


# ---------------------------------------------------------------- showing


def _list() -> list[str]:
    """All rows in lines of `WIDTH` columns."""
    from textwrap import wrap

    from repae_lite.commands.row_results import guidance, shown, state, verify
    from repae_lite.commands.rows import read_row, row_names

    results, lines = _results(), []
    for name in row_names():
        row = read_row(name)
        lines += wrap(f"{name}: {row.title} ({row.source})", WIDTH, subsequent_indent="    ")
        full = [entry for entry in row.published if entry.scale == "full"]
        told = []
        judged = [entry for entry in full if {"frechet", "reconstruction_frechet"} & entry.metrics.keys()]
        if full:
            entry = (judged or full)[-1]
            metric, value = next(
                (item for item in entry.metrics.items() if "frechet" in item[0]),
                next(iter(entry.metrics.items())),
            )
            told += [
                f"{shown(entry, metric)} {value:g}",
                entry.protocol or "protocol not said",
                guidance(entry),
            ]
        if row.not_built:
            told.append(f"not built: {row.not_built}")
        else:
            runs = [result for result in results.values() if (result.row, result.scale) == (name, "full")]
            told += [f"cost {row.hours}", state(each for run in runs for each in verify(run, row))]
        words = "; ".join(word for word in told if word)
        lines += wrap(words, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return lines


def _dry_run(plan: "Plan", stages: list["Stage"]) -> list[str]:
    """The commands of stages as lines for a shell, and as comments what they need."""
    from repae_lite.commands.rows import typed

    row = plan.row
    lines = [f"# {row.name} at scale {plan.scale}: {row.title} ({row.source}), in {plan.folder}"]
    lines += [f"# {words}" for words in _needs(plan)]
    for stage in stages:
        lines.append(f"# {stage.name}")
        for command in stage.commands:
            lines += ["# done:"] * command.finished
            lines.append(typed(command, plan.processes))
    lines += [f"# needed: {words}" for words in dict.fromkeys(w for stage in stages for w in _missing(stage))]
    return lines


def _needs(plan: "Plan") -> list[str]:
    """Inputs, disk, memory and time, in words."""
    from repae_lite.commands.machine import GIB, needs
    from repae_lite.commands.preflight import preset_of
    from repae_lite.commands.presets import presets_dir, read_preset
    from repae_lite.evaluation.protocols import load_protocol

    lines, disk, memory = [], 0, 0
    trained = plan.trained
    for row in trained:
        preset = preset_of(plan, row.name)
        wanted = needs(preset)
        disk, memory = disk + wanted["disk"], max(memory, wanted["device_memory"])
        if row is not trained[0] and preset.config.data_dir != "embedded":  # all train on the same images
            disk -= preset.images * 3 * plan.resolution**2
        lines.append(
            f"{row.name}: {wanted['steps']:,} steps of {wanted['batch']} images, up to "
            f"{wanted['checkpoints']} checkpoint(s) at once"
        )
    for entry, _ in plan.draws:
        count = plan.samples or load_protocol(entry.protocol).count
        disk += 2 * count * 3 * plan.resolution**2  # twice while the file is finished
    released = plan.released
    given = {"images": plan.images, "validation": plan.validation, "reference": plan.reference}
    inputs = [f"{name} {path}" for name, path in given.items() if path]
    inputs += [f"released {', '.join(released)}"] if released else []
    lines.append(f"inputs: {'; '.join(inputs) or 'none given'}")
    lines.append(
        f"disk: {disk / 1e9:.1f} GB (images, latents, checkpoints, samples); device memory: "
        f"{memory / GIB:.1f} GiB and activations, which grow with the images per process"
    )
    if plan.scale == "full":
        basis = f" ({plan.row.cost.basis})" if plan.row.cost else ""
        lines.append(f"cost: {plan.row.hours}{basis}")
    else:
        each = {"tiny": "minutes on two CPU cores", "mid": "an evening on one GPU"}[plan.scale]
        lines.append(f"cost: {each}" + f" for each of {len(trained)} trainings" * (len(trained) > 1))
    if plan.scale == "mid" and trained:
        cards = {path.stem.removeprefix("mid-"): path.stem for path in presets_dir().glob("mid-*gb.yaml")}
        words = [
            f"{read_preset(cards[card]).options['micro_batches']} for a card of {card.removesuffix('gb')} GB"
            for card in sorted(cards, key=lambda name: (len(name), name))
        ]
        lines.append(f"--micro-batches by the GPU's memory, estimated: {', '.join(words)}")
    return lines
