"""The flow decoder: what a prefix of codes does and does not influence."""

import pytest
import torch
from tiny_models import FSQ_LEVELS, NUM_REGISTERS, SHAPES, make_decoder, make_pipeline

from flextok_hf import FlexTokFlowDecoder


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def latents():
    return torch.randn(3, 3, 16, 16, generator=seeded(7))


SIGMA = torch.tensor([0.1, 0.5, 1.0])
LENGTHS = torch.tensor([0, 3, NUM_REGISTERS])
CODES, OTHER_CODES = (torch.rand(3, NUM_REGISTERS, len(FSQ_LEVELS), generator=seeded(seed)) * 2 - 1 for seed in (0, 1))
ALL_ROWS = torch.ones(3, dtype=torch.bool)


def velocity(decoder, latents, *args):
    with torch.no_grad():
        return decoder(latents, SIGMA[: len(latents)], *args).velocity


def test_dropped_codes_do_not_matter(tiny_decoder, latents):
    is_kept = torch.arange(NUM_REGISTERS) < LENGTHS[:, None]
    changed = torch.where(is_kept[..., None], CODES, OTHER_CODES)
    assert velocity(tiny_decoder, latents, changed, LENGTHS).equal(velocity(tiny_decoder, latents, CODES, LENGTHS))


def test_kept_codes_matter(tiny_decoder, latents):
    for position in range(NUM_REGISTERS):
        changed = CODES.clone()
        changed[:, position] = OTHER_CODES[:, position]
        difference = (velocity(tiny_decoder, latents, changed) - velocity(tiny_decoder, latents, CODES)).abs()
        assert difference.amax(dim=(1, 2, 3)).gt(1e-6).all()


@pytest.mark.parametrize("length", [1, 4, NUM_REGISTERS])
def test_a_short_sequence_is_a_full_one_with_its_tail_dropped(tiny_decoder, latents, length):
    short = velocity(tiny_decoder, latents, CODES[:, :length])
    full = velocity(tiny_decoder, latents, CODES, torch.full((3,), length))
    torch.testing.assert_close(short, full, atol=1e-5, rtol=0)


def test_the_number_of_codes_matters(tiny_decoder, latents):
    assert not torch.allclose(
        velocity(tiny_decoder, latents, CODES[:, :2]), velocity(tiny_decoder, latents, CODES[:, :3])
    )


def test_the_unconditional_velocity_ignores_codes_and_their_number(tiny_decoder, latents):
    expected = velocity(tiny_decoder, latents, CODES, None, ALL_ROWS)
    other = velocity(tiny_decoder, latents, OTHER_CODES[:, :2], LENGTHS.clamp(max=2), ALL_ROWS)
    torch.testing.assert_close(other, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(expected, velocity(tiny_decoder, latents, CODES, torch.zeros(3, dtype=torch.int64)))


def test_a_batch_of_mixed_conditions_matches_single_images(tiny_decoder, latents):
    ignored = torch.tensor([False, False, True])
    together = velocity(tiny_decoder, latents, CODES, LENGTHS, ignored)
    with torch.no_grad():
        alone = [
            tiny_decoder(*(tensor[i : i + 1] for tensor in (latents, SIGMA, CODES, LENGTHS, ignored))).velocity
            for i in range(3)
        ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_every_pixel_of_the_input_reaches_the_whole_velocity(tiny_decoder, latents):
    changed = latents.clone()
    changed[:, :, 0, 0] += 1
    difference = velocity(tiny_decoder, changed, CODES) - velocity(tiny_decoder, latents, CODES)
    assert difference.abs().gt(0).float().mean() > 0.99


def test_a_fresh_decoder_predicts_zero(latents):
    fresh = FlexTokFlowDecoder(num_layers=1, code_dim=len(FSQ_LEVELS), **SHAPES, num_registers=NUM_REGISTERS)
    assert velocity(fresh, latents, CODES).eq(0).all()


def test_more_codes_than_registers_are_refused(tiny_decoder, latents):
    with pytest.raises(ValueError, match=r"`codes` has 12 tokens.*`num_registers`.*codes\[:, :n\]"):
        velocity(tiny_decoder, latents, CODES.repeat(1, 2, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saving_and_loading_changes_no_bit(tiny_decoder, latents, tmp_path, dtype):
    tiny_decoder.to(dtype).save_pretrained(tmp_path)
    loaded = FlexTokFlowDecoder.from_pretrained(tmp_path, torch_dtype=dtype)

    assert dict(loaded.config)["num_layers"] == 2
    assert loaded.state_dict().keys() == tiny_decoder.state_dict().keys()
    for name, tensor in tiny_decoder.state_dict().items():
        assert loaded.state_dict()[name].equal(tensor), name
    if dtype == torch.float32:
        assert velocity(loaded, latents, CODES).equal(velocity(tiny_decoder, latents, CODES))


def test_gradient_checkpointing_changes_nothing(latents):
    gradients = []
    for is_checkpointed in (False, True):
        decoder = make_decoder().train()
        if is_checkpointed:
            decoder.enable_gradient_checkpointing()
        velocity = decoder(latents, SIGMA, CODES, LENGTHS, torch.tensor([False, False, True])).velocity
        velocity.square().sum().backward()
        gradients.append([parameter.grad for parameter in decoder.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_an_unknown_attention_backend_is_refused(tiny_decoder):
    with pytest.raises(ValueError, match="backend"):
        tiny_decoder.set_attention_backend("natively")


def test_fp8_layerwise_casting_gives_nearly_the_same_latents():
    pipe, token_ids = make_pipeline(), torch.zeros(1, 2, dtype=torch.long)
    options = {"num_inference_steps": 2, "output_type": "latent", "latents": torch.zeros(1, 3, 16, 16)}
    expected = pipe.detokenize(token_ids, **options).images
    pipe.decoder.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert pipe.decoder.transformer_blocks[0].attention.to_q.weight.dtype == torch.float8_e4m3fn
    latents = pipe.detokenize(token_ids, **options).images
    assert 0 < (latents - expected).norm() < 0.2 * expected.norm()


def test_an_adapter_is_trainable_while_the_decoder_is_frozen(tiny_decoder, latents):
    peft = pytest.importorskip("peft")
    before = velocity(tiny_decoder, latents, CODES)
    tiny_decoder.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    trained = {name for name, parameter in tiny_decoder.named_parameters() if parameter.requires_grad}
    assert trained and all("lora" in name for name in trained)
    assert not torch.allclose(velocity(tiny_decoder, latents, CODES), before)
    tiny_decoder.disable_adapters()
    assert velocity(tiny_decoder, latents, CODES).equal(before)
