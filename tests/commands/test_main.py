"""The command line: every command explains itself, knows its official flags, and refuses in one sentence."""

import pytest

from repae_lite.commands.main import main

FLAGS = {  # of the official scripts that the commands stand for
    "preprocess": ("--imagenet-path",),
    "cache-latents": (
        "--vae-arch",
        "--vae-ckpt-path",
        "--vae-latents-name",
        "--pproc-batch-size",
        "--data-dir",
    ),
    "export-vae": ("--repae-ckpt", "--vae-name", "--save-dir", "--exp-path", "--train-steps"),
    "download": ("all-for", "--revision", "sit-ldm-e2e-vavae"),
    "check": ("--json",),
}


@pytest.mark.parametrize("command", FLAGS)
def test_help_names_the_flags(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in FLAGS[command])


def test_the_commands_are_listed(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(command in printed for command in FLAGS)


def test_mistakes_of_usage_and_of_content_both_end_with_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["export-vae", "--vae-name", "x"])  # of what?
    assert ended.value.code == 2
    assert (
        main(
            [
                "export-vae",
                "--exp-path",
                str(tmp_path / "none"),
                "--vae-name",
                "x",
                "--save-dir",
                str(tmp_path),
            ]
        )
        == 2
    )
    assert capsys.readouterr().err.splitlines()[-1].startswith("repae export-vae: the weights ")
    assert not list(tmp_path.iterdir())
