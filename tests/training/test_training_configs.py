"""The configurations in scripts/configs: all can be read, and those of the paper have the paper's model sizes."""

import re

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from paths import SCRIPTS

from flextok_hf.training.arguments import PriorArguments, TokenizerArguments, VaeArguments
from flextok_hf.training.distillation_arguments import DistillationArguments
from flextok_hf.training.prior import build_prior
from flextok_hf.training.tokenizer import build_tokenizer
from flextok_hf.training.vae import build_vae
from flextok_hf.utils.option_parsing import parse_arguments


CONFIGS = SCRIPTS / "configs"
STAGES = {"vae": VaeArguments, "tokenizer": TokenizerArguments, "prior": PriorArguments}
STAGES |= {"distill": DistillationArguments}
PAPER = sorted(CONFIGS.glob("paper/*.yaml"))


def read(path):
    (stage,) = (stage for stage in STAGES if stage in path.stem)
    return parse_arguments(STAGES[stage], ["--config", str(path)])


RECIPES = [path for path in CONFIGS.glob("*.yaml") if any(stage in path.stem for stage in STAGES)]


@pytest.mark.parametrize("path", sorted([*RECIPES, *PAPER]), ids=lambda path: path.stem)
def test_every_configuration_can_be_read(path):
    assert read(path).output_dir.startswith("runs/")


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_every_value_of_the_paper_is_marked(path):
    lines = [line for line in path.read_text().splitlines() if re.match(r"[a-z]", line)]
    assert len(lines) > 20
    assert [line for line in lines if not re.search(r"  # [PDO]\b", line)] == []


@pytest.mark.parametrize(
    ("name", "encoder_weights", "decoder_weights"),
    [
        ("d12_d12", 85_382_406, 172_448_320),
        ("d18_d18", 287_326_086, 578_587_456),
        ("d18_d28", 287_326_086, 2_169_735_744),
    ],
)
def test_tokenizers_have_the_published_number_of_weights(name, encoder_weights, decoder_weights):
    arguments = read(CONFIGS / "paper" / f"tokenizer_{name}.yaml")
    with torch.device("meta"):
        vae = build_vae(VaeArguments(output_dir="", resolution=256, latent_channels=16))
        encoder, decoder = build_tokenizer(arguments, vae)
    # the published counts include position embeddings, which are buffers here
    counts = [sum(tensor.numel() for tensor in model.state_dict().values()) for model in (encoder, decoder)]
    assert counts == [encoder_weights, decoder_weights]


SIZES = {"class_49m": 49, "class_85m": 85, "class_201m": 201, "class_393m": 393, "class_679m": 679}
SIZES |= {"class_1_33b": 1330, "text_113m": 113, "text_382m": 382, "text_1_15b": 1150, "text_3_06b": 3060}


@pytest.mark.parametrize(("name", "millions"), SIZES.items())
def test_priors_have_the_published_number_of_weights_in_their_blocks(name, millions):
    arguments = read(CONFIGS / "paper" / f"prior_{name}.yaml")
    condition = (2048, None) if arguments.caption_column else (None, 1000)
    with torch.device("meta"):
        prior = build_prior(arguments, 64_000, 256, *condition)
    count = sum(weight.numel() for weight in prior.blocks.parameters())
    assert count == pytest.approx(millions * 1e6, rel=0.02)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("accelerate/*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    assert load_config_from_file(str(path)).num_processes in (8, 64)
