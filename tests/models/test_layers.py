"""Attention, patches, positions and time embedding."""

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

from flextok_hf.models.layers import (
    CPU_BACKENDS,
    MASK_BACKENDS,
    Attention,
    GatedMLP,
    TimestepEmbedder,
    attend,
    attend_with_matmuls,
    check_backend,
    layer_norm,
)
from flextok_hf.models.patches import PatchEmbedding, patchify, sincos_position_table, unpatchify


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def test_attention_is_softmax_of_scaled_logits():
    query, key, value = random(2, 5, 3, 4), random(2, 6, 3, 4, seed=1), random(2, 6, 3, 4, seed=2)
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * 0.7
    expected = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value)
    torch.testing.assert_close(attend(query, key, value, scale=0.7), expected)


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_a_square_mask_works_for_any_batch_size(batch_size):
    """With as many samples as positions, the mask was once taken for a padding mask of (batch, length)."""
    query, key, value = (random(batch_size, 5, 2, 4, seed=seed) for seed in range(3))
    causal = torch.ones(5, 5, dtype=torch.bool).tril()

    context = attend(query, key, value, causal)

    torch.testing.assert_close(context, attend(query, key, value, is_causal=True))
    torch.testing.assert_close(context[:, 0], value[:, 0])


MASKS = {
    "none": None,
    "bias per key": random(3, 1, 1, 6, seed=4),
    "boolean": torch.ones(1, 1, 5, 6, dtype=torch.bool).tril(),
    "logits of each head": random(3, 2, 5, 6, seed=5),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@torch.no_grad()
def test_attention_with_matmuls_equals_attention(mask):
    query, key, value = random(3, 5, 2, 4), random(3, 6, 2, 4, seed=1), random(3, 6, 2, 4, seed=2)
    expected = attend(query, key, value, mask, scale=0.7)
    torch.testing.assert_close(attend_with_matmuls(query, key, value, mask, scale=0.7), expected)


@pytest.mark.parametrize("name", ["flash", "flash_varlen", "sage_varlen", "_native_flash", "aiter_fa2_hub"])
def test_a_mask_is_refused_where_the_backend_would_ignore_it(name):
    """Of a causal mask, variable-length kernels see that each key is visible to some query."""
    with pytest.raises(ValueError, match=f"'{name}' does not apply the attention mask"):
        check_backend(AttentionBackendName(name), "cuda", has_mask=True)
    check_backend(AttentionBackendName(name), "cuda", has_mask=False)


@pytest.mark.parametrize("name", sorted({*CPU_BACKENDS, *MASK_BACKENDS} - {"_native_flash"}))
def test_backends_that_take_masks_are_not_refused(name):
    check_backend(AttentionBackendName(name), "cuda", has_mask=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_backend_of_a_with_block_is_used(dtype):
    query, key, value = (random(2, 100, 3, 16, seed=seed).to(dtype) for seed in range(3))
    with attention_backend("_native_efficient"), pytest.raises(ValueError, match="_native_efficient"):
        attend(query, key, value)


@torch.no_grad()
def test_bfloat16_attention_is_close_to_float32_whatever_the_size():
    """Large and small inputs take different code paths."""
    for length in (8, 100):
        query, key, value = (random(2, length, 3, 16, seed=seed).bfloat16() for seed in range(3))
        expected = attend(query.float(), key.float(), value.float())
        torch.testing.assert_close(attend(query, key, value).float(), expected, atol=0.02, rtol=0)


@torch.no_grad()
def test_a_bias_per_key_is_accurate_in_bfloat16():
    query, key, value = (random(2, 100, 3, 16, seed=seed).bfloat16() for seed in range(3))
    bias = random(2, 100, seed=3)
    expected = attend(query.float(), key.float(), value.float(), key_bias=bias)
    torch.testing.assert_close(attend(query, key, value, key_bias=bias).float(), expected, atol=0.03, rtol=0)


def test_a_gated_mlp_without_gradients_gives_the_same_and_preserves_its_input():
    """It then overwrites its own states."""
    mlp = GatedMLP(24)
    hidden_states = random(2, 5, 24)
    expected = mlp(hidden_states)
    with torch.no_grad():
        assert mlp(hidden_states).equal(expected)
        seen = []
        mlp.gate_proj.register_forward_hook(lambda layer, inputs, output: seen.append(output))
        mlp(hidden_states)
    assert hidden_states.equal(random(2, 5, 24))
    assert seen[0].equal(mlp.gate_proj(hidden_states))


def test_logits_are_scaled_by_eight_over_the_head_size():
    assert Attention(64, 64).scale == 64**-0.5
    assert Attention(64, 32).scale == 0.25


def test_layer_norm_computes_in_float32():
    hidden_states = (random(2, 3, 64) * 100).bfloat16()
    normalized = layer_norm(hidden_states)
    assert normalized.dtype == torch.bfloat16
    assert normalized.equal(layer_norm(hidden_states.float()).bfloat16())
    scale, shift = random(64, seed=1).bfloat16(), random(64, seed=2).bfloat16()
    expected = layer_norm(hidden_states.float(), scale.float(), shift.float()).bfloat16()
    assert layer_norm(hidden_states, scale, shift).equal(expected)


def test_patches_are_row_major_with_channels_last():
    latents = torch.arange(2 * 4 * 4).view(1, 2, 4, 4)
    patches = patchify(latents, 2)
    assert patches[0, 1].tolist() == [2, 18, 3, 19, 6, 22, 7, 23]  # first row, second column


@pytest.mark.parametrize("height, width", [(4, 4), (4, 8), (12, 4)])
def test_unpatchify_inverts_patchify(height, width):
    latents = random(2, 3, height, width)
    assert unpatchify(patchify(latents, 2), 2, height, width).equal(latents)


def test_positions_hold_rows_before_columns():
    table = sincos_position_table(16, 5)
    assert table[3, :, :8].eq(table[3, 0, :8]).all()
    assert table[:, 3, 8:].eq(table[0, 3, 8:]).all()
    torch.testing.assert_close(table[2, 0, 0], torch.tensor(2.0).sin())


def test_smaller_images_use_the_start_of_the_position_table():
    embedding = PatchEmbedding(3, 2, 4, 16)
    torch.nn.init.zeros_(embedding.proj.weight)
    torch.nn.init.zeros_(embedding.proj.bias)
    assert embedding(torch.zeros(1, 3, 4, 6))[0].equal(embedding.positions[:2, :3].flatten(0, 1))


@pytest.mark.parametrize("height, width", [(3, 4), (4, 3), (10, 4), (4, 10)])
def test_latents_that_do_not_fit_the_grid_are_refused(height, width):
    with pytest.raises(ValueError, match=f"`latents` of {height} x {width} .* patch size 2 and at most 8"):
        PatchEmbedding(3, 2, 4, 16)(torch.zeros(1, 3, height, width))


def test_max_timestep_only_rescales_the_noise_levels():
    one, thousand = TimestepEmbedder(16, 32, 1.0), TimestepEmbedder(16, 32, 1000.0)
    thousand.load_state_dict(one.state_dict())
    sigma = torch.tensor([0.0, 0.25, 0.9])
    torch.testing.assert_close(thousand(sigma * 1000), one(sigma), atol=1e-4, rtol=0)
