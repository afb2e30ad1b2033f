"""Damaged checkpoints: `latest` passes over them by name, and one that is asked for is refused with its file."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from training_processes import SMALL_DATA, SMALL_TOKENIZER, assert_same_state

from flextok_hf.training.arguments import TokenizerArguments
from flextok_hf.training.checkpoints import CheckpointDamaged, find_whole_checkpoint, list_checkpoints
from flextok_hf.training.stages import train_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("run")
    options = {"max_train_steps": 3, "checkpointing_steps": 1, "checkpoints_total_limit": 3, "validation_steps": 0}
    options |= {**SMALL_DATA, **SMALL_TOKENIZER, "ema_decay": 0.9, "resume_from_checkpoint": "latest"}
    arguments = TokenizerArguments(output_dir=str(folder), **options)
    train_tokenizer(arguments)
    return arguments


@pytest.fixture
def copy(run, tmp_path):
    """The options of a copy of the run, which a test may damage."""
    shutil.copytree(run.output_dir, tmp_path / "copy")
    return replace(run, output_dir=str(tmp_path / "copy"))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def append(path):
    path.write_bytes(path.read_bytes() + b"\0")


def fill_with_zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def swap(path):
    shutil.copy(path.parents[1] / "checkpoint-1" / path.name, path)


def replace_by_a_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def replace_by_a_dangling_link(path):
    path.unlink()
    path.symlink_to("nowhere")


def write_garbage(path):
    path.write_text("{not JSON")


def write_another_json(path):
    path.write_text("[1, 2]")


BINARY = [truncate, empty, flip_a_bit, append, fill_with_zeros, swap, Path.unlink]
BINARY += [replace_by_a_folder, replace_by_a_pipe, replace_by_a_dangling_link]
DAMAGES = [
    *((name, damage) for name in ("model.safetensors", "ema.safetensors", "optimizer.bin") for damage in BINARY),
    *(("random_states_0.pkl", damage) for damage in (truncate, flip_a_bit)),
    *(
        (name, damage)
        for name in ("training_state.json", "checksums.json")
        for damage in (truncate, empty, swap, Path.unlink, write_garbage, write_another_json, replace_by_a_folder)
    ),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_checkpoint_is_passed_over_by_latest_and_refused_by_name(copy, caplog, name, damage):
    folder = Path(copy.output_dir)
    damage(folder / "checkpoint-3" / name)
    # with the checksums of another checkpoint, all files seem to be damaged
    culprit = "differs from its checksum" if (name, damage) == ("checksums.json", swap) else name
    with pytest.raises(OSError, match=f"checkpoint-3.*{culprit}"):
        find_whole_checkpoint(replace(copy, resume_from_checkpoint=str(folder / "checkpoint-3")))
    assert len(list_checkpoints(folder)) == 3

    assert find_whole_checkpoint(copy) == folder / "checkpoint-2"
    assert f"{folder / 'checkpoint-3'} is skipped, and is now checkpoint-3.damaged: " in caplog.text
    assert culprit in caplog.text
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-1", "checkpoint-2"]


def test_going_on_from_an_older_checkpoint_gives_bitwise_the_same_result(run, copy):
    for name in ("checkpoint-2", "checkpoint-3"):
        flip_a_bit(Path(copy.output_dir) / name / "model.safetensors")
    train_tokenizer(copy)
    assert sorted(path.name for path in Path(copy.output_dir).glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-2.damaged",
        "checkpoint-3",
        "checkpoint-3.damaged",
    ]
    assert_same_state(Path(run.output_dir) / "checkpoint-3", Path(copy.output_dir) / "checkpoint-3")


def test_a_run_does_not_start_over_when_all_its_checkpoints_are_damaged(copy):
    for number in (1, 2, 3):
        empty(Path(copy.output_dir) / f"checkpoint-{number}" / "optimizer.bin")
    with pytest.raises(
        CheckpointDamaged, match="'latest' finds no whole checkpoint: in .*checkpoint-3, optimizer.bin"
    ):
        train_tokenizer(copy)
    assert len(list_checkpoints(copy.output_dir)) == 3


def test_other_files_in_a_checkpoint_are_no_damage(copy):
    folder = Path(copy.output_dir) / "checkpoint-3"
    (folder / "notes").mkdir()
    (folder / "notes" / "today.txt").write_text("went well")
    (folder / "link").symlink_to("nowhere")
    train_tokenizer(replace(copy, max_train_steps=4))
    assert not list(Path(copy.output_dir).glob("*.damaged"))


@pytest.mark.parametrize("kind", ["file", "empty folder", "link", "renamed"])
def test_what_only_has_the_name_of_a_checkpoint_is_passed_over(copy, caplog, kind):
    path = Path(copy.output_dir) / "checkpoint-9"
    if kind == "file":
        path.write_text("")
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere")
    else:
        shutil.copytree(path.with_name("checkpoint-1"), path)
    train_tokenizer(replace(copy, max_train_steps=4))
    assert "checkpoint-9 is skipped" in caplog.text
    assert [path.name for path in list_checkpoints(copy.output_dir)][-1] == "checkpoint-4"


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.bin"])
@pytest.mark.parametrize("damage", [truncate, empty, fill_with_zeros, Path.unlink], ids=lambda one: one.__name__)
def test_a_damaged_checkpoint_of_an_earlier_version_is_refused_in_words(copy, name, damage):
    folder = Path(copy.output_dir) / "checkpoint-3"
    state = json.loads((folder / "training_state.json").read_text())
    del state["checksums"]
    (folder / "training_state.json").write_text(json.dumps(state))
    (folder / "checksums.json").unlink()
    damage(folder / name)
    reason = "cannot be loaded: .* damaged" if damage is Path.unlink else f"{name} is damaged: "
    with pytest.raises(CheckpointDamaged, match=f"checkpoint-3.*{reason}"):
        train_tokenizer(replace(copy, resume_from_checkpoint=str(folder)))


def test_a_checkpoint_of_a_model_of_another_size_is_refused_in_words(copy):
    with pytest.raises(CheckpointDamaged, match="checkpoint-3 cannot be loaded: it is of a model with other sizes"):
        train_tokenizer(replace(copy, encoder_num_layers=2))
