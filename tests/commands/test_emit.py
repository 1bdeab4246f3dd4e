"""Job files of `repae reproduce --emit`: run here with stand-ins for Python, srun and scontrol."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from repae_lite.commands.emit import EMITTERS, emit
from repae_lite.commands.main import make_parser
from repae_lite.commands.rows import Plan, read_row, row_names

SHELLCHECK = shutil.which("shellcheck") or shutil.which(Path(sys.executable).parent / "shellcheck")
PLACES = {"images": "/data/a folder", "validation": "/data/val", "reference": "/data/it's here.npz"}
PYTHON = """\
words=(); for word in "$@"; do words+=("$word"); done
{ printf '%s\\x1f' "${WORLD_SIZE:-}" "${words[@]}"; echo; } >> "$LOG"
case "$*" in *"$FAIL"*) exit "$CODE" ;; esac
"""
STAND_INS = {
    "python": PYTHON,
    "srun": """\
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=2 exec "$@"
""",
    "scontrol": """\
if [ "$1" = show ]; then echo node1; echo node2; else echo "$@" >> "$LOG.scontrol"; fi
""",
}


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """The mid scale of a row on two GPUs, in a folder that needs quotes."""
    monkeypatch.chdir(tmp_path)
    return Plan(row=read_row("repae-sdvae"), scale="mid", folder=tmp_path / "it's a $row", processes=2)


@pytest.fixture
def bench(tmp_path):
    """Runs a job file with the stand-ins: (exit code, words of each Python)."""
    bin, log = tmp_path / "bin", tmp_path / "log"
    bin.mkdir()
    for name, script in STAND_INS.items():
        (bin / name).write_text(f"#!/bin/bash\n{script}")
        (bin / name).chmod(0o755)

    def run(text, *, fail="nothing fails", code=1, **environment):
        (tmp_path / "job.sh").write_text(text)
        log.unlink(missing_ok=True)
        slurm = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "8"}
        path = f"{bin}{os.pathsep}{os.environ['PATH']}"
        environment |= {"PATH": path, "LOG": str(log), "FAIL": fail, "CODE": str(code)}
        done = subprocess.run(
            ["bash", "job.sh"],
            cwd=tmp_path,
            env=os.environ | slurm | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not done.stderr, done.stderr
        lines = log.read_text().splitlines() if log.exists() else []
        return done.returncode, [line.split("\x1f")[:-1] for line in lines]

    return run


def commands(plan):
    return [command for stage in plan.stages for command in stage.commands]


def pod(text):
    """The script of a pod, of both kinds alike."""
    replicas = yaml.safe_load(text)["spec"]["pytorchReplicaSpecs"]
    (script,) = {spec["template"]["spec"]["containers"][0]["args"][0] for spec in replicas.values()}
    return script


def make_results(plan, *keep):
    """What a run leaves: the results of all commands but those that are named in `keep`."""
    for command in commands(plan):
        if command.done and command.words[0] not in keep:
            command.done.parent.mkdir(parents=True, exist_ok=True)
            command.done.touch()


def test_a_script_runs_all_commands_in_order_and_passes_over_what_is_there(plan, bench):
    code, ran = bench(emit(plan, "script"))
    assert code == 0 and len(ran) == len(commands(plan))
    for words, command in zip(ran, commands(plan), strict=True):
        assert tuple(words[-len(command.words) :]) == command.words
        assert ("accelerate.commands.launch" in words) == command.parallel
    make_results(plan, "generate")
    code, ran = bench(emit(plan, "script"))
    assert code == 0 and [words for words in ran if "train-repae" in words] == []
    assert [words for words in ran if "generate" in words]


@pytest.mark.parametrize(("code", "starts"), [(1, 1), (137, 4), (143, 1)])
def test_slurm_restarts_what_crashed_and_queues_again_what_was_preempted(plan, bench, tmp_path, code, starts):
    ended, ran = bench(emit(plan, "slurm"), fail="train-repae", code=code)
    assert ended == code and ran[-1][3] == "train-repae" and ran[-1][0] == "2"  # of two processes
    assert [words[3] for words in ran].count("train-repae") == starts
    assert {words[0] for words in ran[:-starts]} == {""}  # the others are alone
    queued = tmp_path / "log.scontrol"
    assert (queued.read_text() == "requeue 17\n") if code == 143 else not queued.exists()
    code, ran = bench(emit(plan, "slurm"))
    assert code == 0 and [tuple(words[3:]) for words in ran] == [each.words for each in commands(plan)]


@pytest.mark.parametrize("kind", ["script", "k8s"])
def test_a_signal_ends_training_by_itself_and_then_the_job(plan, tmp_path, kind):
    make_results(plan, "train-repae")
    script = tmp_path / "job.sh"
    script.write_text(emit(plan, "script") if kind == "script" else pod(emit(plan, "k8s")))
    (tmp_path / "python").write_text(
        '#!/bin/bash\ncase "$*" in *train-repae*) ;; *) exit 0 ;; esac\n'
        "trap 'sleep 0.2; touch checkpoint; exit 143' TERM; touch started; while :; do sleep 0.05; done\n"
    )
    (tmp_path / "python").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    job = subprocess.Popen(["bash", script], cwd=tmp_path, env=os.environ | {"PATH": path, "RANK": "0"})
    try:
        while job.poll() is None and not (tmp_path / "started").exists():
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        assert job.wait(30) == 143 and (tmp_path / "checkpoint").exists()
    finally:
        job.kill()


def test_pods_share_what_can_be_shared_and_the_first_does_the_rest(plan, bench):
    script = pod(emit(plan, "k8s"))
    assert "set -u" in script
    alone = [command for command in commands(plan) if not command.parallel]
    shared = [command.words for command in commands(plan) if command.parallel]
    code, ran = bench(script, RANK="0", WORLD_SIZE="2")
    assert code == 0 and [words[0] for words in ran] == [
        "2" if command.parallel else "" for command in commands(plan)
    ]
    marks = sorted((plan.folder / "jobs").iterdir())
    assert len(marks) == len([command for command in alone if command.done is None])
    code, ran = bench(script, RANK="1", WORLD_SIZE="2")  # the first one's results are there
    assert code == 0 and [tuple(words[3:]) for words in ran] == shared


def test_a_pytorchjob_has_what_the_operator_wants(plan):
    text = emit(plan, "k8s")
    job = yaml.safe_load(text)
    assert not re.search(r"(^|\s)!\w", re.sub(r"- \|\n(.|\n)*?resources:", "", text))  # no tags
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", job["metadata"]["name"])
    assert job["spec"]["runPolicy"]["cleanPodPolicy"] in ("None", "Running", "All")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1 and replicas["Worker"]["replicas"] == 1
    for spec in replicas.values():
        assert spec["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        inside = spec["template"]["spec"]
        (container,) = inside["containers"]
        assert container["name"] == "pytorch" and container["image"]  # the operator looks for that name
        assert all(isinstance(each["value"], str) for each in container["env"])
        mounted = {each["name"] for each in container["volumeMounts"]}
        assert mounted == {each["name"] for each in inside["volumes"]}
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    single = Plan(row=plan.row, scale="mid", folder=plan.folder)
    assert set(yaml.safe_load(emit(single, "k8s"))["spec"]["pytorchReplicaSpecs"]) == {"Master"}


@pytest.mark.parametrize("kind", EMITTERS)
def test_every_row_makes_a_job_that_shells_can_read(kind, tmp_path):
    texts = []
    for row in map(read_row, row_names()):
        for scale in ("mid", "full") if not row.not_built else ():
            text = emit(Plan(row=row, scale=scale, folder=tmp_path / "a b", processes=16, **PLACES), kind)
            texts.append(text if kind != "k8s" else pod(text))
    job = tmp_path / "job.sh"
    job.write_text("\n".join(texts))
    assert subprocess.run(["bash", "-n", job], capture_output=True, check=False).stderr == b""
    if SHELLCHECK:
        job.write_text(texts[0])
        done = subprocess.run([SHELLCHECK, "--shell=bash", job], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_the_mid_scale_is_made_of_commands_that_exist(plan):
    parser = make_parser()
    for command in commands(plan):
        parser.parse_args(command.words)


def test_what_makes_no_job_is_refused(tmp_path):
    row = read_row("repae-sdvae")

    def plan(scale="full", processes=16, **places):
        return Plan(row=row, scale=scale, folder=tmp_path, processes=processes, **places)

    for wanted, kind, sentence in (
        (plan(**PLACES), "pbs", "unknown kind of job 'pbs': choose one of slurm, k8s, script"),
        (plan("tiny"), "slurm", "scale tiny needs no cluster"),
        (plan(), "slurm", "repae preprocess needs a path that was left open: give --images PATH"),
        (plan(images="/i"), "k8s", "repae evaluate needs a path that was left open: give --reference PATH"),
        (plan("mid", samples=50), "script", "--samples draws by a protocol that only a run here writes"),
        (plan(processes=9, **PLACES), "slurm", "9 GPUs do not fill machines of 8"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
            emit(wanted, kind)
