"""Output may fail, a program does not end by it."""

import subprocess
import sys

import pytest

PROGRAM = """
import logging, os, sys, warnings
from tqdm import tqdm
from repae_lite.utils.output import patient_output

@patient_output()
def work():
    logging.getLogger("repae_lite").addHandler(logging.StreamHandler())
    for _ in tqdm(range(3), disable=False):
        print("x" * 100_000)
        print("é", file=sys.stderr, flush=True)
        logging.getLogger("repae_lite").warning("said")
        warnings.warn("warned")
    with open(sys.argv[1], "w") as file:
        assert file.fileno() > 2  # what libraries write to standard errors does not land in it
        file.write("finished")
    return 0

sys.exit(work())
"""


@pytest.mark.parametrize(
    "redirected",
    ["| true", "2>&1 | true", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1", "2>&-", ">&-", "<&- >&- 2>&-"],
)
def test_work_is_finished_whatever_becomes_of_its_output(tmp_path, redirected):
    command = f'set -o pipefail; "$0" -c "$1" "$2" {redirected}'
    done = subprocess.run(["bash", "-c", command, sys.executable, PROGRAM, tmp_path / "file"], check=False)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "finished"


def test_characters_that_a_terminal_lacks_are_written_in_another_way():
    program = "from repae_lite.utils.output import patient_output\nwith patient_output(): print('8 × 8')"
    command = [sys.executable, "-X", "utf8=0", "-c", program]
    done = subprocess.run(command, env={"PYTHONIOENCODING": "ascii"}, capture_output=True, check=True)
    assert done.stdout == b"8 \\xd7 8\n"


@pytest.mark.parametrize("words", ["--help", "check --help"])
def test_help_into_a_closed_pipe_is_no_error(words):
    command = f'set -o pipefail; "$0" -m repae_lite {words} | true'
    done = subprocess.run(["bash", "-c", command, sys.executable], capture_output=True, check=False)
    assert done.returncode == 0 and not done.stderr
