"""Command lines run from a notebook: what is printed, what is refused."""

import pytest

from repae_lite.commands.terminal import NOISE, Terminal, check, typed


@pytest.mark.parametrize("quick", [True, False])
def test_runs_a_command_and_expects_its_exit_code(tmp_path, capsys, quick):
    run = Terminal(tmp_path, quick=quick)
    run("repae compare one.json", expect=2)
    said = capsys.readouterr().out
    assert said.startswith("$ repae compare one.json\n") and "give two or more" in said


def test_shows_the_chosen_lines_and_counts_the_others(tmp_path, capsys):
    run = Terminal(tmp_path, quick=True)
    run("repae --help", full="repae preprocess --imagenet-path IMAGES", show=slice(2))
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["at full scale:", "repae preprocess --imagenet-path IMAGES"]
    assert said[-1].endswith("more lines]") and len(said) == 7


def test_another_exit_code_is_an_error(tmp_path):
    with pytest.raises(ChildProcessError, match="give two or more"):
        Terminal(tmp_path, quick=True)("repae compare one.json")


def test_a_line_that_repae_would_not_take_is_refused():
    check("accelerate launch --multi_gpu --num_processes 8 -m repae_lite train-repae --preset repae-sdvae")
    with pytest.raises(ValueError, match="--batchsize"):
        check("repae train-repae --batchsize 256")


def test_long_lines_are_broken_as_in_a_shell():
    line = "repae train-repae " + " ".join(f"--option-{i} {i}" for i in range(20))
    assert len(typed(line).splitlines()) > 1 and typed(line).replace(" \\\n    ", " ") == line


def test_progress_bars_and_the_launchers_notes_are_noise():
    assert NOISE.search("100%|████| 6000/6000 [00:05<00:00]")
    assert NOISE.search("\t`--num_machines` was set to a value of `1`")
    assert not NOISE.search("step 20 of 20, 0.872 steps/s")
