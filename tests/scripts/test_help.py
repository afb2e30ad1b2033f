"""Every script and every one of its commands prints its help, and says what is missing without one."""

import runpy
import sys
from importlib import import_module

import pytest
from paths import ROOT, SCRIPTS


PATHS = [path for folder in (SCRIPTS, ROOT / "benchmarks") for path in sorted(folder.glob("*.py"))]
PATHS = [path for path in PATHS if "__main__" in path.read_text()]  # the others are modules of scripts
COMMANDS = {
    "train": import_module("train").STAGES,
    "evaluate": (*import_module("evaluate").MEASUREMENTS, "compare"),
}
CALLS = [(path, []) for path in PATHS]
CALLS += [(path, [command]) for path in PATHS for command in COMMANDS.get(path.stem, ())]


def run(path, words, monkeypatch):
    """Run a script as a program and return its exit code."""
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    return end.value.code


@pytest.mark.parametrize(("path", "command"), CALLS, ids=[" ".join([path.stem, *words]) for path, words in CALLS])
def test_the_help_of_every_script_and_command_is_printed(path, command, monkeypatch, capsys):
    assert run(path, [*command, "--help"], monkeypatch) in (0, None)
    output = capsys.readouterr().out
    assert output.startswith("usage: ") and "--help" in output


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("words", [[], ["no_such_command"], ["--no_such_option"]], ids=["none", "unknown", "flag"])
def test_without_a_known_command_a_script_lists_them_and_exits_with_2(name, words, monkeypatch, capsys):
    assert run(SCRIPTS / f"{name}.py", words, monkeypatch) == 2
    output = capsys.readouterr().err
    assert output.startswith("usage: ") and all(command in output for command in COMMANDS[name])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output_dir", "x", "--resolution", "0"], "`resolution` must be 1 or more, got 0"),
        (["--output_dir", "x", "--no_such_option", "1"], "no_such_option"),
        ([], "--output_dir"),
        (["--output_dir", "x", "--resolution", "many"], "invalid int value: 'many'"),
    ],
)
def test_wrong_options_of_training_are_one_line_and_exit_code_2(words, message, monkeypatch, capsys):
    assert run(SCRIPTS / "train.py", ["tokenizer", *words], monkeypatch) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last and message in last
