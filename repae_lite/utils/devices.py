"""What runs where: which device a process computes on, and what torch can do there.

Every choice that depends on a device is made here, and `repae check` tells what was found:

|                         | CPU                 | CUDA                            | MPS (Apple)         |
|-------------------------|---------------------|---------------------------------|---------------------|
| float64                 | yes                 | yes                             | no                  |
| precision "auto"        | float32             | bf16 from 8.0 on, else float32  | float32             |
| pinned memory, spawning | no                  | yes                             | no                  |
| fused AdamW             | torch's choice      | yes                             | torch's choice      |
| convolutions' layout    | channels last       | channels last                   | channels first      |
| linear layers           | AMD: by convolution | products                        | products            |
| memory of freed tensors | kept (glibc)        | torch's choice                  | torch's choice      |
| torch.compile           | with a C++ compiler | from 7.0 on, Triton, a compiler | where a trial works |

Numbers like 8.0 are CUDA compute capabilities.
"""

import ctypes
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from repae_lite.utils.errors import first_line
from repae_lite.utils.processes import join, started_together

# Their CUDA 12.6 builds have code for Maxwell to Hopper; torch 2.15 has no such build.
OLD_CARDS = (
    "the build of torch 2.14 or older for CUDA 12.6, whose pip command is at "
    "https://pytorch.org/get-started/previous-versions/"
)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
CPUINFO = Path("/proc/cpuinfo")
CHOOSE = "choose a build at https://pytorch.org/get-started/locally/"
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# What torch raises for a device that it cannot use; AssertionError without CUDA compiled in.
UNUSABLE = (RuntimeError, AssertionError, NotImplementedError)
logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- choosing


def choose_device(name: str | None = None) -> str:
    """The device of this process, which can be computed on.

    Processes that `accelerate launch` or torchrun started together join here, and each gets its own device.

    Args:
        name: of the device; None takes CUDA if there is a GPU, Apple's MPS if there is that, else the CPU,
            and warns if this machine has a GPU that torch cannot use.

    Raises:
        ValueError: this machine does not have the device, or torch cannot use it.
    """
    asked, name = name is not None, name or _best()
    try:
        torch.empty(0, device=name)
        if torch.device(name).type == "meta":
            raise RuntimeError("it holds no numbers")
    except (*UNUSABLE, ImportError) as error:  # some kinds of device are packages of their own
        unusable = unusable_gpu() if name.startswith("cuda") else None
        raise ValueError(
            unusable or f"there is no device {name!r} ({_words(error)}): give cpu, cuda, cuda:N or mps"
        ) from None
    check_device(name, asked=asked)
    if started_together():
        device = join(cpu=name == "cpu").device
        return str(device) if device.type != "cpu" else "cpu"
    return name


def check_device(device: torch.device | str, *, asked: bool = True) -> None:
    """Refuses a device that torch cannot compute on; says so if the CPU stands in for a GPU.

    On a CPU the process keeps its memory from now on, see `keep_memory`.

    Args:
        device: as accelerate or `choose_device` chose it.
        asked: the user named it. Otherwise a CPU beside a GPU that torch cannot use is worth a warning.

    Raises:
        ValueError: torch has no code for the GPU, or the GPU refuses work.
    """
    device = torch.device(device)
    index = device.index or 0
    obstacle = cuda_obstacle(index) if device.type == "cuda" and index < gpus() else None
    if obstacle:
        raise ValueError(f"{obstacle}; {_another_gpu(index)}--cpu or --device cpu computes without a GPU")
    if device.type == "cpu":
        keep_memory()
    unusable = unusable_gpu() if device.type == "cpu" and not asked else None
    if unusable:
        logger.warning(f"running on the CPU: {unusable}")


def _best() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _words(error: Exception) -> str:
    """The first line of torch's own message, without its general advice."""
    return re.split(r"\. (?:This could be|Please )", first_line(error))[0]


# ---------------------------------------------------------------- GPUs that torch sees, and cannot use


def gpus() -> int:
    """How many GPUs torch sees through CUDA (or ROCm), whether or not it has code for them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong is said by `unusable_gpu`
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def cuda_obstacle(index: int) -> str | None:
    """Why torch cannot use a GPU that it sees, with the remedy; None if it can, as far as can be told."""
    try:
        reason = _no_code(index)
        if reason is None:
            torch.cuda.mem_get_info(index)  # opens the GPU; one in exclusive use refuses
    except UNUSABLE as error:
        tool = "rocm-smi" if torch.version.hip else "nvidia-smi"
        reason = (
            f"torch cannot open cuda:{index} ({_words(error)}): see what {tool} says of it, and what holds it"
        )
    return reason


def _another_gpu(index: int) -> str:
    """How to take another GPU, if torch can use one."""
    usable = next((i for i in range(gpus()) if i != index and not cuda_obstacle(i)), None)
    if usable is None:
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    name = visible[usable].strip() if usable < len(visible) and visible != [""] else usable
    return f"CUDA_VISIBLE_DEVICES={name} takes {gpu_name(usable)} instead; "


def gpu_name(index: int) -> str:
    """What a GPU that torch sees is called."""
    try:
        return torch.cuda.get_device_name(index)
    except UNUSABLE:
        return "a GPU"


def _no_code(index: int) -> str | None:
    built, name = torch.cuda.get_arch_list(), torch.cuda.get_device_name(index)
    if torch.version.hip:
        arch = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
        known = {code.split(":")[0] for code in built}
        if not known or arch in known or any("generic" in code for code in known):
            return None
        if "HSA_OVERRIDE_GFX_VERSION" in os.environ:
            return None
        return (
            f"torch {torch.__version__} has no code for {name} ({arch}): it was built for "
            f"{', '.join(sorted(known))}; {CHOOSE}"
        )
    capability = tuple(torch.cuda.get_device_capability(index))
    targets = [target for target in map(_target, built) if target]
    if not targets or any(_runs(target, capability) for target in targets):
        return None
    oldest = min(number for _, number, _ in targets)
    older = capability < oldest
    span = f"sm_{oldest[0]}{oldest[1]} and newer ({', '.join(built)})" if older else ", ".join(built)
    if not older:
        remedy = "pip install --upgrade torch torchvision brings a newer torch, which may have it"
    elif (5, 0) <= capability <= (9, 0) and platform.machine().lower() in ("x86_64", "amd64"):
        remedy = f"install {OLD_CARDS}"
    else:
        remedy = CHOOSE
    return (
        f"torch {torch.__version__} has no code for {name} (compute capability {capability[0]}."
        f"{capability[1]}): it was built for {span}; {remedy}"
    )


def _target(code: str) -> tuple[str, tuple[int, int], str] | None:
    """What an entry of torch's list of targets means: "sm_90a" is ("sm", (9, 0), "a")."""
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", code)
    return (found[1], (int(found[2]), int(found[3])), found[4]) if found else None


def _runs(target: tuple[str, tuple[int, int], str], capability: tuple[int, int]) -> bool:
    """Whether code for a target runs on a GPU: PTX on all newer ones, machine code on those of its family."""
    kind, number, suffix = target
    if suffix == "a":  # for this very architecture
        return capability == number
    if kind == "compute" and not suffix:
        return capability >= number
    return capability[0] == number[0] and capability >= number


def unusable_gpu() -> str | None:
    """What keeps torch from a GPU that is in this machine, with the remedy; None if nothing does."""
    if gpus() or torch.backends.mps.is_available():
        return None
    if sys.platform == "darwin" and platform.machine() == "arm64":
        why = "macOS is too old for it" if torch.backends.mps.is_built() else "torch was built without MPS"
        return f"torch {torch.__version__} cannot use Apple's GPU ({why}): update macOS, or {CHOOSE}"
    found = nvidia_gpus()
    if not found:
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA and cannot use {found}: {CHOOSE}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides {found} from torch: unset it, or name a GPU"
    try:
        torch.cuda.init()
        words = "it finds no GPU"
    except UNUSABLE as error:
        words = _words(error)
    version = re.search(r"too old \(found version (\d+)\)", words)
    if version and 12_000 <= int(version[1]):  # CUDA 12.x programs run on any driver of 12.0 or newer
        remedy = f"update the driver, or install {OLD_CARDS}"
    elif version:
        remedy = f"update the driver, or {CHOOSE}"
    else:
        remedy = "see whether nvidia-smi works here, and install or update the driver"
    return f"torch {torch.__version__} cannot use {found} ({words}): {remedy}"


def nvidia_gpus() -> str:
    """The NVIDIA GPUs of this machine, asked without torch: in words, empty if there are none."""
    tool = shutil.which("nvidia-smi")
    if tool:
        try:
            listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
            names = re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", listed.stdout, re.MULTILINE)
            if names:
                return ", ".join(names)
        except (OSError, subprocess.SubprocessError):
            pass
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        try:
            kind = (vendor.parent / "class").read_text()
            if vendor.read_text().strip() == "0x10de" and kind.startswith("0x03"):  # a display adapter
                return "the NVIDIA GPU"
        except OSError:
            continue
    return ""


# ---------------------------------------------------------------- what a device can do


def widest_float(device: torch.device | str) -> torch.dtype:
    """The widest floating-point type of a device: float64, but float32 on MPS."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def in_float64(x: Tensor) -> Tensor:
    """A tensor in float64: where it is, or on the CPU if its device has no float64."""
    return (x if widest_float(x.device) == torch.float64 else x.cpu()).to(torch.float64)


def has_bf16(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16 itself; the CPU does too, but no faster than in float32."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device.index or 0):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def choose_precision(wanted: str, device: torch.device) -> str:
    """The precision that "auto" means on a device; any other is tried.

    Args:
        wanted: "auto", "no", "fp16" or "bf16".
        device: where training runs.

    Raises:
        ValueError: the device does not have the one that was asked for.
    """
    bf16 = wanted in ("auto", "bf16") and has_bf16(device)
    if wanted == "auto":
        return "bf16" if bf16 else "no"
    if wanted == "bf16" and device.type == "cuda" and not bf16:
        raise ValueError("this GPU has no bf16: take --mixed-precision fp16 or no")
    if wanted in HALVES:
        try:
            _try_precision(HALVES[wanted], device)
        except (*UNUSABLE, TypeError) as error:
            raise ValueError(
                f"torch {torch.__version__} cannot train in {wanted} on {device} ({_words(error)}): take "
                "--mixed-precision auto or no"
            ) from None
    return wanted


def _try_precision(dtype: torch.dtype, device: torch.device) -> None:
    """A product forwards and backwards under autocast, with the loss scale that float16 needs."""
    weight = torch.ones(8, 8, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # autocast leaves a type that it lacks with a warning, and no error
        with torch.autocast(device.type, dtype):
            out = F.linear(torch.ones(2, 8, device=device), weight)
    if out.dtype != dtype:
        raise RuntimeError("autocast leaves it out there")
    loss = out.float().mean()
    if dtype == torch.float16:
        scaler = torch.amp.GradScaler(device.type)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
    else:
        loss.backward()


def fused_optimizer(device: torch.device) -> bool | None:
    """Whether optimisers that can be are fused into one kernel: on CUDA; None leaves it to torch.

    A CPU's fused kernel rounds otherwise, and the official steps (tests/method/test_golden.py) leave their
    tolerance.
    """
    return device.type == "cuda" or None


def conv_layout(device: torch.device) -> torch.memory_format:
    """How convolutional networks lie in memory.

    CUDA's tensor cores work on channels last, and a CPU gains by it, too (reproduce/PERFORMANCE.md).
    """
    return torch.channels_last if device.type in ("cuda", "cpu") else torch.contiguous_format


def can_keep_memory() -> bool:
    """Whether `keep_memory` does something here."""
    return platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_MAX_" not in os.environ


def keep_memory() -> None:
    """Has this process keep the memory of tensors that are gone for the next ones, where glibc is.

    Otherwise it goes back to the system, and the pages that come again must be cleared: a tenth to a fifth of
    a training step (reproduce/PERFORMANCE.md). MALLOC_MMAP_MAX_ in the environment decides instead.
    """
    if can_keep_memory():
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def _mkl_is_slow() -> bool:
    """Whether MKL, which has PyTorch's products, is slower than oneDNN, which has its convolutions: on AMD's
    processors with AVX-512, half as fast (reproduce/PERFORMANCE.md).
    """
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not both or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "AuthenticAMD" in platform.processor() + CPUINFO.read_text()[:4096]
    except OSError:  # not Linux; what Windows calls its processor ends in the vendor's name
        return "AuthenticAMD" in platform.processor()


def faster_by_convolution(x: Tensor) -> bool:
    """Whether a linear layer of x is faster as a 1×1 convolution: of many float32 tokens, where MKL is slow.

    PyTorch hands small convolutions, and on one thread all such ones, to MKL again. What is compiled stays
    whole: a compiler cannot ask for the number of threads.
    """
    return (
        MKL_IS_SLOW
        and not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 20_480
        and torch.get_num_threads() > 1
    )


MKL_IS_SLOW = _mkl_is_slow()


def loading(device: torch.device, workers: int) -> dict:
    """Options of a DataLoader that feeds a device.

    Pinned memory, from which CUDA copies in the background; and workers that are spawned, since a process
    that uses CUDA cannot be forked.
    """
    cuda = device.type == "cuda"
    return {"pin_memory": cuda, "multiprocessing_context": "spawn" if workers and cuda else None}


def runs_ahead(device: torch.device) -> bool:
    """Whether the host may go on while a device computes: CUDA."""
    return device.type == "cuda"


class Later:
    """Numbers on their way to the host: from a GPU they are copied while both go on.

    Args:
        values: scalars by name.
    """

    def __init__(self, values: dict[str, Tensor]):
        self.names = list(values)
        numbers = torch.stack([value.detach().float() for value in values.values()])
        ahead = runs_ahead(numbers.device)
        self.numbers = numbers.to("cpu", non_blocking=ahead)  # into pinned memory
        self.copied = torch.cuda.Event(blocking=True) if ahead else None
        if self.copied:
            self.copied.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> dict[str, float]:
        """The numbers by name; waits until they are there."""
        if self.copied:
            self.copied.synchronize()
        return dict(zip(self.names, self.numbers.tolist(), strict=True))


def compile_obstacle(device: torch.device) -> str | None:
    """What torch.compile lacks on a device, with the remedy; None if nothing is known to be lacking."""
    if device.type == "cuda" and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(device.index or 0)
        if major < 7:
            return f"torch.compile needs compute capability 7.0 or newer, and this GPU has {major}.{minor}"
    if device.type == "cuda":
        if find_spec("triton") is None:
            package = "triton-windows" if sys.platform == "win32" else "triton"
            return f"torch.compile needs Triton, which is not installed: pip install {package}"
        compilers = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
        what = "a C compiler"
    elif device.type == "cpu":
        usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        compilers, what = [os.environ.get("CXX") or usual], "a C++ compiler"
    else:
        return None
    if sys.platform != "win32" and not any(shutil.which(each.split()[0]) for each in compilers):
        return f"torch.compile needs {what}, and {' or '.join(compilers)} is not here: install one"
    return None


def try_compile(device: torch.device) -> str | None:
    """Why torch.compile does not work on a device, after compiling something small; None if it does."""
    obstacle = compile_obstacle(device)
    if obstacle:
        return obstacle
    try:
        probe = torch.compile(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()).to(device))
        probe(torch.randn(2, 4, device=device)).sum().backward()
    except Exception as error:  # of many kinds: a broken compiler, a Python that is too new
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        words = next((line for line in lines if not line.endswith("raised:")), "")
        return f"{type(error).__name__}: {words}"
    return None


def peak_memory(device: torch.device) -> int | None:
    """Bytes that this process has held at most on a GPU; None where torch does not count them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def gpu_properties(device: torch.device) -> tuple[str, int] | None:
    """A CUDA GPU's name and its memory in bytes; None for other devices."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return found.name, found.total_memory
