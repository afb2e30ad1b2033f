"""The scripts behind docs/reproduction.md: data, feature network, list of steps, and conclusions of the summary."""

import json
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_dataset
from paths import ROOT

from flextok_hf.data.synthetic import BACKGROUNDS, COLORS, is_held_out
from flextok_hf.evaluation.feature_networks import load_feature_network
from flextok_hf.evaluation.options import ComplexityOptions, GenerationOptions, ReconstructionOptions
from flextok_hf.training.arguments import PriorArguments, TokenizerArguments
from flextok_hf.utils.option_parsing import parse_arguments


data_script, network_script, reproduce, summary = map(
    import_module,
    ("prepare_reproduction_data", "train_feature_network", "reproduce", "reproduction_summary"),
)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduction")
    data_script.main(["--output", str(folder), "--num_train", "60", "--num_validation", "40"])
    return folder


@pytest.fixture(scope="module")
def rows(data_folder):
    data = load_dataset(str(data_folder))
    return {split: list(data[split]) for split in ("train", "validation")}


def test_every_prompt_says_what_the_image_shows(rows):
    for row in rows["train"] + rows["validation"]:
        assert row["color_prompt"] == f"a {row['color']} shape"
        assert row["object_prompt"] == f"a {row['object']}" == f"a {row['size']} {row['color']} {row['shape']}"
        place = "middle" if row["place"] == "center" else row["place"]
        assert row["scene_prompt"] == f"{row['object_prompt']} in the {place}"
        assert row["captions"] == [row["color_prompt"], row["object_prompt"], row["scene_prompt"]]


def test_an_image_shows_its_color_at_its_place_on_gray(rows):
    for row in rows["train"]:
        assert row["image"].size == (24, 24)
        middle = [8 if "left" in row["place"] else 16, 8 if "top" in row["place"] else 16]
        if row["place"] == "center":
            middle = [12, 12]
        difference = [
            abs(a - b) for a, b in zip(row["image"].getpixel(tuple(middle)), COLORS[row["color"]], strict=True)
        ]
        assert max(difference) < 12
        corners = Counter(row["image"].getpixel(place) for place in ((0, 0), (23, 0), (0, 23), (23, 23)))
        assert corners.most_common(1)[0][0] == BACKGROUNDS["gray"]


def test_some_held_out_images_show_combinations_that_were_never_trained(rows):
    pairs = {split: {(row["shape"], row["color"]) for row in rows[split]} for split in rows}
    held_out = {pair for pair in pairs["validation"] if is_held_out(*pair)}
    assert held_out and not held_out & pairs["train"]


def test_another_seed_gives_other_images(rows, tmp_path):
    data_script.main(["--output", str(tmp_path), "--num_train", "60", "--num_validation", "1", "--seed", "1"])
    others = load_dataset(str(tmp_path), split="train")["scene_prompt"]
    assert list(others) != [row["scene_prompt"] for row in rows["train"]]


@pytest.fixture(scope="module")
def network_folder(data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("network") / "colors"
    words = ["--data", data_folder, "--output", folder, "--label_column", "color", "--side", 24, "--epochs", 12]
    words += ["--hidden_sizes", 8, 16, "--batch_size", 20, "--learning_rate", 1e-2, "--name", "color network"]
    network_script.main(list(map(str, words)))
    return folder


def test_the_feature_network_learns_its_classes_and_states_its_accuracy(network_folder, rows):
    record = json.loads((network_folder / "training.json").read_text())
    assert record["validation_accuracy"] > 0.6  # chance level: an eighth
    assert record["classes"] == 8 and record["validation_images"] == 40
    network = load_feature_network(str(network_folder))
    assert network.description.name == "color network" and network.description.num_features == 16
    assert network.description.validation_accuracy == record["validation_accuracy"]
    pixels = torch.stack([data_pixels(row["image"]) for row in rows["validation"]])
    features, log_probabilities = network(pixels)
    seen = [network.class_names[index] for index in log_probabilities.argmax(dim=1).tolist()]
    accuracy = sum(name == row["color"] for name, row in zip(seen, rows["validation"])) / len(seen)
    assert accuracy == pytest.approx(record["validation_accuracy"], abs=1 / 40)  # a tie may go either way


def data_pixels(image):
    from flextok_hf.pipelines.images import image_to_pixels

    return image_to_pixels(image.convert("RGB"))


def test_the_feature_network_is_stored_in_half_precision_without_pickles(network_folder):
    files = {path.name for path in network_folder.iterdir()}
    assert files == {"config.json", "model.safetensors", "preprocessor_config.json", "training.json"}
    parameters = json.loads((network_folder / "training.json").read_text())["parameters"]
    assert (network_folder / "model.safetensors").stat().st_size < 2 * parameters + 20_000


def test_a_missing_label_column_is_refused(data_folder, tmp_path):
    with pytest.raises(ValueError, match="`--label_column` is 'kind', but .* has color_prompt, "):
        network_script.main(["--data", str(data_folder), "--output", str(tmp_path), "--label_column", "kind"])


def read_steps(tmp_path, *words):
    options = reproduce.parse_arguments(["--output", str(tmp_path / "runs"), "--results", str(tmp_path), *words])
    return list(reproduce.training_steps(options)), list(reproduce.measuring_steps(options))


@pytest.mark.parametrize("toy", [[], ["--toy"]], ids=["full", "toy"])
def test_every_step_of_the_study_has_valid_options(tmp_path, toy):
    training, measuring = read_steps(tmp_path, *toy)
    kinds = {"tokenizer": TokenizerArguments, "prior": PriorArguments}
    tokenizers = {}
    for result, (script, stage, *words) in training:
        arguments = parse_arguments(kinds[stage], words)
        assert script == "train.py" and Path(arguments.output_dir) == result.parent
        tokenizers.setdefault(stage, []).append(arguments)
    assert len(tokenizers["tokenizer"]) == len(tokenizers["prior"]) == len(reproduce.MODELS)
    kinds = {
        "reconstruction": ReconstructionOptions,
        "generation": GenerationOptions,
        "complexity": ComplexityOptions,
    }
    for result, (script, kind, *words) in measuring:
        options = parse_arguments(kinds[kind], words)
        assert script == "evaluate.py" and Path(options.output) == result.parent and result.stem == kind
    assert len(measuring) == 2 * len(reproduce.MODELS) + len(reproduce.DETAIL_MODELS)


def test_the_models_of_the_study_differ_only_in_what_they_are_named_for(tmp_path):
    training, _ = read_steps(tmp_path)
    arguments = {
        result.parent.parent.name: parse_arguments(TokenizerArguments, words)
        for result, (_, stage, *words) in training
        if stage == "tokenizer"
    }
    assert (
        arguments["grid"].num_registers == (arguments["grid"].resolution // arguments["grid"].decoder_patch_size) ** 2
    )
    first = vars(arguments["flexible"])
    for name, other in arguments.items():
        changed = {key for key, value in vars(other).items() if value != first[key]} - {"output_dir"}
        allowed = {"flexible": set(), "grid": {"token_layout", "decoder_num_layers"}}
        assert changed <= allowed.get(name, {"num_registers", "full_length_probability"}), name


def test_finished_steps_are_skipped(tmp_path, capsys):
    (tmp_path / "done.json").write_text("{}")
    reproduce.run(iter([(tmp_path / "done.json", ["no_such_script.py"])]))
    assert "exists, skipped" in capsys.readouterr().out


def figure(value, half_width=0.05):
    return {"mean": value, "low": value - half_width, "high": value + half_width}


@pytest.mark.parametrize(
    ("key", "first", "second", "verdict"),
    [
        ("psnr_db", 10, 12, "better"),
        ("psnr_db", 12, 10, "worse"),
        ("psnr_db", 10, 10.05, "no clear difference"),
        ("frechet_distance", 10, 12, "worse"),
        ("frechet_distance", 12, 10, "better"),
    ],
)
def test_a_difference_counts_only_if_the_intervals_do_not_overlap(key, first, second, verdict):
    assert summary.judge(key, figure(first), figure(second)) == verdict


@pytest.mark.parametrize(
    ("simple", "detailed", "verdict"),
    [((1, 1, 2), (8, 4, 8), "held"), ((1, 1, 4), (8, 4, 8), "inconclusive"), ((8, 8, 8), (4, 4, 4), "did not hold")],
)
def test_simple_conditions_need_fewer_tokens_only_if_the_intervals_say_so(simple, detailed, verdict):
    needed = {
        name: dict(zip(("value", "low", "high"), values)) for name, values in {"a": simple, "b": detailed}.items()
    }
    lines = summary.claim_simple_conditions({"flexible": {"complexity": {"tokens_needed": needed}}})
    assert f"simpler conditions: {verdict}." in lines[0]


@pytest.mark.parametrize(
    ("simple", "detailed", "verdict"),
    [(0.8, 0.2, "held"), (0.5, 0.45, "inconclusive"), (0.2, 0.5, "did not hold"), (0.2, 0.0, "held")],
)
def test_one_token_covers_more_only_if_the_intervals_do_not_overlap(simple, detailed, verdict):
    def level(share):
        figures = {"1": (share, share - 0.05, share + 0.05), "16": (0.8, 0.8, 0.8)}
        return {count: {"adherence": dict(zip(("share", "low", "high"), values))} for count, values in figures.items()}

    records = {"flexible": {"complexity": {"results": {"a": level(simple), "b": level(detailed)}}}}
    assert f"simple condition: {verdict}." in summary.claim_one_token(records)[0]


@pytest.mark.parametrize(("cut", "verdict"), [(50, "held"), (10, "inconclusive"), (5, "did not hold")])
def test_every_length_is_plausible_if_a_fixed_length_model_is_worse_when_cut(cut, verdict):
    def model(first, last):
        counts = {
            count: {"frechet_distance": figure(value, 1), "precision": figure(0.5)}
            for count, value in (("1", first), ("16", last))
        }
        return {"generation": {"token_counts": [1, 16], "results": {"prompts": counts}}}

    records = {"flexible": model(10, 5), "grid": model(20, 5), "fixed-4": model(1, 1), "fixed-16": model(cut, 5)}
    (line,) = summary.claim_lengths(records)
    assert f"every length: {verdict}." in line and "fixed-16 cut" in line


def test_evaluation_recipes_of_the_embedded_model_are_valid():
    kinds = {"generation": GenerationOptions}
    for path in sorted((ROOT / "scripts" / "configs" / "embedded_evaluation").glob("*.yaml")):
        options = parse_arguments(
            kinds.get(path.stem, ReconstructionOptions), ["--config", str(path), "--output", "x"]
        )
        assert options.data == yaml.safe_load(path.read_text())["data"]
