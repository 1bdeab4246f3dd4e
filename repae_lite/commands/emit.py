"""A row's whole plan as one job file: for SLURM, for Kubernetes, or a script for a machine of one's own.

The file runs the plan's commands one after another, those that can be shared by one process per GPU. A
command whose result is there is passed over, so a file that is started again goes on, and training goes on
from its last checkpoint. Why there is no launcher between a scheduler and the processes: its signals have to
reach them (reproduce/cluster/README.md).
"""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import indent

from repae_lite.commands.rows import INPUTS, Command, Plan, argv

PER_NODE = 8  # GPUs of a cluster's machine
_SLURM = """\
#!/bin/bash
# {about}
# Submit it from where repae_lite is installed: sbatch FILE. One task per GPU and no launcher between, so that
# SLURM's signals reach every process; commands for a single process run as one task.
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --gpus-per-node={each}
#SBATCH --ntasks-per-node={each}
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -u
cd -- {here} || exit
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=${{MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}}  # of this job alone: others may share a node
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"

# When one process has ended, in whatever way, the others have two minutes to end as well.
share() {{
  # shellcheck disable=SC2016  # expanded by each task
  srun --kill-on-bad-exit=0 --wait=120 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec "$@"' bash "$@"
}}
alone() {{ srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "$@"; }}

# step DONE HOW COMMAND...: a process that was killed or crashed (134, 135, 137, 139) is no mistake of the
# command: all of its processes start again, three times at most, and go on from what is there. 143 is an end
# by SLURM's SIGTERM, five minutes before time is up: queue again.
step() {{
  if [ -n "$1" ] && [ -e "$1" ]; then return; fi
  shift
  for _ in 1 2 3 4; do
    "$@"
    code=$?
    case "$code" in 134 | 135 | 137 | 139) ;; *) break ;; esac
  done
  if [ "$code" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
  if [ "$code" -ne 0 ]; then exit "$code"; fi
}}

{steps}
"""
_FORWARD = """\
# A signal ends the command that runs, training with a checkpoint, and then all of this with its exit code.
child=
trap 'if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; fi' TERM INT USR1
run() {
  "$@" &
  child=$!
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do  # a signal ended the waiting, not the command
    wait "$child"
    code=$?
  done
  if [ "$code" -ne 0 ]; then exit "$code"; fi
}
"""
_SCRIPT = """\
#!/bin/bash
# {about}
# Start it where repae_lite is installed: bash FILE. Started again, it goes on.
set -u
cd -- {here} || exit

{forward}
# step DONE COMMAND...
step() {{
  if [ -n "$1" ] && [ -e "$1" ]; then return; fi
  shift
  run "$@"
}}

{steps}
"""
_POD = """\
set -u
{forward}
# share DONE COMMAND...: all pods together. alone DONE COMMAND...: the first one, while the others wait.
share() {{
  if [ -e "$1" ]; then return; fi
  shift
  run "$@"
}}
alone() {{
  if [ "${{RANK:-0}}" -eq 0 ] && [ ! -e "$1" ]; then
    run env -u WORLD_SIZE -u LOCAL_RANK "${{@:2}}"
    if [ ! -e "$1" ]; then mkdir -p -- "${{1%/*}}" && touch -- "$1"; fi
  fi
  until [ -e "$1" ]; do run sleep 10; done
}}

{steps}"""
_K8S = """\
# {about}
# For the Kubeflow training operator: kubectl apply -f FILE. Fill in the image (see Dockerfile) and the claim,
# a disk that all pods can write: relative paths below are in /repae, where it is mounted.
# One pod per GPU: the operator sets MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE. A preempted pod's SIGTERM
# reaches the command, which ends with a checkpoint and 143; a restarted pod goes on from there.
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata:
  name: {name}
spec:
  runPolicy:
    cleanPodPolicy: Running
    backoffLimit: 100
  pytorchReplicaSpecs:
    Master:
      replicas: 1
      restartPolicy: OnFailure
      template: &pod
        spec:
          terminationGracePeriodSeconds: 300
          containers:
            - name: pytorch
              image: IMAGE_WITH_REPAE_LITE
              workingDir: /repae
              env:
                - {{name: LOCAL_RANK, value: "0"}}
                - {{name: HF_HOME, value: /repae/cache/huggingface}}
                - {{name: TORCH_HOME, value: /repae/cache/torch}}
              command: [bash, -c]
              args:
                - |
{script}
              resources:
                limits: {{nvidia.com/gpu: 1, cpu: "8", memory: 96Gi}}
              volumeMounts:
                - {{name: work, mountPath: /repae}}
                - {{name: shm, mountPath: /dev/shm}}
          volumes:
            - name: work
              persistentVolumeClaim: {{claimName: repae}}
            - name: shm
              emptyDir: {{medium: Memory, sizeLimit: 16Gi}}
"""
_WORKERS = """\
    Worker:
      replicas: {workers}
      restartPolicy: OnFailure
      template: *pod
"""


def emit(plan: Plan, kind: str) -> str:
    """A job file that runs a plan from its first command to its last.

    Args:
        plan: at scale "mid" or "full", for `plan.processes` GPUs.
        kind: "slurm", "k8s" or "script".

    Returns:
        The file's text.

    Raises:
        ValueError: an unknown kind; scale "tiny"; a number of samples; a place that was left open and is
            needed; more GPUs than fill whole machines.
    """
    if kind not in EMITTERS:
        raise ValueError(f"unknown kind of job {kind!r}: choose one of {', '.join(EMITTERS)}")
    if plan.scale == "tiny":
        raise ValueError("scale tiny needs no cluster, only minutes on two cores: leave --emit out")
    if plan.samples:
        raise ValueError("--samples draws by a protocol that only a run here writes: leave it or --emit out")
    for command in (command for stage in plan.stages for command in stage.commands):
        for place in () if command.finished else INPUTS.keys() & set(command.words):
            raise ValueError(
                f"repae {command.words[0]} needs a path that was left open: give {INPUTS[place][0]} PATH"
            )
    return EMITTERS[kind](plan)


def _about(plan: Plan) -> str:
    title = " ".join(plan.row.title.split())
    return f"{plan.row.name} at scale {plan.scale}: {title}. Made by repae reproduce {plan.row.name} --emit."


def _name(plan: Plan) -> str:
    """A name that schedulers take: of a DNS label."""
    return re.sub("[^a-z0-9]+", "-", f"repae-{plan.row.name}-{plan.scale}".lower()).strip("-")[:50].strip("-")


def _steps(plan: Plan, line: Callable[[Command, int], list[str]]) -> str:
    """The commands as lines of shell under their stages' names; `line` makes the words of one."""
    return "\n".join(_lines(plan, line))


def _lines(plan: Plan, line: Callable[[Command, int], list[str]]) -> Iterator[str]:
    number = 0
    for stage in plan.stages:
        yield f"# {stage.name}"
        for command in stage.commands:
            number += 1
            yield shlex.join(line(command, number))


def _python(command: Command) -> list[str]:
    """The command line of one process, with whatever Python comes first on the job's PATH."""
    return ["python", *argv(command)[1:]]


def _slurm(plan: Plan) -> str:
    nodes = -(-plan.processes // PER_NODE)
    if plan.processes % nodes:
        raise ValueError(f"{plan.processes} GPUs do not fill machines of {PER_NODE}: give a multiple of it")

    def line(command: Command, _: int) -> list[str]:
        how = "share" if command.parallel and plan.processes > 1 else "alone"
        return ["step", str(command.done or ""), how, *_python(command)]

    return _SLURM.format(
        about=_about(plan),
        name=_name(plan),
        nodes=nodes,
        each=plan.processes // nodes,
        here=shlex.quote(str(Path.cwd())),
        steps=_steps(plan, line),
    )


def _script(plan: Plan) -> str:
    def line(command: Command, _: int) -> list[str]:
        return ["step", str(command.done or ""), "python", *argv(command, plan.processes)[1:]]

    here = shlex.quote(str(Path.cwd()))
    return _SCRIPT.format(about=_about(plan), here=here, forward=_FORWARD, steps=_steps(plan, line))


def _k8s(plan: Plan) -> str:
    def line(command: Command, number: int) -> list[str]:
        how = "share" if command.parallel and plan.processes > 1 else "alone"
        done = command.done or plan.folder / "jobs" / f"{number:02d}.done"
        return [how, str(done), *_python(command)]

    script = _POD.format(forward=_FORWARD, steps=_steps(plan, line))
    text = _K8S.format(about=_about(plan), name=_name(plan), script=indent(script, 18 * " "))
    return text + (_WORKERS.format(workers=plan.processes - 1) if plan.processes > 1 else "")


EMITTERS = {"slurm": _slurm, "k8s": _k8s, "script": _script}
