"""Priors that are told the shape of the image: a pair of numbers beside the prompt."""

import math

import pytest
import torch
from test_prior import KINDS, NUM_TOKENS, VOCABULARY, make_condition, make_negative, make_prior, rows, seeded
from transformers import DynamicCache, StaticCache

from flextok_hf.models.modeling_prior import FlexTokPriorForCausalLM
from flextok_hf.models.patches import features_of_sizes, shape_features
from flextok_hf.models.prior_cache import CACHE_NAME


SIZES = torch.tensor([[16, 16], [8, 32], [32, 8]])  # height, width
FEATURES = features_of_sizes(SIZES, 16)
TOLD = {"shape_conditioning": True}


def make_told(kind, is_trained=True):
    """Return a prior that is told the shape, with the other weights of `make_prior(kind)`."""
    prior = make_prior(kind, **TOLD)
    prior.load_state_dict(make_prior(kind).state_dict(), strict=False)
    if is_trained:
        torch.nn.init.normal_(prior.shape_proj.weight, generator=torch.Generator().manual_seed(5))
    return prior


def make_inputs(prior):
    ids = torch.randint(VOCABULARY, (3, NUM_TOKENS), generator=torch.Generator().manual_seed(3))
    return {"input_ids": prior.prepend_bos(ids), **make_condition(prior.config)}


def start(num_rows=3):
    return torch.full((num_rows, 1), VOCABULARY)


def test_the_numbers_are_those_of_the_decoder():
    config = type("Config", (), {"grid_size": 4, "patch_size": 4})
    for size, features in zip(SIZES.tolist(), FEATURES, strict=True):
        torch.testing.assert_close(features, shape_features(size, config, torch.zeros(1))[0])
        expected = [math.log(size[0] * size[1] / 256), math.log(size[0] / size[1])]
        torch.testing.assert_close(features, torch.tensor(expected))
    assert not FEATURES[0].any()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_prior_does_not_depend_on_the_shape(kind):
    plain, told = make_prior(kind), make_told(kind, is_trained=False)
    inputs = make_inputs(plain)
    expected = plain(**inputs).logits
    assert told(**inputs).logits.equal(expected)
    assert told(**inputs, shape_features=FEATURES).logits.equal(expected)
    assert not make_prior(kind, **TOLD).shape_proj.weight.any()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_prior_depends_on_other_shapes_than_the_square(kind):
    plain, told = make_prior(kind), make_told(kind)
    inputs = make_inputs(plain)
    expected, logits = plain(**inputs).logits, told(**inputs, shape_features=FEATURES).logits
    assert logits[0].equal(expected[0]) and told(**inputs).logits.equal(expected)
    assert (logits[1:, :-1] - expected[1:, :-1]).abs().amax(-1).min() > 1e-4  # at every position


@torch.no_grad()
@pytest.mark.parametrize("make_cache", [DynamicCache, StaticCache])
@pytest.mark.parametrize("kind", ["text", "class", "unconditional"])
def test_cached_logits_know_the_shape(kind, make_cache):
    prior = make_told(kind)
    inputs = {**make_inputs(prior), "shape_features": FEATURES}
    expected = prior(**inputs).logits
    options = {"max_cache_len": NUM_TOKENS} if make_cache is StaticCache else {}
    cache, ids, logits = make_cache(config=prior.config, **options), inputs.pop("input_ids"), []
    for first, last in [(0, 3), (3, 4), (4, NUM_TOKENS)]:
        output = prior(ids[:, first:last], **inputs, use_cache=True, **{CACHE_NAME: cache})
        cache = output[CACHE_NAME]
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected[:, :-1])


@pytest.mark.parametrize("kind", KINDS)
def test_generated_rows_of_several_shapes_are_those_of_single_calls(kind):
    prior = make_told(kind)
    condition = {**make_condition(prior.config), "shape_features": FEATURES}
    options = {"do_sample": True, "guidance_scale": 1.0 if kind == "unconditional" else 2.0}
    options |= make_negative(prior.config)
    together = prior.generate(start(), **condition, **options, generator=seeded(0, 1, 2))
    for index in range(3):
        one = slice(index, index + 1)
        alone = prior.generate(start(1), **rows(condition, one), **options, generator=seeded(index))
        assert alone.equal(together[one])
    condition.pop("shape_features")
    squares = prior.generate(start(), **condition, **options, generator=seeded(0, 1, 2))
    assert squares[0].equal(together[0]) and not squares.equal(together)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["text", "class"])
def test_guidance_keeps_the_shape(kind):
    prior = make_told(kind)
    condition = make_condition(prior.config)
    output = prior.generate(
        start(), **condition, **make_negative(prior.config), shape_features=FEATURES, guidance_scale=2.0,
        max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )  # fmt: skip
    if kind == "class":
        without = {"class_labels": torch.full((3,), -1)}
    else:
        negative = {name.removeprefix("negative_"): value for name, value in make_negative(prior.config).items()}
        without = {name: value.expand(3, *value.shape[1:]) for name, value in negative.items()}
    logits = [prior(start(), **each, shape_features=FEATURES).logits[:, -1] for each in (condition, without)]
    torch.testing.assert_close(output.logits[0], logits[1] + 2.0 * (logits[0] - logits[1]))


def test_beams_know_the_shape():
    prior = make_told("class")
    condition = {**make_condition(prior.config), "shape_features": FEATURES}
    options = {"num_beams": 2, "max_new_tokens": 4}
    beams = prior.generate(start(), **condition, **options)
    alone = [prior.generate(start(1), **rows(condition, slice(row, row + 1)), **options) for row in range(3)]
    assert beams.equal(torch.cat(alone))


def test_every_parameter_gets_a_gradient():
    prior = make_told("text", is_trained=False)
    inputs = make_inputs(prior)
    prior(**inputs, labels=inputs["input_ids"], shape_features=FEATURES).loss.backward()
    assert all(parameter.grad is not None for parameter in prior.parameters())
    assert prior.shape_proj.weight.grad.any()


@torch.no_grad()
def test_a_prior_that_is_told_the_shape_survives_saving(tmp_path):
    prior = make_told("class")
    prior.save_pretrained(tmp_path)
    again = FlexTokPriorForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.shape_conditioning is True
    inputs = {**make_inputs(prior), "shape_features": FEATURES}
    assert again(**inputs).logits.equal(prior(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_the_numbers_as_they_are(dtype):
    prior = make_told("class").to(dtype)
    assert prior(**make_inputs(prior), shape_features=FEATURES).logits.isfinite().all()


@pytest.mark.parametrize(
    "kind, features, error, message",
    [
        ("plain", FEATURES, ValueError, "`shape_features` was given, but this model is not told the shape"),
        ("told", FEATURES[:2], ValueError, r"`shape_features` must be floats of shape \(3, 2\)"),
        ("told", FEATURES[:, :1], ValueError, r"`shape_features` must be floats of shape \(3, 2\)"),
        ("told", SIZES, ValueError, "`shape_features` must be floats .* got torch.int64"),
        ("told", SIZES.float() * 16, ValueError, "`shape_features` must hold values from -20 to 20"),
        ("told", FEATURES * math.nan, ValueError, "`shape_features` must hold values from -20 to 20"),
        ("told", FEATURES.tolist(), TypeError, "`shape_features` must be a tensor, got list"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_by_name(kind, features, error, message):
    prior = make_prior("class", shape_conditioning=kind == "told")
    for call in (prior, prior.generate):
        with pytest.raises(error, match=message):
            call(start(), **make_condition(prior.config), shape_features=features)
