"""The command that trains the next embedded model: every step runs, in miniature, and its recipes are valid."""

from importlib import import_module
from pathlib import Path

import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw

from flextok_hf.training.arguments import PriorArguments, TokenizerArguments, VaeArguments
from flextok_hf.training.distillation_arguments import DistillationArguments
from flextok_hf.utils.option_parsing import parse_arguments


pytestmark = pytest.mark.slow

script = import_module("train_embedded")

NAMES = [f"thing {letter}" for letter in "abcdefghijkl"]


def drawing(number):
    image = Image.new("RGB", (32, 32), "white")
    box = (4 + number % 5, 6, 20 + number % 7, 24)
    ImageDraw.Draw(image).rectangle(box, fill=(20 * number % 255, 90, 255 - 20 * number % 255))
    return image


def save(folder, rows, columns):
    features = Features({"image": ImageFeature()} | columns)
    held_out = [row | {"image": drawing(len(rows) + 3 + number)} for number, row in enumerate(rows[:4])]
    for split, part in {"train": rows, "validation": held_out}.items():
        Dataset.from_list(part, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    root = tmp_path_factory.mktemp("embedded")
    for name in ("emoji", "clipart", "photos"):
        (root / name).mkdir()
    text, listed = Value("string"), List(Value("string"))
    emoji = [
        {"image": drawing(number), "name": name, "style": style, "keywords": ["round"]}
        for number, name in enumerate(NAMES)
        for style in ("3d", "flat")
    ]
    art = [{"image": drawing(n), "text": n * "x" + "y", "keywords": [], "label": "food"} for n in range(5)]
    photos = [{"image": drawing(n), "name": "cup"} for n in range(5)]
    (root / "names.txt").write_text("\n".join(NAMES))
    return [
        "--toy",
        *("--emoji", save(root / "emoji", emoji, {"name": text, "style": text, "keywords": listed})),
        *("--clipart", save(root / "clipart", art, {"text": text, "keywords": listed, "label": text})),
        *("--photos", save(root / "photos", photos, {"name": text})),
        *("--names", str(root / "names.txt"), "--data", str(root / "data")),
        *("--output", str(root / "runs"), "--results", str(root / "results")),
    ]


def test_every_step_runs_and_a_second_call_skips_them_all(words, capsys):
    script.main(words)
    results = Path(words[-1])
    found = sorted(path.relative_to(results).as_posix() for path in results.glob("*/*/*.json"))
    kinds = ("illustrations_mean", "illustrations_sampled")
    expected = [*(f"{kind}/reconstruction.json" for kind in kinds), "prompts/generation.json"]
    expected.append("two_objects/two_objects.json")
    assert found == [f"embedded_256/{name}" for name in expected]
    capsys.readouterr()
    script.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(line.endswith("exists, skipped") for line in lines)


def test_the_recipes_are_valid_and_each_part_starts_from_the_one_before(words):
    options = script.parse_arguments([word for word in words if word != "--toy"])
    kinds = {"vae": VaeArguments, "tokenizer": TokenizerArguments, "prior": PriorArguments}
    kinds["distill"] = DistillationArguments
    parsed = {}
    for result, (name, *command) in script.training_steps(options):
        if name == "train.py":
            arguments = parse_arguments(kinds[command[0]], command[1:])
            assert Path(arguments.output_dir) == result.parent and arguments.resume_from_checkpoint == "latest"
            parsed[result.parent.name] = arguments
    assert list(parsed) == ["vae", *script.STAGES, "prior", "distill"]
    assert parsed["decoder"].pretrained_tokenizer == str(options.output / "tokenizer_detail" / "pipeline")
    assert parsed["prior"].tokenizer == str(options.output / "decoder" / "pipeline")
    assert parsed["distill"].pretrained_tokenizer == str(options.output / "prior" / "pipeline")
    assert parsed["decoder"].freeze_encoder and not parsed["tokenizer_detail"].freeze_encoder
