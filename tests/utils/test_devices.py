"""Devices by name, the processes of a launcher, and the space that work needs."""

import logging
import os
import platform
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from repae_lite.utils import devices, progress
from repae_lite.utils.devices import choose_device
from repae_lite.utils.locks import check_space
from repae_lite.utils.processes import local_process_count


@pytest.mark.parametrize("gpu", [False, True])
def test_a_gpu_is_taken_if_there_is_one(monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch, "empty", lambda *_, device: device)  # as if it were there
    assert choose_device() == choose_device(None) == ("cuda" if gpu else "cpu")
    assert choose_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["nonsense", "cpu:x", "cuda:99", "hpu"])
def test_a_device_that_is_not_there_is_one_sentence(name):
    with pytest.raises(
        ValueError, match=rf"^there is no device '{name}' \(.*\): give cpu, cuda, cuda:N or mps$"
    ):
        choose_device(name)


def test_what_holds_no_numbers_is_no_device():
    with pytest.raises(ValueError, match=r"^there is no device 'meta' "):
        choose_device("meta")


# ---------------------------------------------------------------- GPUs that torch cannot use

BUILT = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"


@pytest.fixture
def card(monkeypatch):
    """A function that puts a GPU into this machine."""

    def put(name="a GPU", capability=(9, 0), built=BUILT, memory=2**35, **more):
        def open_it(_):
            if isinstance(memory, Exception):
                raise memory
            return memory, memory

        properties = SimpleNamespace(major=capability[0], minor=capability[1], **more)
        for function, value in {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "get_device_name": lambda _: name,
            "get_device_capability": lambda *_: capability,
            "get_device_properties": lambda *_: properties,
            "get_arch_list": lambda: built.split(),
            "mem_get_info": open_it,
        }.items():
            monkeypatch.setattr(torch.cuda, function, value)
        monkeypatch.setattr(devices, "has_bf16", lambda device: capability >= (8, 0))
        monkeypatch.setattr(torch, "empty", lambda *_, device: device)

    return put


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((7, 0), BUILT, False),  # a V100
        ((6, 1), BUILT, False),
        ((7, 5), BUILT, True),
        ((8, 9), BUILT, True),  # sm_86 runs on newer cards of its family
        ((12, 1), BUILT, True),
        ((11, 0), BUILT, False),  # between two families
        ((12, 0), "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90", False),  # newer than this torch
        ((12, 0), "sm_80 sm_90 compute_90", True),  # PTX is compiled for newer ones
        ((7, 0), "sm_80 compute_80", False),
        ((9, 0), "sm_90a", True),
        ((10, 3), "sm_100a", False),  # for one architecture alone
        ((10, 3), "sm_100f", True),  # for a family
        ((8, 0), "sm_86", False),
        ((7, 0), "", True),  # a build that does not say
        ((7, 0), "nonsense", True),
    ],
)
def test_machine_code_runs_on_its_family_and_ptx_on_all_newer(card, capability, built, runs):
    card(capability=capability, built=built)
    assert (devices.cuda_obstacle(0) is None) == runs


def test_a_card_without_code_is_refused_with_the_build_that_has_it(card, monkeypatch):
    monkeypatch.setattr(devices.platform, "machine", lambda: "x86_64")
    card("Tesla V100", (7, 0))
    for refused in (lambda: choose_device(), lambda: devices.check_device("cuda:0", asked=False)):
        with pytest.raises(ValueError, match="no code for Tesla V100") as refusal:
            refused()
        said = str(refusal.value)
        assert "(compute capability 7.0): it was built for sm_75 and newer (sm_75, sm_80, " in said
        assert "for CUDA 12.6, whose pip command is at https://pytorch.org" in said and "--device cpu" in said
    assert choose_device("cpu") == "cpu"
    card("a new one", (13, 0))
    assert "pip install --upgrade torch" in devices.cuda_obstacle(0)
    card("an old one", (3, 5))
    assert "pytorch.org/get-started" in devices.cuda_obstacle(0)
    assert "CUDA 12.6" not in devices.cuda_obstacle(0)


def test_a_usable_card_is_taken(card):
    card(capability=(8, 0))
    assert choose_device() == "cuda" and devices.cuda_obstacle(0) is None


def test_a_card_that_does_not_open_says_what_torch_says(card):
    card(memory=RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel …"))
    with pytest.raises(
        ValueError, match=r"cannot open cuda:0 \(CUDA error: all .* unavailable\): see what nvidia-smi"
    ):
        choose_device("cuda")


def test_a_card_that_cannot_even_be_asked_is_told_as_such(card, monkeypatch):
    def broken(_):
        raise RuntimeError("CUDA driver initialization failed")

    card()
    monkeypatch.setattr(torch.cuda, "get_device_name", broken)
    assert "cannot open cuda:0 (CUDA driver initialization failed): see" in devices.cuda_obstacle(0)
    assert devices.gpu_name(0) == "a GPU"


@pytest.mark.parametrize(("visible", "name"), [(None, "1"), ("3, 5", "5")])
def test_beside_an_old_card_the_new_one_is_named(card, monkeypatch, visible, name):
    card("a V100")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: ((7, 0), (9, 0))[i])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=f"; CUDA_VISIBLE_DEVICES={name} takes a V100 instead; --cpu or"):
        choose_device("cuda")


def test_rocm_lists_architectures_by_name(card, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.delenv("HSA_OVERRIDE_GFX_VERSION", raising=False)
    card("MI300", built="gfx90a gfx942", gcnArchName="gfx942:sramecc+:xnack-")
    assert devices.cuda_obstacle(0) is None
    card("RX 580", built="gfx90a gfx942", gcnArchName="gfx803")
    assert "no code for RX 580 (gfx803): it was built for gfx90a, gfx942; " in devices.cuda_obstacle(0)


TOO_OLD = "The NVIDIA driver on your system is too old (found version {}). Please update"


@pytest.mark.parametrize(
    ("cuda", "visible", "words", "said"),
    [
        (None, None, "", "was built without CUDA and cannot use a Tesla T4: choose a build at "),
        ("13.2", "", "", "CUDA_VISIBLE_DEVICES is '', which hides a Tesla T4 from torch: unset it"),
        ("13.2", "7", "", "CUDA_VISIBLE_DEVICES is '7', which hides"),
        ("13.2", None, TOO_OLD.format(12040), "for CUDA 12.6"),
        ("13.2", None, TOO_OLD.format(11040), "update the driver, or choose a build"),
        (
            "13.2",
            None,
            "Found no NVIDIA driver on your system.",
            "(Found no NVIDIA driver on your system): see",
        ),
    ],
)
def test_the_cpu_never_stands_in_silently(monkeypatch, caplog, cuda, visible, words, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(devices, "nvidia_gpus", lambda: "a Tesla T4")
    monkeypatch.setattr(devices.platform, "machine", lambda: "x86_64")

    def start():
        raise RuntimeError(words)

    monkeypatch.setattr(torch.cuda, "init", start)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with caplog.at_level(logging.WARNING):
        assert choose_device() == "cpu"
    (record,) = caplog.records
    assert record.message.startswith("running on the CPU: ") and said in record.message
    caplog.clear()
    assert choose_device("cpu") == "cpu" and not caplog.records  # asked for
    with pytest.raises(ValueError) as refusal:
        choose_device("cuda")
    assert said in str(refusal.value)


def test_gpus_are_looked_for_without_torch(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho 'GPU 0: Tesla K80 (UUID: GPU-1)'\necho 'GPU 1: Tesla K80 (UUID: GPU-2)'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(tool))
    assert devices.nvidia_gpus() == "Tesla K80, Tesla K80"
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    monkeypatch.setattr(devices, "Path", lambda _: tmp_path)  # no PCI devices
    assert devices.nvidia_gpus() == ""
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "vendor").write_text("0x10de\n")
    (tmp_path / "0000:01:00.0" / "class").write_text("0x030200\n")
    assert devices.nvidia_gpus() == "the NVIDIA GPU"


# ---------------------------------------------------------------- what a device can do


def test_what_runs_where():
    cpu, cuda, mps = map(torch.device, ("cpu", "cuda", "mps"))
    widest = [devices.widest_float(device) for device in (cpu, cuda, mps)]
    assert widest == [torch.float64, torch.float64, torch.float32]
    assert [devices.fused_optimizer(device) for device in (cpu, cuda, mps)] == [None, True, None]
    first, last = torch.contiguous_format, torch.channels_last
    assert [devices.conv_layout(device) for device in (cpu, cuda, mps)] == [last, last, first]
    assert [devices.runs_ahead(device) for device in (cpu, cuda, mps)] == [False, True, False]
    assert devices.loading(cuda, 2) == {"pin_memory": True, "multiprocessing_context": "spawn"}
    nothing = {"pin_memory": False, "multiprocessing_context": None}
    assert devices.loading(cpu, 2) == devices.loading(mps, 2) == nothing
    assert devices.loading(cuda, 0)["multiprocessing_context"] is None


FAULTS = """
import resource, sys, torch
from repae_lite.utils.devices import check_device
if sys.argv[1:]:
    check_device("cpu")
for i in range(20):
    if i == 10:  # by then it has as many blocks as it needs
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its malloc is another one")
def test_a_process_that_computes_on_the_cpu_keeps_its_memory():
    def faults(*words: str, **environment: str) -> int:
        command = [sys.executable, "-c", FAULTS, *words]
        return int(subprocess.check_output(command, env=os.environ | environment, text=True))

    assert faults("on the CPU") < faults() / 10
    assert faults("on the CPU", MALLOC_MMAP_MAX_="65536") > faults() / 2  # as the user says


@pytest.mark.parametrize(
    ("vendor", "capability", "slow"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
    ],
)
@pytest.mark.parametrize("system", ["Linux", "Windows"])
def test_linear_layers_are_convolutions_where_mkl_is_slow(
    tmp_path, monkeypatch, vendor, capability, slow, system
):
    on_linux = system == "Linux"
    if on_linux:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    name = "" if on_linux else f"AMD64 Family 26 Model 2 Stepping 1, {vendor}"
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(devices.platform, "processor", lambda: name)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for library in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(library, "is_available", lambda: True)
    assert devices._mkl_is_slow() is slow
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not devices._mkl_is_slow()


def test_convolutions_pay_for_many_float32_tokens_on_several_threads(monkeypatch):
    many, few = torch.zeros(512, 128), torch.zeros(32, 128)
    monkeypatch.setattr(devices, "MKL_IS_SLOW", True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert devices.faster_by_convolution(many) and not devices.faster_by_convolution(few)
    assert not devices.faster_by_convolution(many.double())
    assert not devices.faster_by_convolution(many.to("meta"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not devices.faster_by_convolution(many)
    compiled = torch.compile(devices.faster_by_convolution, backend="eager", fullgraph=True)
    assert not compiled(many)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(devices, "MKL_IS_SLOW", False)
    assert not devices.faster_by_convolution(many)


def test_precision_falls_back_unless_it_was_asked_for(card, monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert devices.choose_precision("auto", cpu) == "no"
    assert [devices.choose_precision(one, cpu) for one in ("no", "bf16")] == ["no", "bf16"]
    with monkeypatch.context() as patch:
        patch.setattr(
            torch, "autocast", lambda *_: torch.no_grad()
        )  # leaves the type out, as for one it lacks
        with pytest.raises(
            ValueError, match=r"cannot train in fp16 on cpu \(autocast leaves it out there\): take"
        ):
            devices.choose_precision("fp16", cpu)
    card(capability=(7, 5))
    assert devices.choose_precision("auto", cuda) == "no"
    with pytest.raises(ValueError, match="this GPU has no bf16: take --mixed-precision fp16 or no"):
        devices.choose_precision("bf16", cuda)
    card(capability=(8, 0))
    assert devices.choose_precision("auto", cuda) == "bf16"


def test_what_torch_compile_lacks_is_said(card, monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(devices.sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(devices, "find_spec", lambda name: name)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    card(capability=(6, 1))
    assert devices.compile_obstacle(cpu) is None
    assert "needs compute capability 7.0 or newer, and this GPU has 6.1" in devices.compile_obstacle(cuda)
    card(capability=(7, 0))
    assert devices.compile_obstacle(cuda) is None
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert devices.try_compile(cpu) == "torch.compile needs a C++ compiler, and g++ is not here: install one"
    assert "needs a C compiler, and cc or gcc or clang is not here" in devices.compile_obstacle(cuda)
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert "pip install triton" in devices.compile_obstacle(cuda)


def test_a_failed_trial_of_torch_compile_says_why(monkeypatch):
    def refuse(_):
        raise RuntimeError("backend='inductor' raised:\nCppCompileError: no Python.h\nmore")

    monkeypatch.setattr(devices, "compile_obstacle", lambda _: None)
    monkeypatch.setattr(torch, "compile", refuse)
    assert devices.try_compile(torch.device("cpu")) == "RuntimeError: CppCompileError: no Python.h"


@pytest.mark.gpu
def test_a_real_gpu_can_do_what_is_said_of_it():
    device = torch.device(choose_device())
    assert device.type == "cuda" and devices.cuda_obstacle(0) is None
    assert (torch.ones(2, dtype=devices.widest_float(device), device=device) * 2).sum() == 4
    for wanted in ("auto", "fp16"):
        assert devices.choose_precision(wanted, device) in ("bf16", "fp16", "no")
    assert devices.peak_memory(device) >= 0 and devices.gpu_properties(device)[1] > 2**30
    if devices.compile_obstacle(device) is None:
        assert devices.try_compile(device) is None


JOINING = """
import torch.distributed as dist
from repae_lite.utils.devices import choose_device
from repae_lite.utils.processes import local_process_count, process_count, process_rank
device = choose_device("cpu")
print(f"{device}: {process_rank()} of {process_count()}, {local_process_count()} here\\n", end="", flush=True)
dist.destroy_process_group()
"""


def test_processes_of_a_launcher_join(tmp_path):
    (tmp_path / "joining.py").write_text(JOINING)
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(tmp_path / "joining.py"),
    ]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n"))[1:] == ["cpu: 0 of 2, 2 here", "cpu: 1 of 2, 2 here"]


def test_a_process_alone_is_alone(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert local_process_count() == 1


def test_space_is_checked_to_the_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 2 * 10**9))
    check_space(tmp_path, 2 * 10**9, "the images need")
    with pytest.raises(
        OSError, match=rf"^the images need 2\.0 GB more in {tmp_path}, where 2\.0 GB are free: "
    ):
        check_space(tmp_path, 2 * 10**9 + 1, "the images need")


@pytest.mark.parametrize(("terminal", "seconds"), [(True, 0.5), (False, 60)])
def test_a_log_file_gets_a_line_a_minute(monkeypatch, terminal, seconds):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: terminal, raising=False)
    with progress.progress_bar(10, 4, show=True) as bar:
        assert (bar.mininterval, bar.total, bar.n) == (seconds, 10, 4)
    assert progress.progress_bar(10, 0, show=False).disable
