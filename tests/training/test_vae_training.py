"""Stage 0: the losses of the VAE, its export, cached latents, and the transition to stage 1."""

import datasets
import pytest
import torch
from diffusers import AutoencoderKL
from image_rows import TRANSFORM, write_parquet
from training_processes import SMALL_TOKENIZER
from transformers import ResNetConfig, ResNetModel

from flextok_hf.data.batches import build_dataloader
from flextok_hf.data.columns import Columns
from flextok_hf.data.latent_cache import cache_latents
from flextok_hf.data.samples import ImageTransform
from flextok_hf.data.training_dataset import load_training_dataset
from flextok_hf.models.latents import encode_latents
from flextok_hf.pipelines.pipeline_flextok import FlexTokPipeline
from flextok_hf.training.adversarial import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from flextok_hf.training.arguments import PriorArguments, TokenizerArguments, VaeArguments
from flextok_hf.training.perceptual import PerceptualDistance
from flextok_hf.training.stages import train_prior, train_tokenizer, train_vae
from flextok_hf.training.step_rng import StepRng
from flextok_hf.training.vae import VaeForTraining, build_vae, measure_scaling_factor


SMALL_VAE = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "resolution": 32,
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rng(seed=0):
    return StepRng(seed)


def vae_arguments(folder="unused", **changes):
    return VaeArguments(output_dir=str(folder), **{**SMALL_VAE, **changes})


def make_model(**changes):
    torch.manual_seed(0)
    arguments = vae_arguments(**changes)
    return VaeForTraining(build_vae(arguments), arguments).train()


def batch(size=4):
    return {"pixel_values": torch.rand(size, 3, 32, 32, generator=seeded(1)) * 2 - 1}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def resnet(tmp_path):
    """Folder of a tiny vision model."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path / "resnet")
    return str(tmp_path / "resnet")


# Losses


@pytest.mark.parametrize("options", [{}, {"reconstruction_loss": "l2"}, {"adversarial_weight": 0.5}])
def test_every_parameter_receives_a_gradient(options):
    model = make_model(**options)
    loss, _ = model(batch(), 0, rng())
    loss.backward()
    without = [name for name, tensor in model.named_parameters() if tensor.grad is None or not tensor.grad.any()]
    # The key bias shifts all logits of a query equally, so the softmax ignores it. The last bias of the discriminator
    # shifts real and fake scores equally, so the hinge losses of a new discriminator ignore it.
    unseen = ("to_k.bias", "discriminator.layers.11.bias")
    assert [name for name in without if not name.endswith(unseen)] == []


def test_the_same_generator_gives_the_same_loss():
    model = make_model()
    before = torch.get_rng_state()
    losses = [model(batch(), 0, rng(seed))[0].item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.get_rng_state().equal(before)


def test_a_perfect_reconstruction_leaves_only_the_kl_divergence():
    model = make_model(kl_weight=0.5)
    data = batch()
    model.vae.decode = lambda latents: type("Decoded", (), {"sample": data["pixel_values"]})
    loss, metrics = model(data, 0, rng())
    assert metrics["reconstruction_loss"] == 0
    assert loss == 0.5 * metrics["kl"]


def test_the_generator_loss_gives_the_discriminator_no_gradient():
    discriminator, fake = PatchDiscriminator(hidden_size=16), torch.rand(2, 3, 32, 32, requires_grad=True)
    generator_loss(discriminator, fake).backward()
    assert fake.grad.any()
    assert all(weight.grad is None for weight in discriminator.parameters())


def test_the_discriminator_learns_to_tell_images_apart():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(hidden_size=16)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-3)
    real, fake = torch.rand(8, 3, 32, 32) * 0.2, torch.rand(8, 3, 32, 32) * 0.2 + 0.5
    for _ in range(30):
        loss = discriminator_loss(discriminator, real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 < discriminator_loss(discriminator, fake, real)
    assert discriminator(real).mean() > 0 > discriminator(fake).mean()


def test_the_discriminator_is_unused_before_its_start():
    model = make_model(adversarial_weight=0.5, adversarial_start=3)
    loss, metrics = model(batch(), 2, rng())
    loss.backward()
    assert "discriminator_loss" not in metrics
    # distributed training needs a gradient for every parameter in every step
    assert all(not weight.grad.any() for weight in model.discriminator.parameters())
    assert "discriminator_loss" in model(batch(), 3, rng())[1]


def test_the_adaptive_weight_equalizes_the_gradient_norms():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    balance = adaptive_weight(3 * weight.sum(), 0.5 * weight.sum(), weight)
    assert balance.item() == pytest.approx(6, rel=1e-4)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_the_perceptual_distance_is_zero_for_equal_images_only(kind, resnet, tmp_path):
    folder = resnet
    if kind == "vit":
        from transformers import ViTConfig, ViTModel

        folder = str(tmp_path / "vit")
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        ViTModel(ViTConfig(**small, image_size=32, patch_size=8)).save_pretrained(folder)
    distance = PerceptualDistance(folder)
    images = batch()["pixel_values"]
    assert distance(images, images) == 0
    assert distance(images, -images) > 0.001


def test_the_perceptual_loss_trains_the_vae_and_not_its_network(resnet):
    model = make_model(perceptual_network=resnet, perceptual_weight=1.0)
    loss, metrics = model(batch(), 0, rng())
    assert loss > metrics["reconstruction_loss"] + 0.5 * metrics["perceptual_loss"] > metrics["reconstruction_loss"]
    assert all("network" not in name for name, _ in model.named_parameters())


# Options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 33}, "`resolution` 33 must be a multiple of 2"),
        ({"norm_num_groups": 5}, "`block_out_channels` .* multiples of `norm_num_groups`"),
        ({"reconstruction_loss": "l3"}, "`reconstruction_loss` must be one of l1, l2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        build_vae(vae_arguments(**changes))


# Export


def test_the_scaling_factor_brings_latents_to_unit_variance():
    vae = make_model().vae.eval()
    images = [torch.rand(4, 3, 32, 32, generator=seeded(seed)) * 2 - 1 for seed in range(3)]
    vae.register_to_config(scaling_factor=measure_scaling_factor(vae, images))
    assert encode_latents(vae, torch.cat(images)).std().item() == pytest.approx(1, abs=0.01)


def test_the_three_stages_run_in_sequence(tmp_path):
    small = {"max_train_samples": 8, "train_batch_size": 4, "max_train_steps": 2, "validation_steps": 2}
    small |= {"num_validation_images": 2, "resolution": 32}
    vae = train_vae(vae_arguments(tmp_path / "vae", **{**small, "adversarial_weight": 0.1, "adversarial_start": 1}))
    assert (tmp_path / "vae" / "validation-2.png").is_file()
    sizes = {**SMALL_TOKENIZER, "encoder_patch_size": 4, "decoder_patch_size": 2}
    cached = {"vae": str(vae), "cache_latents": True}
    tokenizer = train_tokenizer(TokenizerArguments(output_dir=str(tmp_path / "tokenizer"), **sizes, **small, **cached))
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "text_hidden_size": 32, "text_vocab_size": 300}
    options = {"tokenizer": str(tokenizer), "caption_column": "text", "cache_latents": True, "text_num_layers": 1}
    folder = train_prior(PriorArguments(output_dir=str(tmp_path / "prior"), **sizes, **small, **options))

    pipe = FlexTokPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae.config.scaling_factor == AutoencoderKL.from_pretrained(vae).config.scaling_factor != 1.0
    assert pipe("a red circle", num_inference_steps=1).images[0].size == (32, 32)


# Cached latents


def caching_case(tmp_path, **options):
    path = write_parquet(tmp_path / "a.parquet", text=[[f"{row} a", f"{row} b"] for row in range(10)], **options)
    transform = ImageTransform(32, random_flip=True)
    return load_training_dataset(path, transform=transform, columns=Columns(caption="text")), make_model().vae.eval()


def test_cached_latents_are_those_of_the_same_draws(tmp_path):
    dataset, vae = caching_case(tmp_path)
    cached = cache_latents(dataset, vae)
    assert len(cached) == 10
    for key in [(row, draw) for row in (0, 7) for draw in range(8)]:
        plain, sample = dataset[key], cached[key]
        assert sample["captions"] == plain["captions"]
        expected = encode_latents(vae, plain["pixel_values"][None])[0]
        torch.testing.assert_close(sample["latents"].float(), expected, atol=2e-3, rtol=2e-3)


def test_cached_latents_are_served_in_batches(tmp_path):
    dataset, vae = caching_case(tmp_path)
    served = next(iter(build_dataloader(cache_latents(dataset, vae, num_workers=2), 4, num_workers=2)))
    assert served["latents"].shape == (4, 4, 16, 16) and len(served["captions"]) == 4


def test_unreadable_images_are_skipped_in_the_cache(tmp_path):
    dataset, vae = caching_case(tmp_path, damaged=(2, 5))
    cached = cache_latents(dataset, vae)
    assert len(cached) == 8 and len(dataset.skipped) == 2
    assert [cached[row]["captions"][0] for row in range(8)] == list("01346789")


def test_a_dataset_without_a_usable_image_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", num_rows=3, damaged=(0, 1, 2))
    with pytest.raises(ValueError, match="No usable image in all 3 rows"):
        cache_latents(load_training_dataset(path, transform=TRANSFORM), make_model().vae)


@pytest.mark.parametrize("options", [{}, {"vae": "given", "cache_in_memory": True}])
def test_caching_latents_without_a_vae_or_of_cached_images_is_refused(options, tmp_path):
    if "vae" in options:
        make_model().vae.save_pretrained(tmp_path / "vae")
        options = options | {"vae": str(tmp_path / "vae")}
    small = {"max_train_samples": 8, "train_batch_size": 4, "resolution": 32}
    sizes = {**SMALL_TOKENIZER, "decoder_patch_size": 2}
    arguments = TokenizerArguments(output_dir=str(tmp_path / "run"), cache_latents=True, **small, **sizes, **options)
    with pytest.raises(ValueError, match="`cache_latents` needs a `vae`"):
        train_tokenizer(arguments)
