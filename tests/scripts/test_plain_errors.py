"""How scripts end on full disks, folders that cannot be written to, and Ctrl-C: one sentence and an exit code."""

import errno
import resource
import runpy
import signal
import sys
from contextlib import nullcontext

import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils.other import clean_state_dict_for_safetensors
from diffusers.utils import logging as diffusers_logging
from paths import SCRIPTS
from safetensors import SafetensorError
from tiny_models import make_pipeline
from training_processes import SMALL_DATA, SMALL_TOKENIZER, errors
from training_processes import run as run_processes
from transformers.utils import logging as transformers_logging

from flextok_hf.pipelines.pipeline_flextok import FlexTokPipeline
from flextok_hf.utils.files import write_atomically
from flextok_hf.utils.plain_errors import plain_errors


def end_of(error):
    with pytest.raises(SystemExit) as end, plain_errors():
        raise error
    return end.value.code


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b: No space left on device. Free some space"),
        (OSError(errno.EROFS, "Read-only file system", "/a"), "/a: Read-only file system. Choose a folder that can"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "/a: Permission denied. Change the permissions"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files. Raise the limit on open files"),
        (FileNotFoundError("`config` 'x' is no file."), "`config` 'x' is no file."),
        (ValueError("`data` has no rows.\nPass other files."), "`data` has no rows. Pass other files."),
        (TypeError("`images` must be a list."), "`images` must be a list."),
    ],
)
def test_an_error_that_a_user_can_fix_is_one_sentence_with_advice(error, sentence, capsys):
    assert end_of(error) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and sentence in line


def test_ctrl_c_is_one_word(capsys):
    assert end_of(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), AttributeError("a bug"), KeyError("a bug")])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)), plain_errors():
        raise error


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [FULL, SafetensorError("Error while serializing: I/O error: (os error 28)")])
def test_an_error_while_writing_names_the_file(error, tmp_path):
    def fail(path):
        raise error

    with pytest.raises(OSError, match="No space left on device: '.*/out.bin'"):
        write_atomically(tmp_path / "out.bin", fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError("x"), SafetensorError("x"), FileNotFoundError("x"), KeyboardInterrupt()])
def test_other_errors_while_writing_are_passed_on(error, tmp_path):
    def fail(path):
        raise error

    with pytest.raises(type(error)) as passed:
        write_atomically(tmp_path / "out.bin", fail)
    assert passed.value is error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("x"), TypeError("x")])
def test_a_traceback_can_be_asked_for_with_an_option_that_the_script_does_not_see(monkeypatch, error):
    monkeypatch.setattr(sys, "argv", ["script.py", "--seed", "1", "--debug"])
    with pytest.raises(type(error)), plain_errors():
        assert sys.argv == ["script.py", "--seed", "1"]
        raise error


def test_the_note_about_tied_weights_is_hidden_and_other_warnings_are_not(caplog):
    weight = torch.zeros(2, 2)
    with plain_errors():
        PartialState()
        clean_state_dict_for_safetensors({"a": weight, "b": weight})
        get_logger("accelerate.utils.other").warning("something to act on")
    assert caplog.messages == ["[RANK 0] something to act on"]


# Whole programs


# The largest allowed file in bytes: as on a full disk, the first larger one fails
LIMITS = {"train": 60_000, "tokenize_dataset": 4_000, "evaluate": 4_000}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return folder


def command_of(name, folder, output, model):
    """Return the words of a program that writes to `output`."""
    if name == "train":
        options = {"train_data": ["synthetic"], "validation_steps": 0, "max_train_steps": 1, **SMALL_DATA}
        (folder / "tokenizer.yaml").write_text(yaml.safe_dump({**options, **SMALL_TOKENIZER}))
        return ["train.py", "tokenizer", "--config", folder / "tokenizer.yaml", "--output_dir", output]
    if name == "tokenize_dataset":
        words = ["tokenize_dataset.py", "--train_data", "synthetic", "--max_train_samples", 5000, "--batch_size", 500]
        return [*words, "--model", model, "--output", output]
    words = ["evaluate.py", "reconstruction", "--data", "synthetic", "--max_images", 20, "--batch_size", 4]
    return [*words, "--model", model, "--output", output, "--num_inference_steps", 1]


@pytest.mark.parametrize(("context", "is_shown"), [(nullcontext, True), (plain_errors, False)])
def test_only_scripts_hide_the_bars_of_loading_a_model(context, is_shown, tmp_path, model):
    def program():
        sys.stderr = open(tmp_path / "stderr.txt", "w", buffering=1)
        transformers_logging.enable_progress_bar()  # earlier tests may have hidden them
        diffusers_logging.enable_progress_bar()
        with context():
            FlexTokPipeline.from_pretrained(model)

    assert run_processes(program, tmp_path) == [0]
    assert ("Loading" in (tmp_path / "stderr.txt").read_text()) == is_shown


def run(name, folder, output, model, limit=resource.RLIM_INFINITY):
    """Run a program in a process of its own and return what it printed at the end."""
    words = [str(word) for word in command_of(name, folder, output, model)]

    def program():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing raises an error
        sys.argv, sys.stderr = words, open(folder / "stderr.txt", "w", buffering=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        runpy.run_path(str(SCRIPTS / words[0]), run_name="__main__")

    assert run_processes(program, folder) == [1]
    assert errors(folder).endswith("SystemExit: 1\n"), errors(folder)
    return (folder / "stderr.txt").read_text().splitlines()[-1]


@pytest.mark.parametrize("name", LIMITS)
def test_a_full_disk_ends_in_one_sentence_and_leaves_nothing_half_written(name, tmp_path, model):
    last = run(name, tmp_path, tmp_path / "output", model, LIMITS[name])
    assert last.startswith("error: "), last
    left = [path for path in (tmp_path / "output").rglob("*") if path.is_file()]
    assert not [path for path in left if path.name.startswith(".") or path.stat().st_size >= LIMITS[name]]
    assert not list((tmp_path / "output").rglob("*.partial"))


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("place", ["/proc/flextok", "file"])
def test_a_folder_that_cannot_be_created_ends_in_one_sentence(name, place, tmp_path, model):
    (tmp_path / "file").write_text("in the way")
    output = tmp_path / "file" / "output" if place == "file" else place
    last = run(name, tmp_path, output, model)
    assert last.startswith("error: ") and str(output) in last
