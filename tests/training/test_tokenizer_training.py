"""The loss of stage 1: its gradients, randomness, penalties, REPA and learning rates."""

import pytest
import torch
from tiny_models import NUM_REGISTERS, make_decoder, make_encoder
from transformers import Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from flextok_hf.models.modeling_decoder import FlexTokFlowDecoder
from flextok_hf.pipelines.length_groups import LengthGroups
from flextok_hf.training.arguments import TokenizerArguments
from flextok_hf.training.collapse import correlation_penalty, count_distinct, spread_penalty
from flextok_hf.training.optimization import split_by_decay
from flextok_hf.training.repa import FeatureAlignment
from flextok_hf.training.stages import tokenizer_groups
from flextok_hf.training.step_rng import StepRng
from flextok_hf.training.tokenizer import TokenizerForTraining, build_tokenizer
from flextok_hf.training.vision import FrozenVision


BATCH_SIZE = 16


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_model(**options):
    """Build a model in training mode without zero-initialized layers, so that gradients reach every layer."""
    arguments = TokenizerArguments(output_dir="unused", **{"null_condition_probability": 0.3, **options})
    decoder = make_decoder()
    decoder.register_to_config(remove_dropped=arguments.remove_dropped)
    return TokenizerForTraining(make_encoder(), decoder, arguments).train()


def batch(size=BATCH_SIZE):
    return {"pixel_values": torch.rand(size, 3, 16, 16, generator=seeded(1)) * 2 - 1}


@pytest.fixture
def dinov2(tmp_path):
    """Folder of a tiny DINOv2 with patches of 7 pixels."""
    torch.manual_seed(0)
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    Dinov2Model(Dinov2Config(**small)).save_pretrained(tmp_path / "dinov2")
    return str(tmp_path / "dinov2")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unrounded_probability": 0.5, "feature_penalty": 0.1, "correlation_penalty": 0.5},
        {"joint_lengths": True},
        {"repa": True},
    ],
)
def test_every_parameter_receives_a_gradient(options, dinov2):
    options = {"repa_network": dinov2} if options.pop("repa", False) else {"full_length_probability": 0.3} | options
    if "joint_lengths" in options:
        del options["full_length_probability"]
    model = make_model(**options)
    loss, _ = model(batch(), 0, StepRng(0))
    loss.backward()
    without = [name for name, tensor in model.named_parameters() if tensor.grad is None or not tensor.grad.any()]
    assert without == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_same_seed_gives_the_same_loss():
    model = make_model()
    before = torch.get_rng_state()
    losses = [model(batch(), 0, StepRng(seed))[0].item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("options", [{}, {"joint_lengths": True}, {"unrounded_probability": 0.5}])
def test_randomness_does_not_depend_on_how_a_step_is_split(options):
    model = make_model(**options)
    pixel_values = batch()["pixel_values"]
    whole, _ = model({"pixel_values": pixel_values}, 0, StepRng(5))
    parts = [
        model({"pixel_values": pixel_values[first : first + 4]}, 0, StepRng(5, first=first, total=BATCH_SIZE))[0]
        for first in range(0, BATCH_SIZE, 4)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


@pytest.mark.parametrize("share", [1, 3, 8, 20])
def test_noise_does_not_depend_on_how_a_step_is_split(share):
    whole = StepRng(5, total=40)
    expected = [whole.normal_like(torch.empty(40, 2, 5)) for _ in range(2)]  # two draws, as with joint lengths
    for first in range(0, 40 - share + 1, share):
        rng = StepRng(5, first=first, total=40)
        for noise in expected:
            assert torch.equal(rng.normal_like(torch.empty(share, 2, 5)), noise[first : first + share])


def test_noise_is_standard_normal_and_differs_between_images_and_draws():
    rng = StepRng(0)
    first, second = rng.normal_like(torch.empty(100, 3, 8, 8)), rng.normal_like(torch.empty(100, 3, 8, 8))
    assert abs(first.mean()) < 0.02 and abs(first.std() - 1) < 0.02
    assert torch.corrcoef(torch.cat([first, second]).flatten(1)).fill_diagonal_(0).abs().max() < 0.4


def test_a_process_draws_the_noise_of_its_own_images_only():
    rng = StepRng(0, first=10**9, total=2 * 10**9)  # gigabytes, were it drawn for the whole step
    assert rng.normal_like(torch.empty(4, 3, 8, 8)).shape == (4, 3, 8, 8)


def test_dropped_tokens_give_the_encoder_no_gradient():
    model = make_model(keep_mode="uniform", null_condition_probability=0.0)
    sigma, _, is_unconditional = model.draw(BATCH_SIZE, StepRng(0))
    model.draw = lambda *_, **__: (sigma, torch.full((BATCH_SIZE,), 2), is_unconditional)
    model(batch(), 0, StepRng(0))[0].backward()
    gradient = model.encoder.register_tokens.grad
    assert gradient[:2].any(dim=1).all() and not gradient[2:].any()


def test_the_draws_follow_the_options():
    model = make_model(keep_mode="powers_of_two", full_length_probability=1.0)
    sigma, num_tokens, is_unconditional = model.draw(4000, StepRng(0))
    assert num_tokens.eq(NUM_REGISTERS).all()
    assert abs(is_unconditional.float().mean() - 0.3) < 0.03
    assert sigma.min() > 0 and sigma.max() < 1


def test_measures_against_collapse_fade_out(monkeypatch):
    model = make_model(unrounded_probability=1.0, max_train_steps=100)
    shares = []
    quantize = model.encoder.quantizer.forward

    def spy(features, is_rounded=None):
        if is_rounded is not None:
            shares.append(is_rounded.float().mean().item())
        return quantize(features, is_rounded)

    monkeypatch.setattr(model.encoder.quantizer, "forward", spy)
    with torch.no_grad():
        for step in (0, 20, 40, 99):
            model(batch(400), step, StepRng(0))
    assert shares == pytest.approx([0, 0.5, 1, 1], abs=0.06)


def test_a_perfect_velocity_has_zero_loss(monkeypatch):
    model = make_model()
    pixel_values = batch()["pixel_values"]
    noise = StepRng(0)
    noise.bernoulli(0.0, BATCH_SIZE)  # drawn before the noise
    noise = noise.normal_like(pixel_values)
    monkeypatch.setattr(LengthGroups, "predict_velocity", lambda *_: noise - pixel_values)
    assert model(batch(), 0, StepRng(0))[0] == 0


def test_the_spread_penalty_grows_when_features_collapse_or_drift():
    spread = torch.randn(1000, 2, 3, generator=seeded())
    spread = (spread - spread.mean(0)) / spread.std(0, unbiased=False)
    collapsed, drifted = torch.zeros_like(spread), spread + 2
    assert spread_penalty(spread) < 1e-6
    assert spread_penalty(collapsed) == pytest.approx(1, abs=1e-4)
    assert spread_penalty(drifted) == pytest.approx(4, abs=1e-3)


def test_the_correlation_penalty_is_the_mean_squared_correlation_of_different_features():
    features = torch.randn(40, 3, 2, generator=torch.Generator().manual_seed(0))
    correlation = torch.corrcoef(features.flatten(1).T)
    expected = correlation[~torch.eye(6, dtype=torch.bool)].square().mean()
    assert correlation_penalty(features).item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_correlation_penalty_of_fully_correlated_features_is_1():
    one = torch.randn(40, 1, 1, generator=torch.Generator().manual_seed(0))
    assert correlation_penalty(one.expand(-1, 3, 2) * torch.tensor([1.0, -2.0])).item() == pytest.approx(1, abs=1e-4)


def test_the_correlation_penalty_of_a_collapsed_batch_has_a_gradient():
    features = torch.zeros(8, 3, 2, requires_grad=True)
    correlation_penalty(features).backward()
    assert features.grad is not None and features.grad.isfinite().all()


def test_distinct_ids_are_counted_per_position():
    assert count_distinct(torch.tensor([[1, 5], [1, 6], [1, 7], [1, 5]])) == 2


# Joint lengths


def test_joint_lengths_decode_each_image_with_all_tokens_and_with_those_it_keeps(monkeypatch):
    model = make_model(joint_lengths=True, keep_mode="uniform", null_condition_probability=0.0)
    seen = {}

    def spy(noisy_latents, sigma, codes, num_tokens, is_unconditional):
        seen.update(noisy_latents=noisy_latents, codes=codes, num_tokens=num_tokens, sigma=sigma)
        return torch.zeros_like(noisy_latents), None

    monkeypatch.setattr(model, "predict", spy)
    model(batch(), 0, StepRng(0))
    full, drawn = seen["num_tokens"].chunk(2)
    assert (full == NUM_REGISTERS).all() and len(drawn.unique()) > 2
    first, second = seen["codes"].chunk(2)
    assert torch.equal(first, second) and len(first) == BATCH_SIZE
    assert not torch.equal(*seen["noisy_latents"].chunk(2)) and not torch.equal(*seen["sigma"].chunk(2))


# Removing dropped tokens from the sequence


@torch.no_grad()
def test_removed_tokens_have_no_effect():
    decoder = make_decoder()
    decoder.register_to_config(remove_dropped=True)
    codes = torch.rand(3, NUM_REGISTERS, 2, generator=seeded()) * 2 - 1
    noisy, sigma = torch.randn(3, 3, 16, 16, generator=seeded()), torch.tensor([0.2, 0.5, 0.9])
    num_tokens = torch.tensor([2, 2, 2])
    padded = decoder(noisy, sigma, codes, num_tokens).velocity
    cut = decoder(noisy, sigma, codes[:, :2], num_tokens).velocity
    torch.testing.assert_close(padded, cut, atol=1e-5, rtol=1e-5)
    decoder.mask_token.normal_(generator=seeded(2))
    torch.testing.assert_close(decoder(noisy, sigma, codes, num_tokens).velocity, padded)

    unconditional = decoder(noisy, sigma, codes, num_tokens, torch.ones(3).bool()).velocity
    one_null_token = decoder(noisy, sigma, codes[:, :1], None, torch.ones(3).bool()).velocity
    torch.testing.assert_close(unconditional, one_null_token, atol=1e-5, rtol=1e-5)
    assert (unconditional - padded).abs().max() > 1e-3
    decoder.null_token.normal_(generator=seeded(2))
    assert (decoder(noisy, sigma, codes, num_tokens, torch.ones(3).bool()).velocity - unconditional).abs().max() > 1e-3


@torch.no_grad()
def test_removing_differs_from_masking_except_at_full_length():
    masking, removing = make_decoder(), make_decoder()
    removing.register_to_config(remove_dropped=True)
    codes = torch.rand(2, NUM_REGISTERS, 2, generator=seeded()) * 2 - 1
    noisy, sigma = torch.randn(2, 3, 16, 16, generator=seeded()), torch.tensor([0.2, 0.5])
    torch.testing.assert_close(removing(noisy, sigma, codes).velocity, masking(noisy, sigma, codes).velocity)
    few = torch.tensor([2, 2])
    difference = removing(noisy, sigma, codes, few).velocity - masking(noisy, sigma, codes, few).velocity
    assert difference.abs().max() > 1e-3


def test_remove_dropped_is_saved_with_the_model(tmp_path):
    arguments = TokenizerArguments(output_dir="unused", remove_dropped=True, resolution=32, decoder_num_layers=1)
    _, decoder = build_tokenizer(arguments, None)
    decoder.save_pretrained(tmp_path)
    assert FlexTokFlowDecoder.from_pretrained(tmp_path).config.remove_dropped is True


# A frozen encoder


def test_a_frozen_encoder_receives_no_gradient_and_the_decoder_does():
    model = make_model(freeze_encoder=True, pretrained_tokenizer="anything")
    model(batch(), 0, StepRng(0))[0].backward()
    assert all(weight.grad is None for weight in model.encoder.parameters())
    assert all(weight.grad.any() for weight in model.decoder.parameters())
    trained = [weight for group in tokenizer_groups(model.arguments, model) for weight in group["params"]]
    assert {id(weight) for weight in trained} == {id(weight) for weight in model.decoder.parameters()}


# REPA


@pytest.mark.parametrize("kind", ["dinov2", "vit"])
def test_features_of_the_network_match_the_patches_in_position(kind, dinov2, tmp_path):
    folder = dinov2
    if kind == "vit":
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
        ViTModel(ViTConfig(**small, patch_size=8)).save_pretrained(tmp_path / "vit")
        folder = str(tmp_path / "vit")
    vision = FrozenVision(folder)
    pixel_values = torch.zeros(1, 3, 16, 16)
    pixel_values[:, :, 4:8, 8:12] = 1.0  # row 1, column 2 of a 4 x 4 grid
    change = (vision.patch_features(pixel_values, 4) - vision.patch_features(torch.zeros_like(pixel_values), 4)).norm(
        dim=-1
    )
    assert change.shape == (1, 16) and change.argmax() == 4 + 2


def test_the_alignment_compares_each_image_with_its_own_states(dinov2):
    model = make_model(repa_network=dinov2, keep_mode="uniform")
    images = batch()
    _, metrics = model(images, 0, StepRng(0))
    assert 0 < metrics["repa_loss"] < 2
    with torch.no_grad():  # one decoder call for all rows, in order
        latents, rng = images["pixel_values"], StepRng(0)
        is_rounded = ~rng.bernoulli(0.0, BATCH_SIZE)
        codes = model.encoder.quantizer(model.encoder.compute_features(latents), is_rounded)
        noise = rng.normal_like(latents)
        sigma, num_tokens, is_unconditional = model.draw(BATCH_SIZE, rng)
        model.tap.clear()
        noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))
        model.decoder(noisy, sigma, codes, num_tokens, is_unconditional)
        expected = model.alignment(model.tap.outputs[0][:, :16], latents)
    torch.testing.assert_close(metrics["repa_loss"], expected)


def test_the_network_is_neither_trained_nor_saved(dinov2):
    model = make_model(repa_network=dinov2)
    assert all("vision" not in name for name in model.state_dict())
    assert any(name.startswith("alignment.projector") for name in model.state_dict())


def test_evaluation_skips_alignment_and_penalties(dinov2):
    model = make_model(repa_network=dinov2, feature_penalty=0.5)
    plain = make_model()
    for each in (model, plain):
        each.eval()
    assert model(batch(), 0, StepRng(0))[0] == plain(batch(), 0, StepRng(0))[0]
    assert model.tap.outputs == []


def test_invalid_repa_options_are_refused_by_name(tmp_path, dinov2):
    small = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    small.hidden_size = 8
    ResNetModel(small).save_pretrained(tmp_path / "resnet")
    with pytest.raises(ValueError, match="`repa_network` .*resnet.* has no patches"):
        FeatureAlignment(str(tmp_path / "resnet"), 32, 4)(torch.zeros(1, 16, 32), torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="`repa_layer` is 2, but the decoder has blocks 0 to 1"):
        make_model(repa_network=dinov2, repa_layer=2)


# Learning rates


def test_learning_rates_of_matrices_are_inversely_proportional_to_the_width():
    model = make_model(mup_base_width=8, encoder_learning_rate_scale=0.5, learning_rate=1.0)
    rates = {
        id(weight): group["lr"] for group in tokenizer_groups(model.arguments, model) for weight in group["params"]
    }
    by_name = {name: rates[id(weight)] for name, weight in model.named_parameters()}
    assert len(by_name) == len(rates)
    assert by_name["decoder.transformer_blocks.0.attention.to_q.weight"] == 8 / 32
    assert by_name["decoder.transformer_blocks.0.mlp.down_proj.weight"] == 8 / 32
    assert by_name["decoder.velocity_proj.weight"] == 8 / 32
    for name in ("patch_embedding.proj.weight", "code_proj.weight", "time_embedder.linear_1.weight", "mask_token"):
        assert by_name[f"decoder.{name}"] == 1.0
    assert by_name["decoder.register_positions"] == 1.0
    assert by_name["encoder.feature_proj.weight"] == 0.5 * 8 / 32 and by_name["encoder.register_tokens"] == 0.5


def test_weight_decay_applies_to_matrices_and_embeddings_only():
    decayed = [
        weight.ndim
        for group in split_by_decay([make_decoder()], 1.0)
        if "weight_decay" not in group
        for weight in group["params"]
    ]
    plain = [
        weight.ndim
        for group in split_by_decay([make_decoder()], 1.0)
        if "weight_decay" in group
        for weight in group["params"]
    ]
    assert set(decayed) == {2} and set(plain) == {1}


def test_mup_keeps_the_size_of_updates_at_all_widths():
    """The change of the decoder's states after a few steps must not grow with the width."""

    def change(width, seed, **options):
        torch.manual_seed(seed)
        sizes = {"encoder_hidden_size": 32, "decoder_hidden_size": width, "head_dim": 16, "num_registers": 4}
        sizes |= {"encoder_num_layers": 1, "decoder_num_layers": 2, "encoder_patch_size": 4, "decoder_patch_size": 4}
        arguments = TokenizerArguments(
            output_dir="unused", resolution=16, fsq_levels=[5, 3], learning_rate=1e-2, **sizes, **options
        )
        model = TokenizerForTraining(*build_tokenizer(arguments, None), arguments)
        states = []
        model.decoder.transformer_blocks[-1].register_forward_hook(lambda *call: states.append(call[-1].detach()))
        optimizer = torch.optim.AdamW(tokenizer_groups(arguments, model), betas=(0.9, 0.95))
        inputs = (torch.randn(4, 3, 16, 16, generator=seeded()), torch.full((4,), 0.5), torch.zeros(4, 4, 2))
        model.decoder(*inputs)
        for step in range(6):
            loss, _ = model(batch(8), step, StepRng(step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.decoder(*inputs)
        return (states[-1] - states[0]).square().mean().sqrt().item()

    def growth(**options):
        wide, narrow = (sum(change(width, seed, **options) for seed in range(3)) for width in (256, 32))
        return wide / narrow

    assert 0.6 < growth(mup_base_width=32) < 1.7 < 2 < growth()
