"""Whatever a machine can do to a command is one sentence; a bug stays a bug, with its traceback."""

import errno
import os
import socket
import ssl

import numpy as np
import pytest
import torch

from repae_lite.commands import check
from repae_lite.commands.main import COMMANDS, main
from repae_lite.networks.latent_stats import LatentStats
from repae_lite.utils import files
from repae_lite.utils.errors import REMEDIES, interrupted, sentence

WORKER = """Caught {kind} in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "/site-packages/torch/utils/data/_utils/worker.py", line 375, in _worker_loop
    data = fetcher.fetch(index)
           ^^^^^^^^^^^^^^^^^^^^
  File "{file}", line 141, in decode
    {source}
    ^^^^^^^^^^^^^^^^^
{kind}: {words}
"""
CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 3.00 "
    "MiB is free. Of the allocated memory 70.00 GiB is allocated by PyTorch. If reserved but unallocated "
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 3072000000000 bytes. Error code 12 (Cannot allocate memory)"
)
KILLED = "DataLoader worker (pid 7) is killed by signal: "
BUS = (
    f"{KILLED}Bus error. It is possible that dataloader's workers are out of shared memory. Please try to "
    "raise your shared memory limit."
)
FILES = "Too many open files. Please increase the limit using `ulimit -n` in the shell"
OLD = "CUDA error: no kernel image is available for execution on the device"
NCCL = torch.distributed.DistBackendError("NCCL error in: x\nLast error:\nDuplicate GPU detected : rank 1")
GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] "


class Compiler(RuntimeError):
    __module__ = "torch._inductor.exc"


def from_worker(kind: type[Exception], words: str, *, ours: bool) -> Exception:
    """As torch raises again what a loader's process raised."""
    file, source = (
        (files.__file__, "raise ValueError(") if ours else ("/site-packages/numpy/x.py", "return f(x)")
    )
    return kind(WORKER.format(kind=kind.__name__, file=file, source=source, words=words))


def system(name: str, *paths: str) -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number), *(paths and (paths[0], None, *paths[1:])))


TOLD = {  # an error, and how its sentence begins
    "memory": (RuntimeError(CPU), "out of memory (2,861.0 GiB were wanted): end other programs"),
    "sizes": (
        RuntimeError("Storage size calculation overflowed with sizes=[9]"),
        "out of memory (Storage size",
    ),
    "python": (MemoryError(), "out of memory: end other programs that use it, or take a machine with more"),
    "fork": (system("ENOMEM"), "out of memory: end other programs"),
    "gpu": (
        torch.OutOfMemoryError(CUDA),
        "out of memory on the GPU (Tried to allocate 20.00 GiB, GPU 0 has a total capacity of 79.11 GiB of "
        "which 3.00 MiB is free): ",
    ),
    "mps": (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)."), "out of memory on the GPU: "),
    "cublas": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
        "out of memory on the GPU: ",
    ),
    "full": (
        system("ENOSPC", "a/b"),
        "a/b: No space left on device: make room there, or choose another place",
    ),
    "two paths": (system("EACCES", "a", "b"), "a → b: Permission denied: change who may use it"),
    "no remedy": (system("EXDEV", "a"), "a: Invalid cross-device link"),
    "library's": (ConnectionError("Max retries\nwith url"), "ConnectionError: Max retries with url"),
    "killed": (
        RuntimeError(f"{KILLED}Killed. "),
        f"a loader process ended before its work ({KILLED}Killed): if memory ran out, fewer --num-workers",
    ),
    "shm": (RuntimeError(BUS), f"a loader process has no shared memory left ({BUS[:-1]}): raise its limit"),
    "files": (RuntimeError(FILES), f"{FILES}: raise the limit of open files"),
    "worker's own": (from_worker(ValueError, "image 7 is 48 × 48: drop it", ours=True), "image 7 is 48 × 48"),
    "worker's memory": (
        from_worker(MemoryError, "Unable to allocate 7.3 TiB", ours=False),
        "out of memory (Unable to allocate 7.3 TiB): ",
    ),
    "peer": (
        RuntimeError(f"{GLOO}Connection closed by peer [::1]:4"),
        "another process of this run has ended",
    ),
    "late": (
        RuntimeError(f"{GLOO}Timed out waiting 1800000ms for"),
        "another process of this run does not answer",
    ),
    "nccl": (NCCL, "the processes cannot talk (Duplicate GPU detected : rank 1): NCCL_DEBUG=INFO"),
    "compiler": (
        Compiler("No working C++ compiler found\nSet"),
        "torch.compile failed (Compiler: No working C++ compiler found): leave out --compile",
    ),
    "package": (
        ModuleNotFoundError("No module named 'timm'", name="timm"),
        "No module named 'timm': the inst",
    ),
    "no words": (TimeoutError(), "TimeoutError"),
    "lines": (OSError(28, "write failed\n, errno", "x"), "x: write failed , errno: make room there"),
    "certificate": (
        ssl.SSLCertVerificationError(1, "certificate verify failed"),
        "certificate verify failed: check this machine's clock, its certificates and its proxy",
    ),
    "host": (
        socket.gaierror(-2, "Name or service not known"),
        "Name or service not known: check the network",
    ),
    "shared files": (
        RuntimeError("unable to open shared memory object </torch_1_2>: Too many open files (24)"),
        "unable to open shared memory object </torch_1_2>: Too many open files (24): raise the limit of open",
    ),
    "threads": (RuntimeError("can't start new thread"), "can't start new thread: a limit of the system"),
    "port": (
        torch.distributed.DistNetworkError("failed to listen, name: EADDRINUSE"),
        "the processes cannot meet (failed to listen, name: EADDRINUSE): choose another port",
    ),
    "library file": (
        ImportError("libcudnn.so.9: cannot open"),
        "libcudnn.so.9: cannot open: the installation",
    ),
    "mps lacks": (
        NotImplementedError("No x for MPS. Set `PYTORCH_ENABLE_MPS_FALLBACK=1`"),
        "No x for MPS: PYTORCH_ENABLE_MPS_FALLBACK=1 has the CPU do it, or compute on the CPU",
    ),
    "old GPU": (RuntimeError(f"{OLD}\nCUDA kernel errors might be"), f"{OLD}: see what `repae check` says"),
}


@pytest.mark.parametrize("kind", TOLD)
def test_what_a_machine_does_is_one_sentence(kind):
    error, words = TOLD[kind]
    found = sentence(error)
    assert found.startswith(words) and "\n" not in found and "Traceback" not in found


@pytest.mark.parametrize("name", REMEDIES)
def test_the_system_s_refusals_name_the_path_and_a_remedy(name):
    if not hasattr(errno, name):
        pytest.skip("not on this system")
    found = sentence(system(name, "some/path"))
    assert found == f"some/path: {os.strerror(getattr(errno, name))}: {REMEDIES[name]}"


def caught(act) -> Exception:
    with pytest.raises(Exception) as found:
        act()
    return found.value


@pytest.mark.parametrize(
    "act",
    [
        lambda: {}["x"],
        lambda: 1 / 0,
        lambda: len(7),
        lambda: torch.zeros(2) + torch.zeros(3),
        lambda: torch.zeros(2).view(3, 3),
        lambda: torch.multinomial(torch.ones(1), -1),
        lambda: np.zeros(3).reshape(2, 2),
        lambda: torch.distributions.Normal(0.0, -1.0, validate_args=True),
        lambda: os.close(10**6),
        lambda: __import__("repae_lite.no_such_room"),
        lambda: LatentStats("a", "b"),  # a call in this package, an error in another's function
        lambda: files.read_json("a name is no path"),
    ],
)
def test_what_nobody_refused_is_a_bug(act):
    assert sentence(caught(act)) is None


@pytest.mark.parametrize("kind", [ValueError, KeyError, RuntimeError])
def test_a_bug_in_a_worker_is_a_bug(kind):
    assert sentence(from_worker(kind, "all the input arrays must have the same shape", ours=False)) is None


def test_the_package_s_own_refusals_are_passed_on(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    for name, words in (("a.json", "holds a list: restore it"), ("b.json", "does not exist: check the path")):
        assert (
            sentence(caught(lambda name=name: files.read_json(tmp_path / name)))
            == f"{tmp_path / name} {words}"
        )


def test_a_call_inside_the_package_is_no_refusal(tmp_path):
    """As `int("x")`: it raises a ValueError, and the innermost frame is the package's."""
    code = compile("int('x')", files.__file__, "exec")
    assert sentence(caught(lambda: exec(code, {"__name__": "repae_lite.utils.files"}))) is None
    code = compile("raise ValueError('give 1, not x')", files.__file__, "exec")
    assert sentence(caught(lambda: exec(code, {"__name__": "repae_lite.utils.files"}))) == "give 1, not x"


def test_an_import_that_ctrl_c_broke_is_ctrl_c():
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error
    except ImportError as error:
        assert interrupted(error)
    assert not interrupted(ImportError())


# ---------------------------------------------------------------- the command line


def ends(monkeypatch, capsys, error: BaseException, *words: str) -> tuple[int, str]:
    """Exit code and stderr of `repae check`, which ends in an error."""

    def run(_):
        raise error

    monkeypatch.setattr(check, "run", run)
    return main([*words, "check"]), capsys.readouterr().err


def test_a_sentence_has_no_traceback_unless_asked_for(monkeypatch, capsys):
    full = "repae check: x: No space left on device: make room there, or choose another place\n"
    assert ends(monkeypatch, capsys, system("ENOSPC", "x")) == (2, full)
    for words in (["--debug", "check"], ["check", "--debug"]):
        assert main(words) == 2
        told = capsys.readouterr().err
        assert told.startswith("Traceback") and told.endswith(full)


@pytest.mark.parametrize(
    "error", [KeyError("x"), ZeroDivisionError(), TypeError("x"), ValueError("of a library")]
)
def test_a_bug_keeps_its_traceback_and_says_where_to_report_it(monkeypatch, capsys, error):
    code, told = ends(monkeypatch, capsys, error)
    assert code == 1 and told.startswith("Traceback") and type(error).__name__ in told
    assert (
        told.splitlines()[-1].startswith("repae check: this is a bug of repae_lite")
        and "CONTRIBUTING" in told
    )


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    assert ends(monkeypatch, capsys, KeyboardInterrupt()) == (130, "repae check: interrupted\n")


OOM = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2147483648 bytes.")
TRAIN = ["train-repae", "--vae", "tiny", "--cpu", "--batch-size", "4"]


STEP = "repae_lite.training.trainer.Trainer._step"
CACHE = "cache-latents --vae-ckpt tiny --vae-latents-name x --device cpu --pproc-batch-size 64".split()


@pytest.mark.parametrize(
    ("words", "where", "helps"),
    [
        (
            TRAIN,
            STEP,
            "try --micro-batches 2 (2 images at once instead of 4: about half of what grows with them; the "
            "same step, but for a discriminator's BatchNorm), --gradient-checkpointing (most of the "
            "activations, for about a third more time), a smaller --batch-size than 4 (another recipe)",
        ),
        (
            [*TRAIN, "--micro-batches", "4", "--gradient-checkpointing"],
            STEP,
            "try a smaller --batch-size than 4 (another recipe)",
        ),
        (
            [*TRAIN, "--max-train-steps", "1", "--sampling-steps", "1", "--sample-images", "9"],
            "repae_lite.training.trainer.draw_images",
            "it was a sample grid, so give fewer --sample-images than 9, or --sampling-steps 0 for none",
        ),
        (
            [*TRAIN, "--num-classes", "100"],
            "repae_lite.training.build._new_sit",
            "the networks and their optimisers alone do not fit, so take a smaller --model or --vae, or "
            "fewer than --num-classes 100",
        ),
        (
            CACHE,
            "repae_lite.data.latents.vae_fingerprint",
            "give --pproc-batch-size 32",
        ),
    ],
)
def test_memory_names_the_flags_of_the_command(words, where, helps, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OOM

    monkeypatch.setattr(where, full)
    data = ["--output-dir", str(tmp_path)]
    if words[0] == "cache-latents":
        data += ["--data-dir", str(files.data_small_dir() / "eval")]
    assert main([*words, *data]) == 2
    told = capsys.readouterr().err
    assert told.splitlines()[-1].startswith(f"repae {words[0]}: out of memory (2.0 GiB were wanted): {helps}")
    assert "Traceback" not in told and "--resume" not in told


def test_every_command_takes_debug(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "--debug" in capsys.readouterr().out


def test_names_that_files_hold_stay_on_one_line_and_steer_no_terminal(tmp_path, capsys):
    name = "a\nb\x1b[31m\udce9\u2028é 猫"
    assert sentence(FileNotFoundError(errno.ENOENT, "No such file", name)).startswith(
        r"a\nb\x1b[31m\udce9\u2028é 猫: No such file"
    )
    torch.save({"w\n\x1b[2J": torch.zeros(1)}, tmp_path / "v.pt")
    flags = ("--vae-latents-name", "l", "--data-dir", str(tmp_path))
    assert main(["cache-latents", "--vae-ckpt", str(tmp_path / "v.pt"), *flags]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and len(said.splitlines()) == 1
