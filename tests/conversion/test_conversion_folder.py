"""The output folder of a conversion: complete or absent, and never written over existing files."""

import resource
import shutil
import signal
import sys
from multiprocessing import get_context

import pytest
from refusals import T5_FOLDER
from transformers import T5EncoderModel

from flextok_hf import FlexTokPipeline
from flextok_hf.cli import main
from flextok_hf.conversion.convert import convert_checkpoint
from flextok_hf.conversion.writing import new_folder


def test_existing_files_are_never_overwritten(place, tokenizer):
    (place / "ours").mkdir()
    (place / "ours" / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        convert_checkpoint(place / "ours", str(tokenizer))
    (place / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        convert_checkpoint(place / "file", str(tokenizer))
    with pytest.raises(ValueError, match="does not exist"):
        convert_checkpoint(place / "missing" / "ours", str(tokenizer))
    assert (place / "ours" / "precious.txt").read_text() == (place / "file").read_text() == "mine"


def test_an_empty_folder_is_accepted(place, tokenizer):
    (place / "ours").mkdir()
    convert_checkpoint(place / "ours", str(tokenizer))
    assert (place / "ours" / "model_index.json").is_file()
    assert sorted(path.name for path in place.iterdir()) == ["ours", "tokenizer"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
def test_an_interrupted_conversion_leaves_nothing(place, error):
    with pytest.raises(error), new_folder(place / "ours") as folder:
        (folder / "half.bin").write_text("half")
        raise error
    assert list(place.iterdir()) == []


def test_a_full_disk_is_detected_before_anything_is_written(place, tokenizer, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OSError, match="0.0 GB of free space, but 0.0 GB are needed"):
        convert_checkpoint(place / "ours", str(tokenizer))
    assert sorted(path.name for path in place.iterdir()) == ["tokenizer"]


@pytest.mark.parametrize("limit", [1_000, 5_000, 20_000])
def test_a_disk_that_fills_up_ends_in_a_sentence_and_leaves_nothing(place, tokenizer, text_prior, limit):
    def convert():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing raises an error, as on a full disk
        sys.stderr = open(place / "stderr.txt", "w")
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        words = ["convert", str(tokenizer), "--prior", str(text_prior), "--output", str(place / "ours"), "--quiet"]
        sys.exit(main(words))

    process = get_context("fork").Process(target=convert)
    process.start()
    process.join()
    lines = (place / "stderr.txt").read_text().splitlines()
    assert process.exitcode == 2 and lines[-1] == f"flextok: error: [Errno 27] File too large: '{place / 'ours'}'"
    assert not [path for path in place.iterdir() if "ours" in path.name]


def test_new_folders_have_the_usual_permissions(place, tokenizer):
    convert_checkpoint(place / "ours", str(tokenizer))
    (place / "other").mkdir()
    assert (place / "ours").stat().st_mode == (place / "other").stat().st_mode


def test_a_text_encoder_is_saved_with_the_pipeline(place, tokenizer, text_prior):
    convert_checkpoint(place / "ours", str(tokenizer), str(text_prior))
    pipe = FlexTokPipeline.from_pretrained(place / "ours")
    expected = T5EncoderModel.from_pretrained(T5_FOLDER)
    assert all(pipe.text_encoder.state_dict()[name].equal(one) for name, one in expected.state_dict().items())
    assert pipe.tokenizer.model_max_length == 16
