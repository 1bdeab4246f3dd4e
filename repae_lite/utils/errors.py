"""Any error becomes one sentence for the user, or is called a bug: the only place that decides.

What this project refuses it says itself, by a `raise` of ValueError or OSError. What the machine refuses (a
disk, memory, the network, other processes, a compiler) comes from the system or a library and is recognised
by its type, its errno, or else by words that only that library uses; a cause is named where it is known, and
the library's own words are passed on. All else is a bug.

Nothing slow is imported here: `repae --help` is instant.
"""

import errno
import re
import traceback
import unicodedata
from collections.abc import Callable
from opcode import opmap
from pathlib import Path

PACKAGE = __name__.partition(".")[0]
ROOT = str(Path(__file__).resolve().parents[1])
BUG = (
    "this is a bug of repae_lite and no mistake of yours: please report it with this traceback and what "
    '`repae check --json` prints (see CONTRIBUTING.md, "Reporting a bug")'
)
LESS = "end other programs that use it, or take a machine with more"
RESTORE = "wait until it is back, then give the same command again"
NETWORK = "check the network, then give the same command again"
MOVE = "choose another place"
REMEDIES = {
    "ENOSPC": f"make room there, or {MOVE}",
    "EDQUOT": f"make room within your quota, or {MOVE}",
    "EACCES": f"change who may use it, or {MOVE}",
    "EPERM": f"change who may use it, or {MOVE}",
    "EROFS": "this disk can only be read: " + MOVE,
    "ENAMETOOLONG": "choose a shorter name",
    "EMFILE": "raise the limit of open files with `ulimit -n`, or give fewer --num-workers",
    "ENFILE": "the whole machine has too many open files: end other programs",
    "EISDIR": "it must be a file: check the path",
    "ENOTDIR": "a part of it is a file and no folder: check the path",
    "ENOENT": "check the path",
    "EEXIST": MOVE,
    "ENOTEMPTY": "another program writes into it: end that, then give the same command again",
    "ELOOP": "its links lead in a circle: check the path",
    "EFBIG": f"this disk, or `ulimit -f`, allows no file so large: {MOVE}",
    "EIO": "the disk, or the way to it, is failing: look into the system's log before you go on",
    "ESTALE": "the network disk has lost it: " + RESTORE,
    "ENOTCONN": "the network disk is away: " + RESTORE,
    "EHOSTDOWN": "the network disk is away: " + RESTORE,
    "ETXTBSY": "another program uses it: end that first",
    "EBUSY": "another program uses it: end that first",
    "EAGAIN": "a limit of the system was reached, or another program holds it: see `ulimit -a`, or wait",
    "EINVAL": f"this disk may not be able to do that: {MOVE}",
    "EOPNOTSUPP": f"this disk cannot do that: {MOVE}",
    "ENODEV": f"this disk cannot do that: {MOVE}",
    "ENOEXEC": "install that program again",
    "ECONNREFUSED": NETWORK,
    "ECONNRESET": NETWORK,
    "ECONNABORTED": NETWORK,
    "ETIMEDOUT": NETWORK,
    "ENETUNREACH": NETWORK,
    "EHOSTUNREACH": NETWORK,
    "EADDRINUSE": "choose another port",
}
REMEDY = {getattr(errno, name): remedy for name, remedy in REMEDIES.items() if hasattr(errno, name)}
OURS_TO_MEND = {errno.EBADF, errno.EFAULT, errno.ENOTSOCK}  # no machine causes these
FULL_MEMORY = re.compile(
    r"DefaultCPUAllocator|not enough memory: you tried|MPS backend out of memory|CUDA error: out of memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|bad_alloc|Storage size calculation overflowed"
    r"|Cannot allocate memory|can't allocate memory"
)
SHARED_MEMORY = re.compile(r"shared memory|</torch_\d|torch_\d+_\d+")
PEER_LOST = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Socket closed|ncclRemoteError"
)
LATE = re.compile(r"[Tt]imed out|[Tt]imeout")
GPU_TROUBLE = re.compile(
    r"no kernel image|no CUDA-capable device|busy or unavailable|driver version is insufficient|uncorrectable"
    r"|not yet initialized|unknown error|Found no NVIDIA driver|No CUDA GPUs|invalid device ordinal|NVML"
    r"|not compiled with CUDA|provided PTX was compiled|GPU is lost|driver .* too old",
    re.IGNORECASE,
)


def sentence(
    error: BaseException, *, saves_memory: Callable[[BaseException], str] | None = None
) -> str | None:
    """What to tell the user of an error: what is wrong and what to do, on one line.

    Args:
        error: as it was caught, with its traceback.
        saves_memory: what helps in this command when memory runs out, given the error.

    Returns:
        The sentence, or None: the error is a bug.
    """
    found = _sentence(error, saves_memory)
    return found and printable(found)


def printable(words: str) -> str:
    """Words on one line; line breaks and what else steers a terminal, as in names of files, are escaped."""
    steering = ("Cc", "Cs", "Zl", "Zp")
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in steering else c for c in words)


def _sentence(error: BaseException, saves_memory: Callable[[BaseException], str] | None) -> str | None:
    words, ours = of_a_worker(error) or (str(error).strip(), raised_by_us(error))
    if ours and isinstance(error, ValueError | OSError):
        found = words
    elif wanted := _memory(error, words):
        found = f"{wanted}: {saves_memory(error) if saves_memory else LESS}"
    else:
        rules = (_dead_worker, _network, _system, _other_processes, _compiler, _missing_package, _gpu, _mps)
        found = next((told for rule in rules if (told := rule(error, words))), None)
    return found and " ".join(found.splitlines())


def interrupted(error: BaseException) -> bool:
    """Whether an error is Ctrl-C, or came of it, as where it fell into the import of a compiled module."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def raised_by_us(error: BaseException) -> bool:
    """Whether an error comes of a `raise` in this package, and not of a function that was called there.

    Functions written in C leave no frame of their own: `int("x")` in this package looks like this package,
    but its last instruction is a call.
    """
    at = error.__traceback__
    if at is None:
        return False
    while at.tb_next:
        at = at.tb_next
    return _is_ours(at) and at.tb_frame.f_code.co_code[at.tb_lasti] == opmap["RAISE_VARARGS"]


def came_through(error: BaseException, module: str, function: str | None = None) -> bool:
    """Whether an error came through a module of this package, as in "training.build", or a function in it."""
    return any(
        frame.f_globals.get("__name__") == f"{PACKAGE}.{module}" and function in (None, frame.f_code.co_name)
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def _is_ours(at) -> bool:
    return at.tb_frame.f_globals.get("__name__", "").partition(".")[0] == PACKAGE


def of_a_worker(error: BaseException) -> tuple[str, bool] | None:
    """The words of an error that another process raised, and whether they are ours; None for any other.

    Such an error has only the text of its traceback.
    """
    text = str(error)
    if "Original Traceback (most recent call last):" not in text:
        cause = error.__cause__
        text = str(cause) if type(cause).__name__ == "_RemoteTraceback" else ""
    lines = text.rstrip().rstrip('"').rstrip().splitlines()
    frames = [i for i, line in enumerate(lines) if line.startswith('  File "')]
    if not frames:
        return None
    last = frames[-1]
    end = next((i for i in range(last + 1, len(lines)) if not lines[i].startswith(" ")), len(lines))
    words = " ".join(lines[end:]).partition(": ")[2].strip() or " ".join(lines[end:])
    raised = last + 1 < len(lines) and lines[last + 1].strip().startswith("raise ")
    return words, raised and f'"{ROOT}' in lines[last]


def _memory(error: BaseException, words: str) -> str | None:
    """What was wanted, if memory ran out."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    on_gpu = "OutOfMemoryError" in kinds or re.search(r"MPS backend|CUDA|CUBLAS|CUDNN", words) is not None
    known = (
        "OutOfMemoryError" in kinds
        or isinstance(error, MemoryError)
        or getattr(error, "errno", 0) == errno.ENOMEM
    )
    if not known and not (isinstance(error, RuntimeError) and FULL_MEMORY.search(words)):
        return None
    if SHARED_MEMORY.search(words):
        return None
    asked = re.search(r"tried to allocate (\d+) bytes", words)
    details = [f"{int(asked[1]) / 2**30:,.1f} GiB were wanted"] if asked else []
    details += re.findall(r"Tried to allocate [\d.]+ \w+|(?:GPU \d+|MPS)[^.]*total capacity.*?is free", words)
    details += re.findall(r"Unable to allocate [\d.]+ \w+|Storage size calculation overflowed", words)
    shown = f" ({', '.join(details)})" if details else ""
    return f"out of memory on the GPU{shown}" if on_gpu else f"out of memory{shown}"


def _dead_worker(error: BaseException, words: str) -> str | None:
    """A loader's process that was killed, or cannot hand on what it read."""
    if not isinstance(error, RuntimeError | OSError):
        return None
    if re.search(r"ulimit -n|ancdata|</torch_.*Too many open files", words):
        return f"{_flat(words)}: raise the limit of open files with `ulimit -n`, or give fewer --num-workers"
    if SHARED_MEMORY.search(words) and not isinstance(error, OSError):
        return (
            f"a loader process has no shared memory left ({_flat(words)}): raise its limit (docker run "
            "--shm-size=16g; Kubernetes: an emptyDir at /dev/shm), or give fewer --num-workers"
        )
    if words == "can't start new thread":
        return f"{words}: a limit of the system was reached: see `ulimit -a`, or give fewer --num-workers"
    if re.search(r"DataLoader worker .*(killed by signal|exited unexpectedly)|DataLoader timed out", words):
        cause = str(error.__cause__ or error.__context__ or "")
        told = cause if "killed by signal" in cause else words
        return (
            f"a loader process ended before its work ({_flat(told)}): if memory ran out, fewer --num-workers "
            "need less of it"
        )
    return None


def _network(error: BaseException, words: str) -> str | None:
    """A host that cannot be found or trusted; such errors have numbers that mean other things elsewhere."""
    kinds = {kind.__name__ for kind in type(error).__mro__ if issubclass(kind, OSError)}
    if "SSLError" in kinds:
        return f"{_flat(words)}: check this machine's clock, its certificates and its proxy"
    return f"{error.strerror or _flat(words)}: {NETWORK}" if kinds & {"gaierror", "herror"} else None


def _system(error: BaseException, words: str) -> str | None:
    """What the system or a library says of the world outside."""
    if not isinstance(error, OSError) or error.errno in OURS_TO_MEND:
        return None
    if error.errno is None or not error.strerror:
        return f"{type(error).__name__}: {_flat(words)}" if words else type(error).__name__
    paths = " → ".join(printable(str(name)) for name in (error.filename, error.filename2) if name is not None)
    remedy = REMEDY.get(error.errno, "")
    return f"{paths}{': ' * bool(paths)}{error.strerror}{': ' * bool(remedy)}{remedy}"


def _other_processes(error: BaseException, words: str) -> str | None:
    """A group of processes that broke."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if not kinds & {"DistError", "DistBackendError"} and not (
        "gloo" in words and isinstance(error, RuntimeError)
    ):
        return None
    if PEER_LOST.search(words):
        return "another process of this run has ended: its own message says why"
    if "EADDRINUSE" in words:
        return f"the processes cannot meet ({first_line(words)}): {REMEDIES['EADDRINUSE']}"
    if LATE.search(words):
        return f"another process of this run does not answer ({first_line(words)}): look at its messages"
    last = words.partition("Last error:")[2].strip() or words
    return f"the processes cannot talk ({first_line(last)}): NCCL_DEBUG=INFO shows more on GPUs"


def _compiler(error: BaseException, words: str) -> str | None:
    """torch.compile without what it needs."""
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo", "triton")):
        return f"torch.compile failed ({type(error).__name__}: {first_line(words)}): leave out --compile"
    return None


def _missing_package(error: BaseException, words: str) -> str | None:
    """An installation that lacks a package, or whose packages do not fit together."""
    if not isinstance(error, ImportError) or (error.name or "").partition(".")[0] == PACKAGE:
        return None
    return f"{first_line(words)}: the installation is not whole, install the project again as its README says"


def _gpu(error: BaseException, words: str) -> str | None:
    """A GPU or a driver that cannot be used."""
    named = (
        "CUDA" in words or "NVIDIA" in words or "NVML" in words or type(error).__name__ == "AcceleratorError"
    )
    if isinstance(error, RuntimeError | AssertionError) and named and GPU_TROUBLE.search(words):
        return f"{first_line(words)}: see what `repae check` says of this GPU, or compute on the CPU"
    return None


def _mps(error: BaseException, words: str) -> str | None:
    """Something that Apple's GPU lacks."""
    if isinstance(error, NotImplementedError) and "PYTORCH_ENABLE_MPS_FALLBACK" in words:
        what = words.partition(". ")[0]
        return f"{_flat(what)}: PYTORCH_ENABLE_MPS_FALLBACK=1 has the CPU do it, or compute on the CPU"
    return None


def first_line(said: BaseException | str) -> str:
    """What an error says, in one line without its full stop; its type if it says nothing."""
    line = next(iter(str(said).strip().splitlines()), "").rstrip(".: ")
    return line or type(said).__name__ * isinstance(said, BaseException)


def _flat(words: str) -> str:
    """On one line, without its full stop."""
    return " ".join(words.split()).rstrip(".")
