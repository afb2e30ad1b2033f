"""End-to-end tests of `scripts/evaluate.py` with a tiny untrained pipeline, a tiny classifier and simple shapes."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from importlib import import_module

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from diffusers import FlowMatchEulerDiscreteScheduler
from paths import ROOT
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

from flextok_hf import FlexTokEncoder, FlexTokEncoderConfig, FlexTokFlowDecoder
from flextok_hf.evaluation import complexity, progress
from flextok_hf.evaluation.adherence import NAME_CHECKS, Reference, checks_for, measure_feature_space, score
from flextok_hf.evaluation.feature_networks import ClipScore, load_feature_network
from flextok_hf.evaluation.images import EvaluationImages, load_split
from flextok_hf.evaluation.options import ComplexityOptions, GenerationOptions, ReconstructionOptions
from flextok_hf.evaluation.sampling import Sampling, generate, reconstruct, seeded_generators
from flextok_hf.models.configuration_prior import FlexTokPriorConfig
from flextok_hf.models.modeling_prior import FlexTokPriorForCausalLM
from flextok_hf.pipelines.pipeline_flextok import FlexTokPipeline
from flextok_hf.utils.vision_networks import IMAGENET_MEAN, IMAGENET_STD


evaluate = import_module("evaluate")

NAMES = ("disk", "box", "bar", "cross", "frame", "corner")
STYLES = {"3d": (200, 60, 60), "flat": (60, 60, 200)}
RESOLUTION, NUM_REGISTERS = 16, 4


def draw(name, color):
    image = Image.new("RGB", (RESOLUTION, RESOLUTION), "white")
    pen = ImageDraw.Draw(image)
    boxes = {"disk": (2, 2, 13, 13), "box": (3, 3, 12, 12), "bar": (1, 6, 14, 9), "frame": (2, 2, 13, 13)}
    if name == "disk":
        pen.ellipse(boxes[name], fill=color)
    elif name == "frame":
        pen.rectangle(boxes[name], outline=color, width=2)
    elif name in boxes:
        pen.rectangle(boxes[name], fill=color)
    else:
        pen.line((2, 2, 2, 13), fill=color, width=3)
        pen.line((2, 13, 13, 13) if name == "corner" else (2, 2, 13, 13), fill=color, width=3)
    return image


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    texts = {key: Value("string") for key in ("name", "style", "split", "prompt", "styled_prompt")}
    texts["everyday"] = Value("bool")
    rows = [
        {
            "image": draw(name, color),
            "name": name,
            "style": style,
            "everyday": name != "corner",
            "split": "validation" if (name, style) in (("disk", "flat"), ("bar", "3d")) else "train",
            "prompt": f"a {name}",
            "styled_prompt": f"a {style} {name}",
        }
        for name in NAMES
        for style, color in STYLES.items()
    ]
    for split in ("train", "validation"):
        part = [row for row in rows if row["split"] == split]
        Dataset.from_list(part, features=Features({"image": ImageFeature()} | texts)).to_parquet(
            folder / f"{split}.parquet"
        )
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    torch.manual_seed(0)
    shapes = {"in_channels": 3, "patch_size": 4, "grid_size": RESOLUTION // 4, "hidden_size": 16, "head_dim": 8}
    shapes |= {"num_registers": NUM_REGISTERS}
    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", "a", *STYLES, *NAMES])}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    raw.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", words["</s>"])])
    t5 = T5Config(vocab_size=len(words), d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    pipe = FlexTokPipeline(
        encoder=FlexTokEncoder(FlexTokEncoderConfig(**shapes, num_hidden_layers=1, fsq_levels=[5, 3])),
        decoder=FlexTokFlowDecoder(**shapes, num_layers=1, code_dim=2),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        prior=FlexTokPriorForCausalLM(
            FlexTokPriorConfig(
                codebook_size=15,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                max_position_embeddings=NUM_REGISTERS,
                text_hidden_size=8,
            )
        ),
        text_encoder=T5EncoderModel(t5),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
    )
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def network_folder(tmp_path_factory):
    torch.manual_seed(1)
    labels = dict(enumerate(NAMES))
    config = ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 6],
        depths=[1, 1],
        layer_type="basic",
        id2label=labels,
        label2id={name: number for number, name in labels.items()},
    )
    folder = tmp_path_factory.mktemp("networks") / "tiny_resnet"
    ResNetForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.5, 0.5]}'
    )
    (folder / "training.json").write_text('{"name": "tiny network", "validation_accuracy": 0.25}')
    return folder


def arguments(data_folder, output, model_folder, *more):
    values = ["--data", data_folder, "--output", output, "--model", model_folder, "--num_inference_steps", 2]
    return [*map(str, [*values, "--token_counts", 1, 4, "--batch_size", 5, *more])]


@pytest.fixture
def run(data_folder, model_folder, tmp_path):
    def run_command(command, *more, data=data_folder, model=model_folder):
        evaluate.main([command, *arguments(data, tmp_path, model, *more)])
        return json.loads((tmp_path / f"{command}.json").read_text())

    return run_command


@pytest.fixture(scope="module")
def whole_run(data_folder, model_folder, network_folder, tmp_path_factory):
    """Run a full measurement once for all tests; returns its record and its folder."""
    known = {}

    def run_once(command):
        if command not in known:
            folder = tmp_path_factory.mktemp("whole")
            evaluate.main(
                [command, *arguments(data_folder, folder, model_folder, *options_of(command, network_folder))]
            )
            known[command] = json.loads((folder / f"{command}.json").read_text()), folder
        return known[command]

    return run_once


def options_of(command, network_folder):
    options = {"reconstruction": ["--split", "train"]}.get(command, [])
    return options if command == "complexity" else [*options, "--feature_network", network_folder]


def numbers(record):
    """Return all figures of a record, for approximate comparison."""
    return json.loads(json.dumps(record["results"]), parse_float=lambda text: pytest.approx(float(text), abs=2e-6))


def test_reconstruction_is_reported_for_every_token_count(run, tmp_path):
    record = run("reconstruction")
    assert record["count"] == 2
    assert set(record["results"]) == {"1", "4"}
    for figures in record["results"].values():
        for key in ("psnr_db", "ssim", "mae", "perceptual_distance"):
            assert figures[key]["low"] <= figures[key]["mean"] <= figures[key]["high"]
        assert {style: means["count"] for style, means in figures["by_style"].items()} == {"3d": 1, "flat": 1}
    assert (tmp_path / "reconstruction.md").read_text().startswith("# Reconstruction")
    for name in ("reconstruction.png", "reconstruction_curves.png"):
        assert Image.open(tmp_path / name).width > 0
    assert not list(tmp_path.glob(".*begun"))


def test_baselines_and_recognition_stand_beside_the_model(run, tmp_path):
    record = run("reconstruction", "--split", "train", "--baselines", "true", "--recognition_among", 10)
    assert record["protocol"]["recognition_among"] == 10
    assert list(record["baselines"]) == ["thumbnail_1", "thumbnail_4"]  # this model has no VAE
    assert record["thumbnails"]["4"]["size"] == [1, 2]  # four of 15 codes: 15.6 bits
    for figures in (*record["results"].values(), *record["baselines"].values()):
        for key in ("recognized_by_thumbnail", "recognized_by_edges"):
            assert 0 <= figures[key]["low"] <= figures[key]["share"] <= figures[key]["high"] <= 1
    assert record["baselines"]["thumbnail_1"]["psnr_db"]["mean"] > record["results"]["1"]["psnr_db"]["mean"]
    assert "1 x 2 pixels, 24 bits" in (tmp_path / "reconstruction.md").read_text()


@pytest.mark.parametrize("number", [9, 11])
def test_recognition_among_fewer_than_measured_or_more_than_there_are_is_refused(run, number):
    with pytest.raises(ValueError, match="`recognition_among` must be at least the 10 images"):
        run("reconstruction", "--split", "train", "--recognition_among", number)


def test_the_main_table_is_printed_at_the_end_in_columns_of_equal_width(run, tmp_path, capsys):
    run("reconstruction")
    *table, empty, last = capsys.readouterr().out.splitlines()
    page = [line for line in (tmp_path / "reconstruction.md").read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")] for line in (*table, *page[:4])]
    assert cells[0] == cells[4] and cells[2:4] == cells[6:]
    assert len({tuple(at for at, character in enumerate(line) if character == "|") for line in table}) == 1
    assert (empty, last) == ("", f"Wrote {tmp_path / 'reconstruction.json'}")


def test_reconstruction_figures_match_the_images(run, data_folder, model_folder):
    record = run("reconstruction", "--split", "train", "--seed", 3)
    pipe = FlexTokPipeline.from_pretrained(model_folder)
    _, originals = EvaluationImages(load_split(str(data_folder), "train"), RESOLUTION).read(range(10))
    generators = [torch.Generator().manual_seed(3 + number) for number in range(10)]
    ids = pipe.tokenize(originals, max_tokens=4)
    images = pipe.detokenize(ids, num_inference_steps=2, generator=generators, output_type="pt").images
    errors = ((images * 255).round() / 255 - originals / 255).abs().mean(dim=(1, 2, 3))
    assert record["results"]["4"]["mae"]["mean"] == pytest.approx(errors.mean().item(), abs=1e-4)


@pytest.mark.parametrize(("command", "batch_size"), [("reconstruction", 3), ("generation", 64)])
def test_figures_do_not_depend_on_the_batch_size(run, whole_run, network_folder, command, batch_size):
    record = run(command, *options_of(command, network_folder), "--batch_size", batch_size)
    assert record["results"] == numbers(whole_run(command)[0])


def test_generation_is_reported_for_every_set_and_token_count(whole_run):
    record, folder = whole_run("generation")
    counts = {key: {n: figures["count"] for n, figures in by_n.items()} for key, by_n in record["results"].items()}
    assert counts == {
        "trained": {"1": 10, "4": 10},
        "held_out": {"1": 2, "4": 2},
        "everyday": {"1": 5, "4": 5},
        "plain": {"1": 6, "4": 6},
        "trained_shuffled": {"1": 10, "4": 10},
        "reconstructions": {"1": 10, "4": 10},
    }
    first = record["results"]["trained"]["4"]
    for key in ("frechet_distance", "classifier_score", "precision", "recall", "recognized", "name_and_style"):
        assert first[key]["low"] <= first[key]["high"], key
    assert "fid" not in first
    assert "frechet_distance" not in record["results"]["held_out"]["4"]
    assert "name_and_style" not in record["results"]["plain"]["4"]
    assert record["real_images"] == 12 and record["names"] == 6
    assert record["feature_space"]["distorted"]["none"]["name_and_style"]["share"] == 1
    page = (folder / "generation.md").read_text()
    assert "Frechet distance (tiny network)" in page and "FID" not in page
    assert record["protocol"]["feature_network"]["validation_accuracy"] == 0.25
    assert len(record["weights_sha256"]) == 64
    assert Image.open(folder / "generation.png").width > 0


@pytest.mark.parametrize("option", [["--temperature", 0], ["--guidance_scale", "nan"], ["--num_inference_steps", 0]])
def test_wrong_sampling_is_refused_before_the_reference_set_is_measured(run, network_folder, tmp_path, option):
    with pytest.raises((TypeError, ValueError), match=option[0].removeprefix("--")):
        run("generation", "--feature_network", network_folder, *option)
    assert not (tmp_path / ".generation-begun").exists()


def test_every_combination_of_guidance_and_temperature_is_measured(run):
    record = run("generation", "--guidance_scale", 1, 3, "--temperature", 1, 0.5, "--max_prompts", 2)
    settings = [record["protocol"]["samplings"][0], *(variant["sampling"] for variant in record["sweep"])]
    assert [(value["guidance_scale"], value["temperature"]) for value in settings] == [
        (1, 1),
        (1, 0.5),
        (3, 1),
        (3, 0.5),
    ]
    assert set(record["sweep"][0]["results"]) == {"trained", "held_out", "everyday", "plain", "trained_shuffled"}


def test_generated_images_match_those_of_the_pipeline(model_folder):
    pipe = FlexTokPipeline.from_pretrained(model_folder)
    sampling = Sampling(num_inference_steps=2, temperature=0.7).resolved(pipe)
    prompts = ["a disk", "a 3d box", "a bar"]
    generated = generate(pipe, prompts, [1, 4], [0, 1, 2], 5, sampling)
    for images, count in zip(generated, (1, 4)):
        expected = pipe(
            prompts,
            max_tokens=count,
            generator=seeded_generators(5, range(3)),
            num_inference_steps=2,
            temperature=0.7,
            output_type="pt",
        ).images
        difference = (images - (expected * 255).round()).abs().max().item()
        assert difference <= 1  # a value halfway between two levels may round either way


def test_complexity_reports_the_tokens_that_each_level_needs(run, tmp_path):
    record = run("complexity", "--saturation", 0.5)
    assert list(record["results"]) == list(record["tokens_needed"]) == ["name", "name + style"]
    for level, by_count in record["results"].items():
        assert set(by_count) == {"1", "4"}
        needed = record["tokens_needed"][level]
        assert needed is None or needed["value"] in (1, 4)
    assert record["count"] == 20
    assert (tmp_path / "complexity.md").read_text().startswith("# Tokens needed per condition")


def test_complexity_checks_the_attributes_that_are_given(data_folder, model_folder, tmp_path):
    options = ComplexityOptions(
        data=str(data_folder),
        output=str(tmp_path),
        model=str(model_folder),
        num_inference_steps=1,
        token_counts=[1],
        attributes=["name"],
    )
    given = asdict(options)
    record = complexity.Complexity(options).measure()
    assert asdict(options) == given, "the caller's options are left as they are"
    assert list(record["results"]) == ["name (prompt)", "name (styled_prompt)"]
    assert record["protocol"]["attributes"] == ["name"]
    assert record["protocol"]["levels"] == ["prompt=name", "styled_prompt=name,style"]
    assert complexity.Complexity(replace(options, attributes=[])).attributes == ["name", "style"]


@pytest.mark.parametrize(
    ("attributes", "levels", "words"),
    [
        (["color"], ["prompt=name"], r"\['color'\] are in none of the `levels`"),
        (["name", "color"], ["prompt=name"], r"\['color'\] are in none of the `levels`"),
        (["style"], ["prompt=name", "styled_prompt=name,style"], "must ask for one of `attributes`"),
        ([], ["prompt=name", "prompt=name"], "a level twice"),
        (["name"], ["prompt=name", "prompt=name,style"], "a level twice"),
        ([], ["prompt"], "form column=attribute"),
    ],
)
def test_levels_that_do_not_fit_the_attributes_are_refused(attributes, levels, words):
    with pytest.raises(ValueError, match=words):
        ComplexityOptions(data="data", output="results", attributes=attributes, levels=levels)


@pytest.mark.parametrize(
    ("shares", "saturation", "expected"),
    [
        ([0.1, 0.5, 0.9, 0.9], 0.95, 4),
        ([0.9, 0.9, 0.9, 0.9], 0.95, 1),
        ([0.9, 0.2, 0.9, 0.8], 0.95, None),  # drops again at the end
        ([0.9, 0.2, 0.9, 0.8], 0.85, 4),
        ([0.2, 0.9, 0.5, 0.9], 0.95, 8),
    ],
)
def test_saturation_is_where_adherence_stays_near_its_maximum(shares, saturation, expected):
    point = complexity.saturation_point(torch.tensor(shares), [1, 2, 4, 8], saturation)
    assert point == expected or (expected is None and point != point)


def test_without_any_adherence_there_is_no_saturation():
    assert torch.tensor(complexity.saturation_point(torch.zeros(3), [1, 2, 4], 0.9)).isnan()


class Killed(Exception):
    """Simulates a process killed at a point chosen by the test."""


@pytest.mark.parametrize("command", ["reconstruction", "generation", "complexity"])
def test_a_stopped_evaluation_resumes_to_the_same_figures(
    run, whole_run, monkeypatch, network_folder, command, tmp_path
):
    options = [*options_of(command, network_folder), "--batch_size", 3]
    expected = numbers(whole_run(command)[0])
    monkeypatch.setattr("flextok_hf.evaluation.progress.SAVE_SECONDS", -1)
    measure = evaluate.MEASUREMENTS[command][1]
    method = "measure_prompts" if command == "generation" else "measure_batch"
    original, calls = getattr(measure, method), []

    def dying(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return original(self, *args)

    monkeypatch.setattr(measure, method, dying)
    with pytest.raises(Killed):
        run(command, *options)
    calls_before = len(calls)
    assert list(tmp_path.glob(f".{command}-begun/*.safetensors"))
    record = run(command, *options)
    assert len(calls) - calls_before < {"reconstruction": 4, "generation": 8, "complexity": 7}[command]
    assert record["results"] == expected


def test_an_unfinished_evaluation_of_another_protocol_is_refused(run, monkeypatch, tmp_path):
    def die(self, *args):
        raise Killed

    measure = evaluate.MEASUREMENTS["reconstruction"][1]
    monkeypatch.setattr(measure, "make_record", die)
    with pytest.raises(Killed):
        run("reconstruction")
    with pytest.raises(ValueError, match="holds an unfinished evaluation of another model, dataset or protocol"):
        run("reconstruction", "--seed", 1)
    for option in (["--group_column", "name"], ["--sheet_rows", 1], ["--sheet_group", "flat"], ["--max_images", 1]):
        with pytest.raises(ValueError, match="another model, dataset or protocol"):
            run("reconstruction", *option)
    monkeypatch.undo()
    assert run("reconstruction", "--batch_size", 1, "--model_name", "new")["count"] == 2, "these may change"


def test_prompts_and_neighbors_are_part_of_the_protocol(run, data_folder, tmp_path):
    first = run("generation", "--caption_column", "prompt", "--split", "train", "--max_prompts", 2)
    other = run("generation", "--caption_column", "prompt", "--split", "validation", "--max_prompts", 2)
    with pytest.raises(ValueError, match="checksum_of_conditions"):
        evaluate.compare_records(first, other)
    rows = Dataset.from_parquet(str(data_folder / "train.parquet"))
    (tmp_path / "other").mkdir()
    for split in ("train", "validation"):
        changed = rows.map(lambda row: {"image": row["image"].rotate(90)}) if split == "validation" else rows
        changed.to_parquet(tmp_path / "other" / f"{split}.parquet")
    third = run("generation", "--caption_column", "prompt", "--max_prompts", 2, data=tmp_path / "other")
    assert third["protocol"]["neighbors"] != first["protocol"]["neighbors"]


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(whole_run, data_folder, model_folder, network_folder, tmp_path):
    options = options_of("reconstruction", network_folder)
    alone, _ = whole_run("reconstruction")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    values = arguments(data_folder, tmp_path / "two", model_folder, *options)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    subprocess.run(
        [*command, str(ROOT / "scripts" / "evaluate.py"), "reconstruction", *values],
        env=environment,
        check=True,
        capture_output=True,
        timeout=300,
    )
    together = json.loads((tmp_path / "two" / "reconstruction.json").read_text())
    assert together["num_processes"] == 2
    assert together["results"] == numbers(alone)
    assert together["protocol"] == alone["protocol"]


def test_saving_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    saves = []
    evaluation = progress.Evaluation("a", nn.ModuleDict(), 1000, 1, {}, tmp_path, PartialState(cpu=True))
    original = evaluation.save

    def save():
        original()
        saves.append(now[0])
        now[0] += 40.0

    def measure(samples):
        now[0] += 10.0
        return {}

    monkeypatch.setattr(evaluation, "save", save)
    evaluation.run(measure)
    assert 40 * len(saves[:-1]) < 0.021 * now[0], saves
    assert len(saves) > 4


@pytest.mark.parametrize("arguments", [[], ["--help-me"], ["tokenize"], ["Reconstruction"], ["compare", "one.json"]])
def test_a_command_line_without_a_measurement_is_refused_with_what_there_is(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate.main(arguments)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "RECORD.json" in message or all(name in message for name in (*evaluate.MEASUREMENTS, "compare"))


@pytest.mark.parametrize("counts, message", [([0], "1 or more"), ([4, 1], "growing")])
def test_token_counts_are_checked_as_in_the_pipeline(run, counts, message):
    with pytest.raises(ValueError, match=message):
        run("reconstruction", "--token_counts", *counts)


def test_too_few_images_for_the_feature_network_are_refused_before_any_work(run, network_folder):
    with pytest.raises(ValueError, match="`max_images`: A Frechet distance of 6 features needs more than 6 .* got 2"):
        run("reconstruction", "--feature_network", network_folder)
    with pytest.raises(ValueError, match="`max_prompts`: A Frechet distance of 6 features needs more than 6 .* got 4"):
        run("generation", "--feature_network", network_folder, "--max_prompts", 4)


def test_a_missing_dataset_split_or_column_is_named_in_the_error(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.parquet' does not exist"):
        run("reconstruction", data=tmp_path / "missing.parquet")
    with pytest.raises(ValueError, match="Split 'test' of .* cannot be loaded"):
        run("reconstruction", "--split", "test")
    with pytest.raises(ValueError, match="`image_column` is 'photo', but"):
        run("reconstruction", "--image_column", "photo")
    with pytest.raises(ValueError, match=r"`attributes` \['color'\] are not columns of"):
        run("generation", "--attributes", "color")
    with pytest.raises(ValueError, match="`group_column` 'color' is not one of the columns image, name"):
        run("reconstruction", "--group_column", "color")
    with pytest.raises(FileNotFoundError, match="`feature_network` './nowhere' does not exist"):
        run("reconstruction", "--feature_network", "./nowhere")


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (ReconstructionOptions, {"max_images": 0}, "`max_images` must be 1 or more, got 0"),
        (ReconstructionOptions, {"max_images": -5}, "`max_images` must be 1 or more, got -5"),
        (GenerationOptions, {"max_prompts": -1}, "`max_prompts` must be 1 or more, got -1"),
        (ComplexityOptions, {"max_prompts": 0}, "`max_prompts` must be 1 or more, got 0"),
        (GenerationOptions, {"clip_model": "a/b", "class_column": "label"}, "`clip_model`.*`class_column`"),
    ],
)
def test_options_that_would_be_ignored_or_misread_are_refused(kind, options, words):
    with pytest.raises(ValueError, match=words):
        kind(data="data", output="results", **options)


def test_an_output_that_is_a_file_is_refused_before_the_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("mine")
    for output in ("file", "file/folder"):
        with pytest.raises(OSError, match="file"):
            evaluate.main(["reconstruction", "--data", "d", "--model", "no/model", "--output", str(tmp_path / output)])
    assert (tmp_path / "file").read_text() == "mine"


def test_complexity_uses_the_same_rows_at_every_level(data_folder, model_folder, tmp_path):
    rows = Dataset.from_parquet(str(data_folder / "train.parquet"))
    folder = tmp_path / "gaps"
    folder.mkdir()
    gaps = rows.map(lambda row, i: {"styled_prompt": None if i % 3 == 0 else row["styled_prompt"]}, with_indices=True)
    gaps.to_parquet(folder / "train.parquet")
    options = ComplexityOptions(data=str(folder), output=str(tmp_path), model=str(model_folder), max_prompts=3)
    measured = complexity.Complexity(options)
    plain, styled = measured.levels
    assert [row["name"] for row in plain] == [row["name"] for row in styled] and len(plain) == 3
    assert all(row["condition"] for row in styled)


def test_a_column_without_prompts_is_refused(run, data_folder, tmp_path):
    rows = Dataset.from_parquet(str(data_folder / "train.parquet"))
    (tmp_path / "empty").mkdir()
    rows.map(lambda row: {"prompt": ""}).to_parquet(tmp_path / "empty" / "train.parquet")
    with pytest.raises(ValueError, match="'prompt' of .* holds no prompt or class in any row"):
        run("generation", "--caption_column", "prompt", "--split", "train", data=tmp_path / "empty")
    with pytest.raises(ValueError, match="a prompt for each of the `levels`"):
        run("complexity", data=tmp_path / "empty")


def test_a_model_without_a_prior_cannot_generate(run, model_folder, tmp_path):
    FlexTokPipeline.from_pretrained(model_folder, prior=None).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="This model has no prior"):
        run("generation", model=tmp_path / "tokenizer")


def test_an_unreadable_image_is_reported(run, data_folder, tmp_path):
    rows = Dataset.from_parquet(str(data_folder / "train.parquet")).cast_column("image", ImageFeature(decode=False))
    records = [row | {"image": {"bytes": b"no image", "path": None}} if i == 4 else row for i, row in enumerate(rows)]
    broken = tmp_path / "broken"
    broken.mkdir()
    plain = Dataset.from_list(records, features=rows.features).remove_columns(["name"])
    plain.to_parquet(broken / "validation.parquet")
    record = run("reconstruction", data=broken)
    assert record["count"] == 9
    assert list(record["skipped"]) == ["images 4"]
    assert "1 images could not be read" in (tmp_path / "reconstruction.md").read_text()


def test_only_results_of_the_same_protocol_can_be_compared(run, tmp_path, capsys):
    for name, options in {"first": [], "second": ["--token_counts", "4"], "third": ["--seed", "1"]}.items():
        run("reconstruction", "--split", "train", *options)
        (tmp_path / "reconstruction.json").rename(tmp_path / f"{name}.json")
    evaluate.main(["compare", str(tmp_path / "first.json"), str(tmp_path / "second.json")])
    table = capsys.readouterr().out
    assert "| 4 / psnr_db |" in table and "| 1 / psnr_db |" not in table and "+0.0000" in table
    with pytest.raises(ValueError, match="cannot be compared: their protocols differ.\n- seed: 0 and 1"):
        evaluate.main(["compare", str(tmp_path / "first.json"), str(tmp_path / "third.json")])
    with pytest.raises(FileNotFoundError, match="There is no result file"):
        evaluate.main(["compare", str(tmp_path / "first.json"), str(tmp_path / "none.json")])


def test_a_comparison_reports_disjoint_intervals():
    def record(mean):
        figure = {"mean": mean, "low": mean - 1, "high": mean + 1}
        return {"protocol": {"token_counts": [4]}, "results": {"4": {"psnr_db": figure}}}

    rows = evaluate.compare_records(record(10.0), record(13.0)) + evaluate.compare_records(record(10.0), record(11.0))
    assert [(row[3], row[4]) for row in rows] == [(3.0, True), (1.0, False)]


def test_features_are_the_input_of_the_classifier(network_folder):
    network = load_feature_network(str(network_folder))
    pixels = torch.randint(0, 256, (5, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features, log_probabilities = network(pixels)
    assert features.shape == (5, 6) and network.class_names == list(NAMES)
    expected = network.network.classifier(features[..., None, None]).log_softmax(dim=1)
    torch.testing.assert_close(log_probabilities, expected)
    torch.testing.assert_close(log_probabilities.exp().sum(dim=1), torch.ones(5))


@pytest.fixture(scope="module")
def reference_and_rows(data_folder):
    loaded = [row for split in ("train", "validation") for row in load_split(str(data_folder), split)]
    pixels = EvaluationImages(loaded, RESOLUTION).read_all()
    rows = [{key: row[key] for key in ("name", "style")} for row in loaded]
    return Reference(pixels, rows), rows, pixels


def test_real_images_match_their_own_prompts(reference_and_rows):
    reference, rows, pixels = reference_and_rows
    result = score(reference, NAME_CHECKS, pixels, rows)
    assert result["name"]["share"] == result["name_and_style"]["share"] == 1


def test_images_of_other_names_do_not_match_the_prompts(reference_and_rows):
    reference, rows, pixels = reference_and_rows
    names = sorted({row["name"] for row in rows})
    others = [row | {"name": names[names.index(row["name"]) - 1]} for row in rows]
    assert score(reference, NAME_CHECKS, pixels, others)["name"]["share"] == 0


def test_the_style_counts_only_where_one_is_asked_for(reference_and_rows):
    reference, rows, pixels = reference_and_rows
    result = score(reference, NAME_CHECKS, pixels, [{"name": row["name"]} for row in rows])
    assert "name_and_style" not in result


def test_damage_makes_images_harder_to_find(reference_and_rows):
    reference, _, pixels = reference_and_rows
    space = measure_feature_space(reference, NAME_CHECKS, pixels, None, 0)
    distances = [space["distorted"][f"thumbnail, {side} x {side}"]["median_distance"] for side in (8, 4)]
    assert 0 == space["distorted"]["none"]["median_distance"] < distances[0] < distances[1]
    assert set(space["own_image_left_out"]) == set(STYLES)


def test_several_attributes_are_checked_one_by_one_and_together():
    assert [check.key for check in checks_for(["shape", "color"])] == ["shape", "color", "all"]
    assert [check.key for check in checks_for(["name"])] == ["name"]


def test_all_token_counts_start_from_the_same_noise_and_tokens(model_folder):
    pipe = FlexTokPipeline.from_pretrained(model_folder)
    pixels = torch.randint(0, 256, (2, 3, RESOLUTION, RESOLUTION), dtype=torch.uint8)
    sampling = Sampling(num_inference_steps=2).resolved(pipe)
    together = reconstruct(pipe, pixels, [1, 4], [7, 8], 0, sampling)
    alone = reconstruct(pipe, pixels[1:], [4], [8], 0, sampling)
    assert (together[1][1].int() - alone[0][0].int()).abs().max() <= 1


def test_the_network_in_the_repository_is_small_and_states_its_accuracy():
    folder = ROOT / "scripts" / "assets" / "feature_network"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2e6
    network = load_feature_network(str(folder))
    assert network.description.num_features == 64 and 0.5 < network.description.validation_accuracy < 1
    assert {"cat", "sunflower"} <= set(network.class_names)
    features, _ = network(torch.randint(0, 256, (3, 3, 100, 100), dtype=torch.uint8))
    assert features.shape == (3, 64) and features.isfinite().all()


def test_the_error_for_inception_without_its_package_names_it():
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="`inception` needs torch-fidelity: `pip install torch-fidelity`"):
            load_feature_network("inception")


def test_a_vision_model_without_classes_returns_its_pooled_output(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 32, "width": 32}}')
    network = load_feature_network(str(tmp_path))
    features, log_probabilities = network(torch.zeros(2, 3, 40, 40, dtype=torch.uint8))
    assert features.shape == (2, 16) and log_probabilities is None and network.class_names is None


def test_a_clip_score_is_a_hundred_times_the_cosine(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 10, "max_position_embeddings": 16, "bos_token_id": 2, "eos_token_id": 1}
    torch.manual_seed(2)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    ).eval()
    model.save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(["<pad>", "</s>", "<s>", "a", "cat"])}, "<pad>"))
    words.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=16, **special).save_pretrained(tmp_path)
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scores = ClipScore(str(tmp_path))(pixels, ["a cat"] * 6)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    output = model(input_ids=torch.tensor([[3, 4]]), pixel_values=(pixels / 255 - mean) / std)
    expected = (100 * output.image_embeds @ output.text_embeds.T)[:, 0].clamp(min=0)
    assert expected.max() > 0
    torch.testing.assert_close(scores, expected.detach(), atol=1e-3, rtol=1e-3)
