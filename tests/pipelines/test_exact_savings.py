"""Every optimization that is on by default matches the plain path, which does all the work (float32, 1e-5)."""

import copy
import itertools
from importlib import import_module

import pytest
import torch
from diffusers import AutoencoderKL
from tiny_models import CODEBOOK_SIZE, FSQ_LEVELS, NUM_REGISTERS, make_decoder, make_encoder, make_pipeline, make_prior

from flextok_hf.models.latents import decode_latents, encode_latents
from flextok_hf.models.layers import MATMULS, append_bias_dimensions, attend
from flextok_hf.models.nested_dropout import merged_tail_bias
from flextok_hf.models.packed_linear import ONEDNN, PACKED, PADDED, is_emulated
from flextok_hf.pipelines import length_groups
from flextok_hf.pipelines.length_groups import LengthGroups, group_by_length


plain = import_module("plain_path")


@pytest.fixture(params=[("product", ONEDNN), ("product", PACKED), ("product", PADDED), ("attention", MATMULS), None])
def way(request, take):
    """Each way that timing may choose, in turn; the last takes the library's own kernels."""
    if request.param is not None:
        take(*request.param)


pytestmark = pytest.mark.usefixtures("way")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


LATENTS = torch.randn(4, 3, 16, 16, generator=seeded(7))
SIGMA = torch.tensor([0.1, 0.5, 1.0, 0.7])
CODES = torch.rand(4, NUM_REGISTERS, len(FSQ_LEVELS), generator=seeded()) * 2 - 1
MIXED = torch.tensor([1, 3, NUM_REGISTERS, 3])
UNCONDITIONAL = torch.tensor([False, True, False, False])


def plain_velocity(decoder, num_tokens, is_unconditional):
    rows = [
        plain.velocity(decoder, LATENTS[[i]], SIGMA[[i]], CODES[[i]], num_tokens[[i]], bool(is_unconditional[i]))
        for i in range(4)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("longest", range(1, NUM_REGISTERS + 1))
@torch.no_grad()
def test_dropped_registers_merge_for_any_number_of_codes(tiny_decoder, longest):
    num_tokens = torch.tensor([longest, 0, max(1, longest - 2), longest])
    expected = plain_velocity(tiny_decoder, num_tokens, UNCONDITIONAL)
    assert_same(tiny_decoder(LATENTS, SIGMA, CODES[:, :longest], num_tokens, UNCONDITIONAL).velocity, expected)


def test_merged_registers_give_the_gradients_of_separate_ones():
    num_tokens = torch.tensor([1, 2, 2, 1])
    gradients = []
    for is_merged in (False, True):
        decoder, codes = make_decoder(), CODES.clone().requires_grad_()
        inputs = (LATENTS, SIGMA, codes[:, :2] if is_merged else codes, num_tokens, UNCONDITIONAL)
        decoder(*inputs).velocity.square().mean().backward()
        gradients.append({"codes": codes.grad} | {name: tensor.grad for name, tensor in decoder.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")
    assert gradients[0]["mask_token"].any() and gradients[0]["null_token"].any()


def test_the_weight_of_merged_registers_is_their_count():
    bias = merged_tail_bias(torch.tensor([0, 2, 3]), num_slots=4, length=torch.tensor([10, 10, 10]))
    weights = torch.where(bias == 0, 0.0, bias.exp())  # the kept ones have no bias
    torch.testing.assert_close(weights.sum(dim=1), torch.tensor([10.0, 8.0, 7.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_in_more_head_dimensions_is_a_bias_on_the_logits(dtype):
    query, key, value = (torch.randn(2, 5, 3, 16, generator=seeded(seed)).to(dtype) for seed in range(3))
    bias = torch.rand(2, 5, generator=seeded(3)) * 6
    context = attend(*append_bias_dimensions(query, key, bias, scale=0.5), value, scale=0.5)
    expected = attend(query.float(), key.float(), value.float(), scale=0.5, key_bias=bias)
    # a bias rounded to bfloat16 would be off by up to 2%; split in two parts, only the rounding of the result remains
    torch.testing.assert_close(context.float(), expected, atol=1e-5 if dtype == torch.float32 else 8e-3, rtol=0)


@torch.no_grad()
def test_one_noise_level_for_all_samples_is_the_same_level_for_each(tiny_decoder):
    each = tiny_decoder(LATENTS, torch.full((4,), 0.3), CODES).velocity
    assert_same(tiny_decoder(LATENTS, torch.tensor([0.3]), CODES).velocity, each)


@torch.no_grad()
def test_a_modulation_computed_in_advance_changes_nothing(tiny_decoder):
    table = tiny_decoder.compute_modulation(SIGMA)
    assert_same(tiny_decoder(LATENTS, None, CODES, modulation=table)[0], tiny_decoder(LATENTS, SIGMA, CODES)[0])
    first = tiny_decoder(LATENTS, SIGMA[:1], CODES).velocity
    assert_same(tiny_decoder(LATENTS, None, CODES, modulation=table[:1]).velocity, first)


@pytest.mark.parametrize("call_cost", [0, 3, 10_000])
@torch.no_grad()
def test_grouped_rows_give_the_velocity_of_the_whole_batch(tiny_decoder, monkeypatch, call_cost):
    monkeypatch.setitem(length_groups.CALL_COST, "cpu", call_cost)
    groups = LengthGroups(tiny_decoder, CODES, MIXED, UNCONDITIONAL)
    assert len(groups.groups) == {0: 4, 3: 2, 10_000: 1}[call_cost]
    assert_same(groups.predict_velocity(LATENTS, SIGMA), plain_velocity(tiny_decoder, MIXED, UNCONDITIONAL))


@pytest.mark.parametrize("seed", range(5))
def test_no_other_grouping_of_neighbors_is_cheaper(seed):
    lengths = torch.randint(0, 13, (6,), generator=seeded(seed)).tolist()
    num_patches, num_registers, call_cost = 8, 12, 10

    def cost(groups):
        return sum(
            call_cost + len(rows) * (num_patches + min(max(lengths[row] for row in rows) + 1, num_registers))
            for rows in groups
        )

    groups = group_by_length(lengths, num_patches, num_registers, call_cost)
    assert sorted(itertools.chain(*groups)) == list(range(6))
    order = sorted(range(6), key=lengths.__getitem__)
    for cuts in itertools.chain.from_iterable(itertools.combinations(range(1, 6), count) for count in range(6)):
        others = [order[start:end] for start, end in itertools.pairwise((0, *cuts, 6))]
        assert cost(groups) <= cost(others)


@pytest.mark.parametrize("num_tokens", [1, 4, NUM_REGISTERS])
def test_images_match_the_plain_path(num_tokens):
    pipe = make_pipeline()
    token_ids = torch.randint(0, CODEBOOK_SIZE, (3, num_tokens), generator=seeded())
    noise = LATENTS[:3]
    latents = pipe.detokenize(token_ids, 4, 3.0, latents=noise, output_type="latent").images
    assert_same(latents, plain.detokenize(pipe, token_ids, noise, 4, 3.0))


@torch.no_grad()
def test_features_match_the_plain_path(tiny_encoder):
    expected = plain.features(tiny_encoder, LATENTS)
    for num_tokens in (1, 4, NUM_REGISTERS):
        assert_same(tiny_encoder.compute_features(LATENTS, num_tokens), expected[:, :num_tokens])
    assert expected.std() > 0.1


@pytest.mark.parametrize("kind", ["text", "class"])
def test_the_prior_generates_the_tokens_of_the_plain_path(kind):
    text, no_text = torch.randn(2, 3, 32, generator=seeded()), torch.randn(1, 3, 32, generator=seeded(1))
    conditions = {"encoder_hidden_states": text} if kind == "text" else {"class_labels": torch.tensor([0, 2])}
    negative = {"encoder_hidden_states": no_text} if kind == "text" else {"class_labels": torch.tensor([-1])}
    prior = make_prior(text_hidden_size=32) if kind == "text" else make_prior(text_hidden_size=None, num_classes=3)
    expected = plain.generate(prior, NUM_REGISTERS, conditions, negative, guidance_scale=2.0)
    for_text = {"negative_encoder_hidden_states": no_text} if kind == "text" else {}
    generated = prior.generate(**conditions, **for_text, guidance_scale=2.0, generator=seeded())
    assert generated[:, 1:].equal(expected)
    assert expected.unique().numel() > 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_vae_is_not_computed_in_a_precision_that_the_cpu_emulates(dtype):
    if not is_emulated(dtype):
        pytest.skip(f"this machine computes {dtype} in hardware")
    vae = make_vae().to(dtype)
    vae.enable_slicing()
    exact = copy.deepcopy(vae).float()
    pixel_values = torch.rand(2, 3, 16, 16, generator=seeded()).to(dtype)
    latents = encode_latents(vae, pixel_values)
    assert latents.equal(encode_latents(exact, pixel_values.float()).to(dtype))
    assert decode_latents(vae, latents.float()).equal(decode_latents(exact, latents.float()).to(dtype))
    assert {parameter.dtype for parameter in vae.parameters()} == {dtype}


def make_vae():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**blocks, block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3).eval()


@torch.no_grad()
def test_the_vae_gives_the_same_result_with_channels_last():
    vae = make_vae()
    pixel_values = torch.rand(2, 3, 16, 16, generator=seeded()) * 2 - 1
    latents = encode_latents(vae, pixel_values)
    assert_same(latents, vae.encode(pixel_values).latent_dist.mode() * vae.config.scaling_factor)
    assert_same(decode_latents(vae, latents), vae.decode(latents.contiguous() / vae.config.scaling_factor).sample)
    assert pixel_values.is_contiguous()


def test_the_plain_path_depends_on_its_inputs():
    """Otherwise, the tests above would compare constants."""
    decoder = make_decoder()
    whole = plain_velocity(decoder, MIXED, UNCONDITIONAL)
    assert not torch.allclose(whole, plain_velocity(decoder, MIXED.clamp(max=2), UNCONDITIONAL), atol=1e-2)
    assert not torch.allclose(whole, plain_velocity(decoder, MIXED, ~UNCONDITIONAL), atol=1e-2)
    encoder = make_encoder()
    assert not torch.allclose(plain.features(encoder, LATENTS), plain.features(encoder, LATENTS + 0.1), atol=1e-2)
