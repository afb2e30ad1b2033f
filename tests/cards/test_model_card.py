"""Model cards state what the files of a model state, and nothing else."""

import ast
import importlib
import json
import re
import shutil
import sys

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from flextok_hf.cards.model_card import MARK, is_replaceable, same_weights, write_model_card, write_saved_card
from flextok_hf.cards.sections import duration, logged_seconds, markdown_table, results_table, training_facts
from flextok_hf.pipelines.pipeline_flextok import FlexTokPipeline
from flextok_hf.utils.measures import weights_hash


FIGURE = {"mean": 13.7, "low": 13.1, "high": 14.25}
SHARE = {"share": 0.81, "low": 0.78, "high": 0.84}
RESULTS = {
    "count": 24,
    "seed": 3,
    "weights_sha256": "abcdef0123456789ffff",
    "results": {"1": {"psnr_db": FIGURE, "by_style": {}}, "16": {"psnr_db": FIGURE | {"mean": 15.0}, "by_style": {}}},
}
OPTIONS = {
    "train_data": ["user/images"],
    "train_batch_size": 8,
    "mixed_precision": "bf16",
    "seed": 5,
    "num_registers": 6,
    "vae": None,
    "output_dir": str(torch.__file__),  # an absolute path of this machine
}


@pytest.fixture
def folder(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def enrich(folder):
    """Put recipe, facts, results and an image next to a model."""
    recipe = {"arguments": OPTIONS, "steps": 4000, "hardware": "an abacus", "seconds": 5400.0}
    recipe["earlier"] = [{"arguments": {"mixed_precision": "no", "seed": 1}, "steps": 70, "images_per_step": 4}]
    (folder / "training.json").write_text(json.dumps(recipe))
    facts = {"title": "A tiny model", "license": "mit", "limits": "Knows circles.", "prompt": "a circle"}
    facts["data"] = [{"name": "Circles", "license": "CC0", "url": "https://example.org/circles"}]
    (folder / "model_card.yaml").write_text(yaml.safe_dump(facts))
    (folder / "results").mkdir()
    (folder / "results" / "reconstruction.json").write_text(json.dumps(RESULTS))
    (folder / "images").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "images" / "a_cat.png")


def test_a_card_states_what_the_files_state(folder):
    enrich(folder)
    card = ModelCard.load(write_model_card(folder, "user/tiny"))
    metadata = card.data.to_dict()
    assert metadata["library_name"] == "flextok_hf" and metadata["pipeline_tag"] == "text-to-image"
    assert (metadata["license"], metadata["language"]) == ("mit", "en")
    assert {"flextok", "arxiv:2502.13967"} <= set(metadata["tags"])
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values == {"psnr_db": 15.0}

    text = " ".join(card.text.split())
    for words in (
        "# A tiny model",
        'FlexTokPipeline.from_pretrained("user/tiny")',
        'pipe("a circle", max_tokens=8)',
        "Images of 16 x 16 pixels become 1 to 6 tokens. Each token is one of 15 codes",
        "without a VAE",
        "Circles, CC0, <https://example.org/circles>",
        "Stage `vae`: 70 steps of 4 images, precision float32, seed 1.",
        "Stage `tokenizer`: 4,000 steps of 8 images, 90 minutes on an abacus, precision bf16, seed 5.",
        "| 16 | 15.00 (13.10 to 14.25) |",
        "weights abcdef0123456789",
        "![a cat](images/a_cat.png)",
        "Knows circles.",
    ):
        assert words in text, words
    assert torch.__file__ not in text, "a path of the machine that trained it"


def test_the_python_code_of_a_card_runs(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    Image.new("RGB", (20, 20), "red").save("photo.jpg")
    enrich(folder)
    text = write_model_card(folder, str(folder)).read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    scope: dict = {}
    exec(code, scope)
    assert scope["few"].size == scope["image"].size == (16, 16)


def test_a_prompt_with_quotes_is_quoted(folder):
    (folder / "model_card.yaml").write_text("""prompt: 'the word "cat" \\ on a wall'\n""")
    code = re.search(r"```python\n(.*?)```", write_model_card(folder).read_text(), re.DOTALL).group(1)
    constants = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert 'the word "cat" \\ on a wall' in constants


def test_missing_information_is_stated_and_not_made_up(folder):
    card = ModelCard.load(folder / "README.md")
    assert "license" not in card.data.to_dict() and "model-index" not in card.data.to_dict()
    assert "How it was trained is not recorded." in card.text
    assert "not stated here" in card.text
    assert "## Evaluation" not in card.text and "## Images" not in card.text


def test_kinds_of_models_are_distinguished(tiny_class_pipeline, tiny_tokenizer_pipeline, tmp_path):
    tiny_class_pipeline.save_pretrained(tmp_path / "classes")
    tiny_tokenizer_pipeline.save_pretrained(tmp_path / "tokenizer")
    classes, tokenizer = (ModelCard.load(tmp_path / name / "README.md") for name in ("classes", "tokenizer"))
    assert "class_labels=[0]" in classes.text and "language" not in classes.data.to_dict()
    assert tokenizer.data.pipeline_tag == "image-to-image" and "image = pipe(" not in tokenizer.text


def test_the_card_of_a_converted_model_states_its_origin(folder):
    record = {"tokenizer": {"source": "owner/official", "commit": "abc"}, "prior": {"source": "a_folder"}}
    (folder / "original.json").write_text(json.dumps(record))
    card = ModelCard.load(write_model_card(folder))
    assert card.data.base_model == ["owner/official"] and "license" not in card.data.to_dict()
    assert "Converted from `owner/official` and `a_folder`" in card.text


def test_a_local_card_loads_the_model_from_where_it_is(folder, monkeypatch, tmp_path):
    def loaded_from():
        return re.search(r"from_pretrained\((.*)\)", write_model_card(folder).read_text()).group(1)

    monkeypatch.chdir(folder.parent)
    assert loaded_from() == f'"{folder.name}"'
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert loaded_from() == f'"{folder.resolve()}"'


def test_a_fine_tuned_model_names_its_origin_with_license_and_data(folder, tmp_path):
    enrich(folder)
    shutil.copytree(folder, tmp_path / "tuned", ignore=shutil.ignore_patterns("model_card.yaml", "results"))
    arguments = {"pretrained_tokenizer": str(folder), "vae": "owner/vae", "train_data": ["photos"]}
    arguments |= {"mixed_precision": "no", "train_batch_size": 2}
    record = {"stage": "tokenizer", "steps": 3, "arguments": arguments, **training_facts(arguments, [], 2)}
    (tmp_path / "tuned" / "training.json").write_text(json.dumps(record))
    card = ModelCard.load(write_model_card(tmp_path / "tuned"))
    text = " ".join(card.text.split())
    assert "Trained on: `photos`." in text
    assert f"Started from `{folder.name}` (A tiny model), license: mit." in text
    assert "- Circles, CC0, <https://example.org/circles>" in text
    assert "Started from `owner/vae`, license: see its card." in text and card.data.base_model == ["owner/vae"]
    assert [stage["steps"] for stage in record["earlier"]] == [70, 4000]


def test_a_model_changed_in_an_unrecorded_way_names_license_and_data_of_its_origin(folder, tmp_path):
    enrich(folder)
    pipe = FlexTokPipeline.from_pretrained(folder)
    with torch.no_grad():
        next(pipe.decoder.parameters()).add_(1)
    pipe.save_pretrained(tmp_path / "tuned")
    text = (tmp_path / "tuned" / "README.md").read_text()
    assert "Made from `model`." in text and "license: mit" in text and "Circles, CC0" in text


def test_a_prior_that_reads_text_without_its_text_encoder_is_not_called_with_a_class(folder, tmp_path):
    pipe = FlexTokPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    pipe.save_pretrained(tmp_path / "no_text")
    assert "image = pipe(" not in (tmp_path / "no_text" / "README.md").read_text()


def test_unknown_facts_are_refused(folder):
    (folder / "model_card.yaml").write_text("licence: mit\n")
    with pytest.raises(ValueError, match="licence.*license"):
        write_model_card(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_card_files_are_copied_along_with_the_same_weights(folder, tmp_path, dtype):
    stored = FlexTokPipeline.from_pretrained(folder, dtype=dtype)
    stored.save_pretrained(tmp_path / "stored")
    enrich(tmp_path / "stored")
    FlexTokPipeline.from_pretrained(tmp_path / "stored").save_pretrained(tmp_path / "copy")
    text = (tmp_path / "copy" / "README.md").read_text()
    assert "A tiny model" in text and "4,000 steps" in text and "images/a_cat.png" in text
    assert (tmp_path / "copy" / "images" / "a_cat.png").is_file()


def test_results_of_other_weights_are_not_copied(folder, tmp_path):
    enrich(folder)
    pipe = FlexTokPipeline.from_pretrained(folder)
    with torch.no_grad():
        pipe.decoder.mask_token[0] += 1
    pipe.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / "results").exists()
    text = (tmp_path / "copy" / "README.md").read_text()
    assert "Made from `model`" in text and "## Evaluation" not in text and "4,000 steps" not in text
    assert not same_weights(folder, tmp_path / "copy")


@pytest.mark.parametrize("is_loaded", [True, False])
def test_saving_other_weights_over_a_model_does_not_keep_its_results(folder, tmp_path, is_loaded):
    enrich(folder)
    pipe = FlexTokPipeline.from_pretrained(folder)
    pipe.save_pretrained(folder)
    assert "## Evaluation" in (folder / "README.md").read_text(), "the same weights keep them"
    with torch.no_grad():
        pipe.decoder.mask_token[0] += 1
    if not is_loaded:
        pipe = FlexTokPipeline(**pipe.components)
    pipe.save_pretrained(folder)
    text = (folder / "README.md").read_text()
    assert "A tiny model" in text and "## Evaluation" not in text and "4,000 steps" not in text
    assert "a_cat" not in text and "13.70" not in text
    names = {path.name for path in (folder / "outdated").iterdir()}
    assert names == {"training.json", "results", "images"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_saved_over_itself_in_its_own_precision_keeps_its_results(folder, tmp_path, dtype):
    FlexTokPipeline.from_pretrained(folder, dtype=dtype).save_pretrained(tmp_path / "stored")
    enrich(tmp_path / "stored")
    FlexTokPipeline.from_pretrained(tmp_path / "stored", dtype=torch.float32).save_pretrained(tmp_path / "stored")
    assert "## Evaluation" in (tmp_path / "stored" / "README.md").read_text()
    assert not (tmp_path / "stored" / "outdated").exists()


@pytest.mark.parametrize("part", ["encoder", "decoder", "prior", "text_encoder"])
def test_weights_that_are_not_safetensors_are_never_taken_for_equal(folder, tmp_path, part):
    shutil.copytree(folder, tmp_path / "copy")
    assert same_weights(folder, tmp_path / "copy")
    for number, model in enumerate((folder, tmp_path / "copy")):
        (weights,) = (model / part).glob("*.safetensors")
        torch.save({"weight": torch.tensor(number)}, weights.with_suffix(".bin"))
        weights.unlink()
    enrich(folder)
    assert not same_weights(folder, tmp_path / "copy")
    write_saved_card(str(folder), tmp_path / "copy", None)
    text = (tmp_path / "copy" / "README.md").read_text()
    assert "Made from `model`" in text and "## Evaluation" not in text


def test_a_missing_component_makes_a_different_model(folder, tmp_path):
    FlexTokPipeline.from_pretrained(folder, prior=None, text_encoder=None, tokenizer=None).save_pretrained(
        tmp_path / "b"
    )
    assert not same_weights(folder, tmp_path / "b")


def test_a_hand_written_card_is_kept(folder, tiny_pipeline):
    assert is_replaceable(folder / "README.md") and MARK in (folder / "README.md").read_text()
    (folder / "README.md").write_text("# Mine\n")
    tiny_pipeline.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "# Mine\n"


def test_sets_of_images_become_columns():
    table = results_table({"trained": {"1": {"name": SHARE}}, "held_out": {"1": {"name": SHARE | {"share": 0.5}}}})
    assert "| tokens | trained | held out |" in table and "| 1 | 81% (78 to 84) | 50% (78 to 84) |" in table
    partial = results_table({"trained": {"1": {"name": SHARE}}, "plain": {"1": {"style": SHARE}}, "none": {}})
    assert "| 1 | 81% (78 to 84) |  |  |" in partial, "not every set has every metric"
    assert markdown_table(["a"], [[1]]) == "| a |\n| --- |\n| 1 |"


def test_the_duration_of_a_run_counts_repeated_steps_once(tmp_path):
    log = [{"step": 10, "images_per_s": 2.0}, {"step": 10, "loss": 1.0}, {"step": 20, "images_per_s": 4.0}]
    assert logged_seconds(log, 2) == 10 + 5
    assert logged_seconds([*log, {"step": 15, "images_per_s": 1.0}, {"step": 30, "images_per_s": 2.0}], 2) == 25
    assert [duration(seconds) for seconds in (40, 2100, 9000)] == ["40 seconds", "35 minutes", "2.5 hours"]
    (tmp_path / "training.json").write_text(json.dumps({"arguments": {}, "steps": 1, "earlier": [{"steps": 2}]}))
    facts = training_facts({"vae": None, "tokenizer": str(tmp_path)}, log, 2)
    assert facts["seconds"] == 15 and [stage["steps"] for stage in facts["earlier"]] == [2, 1]


# Scripts


def run_script(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *map(str, arguments)])
    importlib.import_module(module).main()


def weights_of(folder):
    parts = FlexTokPipeline.from_pretrained(folder).components
    return weights_hash({name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)})


def test_the_script_puts_everything_next_to_a_model(folder, tmp_path, monkeypatch):
    enrich(folder)
    weights = weights_of(folder)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "reconstruction.json").write_text(json.dumps(RESULTS | {"weights_sha256": weights}))
    (tmp_path / "facts.yaml").write_text("title: Another title\n")
    image = folder / "images" / "a_cat.png"
    image.rename(tmp_path / "a_dog.png")
    shared = ["--model", folder, "--facts", tmp_path / "facts.yaml", "--results", tmp_path / "results"]
    run_script("write_model_card", monkeypatch, *shared, "--images", tmp_path / "a_dog.png")
    text = (folder / "README.md").read_text()
    assert "# Another title" in text and weights[:16] in text and "![a dog](images/a_dog.png)" in text

    (tmp_path / "results" / "reconstruction.json").write_text(json.dumps(RESULTS))
    with pytest.raises(ValueError, match="abcdef.*Measure again"):
        run_script("write_model_card", monkeypatch, *shared)


def test_files_that_are_already_next_to_a_model_are_kept(folder, monkeypatch):
    enrich(folder)
    inside = ["--facts", folder / "model_card.yaml", "--images", folder / "images" / "a_cat.png"]
    run_script("write_model_card", monkeypatch, "--model", folder, *inside)
    assert (folder / "images" / "a_cat.png").is_file() and "# A tiny model" in (folder / "README.md").read_text()
    weights = {"weights_sha256": weights_of(folder)}
    (folder / "results" / "reconstruction.json").write_text(json.dumps(RESULTS | weights))
    run_script("write_model_card", monkeypatch, "--model", folder, "--results", folder / "results")
    assert json.loads((folder / "results" / "reconstruction.json").read_text())["count"] == 24
    (folder / "other").mkdir()
    shutil.copyfile(folder / "images" / "a_cat.png", folder / "other" / "a_cat.png")
    images = [folder / name / "a_cat.png" for name in ("images", "other")]
    with pytest.raises(ValueError, match="have the same name"):
        run_script("write_model_card", monkeypatch, "--model", folder, "--images", *images)
    assert images[0].is_file()


def test_the_measured_influence_is_that_of_an_ordered_tokenizer(tiny_pipeline, tmp_path):
    draw_figures = importlib.import_module("draw_figures")
    before = {name: value.clone() for name, value in tiny_pipeline.encoder.state_dict().items()}
    noise = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(tmp_path / "noise.png")
    influence = draw_figures.measure_influence(tiny_pipeline, tmp_path / "noise.png")
    assert influence[:, :16].all()  # every register reads every patch
    assert torch.equal(influence[:, 16:], torch.ones(6, 6, dtype=torch.bool).tril())
    assert all(torch.equal(value, before[name]) for name, value in tiny_pipeline.encoder.state_dict().items())
