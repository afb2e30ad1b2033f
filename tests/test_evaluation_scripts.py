"""The evaluation scripts from end to end, with a tiny untrained pipeline and drawn shapes."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from flextok_hf import FlexTokEncoder, FlexTokEncoderConfig, FlexTokFlowDecoder
from flextok_hf.configuration_prior import FlexTokPriorConfig
from flextok_hf.evaluation import PictureIndex, stack_pictures
from flextok_hf.modeling_prior import FlexTokPriorForCausalLM
from flextok_hf.pipeline_flextok import FlexTokPipeline


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
adherence = import_module("evaluate_adherence")
reconstruction = import_module("evaluate_reconstruction")

NAMES = ("disk", "box", "bar", "cross", "frame", "corner")
STYLES = {"3d": (200, 60, 60), "flat": (60, 60, 200)}
RESOLUTION, NUM_REGISTERS = 16, 4


def draw(name, color):
    picture = Image.new("RGB", (RESOLUTION, RESOLUTION), "white")
    pen = ImageDraw.Draw(picture)
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
    return picture


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


def run(script, monkeypatch, data_folder, output, model_folder, *more):
    arguments = ["--data", data_folder, "--output", output, "--model", model_folder, "--num_inference_steps", 2]
    arguments += ["--token_counts", 1, 4, "--batch_size", 5, *more]
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    script.main()


def test_adherence_is_reported_for_every_set_and_token_count(monkeypatch, data_folder, model_folder, tmp_path):
    run(adherence, monkeypatch, data_folder, tmp_path, model_folder)
    record = json.loads((tmp_path / "adherence.json").read_text())
    counts = {key: {n: score["count"] for n, score in by_n.items()} for key, by_n in record["results"].items()}
    assert counts == {
        "trained": {"1": 10, "4": 10},
        "held_out": {"1": 2, "4": 2},
        "everyday": {"1": 5, "4": 5},
        "plain": {"1": 6, "4": 6},
        "trained_shuffled": {"1": 10, "4": 10},
        "reconstructions": {"1": 10, "4": 10},
    }
    assert len(record["weights_sha256"]) == 64
    assert (tmp_path / "adherence.md").read_text().startswith("# Prompt adherence")
    assert Image.open(tmp_path / "adherence.png").width > 0


def test_adherence_does_not_depend_on_the_batch_size(monkeypatch, data_folder, model_folder, tmp_path):
    records = []
    for size in (3, 64):
        run(adherence, monkeypatch, data_folder, tmp_path, model_folder, "--batch_size", size)
        records.append(json.loads((tmp_path / "adherence.json").read_text())["results"])
    assert records[0] == records[1]


def test_reconstruction_is_reported_for_every_token_count(monkeypatch, data_folder, model_folder, tmp_path):
    run(reconstruction, monkeypatch, data_folder, tmp_path, model_folder)
    record = json.loads((tmp_path / "reconstruction.json").read_text())
    assert record["count"] == 2
    assert set(record["results"]) == {"1", "4"}
    for value in record["results"].values():
        assert value["psnr_db"]["low"] <= value["psnr_db"]["mean"] <= value["psnr_db"]["high"]
    assert Image.open(tmp_path / "reconstruction.png").width > 0


def test_a_token_count_that_the_model_does_not_have_is_refused(monkeypatch, data_folder, model_folder, tmp_path):
    with pytest.raises(ValueError, match="this model has 1 to 4"):
        run(reconstruction, monkeypatch, data_folder, tmp_path, model_folder, "--token_counts", 8)


@pytest.fixture(scope="module")
def index_and_rows(data_folder):
    rows = adherence.load_rows(data_folder)
    pictures = stack_pictures([row["image"] for row in rows])
    return PictureIndex(pictures, [r["name"] for r in rows], [r["style"] for r in rows]), rows, pictures


def test_real_pictures_meet_their_own_prompts(index_and_rows):
    index, rows, pictures = index_and_rows
    result = adherence.score(index, pictures, rows)
    assert result["name"]["share"] == result["name_and_style"]["share"] == 1


def test_pictures_of_other_names_do_not_meet_the_prompts(index_and_rows):
    index, rows, pictures = index_and_rows
    names = sorted({row["name"] for row in rows})
    others = [row | {"name": names[names.index(row["name"]) - 1]} for row in rows]
    assert adherence.score(index, pictures, others)["name"]["share"] == 0


def test_the_style_counts_only_where_one_is_asked_for(index_and_rows):
    index, rows, pictures = index_and_rows
    result = adherence.score(index, pictures, [{"name": row["name"]} for row in rows])
    assert "name_and_style" not in result


def test_prompts_are_drawn_from_each_set(index_and_rows):
    sets = adherence.prompt_sets(index_and_rows[1], max_prompts=4, seed=0)
    assert {key: len(prompts) for key, prompts in sets.items()} == {
        "trained": 4,
        "held_out": 2,
        "everyday": 4,
        "plain": 4,
    }
    assert "corner" not in {prompt["name"] for prompt in sets["everyday"]}


def test_trained_and_held_out_prompts_share_no_combination(index_and_rows):
    sets = adherence.prompt_sets(index_and_rows[1], max_prompts=None, seed=0)
    pairs = {key: {(row["name"], row["style"]) for row in sets[key]} for key in ("trained", "held_out")}
    assert not pairs["trained"] & pairs["held_out"]
