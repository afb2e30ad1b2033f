"""`scripts/collect_words.py`: an old model learns to say what it was trained on."""

import runpy
import sys

import pytest
from datasets import Dataset
from paths import ROOT
from tiny_models import make_text_pipeline

from flextok_hf import FlexTokPipeline
from flextok_hf.utils.measures import weights_hash


CAPTIONS = [["a red circle", "a circle, red"], ["a dog"]]


def collect(monkeypatch, model, data, column="captions") -> None:
    arguments = ["--model", str(model), "--train_data", str(data), "--caption_column", column]
    monkeypatch.setattr(sys, "argv", ["collect_words.py", *arguments])
    runpy.run_path(str(ROOT / "scripts" / "collect_words.py"), run_name="__main__")


@pytest.fixture
def model_and_data(tmp_path):
    make_text_pipeline().save_pretrained(tmp_path / "model")
    data = tmp_path / "train.parquet"
    Dataset.from_dict({"captions": CAPTIONS}).to_parquet(data)
    return tmp_path / "model", data


def test_the_words_of_the_captions_are_written_and_nothing_else_changes(monkeypatch, model_and_data):
    model, data = model_and_data
    before = FlexTokPipeline.from_pretrained(model).prior
    collect(monkeypatch, model, data)
    after = FlexTokPipeline.from_pretrained(model).prior
    words = {"known_names": ["dog", "red circle"], "known_words": ["a", "circle", "red", "dog"]}
    assert after.config.to_dict() == before.config.to_dict() | words
    assert weights_hash({"prior": after}) == weights_hash({"prior": before})


def test_a_missing_column_is_an_error_that_names_those_there(monkeypatch, model_and_data, capsys):
    with pytest.raises(SystemExit):
        collect(monkeypatch, *model_and_data, column="text")
    assert "the data set has captions" in capsys.readouterr().err
