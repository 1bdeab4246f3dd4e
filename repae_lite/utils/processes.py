"""Am I one of several processes, and what do the others have: joining, leaving, collectives.

A launcher (accelerate, torchrun, SLURM, Kubernetes) starts the processes and says by environment variables
where they meet; accelerate decides on devices and the backend.
"""

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn

from repae_lite.utils.errors import first_line

if TYPE_CHECKING:
    from accelerate import PartialState

MEETING = timedelta(minutes=30)  # until all are there: machines may start one after the other
# In a barrier, for what the first process does alone. The longest is a checkpoint of SiT-XL, 11 GB with its
# optimisers: two hours are enough for a disk that writes 1.6 MB/s.
WAITING = timedelta(hours=2)
ASKING = 2.0  # seconds: launchers and schedulers give 30 and more from their signal to the end
STOPPING = [getattr(signal, n) for n in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, n)]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Settings of accelerate that this project does not honour: what they may be, and what to do otherwise.
OFF = ("", "0", "f", "false", "n", "no", "off")
ELSEWHERE = "no command here trains in that way: unset it"
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": (OFF, ELSEWHERE),
    "ACCELERATE_USE_FSDP": (OFF, ELSEWHERE),
    "ACCELERATE_USE_MEGATRON_LM": (OFF, ELSEWHERE),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (OFF, ELSEWHERE),
    "ACCELERATE_USE_SAGEMAKER": (OFF, ELSEWHERE),
    "ACCELERATE_DYNAMO_BACKEND": (OFF, "the flag here is --compile: unset it"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        ("", "1"),
        "the flag here is --gradient-accumulation-steps: unset it",
    ),
}


# ---------------------------------------------------------------- joining and leaving


def check_settings() -> None:
    """Refuses settings of accelerate that nothing here honours; a launcher takes them from its file, too.

    Raises:
        ValueError: one of them is set.
    """
    for name, (allowed, remedy) in REFUSED.items():
        value = os.environ.get(name, "")
        if value.strip().lower() not in allowed:
            raise ValueError(
                f"accelerate's setting {name} is {value!r}, and {remedy}, or, if accelerate launch took it "
                "from its default_config.yaml, give that another --config_file"
            )


def settings() -> str:
    """accelerate's settings in the environment, and a launcher's, for an error."""
    found = (
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith("ACCELERATE_") or name in LAUNCHER
    )
    return ", ".join(found) or "none in the environment"


def started_together() -> bool:
    """Whether a launcher started this process, and perhaps others with it.

    Raises:
        ValueError: it says too little to find the others.
    """
    if os.environ.get("WORLD_SIZE", "1") in ("", "1") and os.environ.get("LOCAL_RANK", "-1") in ("", "-1"):
        return False
    for name in LAUNCHER:
        value = os.environ.get(name, "")
        if not (value if name == "MASTER_ADDR" else value.isdecimal()):
            raise ValueError(
                "this is one of several processes, as the environment says (WORLD_SIZE or LOCAL_RANK), "
                f"but {name} is {repr(value) if value else 'not set'}: start with accelerate launch or "
                f"torchrun, or unset {', '.join(LAUNCHER)}"
            )
    return True


def join(*, cpu: bool) -> "PartialState":
    """Joins the processes that a launcher started together; they get a device each.

    Args:
        cpu: compute on the CPU, even if there is something faster.

    Raises:
        ValueError: the launcher's or accelerate's settings make no group.
        ConnectionError: the others are not to be found.
    """
    from accelerate import PartialState

    check_settings()
    store, rank, size = _meet()
    try:
        state = PartialState(
            cpu=cpu or not torch.accelerator.is_available(),
            store=store,
            rank=rank,
            world_size=size,
            timeout=WAITING,
        )
    except (ValueError, ImportError, NotImplementedError) as error:
        raise ValueError(f"accelerate cannot start ({error}): look at its settings ({settings()})") from None
    except RuntimeError as error:
        raise ConnectionError(
            f"the {size} processes have met at {_address()} but cannot talk ({first_line(error)}): look at "
            "their network and firewall, and at GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
        ) from None
    if state.num_processes != size:
        raise ValueError(
            f"{size} processes were started, but on {state.device} each would work alone: start one, or give "
            "--cpu (cache-latents: --device cpu)"
        )
    return state


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _meet() -> tuple[dist.Store, int, int]:
    """The store that all processes share, this one's number, and how many they are."""
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=MEETING))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = unwritten(store, rank, size)
        return store, rank, size
    except (dist.DistError, ValueError) as error:
        reason = first_line(error)
    if "EADDRINUSE" in reason:
        raise ConnectionError(
            f"the processes cannot meet at port {os.environ['MASTER_PORT']} of this machine: it is in use, "
            "perhaps by another run: choose another (accelerate launch --main_process_port 0, torchrun "
            "--standalone, or MASTER_PORT)"
        )
    raise ConnectionError(
        f"the {os.environ['WORLD_SIZE']} processes cannot meet at {_address()} ({reason}): check MASTER_ADDR "
        "and MASTER_PORT, and that all of them were started"
    )


def unwritten(store: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of a launcher's store that nobody has written into.

    torchrun keeps its store over restarts, with the addresses of processes that are gone, and those who find
    them wait for hours. So each process asks by a name of its own, and the first one answers until all have
    heard.

    Raises:
        dist.DistError: the others do not come.
    """
    own, late = uuid4().hex, time.monotonic() + MEETING.total_seconds()
    if rank > 0:
        store.set(f"asks/{rank}", own)
        first = store.get(f"answer/{own}").decode()
        store.add(f"heard/{first}", 1)
        return dist.PrefixStore(first, store)
    while store.add(f"heard/{own}", 0) < size - 1:
        for other in range(1, size):
            if store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", own)
        if time.monotonic() > late:
            raise dist.DistError("Timed out")
        time.sleep(0.05)
    return dist.PrefixStore(own, store)


def leave(*, together: bool) -> None:
    """Leaves the group, if there is one: its threads would abort Python at the end.

    Args:
        together: wait until all processes come here. One that failed must not, for the others are elsewhere.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if together:
        dist.barrier()
    if together or dist.get_backend() == "gloo":  # NCCL's group cannot be left by one alone
        dist.destroy_process_group()


def first_to_say(sentence: str) -> bool:
    """Whether no other process has said this before; where that cannot be asked, this one says it."""
    try:
        if dist.is_initialized():
            store = dist.distributed_c10d._get_default_store()
        elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it is the launcher's, and is there
            store = next(dist.rendezvous("env://", timeout=timedelta(seconds=10)))[0]
        else:
            return True
        return store.add(hashlib.sha256(sentence.encode()).hexdigest(), 1) == 1
    except (RuntimeError, ValueError):
        return True


# ---------------------------------------------------------------- collectives


def local_process_count() -> int:
    """How many processes work together on this machine; 1 for a process alone."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def process_count() -> int:
    """How many processes work together; 1 for a process alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if process_count() > 1:
        dist.barrier()


def from_first_process(values: Tensor) -> Tensor:
    """The first process's values, in every process; changed in place."""
    if process_count() > 1:
        dist.broadcast(values, 0)
    return values


def sum_over_processes(values: Tensor) -> Tensor:
    """Element-wise sum of equal shapes over processes; gradients flow through it."""
    return _Sum.apply(values) if process_count() > 1 else values


class _Sum(torch.autograd.Function):
    """Sum over processes. The gradient sums too: every process's loss depends on every process's input."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


def mean_over_processes(values: Tensor) -> Tensor:
    """Element-wise mean of equal shapes over processes; changed in place, without gradient."""
    if process_count() > 1:
        dist.all_reduce(values)
        values /= process_count()
    return values


def ignore_stop_signals(_: int) -> None:
    """Lets a loader process outlive a signal to the whole group: the training process decides when to end.

    It is here because a spawned process imports what it is called from: the trainer would take 200 MB.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


class StopFlag:
    """Whether any process has been asked to stop: the same answer after the same step in all of them.

    Every process waits for the answer, so they ask about every two seconds instead of after each step; after
    how many steps they ask again is part of the answer.

    Args:
        device: of the collective.
        clock: seconds.

    Attributes:
        up: the last answer.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic):
        self.device, self.clock, self.up = device, clock, False
        self._steps, self._passed, self._asked = 1, 0, clock()  # ask after so many steps; since then; when

    def after_step(self, asked: bool) -> bool:
        """To be called after every step with what this process knows; a process alone knows everything."""
        if process_count() == 1:
            self.up = asked
            return self.up
        self._passed += 1
        if self._passed == self._steps:
            now = self.clock()
            answer = torch.tensor([float(asked), (now - self._asked) / self._steps], device=self.device)
            dist.all_reduce(answer, dist.ReduceOp.MAX)
            asked, seconds = answer.tolist()  # of the slowest process
            self.up, self._asked, self._passed = bool(asked), now, 0
            self._steps = max(1, int(ASKING / max(seconds, 1e-3)))
        return self.up


@torch.no_grad()
def same_everywhere(*modules: nn.Module | None) -> None:
    """Gives every process the weights of the first."""
    for module in filter(None, modules):
        for tensor in module.state_dict().values():
            from_first_process(tensor)


@contextmanager
def together() -> Iterator[None]:
    """Inside, an error in one process ends all of them, and none waits for it; also a decorator.

    All processes must enter. It ends as a barrier does: when the last one is through.

    Raises:
        SystemExit: 2, where another process, the first that failed, says why.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = [failure is not None]
    if process_count() > 1:
        failed = [False] * process_count()
        dist.all_gather_object(failed, failure is not None)
    if any(failed):
        raise failure if failure and failed.index(True) == process_rank() else SystemExit(2)
