"""Compiled models: no graph breaks, the same results, and no compilation for every number of tokens.

Graphs are traced as for any backend but run eagerly, which is fast and needs no C++ compiler.
"""

import pytest
import torch
import torch.fx.experimental._config
from tiny_models import FSQ_LEVELS, NUM_REGISTERS, make_decoder, make_encoder, make_pipeline, make_prior
from torch._dynamo.utils import counters


OPTIONS = {"backend": "eager", "fullgraph": True}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def num_graphs():
    return counters["stats"]["unique_graphs"]


def decoder_inputs(batch_size, num_tokens):
    latents = torch.randn(batch_size, 3, 16, 16, generator=seeded(7))
    codes = torch.rand(batch_size, num_tokens, len(FSQ_LEVELS), generator=seeded(1)) * 2 - 1
    counts = torch.arange(batch_size) % num_tokens + 1
    return latents, torch.full((1,), 0.4), codes, counts, torch.arange(batch_size) == 0


@torch.no_grad()
def test_a_compiled_block_serves_all_blocks_lengths_and_batches():
    plain, decoder = make_decoder(), make_decoder()
    decoder.compile_repeated_blocks(dynamic=True, **OPTIONS)
    for batch_size in (2, 3, 5):
        for num_tokens in range(1, NUM_REGISTERS + 1):
            inputs = decoder_inputs(batch_size, num_tokens)
            torch.testing.assert_close(decoder(*inputs).velocity, plain(*inputs).velocity)
    assert num_graphs() == 2  # with and without dropped registers


@torch.no_grad()
def test_the_whole_decoder_compiles_for_all_lengths():
    plain, decoder = make_decoder(), make_decoder()
    decoder.compile(dynamic=True, **OPTIONS)
    for num_tokens in range(2, NUM_REGISTERS + 1):
        inputs = decoder_inputs(4, num_tokens)
        torch.testing.assert_close(decoder(*inputs).velocity, plain(*inputs).velocity)
    # with and without dropped registers; and a third where the first count happens to equal the size of the codes
    assert num_graphs() <= 3


@torch.no_grad()
def test_patches_of_all_latent_sizes_share_a_graph():
    """At full width, the crop of the position table was once a special case."""
    plain, embedding = (make_decoder().patch_embedding for _ in range(2))
    embedding.compile(dynamic=True, **OPTIONS)
    with torch.fx.experimental._config.patch(use_duck_shape=False):  # else equal sizes are a special case
        for height, width in [(16, 16), (8, 16), (12, 8), (16, 12)]:
            latents = torch.randn(2, 3, height, width, generator=seeded(7))
            torch.testing.assert_close(embedding(latents), plain(latents))
    assert num_graphs() == 1


@torch.no_grad()
def test_the_encoder_compiles_for_all_lengths():
    plain, encoder = make_encoder(), make_encoder()
    encoder.compute_features = torch.compile(encoder.compute_features, dynamic=True, **OPTIONS)
    latents = torch.randn(3, 3, 16, 16, generator=seeded(7))
    for num_tokens in range(2, NUM_REGISTERS + 1):
        features = encoder.compute_features(latents, num_tokens)
        torch.testing.assert_close(features, plain.compute_features(latents, num_tokens))
    assert num_graphs() == 1


def test_a_compiled_pipeline_gives_the_same_images():
    plain, pipe = (make_pipeline(prior=make_prior(text_hidden_size=None, num_classes=3)) for _ in range(2))
    pipe.enable_compile(**OPTIONS)
    for counts in ([1, 4, 6], [2, 3], [5, 5, 1, 2]):
        options = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 3.0}
        labels = list(range(len(counts)))[:3] + [0] * (len(counts) - 3)
        expected = plain(class_labels=labels, max_tokens=counts, generator=seeded(), **options)
        output = pipe(class_labels=labels, max_tokens=counts, generator=seeded(), **options)
        torch.testing.assert_close(output.images, expected.images, atol=1e-5, rtol=0)
        assert all(ids.equal(same) for ids, same in zip(output.token_ids, expected.token_ids, strict=True))
        token_ids = pipe.tokenize(expected.images, max_tokens=max(counts))
        assert token_ids.equal(plain.tokenize(expected.images, max_tokens=max(counts)))
    # decoder blocks with and without dropped registers, each twice where a group has a single row; encoder blocks in
    # the middle and at the end
    assert num_graphs() <= 6
