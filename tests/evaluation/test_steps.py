"""How many decoder steps are enough: the rule, the measurement, and what it writes to a model."""

import json
from importlib import import_module

import paths  # noqa: F401  makes scripts importable
import pytest
from tiny_models import make_pipeline

from flextok_hf.evaluation.steps import StepsOptions, choose_steps
from flextok_hf.pipelines.pipeline_flextok import FlexTokPipeline


@pytest.fixture
def model(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def options_for(tmp_path, **changes):
    options = {"data": "synthetic", "output": str(tmp_path / "out"), "step_counts": [1, 2, 8], "reference_steps": 16}
    return {**options, "max_images": 4, "token_counts": [1, 6], **changes}


def test_the_fewest_steps_from_which_on_all_agree_are_chosen():
    means = {1: {1: 0.5, 2: 0.3, 4: 0.2}, 2: {1: 0.4, 2: 0.05, 4: 0.06}, 4: {1: 0.3, 2: 0.05, 4: 0.04}}
    assert choose_steps(means, 0.1, 100) == {"1": 100, "2": 2}
    assert choose_steps({1: {1: 0.05, 2: 0.2, 4: 0.05}}, 0.1, 100) == {"1": 4}  # what one step gives is luck
    assert choose_steps(means, 1.0, 100) == {"1": 1}


def test_the_command_measures_and_writes_the_steps_of_a_model(model, tmp_path):
    flags = options_for(tmp_path, model=str(model), tolerance=0.2)
    argv = ["steps", "--write_to_model"]
    for name, value in flags.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    import_module("evaluate").main(argv)
    record = json.loads((tmp_path / "out" / "steps.json").read_text())
    for figures in record["results"].values():
        means = [figures[f"{steps}_steps"]["mean"] for steps in (1, 2, 8)]
        assert means == sorted(means, reverse=True) and means[-1] > 0
    table = record["default_num_inference_steps"]
    assert (tmp_path / "out" / "steps.md").is_file() and table
    loaded = FlexTokPipeline.from_pretrained(model)
    assert loaded.decoder.config.default_num_inference_steps == table
    assert loaded.choose_steps(None, [1]) == table["1"]


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"step_counts": []}, "`step_counts`"),
        ({"step_counts": [4, 2]}, "`step_counts`"),
        ({"step_counts": [0, 2]}, "`step_counts`"),
        ({"reference_steps": 8}, "`reference_steps`"),
        ({"measure": "fid"}, "`measure`"),
        ({"tolerance": 0.0}, "`tolerance`"),
        ({"num_inference_steps": 4}, "`num_inference_steps`"),
        ({"max_images": 0}, "`max_images`"),
        ({"write_to_model": True}, "`write_to_model`"),
    ],
)
def test_options_of_steps_that_make_no_sense_are_refused(tmp_path, changes, name):
    with pytest.raises(ValueError, match=name):
        StepsOptions(**options_for(tmp_path, **changes))
