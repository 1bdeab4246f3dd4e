"""What one GPU can tell, within 25 minutes, so that a card at hand for half an hour is enough.

Not what several would: --shard, and NCCL between cards.

    python reproduce/benchmarks/gpu_day.py --output runs/gpu_day
    python reproduce/benchmarks/gpu_day.py --device cpu --quick     # tries the parts, measures nothing

Each part has its budget in seconds; one that needs longer is ended and keeps what it has found, and the rest
still run. Results lie as JSON in one folder: PART.json of each, with the logs and what the commands wrote,
and gpu_day.json, which says what ran when, on which card and with which versions. Parts that are done are not
repeated, nor are measurements of a part that was ended, so that the same command goes on where it was. Exit
codes: 0, all parts are done; 1, one failed or ran out of time; 2, there is no GPU.
"""

import argparse
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from record import commit, head

from repae_lite.utils.files import data_small_dir, write_text

Found = Iterator[tuple[str, object]]  # what a part finds, piece by piece
ROOT = Path(__file__).resolve().parents[2]
# NCCL wants a card for each process; gloo lets two share one, which is slow, and all that is needed here.
ONE_CARD = """
import sys
from accelerate import PartialState

prepare = PartialState._prepare_backend

def by_gloo(self, *args, **kwargs):
    backend, kind = prepare(self, *args, **kwargs)
    return "gloo" if backend == "nccl" else backend, kind

PartialState._prepare_backend = by_gloo
from repae_lite.commands.main import main

sys.exit(main(sys.argv[1:]))
"""
TINY = "--vae tiny --batch-size 2"
AGAINST = "--against reference"
FROM_SCRATCH = (
    "--vae f8d4 --vae-ckpt none --model SiT-B/2 --resolution 32 --enc-weights random --perceptual tiny "
    "--num-workers 0 --batch-size 32"
)
SAME = 1e-3  # relative difference of losses that rounding may make in a few steps
# Of a run in half precision beside float32: how far the means of its last losses may be apart, and how many
# of 500 steps may have a number that is not finite (fp16 looks for its loss scale in such steps).
WATCHED = ("denoising", "sit_align", "reconstruction", "perceptual")
CLOSE, LOST = 0.05, {"no": 0, "bf16": 0, "fp16": 25}


class OutOfTime(Exception):
    """A part's budget is spent."""


@dataclass
class Day:
    """Where and how the parts run.

    Attributes:
        folder: of the results.
        device: "cuda" or "cpu".
        quick: only try whether the parts work.
        deadline: of the running part, on the monotonic clock.
    """

    folder: Path
    device: str
    quick: bool
    deadline: float = math.inf

    def run(self, log: str, *commands: list[str], **environment: str) -> None:
        """Runs commands side by side until all have ended; what they say goes to logs/LOG.

        Raises:
            OutOfTime: they were ended.
            ChildProcessError: one of them failed.
        """
        path = self.folder / "logs" / f"{log}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        common = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment
        alone = len(commands) == 1
        with open(path, "w", encoding="utf-8") as file:
            started = [
                subprocess.Popen(
                    [sys.executable, *words],
                    cwd=self.folder,
                    env=common | ({} if alone else {"RANK": str(rank)}),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a group, which can be ended as one
                )
                for rank, words in enumerate(commands)
            ]
            try:
                codes = [process.wait(max(0.0, self.deadline - time.monotonic())) for process in started]
            except subprocess.TimeoutExpired:
                raise OutOfTime(f"ended while it ran; see {path}") from None
            finally:
                for process in started:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if any(codes):
            last = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise ChildProcessError(f"exit codes {codes}; see {path}: {' '.join(last)}")


# ---------------------------------------------------------------- parts


def tests(day: Day) -> Found:
    """The tests that need a GPU; quick: they are only found."""
    find = ["--collect-only"] if day.quick else []
    day.run(
        "tests", ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *find, str(ROOT / "tests")]
    )
    yield "said", (day.folder / "logs" / "tests.log").read_text(encoding="utf-8").strip().splitlines()[-1]


def bench(day: Day) -> Found:
    """Our step against the reference, and what is around it; what is compiled, and takes longest, comes last.

    Raises:
        ChildProcessError: what failed, after all the others.
    """
    full = "repae --vae f8d4 --model SiT-XL/2 --mixed-precision bf16 --allow-tf32"
    around = full.removeprefix("repae ")
    exact = around.replace(" --mixed-precision bf16", "")  # sampling is in float32
    few = "--no-ways --repeats 3 --warmup 1"
    if day.quick:
        words = f"repae --vae tiny --model tiny --batch-size 2 --repeats 1 {AGAINST}"
        yield "tiny", _bench(day, "tiny", words)
        return
    runs = {
        "reference-8": f"{full} --batch-size 8 {AGAINST}",
        "checkpointing-32": f"{full} --batch-size 32 --gradient-checkpointing",
        "checkpointing-4": f"{full} --batch-size 4 --gradient-checkpointing",
        "micro-batches-32": f"{full} --batch-size 32 --micro-batches 2",
        "ldm": f"ldm encoder {around} --batch-size 32",
    }
    failed, largest = [], 8

    def each(runs: dict[str, str]) -> Found:
        for name, words in runs.items():
            try:
                yield name, _bench(day, name, words)
            except ChildProcessError as error:
                failed.append(f"{name}: {error}")

    yield from each(runs)
    for size in (16, 32, 48, 64, 96, 128):  # until one does not fit beside a second state
        name = f"reference-{size}"
        try:
            yield name, _bench(day, name, f"{full} --batch-size {size} {AGAINST} {few}")
            largest = size
        except ChildProcessError as error:
            yield name, str(error)
            if "out of memory" not in str(error):
                failed.append(f"{name}: {error}")
            break
    last = {
        "ldm-compiled": f"ldm {around} --batch-size 32 --compile",
        "sampling": f"sample encode decode {exact} --batch-size 32 --num-steps 10 --repeats 3 --warmup 1",
        f"reference-{largest}-compiled": f"{full} --batch-size {largest} --compile {AGAINST} {few}",
    }
    yield from each(last)
    if failed:
        raise ChildProcessError("; ".join(failed))


def _bench(day: Day, name: str, words: str) -> dict:
    """What `repae bench` has measured; now, or before this part was ended."""
    path = day.folder / "bench" / name / "bench.json"
    if not path.is_file():
        where = ["--device", day.device, "--output-dir", f"bench/{name}"]
        day.run(f"bench-{name}", ["-m", "repae_lite", "bench", *words.split(), *where])
    return json.loads(path.read_text())


def attempts(day: Day) -> Found:
    """What each of our ways of taking a step is worth; see attempts.py."""
    words = f"{TINY} --model tiny --repeats 1" if day.quick else "--mixed-precision bf16 --batch-size 8"
    script = str(ROOT / "reproduce" / "benchmarks" / "attempts.py")
    path = day.folder / "attempts" / "attempts.json"
    try:
        day.run("attempts", [script, *words.split(), "--device", day.device, "--out", str(path)])
    finally:
        yield "attempts", json.loads(path.read_text())["attempts"] if path.is_file() else {}


def _train(day: Day, name: str, steps: int, *words: str) -> list[str]:
    device = ["--cpu"] * (day.device == "cpu")
    never = f"--checkpointing-steps {steps} --sampling-steps 0 --max-train-steps {steps} --logging-steps 1"
    shutil.rmtree(day.folder / "exps" / name, ignore_errors=True)  # of a part that was ended
    return ["train-repae", "--exp-name", name, *never.split(), *words, *device]


def _metrics(day: Day, name: str) -> list[dict]:
    return [json.loads(line) for line in open(day.folder / "exps" / name / "metrics.jsonl", encoding="utf-8")]


def stability(day: Day) -> Found:
    """500 steps in bf16 and fp16 beside float32: f8d4 and SiT-B/2 from scratch, on the embedded images.

    Raises:
        ValueError: one of them ends elsewhere than float32, or loses more steps to numbers that are not
            finite than it may.
    """
    exact: dict[str, float] = {}
    steps, words = (3, TINY.split()) if day.quick else (500, FROM_SCRATCH.split())
    if not day.quick:
        words += ["--data-dir", str(data_small_dir() / "train")]
    for precision in ("no", "bf16") if day.quick else ("no", "bf16", "fp16"):
        name = f"stability-{precision}"
        command = _train(day, name, steps, *words, "--mixed-precision", precision)
        day.run(name, ["-m", "repae_lite", *command])
        lines = _metrics(day, name)
        measures = {  # null is a number that is not finite
            key: [line[key] for line in lines if line.get(key) is not None] for key in lines[-1]
        }
        others = ("step", "lr_", "grad_norm_", "loss_scale_")
        last = {
            key: sum(values[-50:]) / len(values[-50:])
            for key, values in measures.items()
            if values and not key.startswith(others)
        }
        extremes = {"largest": (max, "grad_norm_"), "smallest": (min, "loss_scale_")}
        lost = sum(None in line.values() for line in lines)
        found = {"steps": lines[-1]["step"], "steps with a number that is not finite": lost}
        found["mean of the last 50"] = last
        for kind, (extreme, start) in extremes.items():
            found[kind] = {
                key: extreme(values) for key, values in measures.items() if values and key.startswith(start)
            }
        yield precision, found
        exact = exact or last
        apart = {
            key: abs(last[key] - exact[key]) / max(abs(exact[key]), 0.1) for key in WATCHED if key in last
        }
        if lost > LOST[precision] or not max(apart.values()) <= CLOSE:
            raise ValueError(f"{precision} beside float32: {lost} steps lost, differences {apart}")


def processes(day: Day) -> Found:
    """Two processes on one card, which take the steps of one.

    Raises:
        ValueError: their losses differ.
    """
    steps = 2 if day.quick else 20
    words = f"--vae tiny --batch-size {4 if day.quick else 32} --mixed-precision no".split()
    day.run("one-process", ["-m", "repae_lite", *_train(day, "one", steps, *words)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = ["-c", ONE_CARD, *_train(day, "two", steps, *words)]
    day.run("two-processes", command, command, WORLD_SIZE="2", **place)
    pairs = list(zip(_metrics(day, "one"), _metrics(day, "two"), strict=True))
    differences = {
        key: max(abs(a[key] - b[key]) / max(abs(a[key]), 1e-3) for a, b in pairs)
        for key in ("denoising", "sit_align", "sit_total", "reconstruction", "perceptual", "vae_total")
    }
    yield "steps", steps
    yield "largest relative differences", differences
    if not max(differences.values()) <= SAME:
        raise ValueError(f"two processes take other steps than one: relative differences {differences}")


def evidence(day: Day) -> Found:
    """The records of chapters 03 and 05 at the embedded scale, as many of their runs as the time allows.

    Raises:
        OutOfTime: some are missing; those that are there were yielded.
    """
    late, data, records = None, day.folder / "data_small", ["learning_curves", "causes"]
    if not data.is_dir():
        shutil.copytree(data_small_dir(), data, ignore=shutil.ignore_patterns("evidence"))
        (data / "evidence").mkdir()
    script = [str(ROOT / "reproduce" / "benchmarks" / "arms.py"), *records, "--device", day.device]
    some = ["--steps", *(["0"] if day.quick else ["400", "1000"])]  # there are no runs of 0
    try:
        day.run("evidence", [*script, *some], REPAE_DATA_SMALL=str(data))
    except OutOfTime as error:
        late = error
        day.deadline = time.monotonic() + 60
        day.run("evidence-join", [*script, "--join"], REPAE_DATA_SMALL=str(data))
    for name in records:
        yield name, json.loads((data / "evidence" / f"{name}.json").read_text())
    if late:
        raise late


PARTS: dict[str, tuple[int, Callable[[Day], Found]]] = {  # budget in seconds; together 25 minutes
    "tests": (200, tests),
    "bench": (600, bench),
    "attempts": (160, attempts),
    "stability": (220, stability),
    "processes": (80, processes),
    "evidence": (240, evidence),
}


def take(name: str, day: Day) -> dict:
    """Runs a part within its budget: `state` is "done", "out of time" or "failed", `result` what it found."""
    budget, part = PARTS[name]
    started, result, about = time.monotonic(), {}, {"state": "done"}
    day.deadline = started + budget
    try:
        for key, value in part(day):
            result[key] = value
    except OutOfTime as error:
        about = {"state": "out of time", "why": str(error)}
    except (OSError, ValueError, KeyError) as error:
        about = {"state": "failed", "why": f"{type(error).__name__}: {error}"}
    return about | {"budget": budget, "seconds": round(time.monotonic() - started, 1), "result": result}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs") / "gpu_day", help="where results go")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="only try the parts, as on a CPU")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="some of the parts")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the commands are ended, too
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            f"torch {torch.__version__} finds no CUDA GPU: --device cpu --quick tries the parts without one"
        )
        return 2
    if options.device == "cpu" and not options.quick:
        print("a CPU measures nothing of a GPU: --device cpu goes with --quick, which only tries the parts")
        return 2
    day = Day(options.output.resolve(), options.device, options.quick)
    day.folder.mkdir(parents=True, exist_ok=True)
    path = day.folder / "gpu_day.json"
    about = head(f"python reproduce/benchmarks/gpu_day.py{' --quick' * day.quick}", day.device)
    about["machine"] = about["machine"].removesuffix(", 1 thread")  # commands take as many as they like
    about |= {"commit": commit(), "quick": day.quick, "parts": {}}
    before = json.loads(path.read_text()) if path.is_file() else about
    same = all(before[key] == about[key] for key in ("machine", "versions", "commit", "quick"))
    about["parts"] = before["parts"] if same else {}
    if not same:  # another card, version or commit: nothing of it counts
        for kept in ("bench", "attempts", "runs", "data_small"):
            shutil.rmtree(day.folder / kept, ignore_errors=True)
    for name in options.only:
        if about["parts"].get(name, {}).get("state") == "done":
            print(f"{name}: done before", flush=True)
            continue
        print(f"{name}: up to {PARTS[name][0]} s", flush=True)
        found = take(name, day)
        write_text(day.folder / f"{name}.json", json.dumps(found, indent=1) + "\n")
        about["parts"][name] = {key: value for key, value in found.items() if key != "result"}
        write_text(path, json.dumps(about, indent=1) + "\n")
        print(f"{name}: {found['state']} after {found['seconds']:.0f} s {found.get('why', '')}", flush=True)
    return 0 if all(about["parts"][name]["state"] == "done" for name in options.only) else 1


if __name__ == "__main__":
    sys.exit(main())
