"""The command line: every command explains itself, knows its official flags, and refuses in one sentence."""

import logging
import sys

import pytest

from repae_lite import commands
from repae_lite.commands import main as command_line
from repae_lite.commands.main import COMMANDS, main

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
EXAMPLE = '''"""Greet somebody."""
FLAGS = {"what is said": {"--name": {"default": "you", "help": "whom to greet (default: you)"}}}
def run(args): print(f"Hello, {args.name}!")
'''


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
    assert all(command in printed for command in COMMANDS) and set(FLAGS) < set(COMMANDS)


@pytest.fixture
def greeting(tmp_path, monkeypatch):
    """A new command: one file of three lines and one row of the table."""
    (tmp_path / "say_hello.py").write_text(EXAMPLE)
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    monkeypatch.setattr(command_line, "COMMANDS", (*COMMANDS, "say-hello"))
    yield
    del sys.modules["repae_lite.commands.say_hello"]


def test_a_new_command_is_one_file_and_one_row(greeting, capsys):
    assert main(["say-hello", "--name", "REPA-E"]) == 0
    assert capsys.readouterr().out == "Hello, REPA-E!\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "say-hello    Greet somebody." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["say-hello", "--help"])
    printed = capsys.readouterr().out
    assert "Greet somebody." in printed and "what is said:" in printed and "whom to greet" in printed


def test_what_the_library_logs_is_shown_while_a_command_runs(greeting, capsys, monkeypatch):
    logger = logging.getLogger("repae_lite.some.module")

    def talk(_):
        logger.info("a plain sentence")
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["repae_lite.commands.check"], "run", talk)
    assert main(["check"]) == 130
    assert capsys.readouterr().err == "a plain sentence\nrepae check: interrupted\n"
    logger.info("nobody asked")
    assert capsys.readouterr().err == ""


def test_mistakes_of_usage_and_of_content_both_end_with_2(tmp_path, capsys):
    for words in (["nothing"], ["export-vae", "--vae", "x"], ["preprocess"], ["train-repae", "--batch", "8"]):
        with pytest.raises(SystemExit) as ended:  # unknown, shortened or missing words
            main(words)
        assert ended.value.code == 2
    for both in ([], ["--repae-ckpt", "a.pt", "--exp-path", "b"]):
        assert main(["export-vae", "--vae-name", "x", *both]) == 2  # of what?
        assert "either --repae-ckpt FILE or --exp-path FOLDER" in capsys.readouterr().err
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
