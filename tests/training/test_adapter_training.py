"""Training adapters (LoRA): the base stays, runs resume exactly, and a pipeline that goes in comes out whole."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_models import make_class_pipeline, make_text_pipeline
from training_processes import run

from flextok_hf import FlexTokPipeline
from flextok_hf.training.adapters import add_adapters
from flextok_hf.training.arguments import PriorArguments, TokenizerArguments, VaeArguments
from flextok_hf.training.prior import PriorForTraining
from flextok_hf.training.setup import build_accelerator
from flextok_hf.training.stages import train_prior, train_tokenizer
from flextok_hf.training.starting_points import load_prior, load_tokenizer
from flextok_hf.training.step_rng import StepRng
from flextok_hf.training.tokenizer import TokenizerForTraining


pytest.importorskip("peft")
FILE = "pytorch_lora_weights.safetensors"
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SMALL = {"max_train_samples": 12, "train_batch_size": 4, "max_train_steps": 6, "lr_warmup_steps": 0}
SMALL |= {"checkpointing_steps": 3, "validation_steps": 0, "ema_decay": 0.5, "learning_rate": 0.02}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_text_pipeline().save_pretrained(folder)
    return str(folder)


def tokenizer_arguments(folder, base, **changes):
    options = {"output_dir": str(folder), "pretrained_tokenizer": base, "lora_rank": 2, **SMALL, **changes}
    return TokenizerArguments(**options)


def prior_arguments(folder, base, **changes):
    options = {"output_dir": str(folder), "pretrained_prior": base, "caption_column": "text", "lora_rank": 2}
    return PriorArguments(**{**options, **SMALL, **changes})


def trained(folder, base):
    pipe = FlexTokPipeline.from_pretrained(base)
    pipe.load_lora_weights(folder)
    return pipe


def losses(folder):
    lines = (json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("whole")
    train_tokenizer(tokenizer_arguments(folder, base))
    return folder


def test_an_adapter_of_the_decoder_is_trained_and_token_ids_stay(whole_run, base):
    pipe, before = trained(whole_run / "adapter", base), FlexTokPipeline.from_pretrained(base)
    assert pipe.get_list_adapters() == {"decoder": ["default_0"]}
    assert pipe.tokenize(IMAGES).equal(before.tokenize(IMAGES))
    codes, sigma = torch.zeros(2, 3, 2), torch.tensor([0.5, 0.9])
    assert not torch.allclose(
        pipe.decoder(IMAGES, sigma, codes).velocity, before.decoder(IMAGES, sigma, codes).velocity
    )
    pipe.disable_lora()
    assert pipe.decoder(IMAGES, sigma, codes).velocity.equal(before.decoder(IMAGES, sigma, codes).velocity)
    recipe = json.loads((whole_run / "adapter" / "training.json").read_text())
    assert recipe["arguments"]["lora_rank"] == 2 and recipe["arguments"]["resolution"] == 16
    assert f"Base model: {Path(base).name}." in (whole_run / "adapter" / "README.md").read_text()


def test_checkpoints_hold_only_the_adapter(whole_run):
    names = load_file(whole_run / "checkpoint-6" / "model.safetensors").keys()
    assert names and all(".lora_" in name for name in names)
    assert load_file(whole_run / "checkpoint-6" / "ema.safetensors").keys() == names


def test_a_resumed_run_gives_the_same_adapter_bit_for_bit(whole_run, base, tmp_path):
    shutil.copytree(whole_run / "checkpoint-3", tmp_path / "checkpoint-3")
    train_tokenizer(tokenizer_arguments(tmp_path, base, resume_from_checkpoint="latest"))
    one, two = (load_file(folder / "adapter" / FILE) for folder in (whole_run, tmp_path))
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def test_two_processes_train_the_same_adapter(whole_run, base, tmp_path):
    arguments = tokenizer_arguments(tmp_path, base, train_batch_size=2)
    assert run(lambda: train_tokenizer(arguments), tmp_path, num_processes=2) == [0, 0]
    one, two = (load_file(folder / "adapter" / FILE) for folder in (whole_run, tmp_path))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-3, rtol=1e-2)


def test_chosen_layers_of_encoder_and_decoder_are_adapted(base, tmp_path):
    targets = ["encoder.to_q", "encoder.feature_proj", "decoder.transformer_blocks.1.modulation"]
    train_tokenizer(tokenizer_arguments(tmp_path, base, lora_targets=targets, max_train_steps=1))
    layers = {name.rpartition(".lora_")[0] for name in load_file(tmp_path / "adapter" / FILE)}
    assert layers == {
        "encoder.blocks.0.attention.to_q",
        "encoder.blocks.1.attention.to_q",
        "encoder.feature_proj",
        "decoder.transformer_blocks.1.modulation",
    }
    assert "Token ids change" in (tmp_path / "adapter" / "README.md").read_text()


def test_an_adapter_of_a_prior_learns_captions_and_starts_from_its_text_encoder(base, tmp_path):
    train_prior(prior_arguments(tmp_path, base, max_train_steps=40, logging_steps=5, ema_decay=0.0))
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.2
    pipe = trained(tmp_path / "adapter", base)
    assert pipe.get_list_adapters() == {"prior": ["default_0"]}
    before = FlexTokPipeline.from_pretrained(base).encode_prompt("a red circle")[0]
    assert pipe.encode_prompt("a red circle")[0].equal(before)


@pytest.fixture
def fresh_accelerate():
    """The precision is fixed for the whole process otherwise."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def in_half_precision(folder, base, part):
    """Return a model in training with a base in half precision, and a batch."""
    options = {"mixed_precision": "bf16", "lora_targets": [part]}
    if part == "prior":
        arguments = prior_arguments(folder, base, **options)
        prior, text_encoder, tokenizer, arguments = load_prior(arguments, make_text_pipeline().encoder.config, None)
        model = PriorForTraining(prior, text_encoder, tokenizer, None, arguments)
        batch = {"token_ids": torch.arange(12).view(2, 6), "captions": ["a red circle", "a star"]}
    else:
        pipe, arguments = load_tokenizer(tokenizer_arguments(folder, base, **options), None)
        model = TokenizerForTraining(pipe.encoder, pipe.decoder, arguments)
        batch = {"pixel_values": IMAGES * 2 - 1}
    add_adapters(arguments, build_accelerator(arguments), model)
    return model.train(), batch


@pytest.mark.parametrize("part", ["encoder", "decoder", "prior"])
def test_the_base_is_held_in_half_precision_and_checkpointing_keeps_gradients(base, tmp_path, part, fresh_accelerate):
    """With a frozen base, the inputs of the first block need no gradient, which some ways of checkpointing drop."""
    model, batch = in_half_precision(tmp_path, base, part)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    frozen = [parameter for parameter in getattr(model, part).parameters() if not parameter.requires_grad]
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            own = getattr(model, part)
            (own.enable_gradient_checkpointing if part == "decoder" else own.gradient_checkpointing_enable)()
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = model(batch, 0, StepRng(0))
        loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in trained.items()})
        model.zero_grad()
    assert all(gradient.any() for name, gradient in gradients[0].items() if "lora_B" in name)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


# Without adapters


def test_fine_tuning_a_decoder_keeps_the_prior_and_the_resolution(base, tmp_path):
    arguments = tokenizer_arguments(tmp_path, base, lora_rank=0, freeze_encoder=True, max_train_steps=1)
    pipe = FlexTokPipeline.from_pretrained(train_tokenizer(arguments))
    assert pipe.resolution == 16
    pipe.set_progress_bar_config(disable=True)
    before = FlexTokPipeline.from_pretrained(base)
    before.set_progress_bar_config(disable=True)
    draw = [
        each.generate_tokens("a red circle", generator=torch.Generator().manual_seed(0)) for each in (pipe, before)
    ]
    assert draw[0].equal(draw[1])


def test_fine_tuning_an_encoder_leaves_the_prior_out(base, tmp_path):
    pipe, _ = load_tokenizer(tokenizer_arguments(tmp_path, base, lora_rank=0), None)
    assert pipe.prior is None


def test_a_prior_is_fine_tuned_from_a_trained_one(base, tmp_path):
    arguments = prior_arguments(tmp_path, base, lora_rank=0, max_train_steps=1, learning_rate=1e-6)
    pipe, before = FlexTokPipeline.from_pretrained(train_prior(arguments)), FlexTokPipeline.from_pretrained(base)
    own, old = pipe.prior.head.weight, before.prior.head.weight
    assert not own.equal(old)
    torch.testing.assert_close(own, old, atol=1e-4, rtol=1e-4)
    recipe = json.loads((tmp_path / "pipeline" / "training.json").read_text())["arguments"]
    assert (recipe["hidden_size"], recipe["num_layers"], recipe["resolution"]) == (32, 2, 16)


def test_training_starts_from_what_a_pipeline_with_adapters_draws(whole_run, base, tmp_path):
    pipe = trained(whole_run / "adapter", base)
    pipe.save_pretrained(tmp_path / "adapted")
    start, _ = load_tokenizer(tokenizer_arguments(tmp_path, str(tmp_path / "adapted"), lora_rank=0), None)
    codes, sigma = torch.zeros(2, 3, 2), torch.tensor([0.5, 0.9])
    expected = pipe.decoder(IMAGES, sigma, codes).velocity
    torch.testing.assert_close(start.decoder(IMAGES, sigma, codes).velocity, expected, atol=1e-5, rtol=1e-5)


# Bad options


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (TokenizerArguments, {"lora_rank": 2}, "`lora_rank` needs a trained model.*`pretrained_tokenizer`"),
        (TokenizerArguments, {"lora_rank": -1}, "`lora_rank` must be 0 or more"),
        (TokenizerArguments, {"lora_alpha": 2.0}, "`lora_alpha` is for adapters: set `lora_rank`"),
        (TokenizerArguments, {"lora_targets": ["decoder"]}, "`lora_targets` is for adapters"),
        (
            TokenizerArguments,
            {"lora_rank": 1, "pretrained_tokenizer": "x", "lora_targets": ["prior"]},
            "`lora_targets` must name decoder or encoder",
        ),
        (
            TokenizerArguments,
            {"lora_rank": 1, "pretrained_tokenizer": "x", "lora_targets": ["encoder"], "freeze_encoder": True},
            "`freeze_encoder` is set, but `lora_targets`",
        ),
        (VaeArguments, {"lora_rank": 2}, "`lora_rank` is for stages that adapt"),
        (PriorArguments, {"caption_column": "text"}, "`tokenizer` is not set"),
        (PriorArguments, {"caption_column": "text", "tokenizer": "x", "lora_rank": 2}, "`pretrained_prior`"),
        (
            PriorArguments,
            {"caption_column": "text", "pretrained_prior": "x", "text_encoder": "t5"},
            "`text_encoder` comes with `pretrained_prior`",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(output_dir="x", **options)


def test_layers_that_do_not_exist_are_refused_by_name(base, tmp_path):
    with pytest.raises(ValueError, match="`lora_targets` 'decoder.qkv' is no linear layer; the decoder has .*to_q"):
        train_tokenizer(tokenizer_arguments(tmp_path, base, lora_targets=["decoder.qkv"]))


def test_a_prior_for_other_conditions_or_tokens_is_refused_by_name(base, tmp_path):
    config = make_text_pipeline().encoder.config
    with pytest.raises(ValueError, match="`pretrained_prior` .* is conditioned on captions"):
        load_prior(prior_arguments(tmp_path, base), config, ["a", "b"])
    make_class_pipeline().save_pretrained(tmp_path / "classes")
    with pytest.raises(ValueError, match="has 3 classes"):
        load_prior(prior_arguments(tmp_path, str(tmp_path / "classes")), config, ["a", "b"])
    config.num_registers = 7
    with pytest.raises(ValueError, match="is for 6 tokens per image, but `tokenizer` has 7"):
        load_prior(prior_arguments(tmp_path, base), config, None)
    make_text_pipeline().from_pipe(make_text_pipeline(), prior=None).save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="has no prior"):
        load_prior(prior_arguments(tmp_path, str(tmp_path / "none")), config, None)
