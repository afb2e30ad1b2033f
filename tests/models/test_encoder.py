"""The encoder: registers never attend to later ones."""

import copy

import pytest
import torch
from tiny_models import FSQ_LEVELS, NUM_REGISTERS, SHAPES, make_encoder
from transformers import AttentionInterface, AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from flextok_hf import FlexTokEncoder, FlexTokEncoderConfig


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def latents():
    return torch.randn(3, 3, 16, 16, generator=seeded(7))


NUM_PATCHES = SHAPES["grid_size"] ** 2


@pytest.mark.parametrize("length", range(1, NUM_REGISTERS + 1))
@torch.no_grad()
def test_stopping_early_gives_the_same_ids(tiny_encoder, latents, length):
    full, prefix = tiny_encoder(latents), tiny_encoder(latents, num_tokens=length)
    assert prefix.token_ids.equal(full.token_ids[:, :length])
    assert prefix.codes.equal(full.codes[:, :length])
    torch.testing.assert_close(prefix.features, full.features[:, :length], atol=1e-5, rtol=0)


@pytest.mark.parametrize("first_changed", range(1, NUM_REGISTERS))
@torch.no_grad()
def test_a_register_does_not_depend_on_later_ones(tiny_encoder, latents, first_changed):
    before = tiny_encoder.compute_features(latents)
    tiny_encoder.register_tokens[first_changed:].neg_()
    after = tiny_encoder.compute_features(latents)

    assert after[:, :first_changed].equal(before[:, :first_changed])
    assert not torch.isclose(after[:, first_changed:], before[:, first_changed:]).all(dim=-1).any()


@torch.no_grad()
def test_every_register_depends_on_every_patch(tiny_encoder, latents):
    before = tiny_encoder.compute_features(latents[:1])
    changed = latents[:1].repeat(NUM_PATCHES, 1, 1, 1)
    for patch in range(NUM_PATCHES):
        row, column = 4 * (patch // 4), 4 * (patch % 4)
        changed[patch, :, row : row + 4, column : column + 4] += 1.0
    after = tiny_encoder.compute_features(changed)
    assert (after - before).abs().amax(dim=-1).gt(1e-6).all()


@pytest.mark.parametrize("num_tokens", [1, 4, NUM_REGISTERS])
@torch.no_grad()
def test_a_batch_as_long_as_its_sequence_matches_single_images(tiny_encoder, num_tokens):
    """The mask of such a batch has the shape (batch, length) and must not be taken for a padding mask."""
    batch_size = NUM_PATCHES + num_tokens
    latents = torch.randn(batch_size, 3, 16, 16, generator=seeded())

    together = tiny_encoder(latents, num_tokens)
    alone = [tiny_encoder(latents[i : i + 1], num_tokens) for i in range(batch_size)]

    assert together.token_ids.equal(torch.cat([output.token_ids for output in alone]))
    torch.testing.assert_close(together.features, torch.cat([output.features for output in alone]), atol=1e-5, rtol=0)


@torch.no_grad()
def test_outputs_are_consistent(tiny_encoder, latents):
    output = tiny_encoder(latents)
    assert output.features.shape == output.codes.shape == (3, NUM_REGISTERS, len(FSQ_LEVELS))
    assert output.token_ids.dtype == torch.int64
    assert tiny_encoder.quantizer.ids_to_codes(output.token_ids).equal(output.codes)
    assert len(output.token_ids.unique()) > NUM_REGISTERS  # not collapsed, so that equal ids mean something


LAYOUTS = {"registers": {}, "grid": {"token_layout": "grid", "num_registers": NUM_PATCHES}}


@pytest.mark.parametrize("wanted", [{}, {"output_hidden_states": True}, {"output_attentions": True}])
@torch.no_grad()
def test_return_dict_false_gives_a_tuple(tiny_encoder, latents, wanted):
    tiny_encoder.set_attn_implementation("eager")
    as_tuple, output = tiny_encoder(latents, return_dict=False, **wanted), tiny_encoder(latents, **wanted)
    assert as_tuple[2].equal(output.token_ids) and len(as_tuple) == len(output.to_tuple()) == 3 + len(wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_hidden_states_lead_from_the_patches_to_the_features(latents, layout):
    encoder = make_encoder(**LAYOUTS[layout])
    output, plain = encoder(latents, num_tokens=4, output_hidden_states=True), encoder(latents, num_tokens=4)
    first, second, last = output.hidden_states
    num_states = NUM_PATCHES + (4 if layout == "registers" else 0)
    assert first[:, :NUM_PATCHES].equal(encoder.patch_embedding(latents))
    assert first.shape == second.shape == (3, num_states, SHAPES["hidden_size"])
    assert encoder.feature_proj(last).equal(output.features) and output.features.equal(plain.features)
    assert plain.hidden_states is None and plain.attentions is None


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_eager_attention_gives_the_same_features_and_its_weights(latents, layout):
    encoder = make_encoder(**LAYOUTS[layout])
    expected = encoder(latents).features
    encoder.set_attn_implementation("eager")
    output = encoder(latents, output_attentions=True)
    torch.testing.assert_close(output.features, expected, atol=1e-5, rtol=0)
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
    if layout == "registers":
        whole, of_registers = output.attentions
        assert whole.shape[-2:] == (NUM_PATCHES + NUM_REGISTERS,) * 2
        assert of_registers.shape[-2:] == (NUM_REGISTERS, NUM_PATCHES + NUM_REGISTERS)
        assert not whole[..., :NUM_PATCHES, NUM_PATCHES:].any()  # patches see no registers
        assert not of_registers[..., NUM_PATCHES:].triu(1).any()  # registers see no later ones


@pytest.mark.parametrize("name", ["config", "argument"])
def test_gradients_reach_kept_states_and_weights(latents, name):
    wanted = {"output_hidden_states": True, "output_attentions": True}
    encoder = make_encoder(**(wanted if name == "config" else {}))
    encoder.set_attn_implementation("eager")
    output = encoder(latents, **(wanted if name == "argument" else {}))
    kept = [output.hidden_states[0], output.attentions[0]]
    for states in kept:
        states.retain_grad()
    output[0].flatten()[0].backward()
    assert all(states.grad.any() for states in kept)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_attention_weights_need_no_switch(latents, layout):
    encoder = make_encoder(**LAYOUTS[layout])
    attentions = encoder(latents, output_attentions=True).attentions
    encoder.set_attn_implementation("eager")
    for weights, expected in zip(attentions, encoder(latents, output_attentions=True).attentions, strict=True):
        torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_registered_attention_function_is_called(latents, layout):
    encoder, calls = make_encoder(**LAYOUTS[layout]), []

    def counted(*args, **kwargs):
        calls.append(args)
        return sdpa_attention_forward(*args, **kwargs)

    expected = encoder(latents).features
    AttentionInterface.register("counted", counted)
    encoder.set_attn_implementation("counted")
    torch.testing.assert_close(encoder(latents).features, expected, atol=1e-5, rtol=0)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "paged|eager", "unknown"])
def test_other_attention_implementations_are_refused_by_name(tiny_encoder, name):
    with pytest.raises(ValueError, match="FlexTokEncoder does not support|is not supported"):
        tiny_encoder.set_attn_implementation(name)
    assert tiny_encoder.config._attn_implementation == "sdpa"


def test_the_patch_embedding_is_the_input_embedding(tiny_encoder, latents):
    assert tiny_encoder.get_input_embeddings() is tiny_encoder.patch_embedding
    features = tiny_encoder(latents).features
    other = copy.deepcopy(tiny_encoder.patch_embedding)
    other.proj.weight.data.neg_()
    tiny_encoder.set_input_embeddings(other)
    assert tiny_encoder.patch_embedding is other and not tiny_encoder(latents).features.equal(features)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dimension", range(len(FSQ_LEVELS)))
def test_features_that_are_not_finite_have_no_id(tiny_encoder, value, dimension):
    features = torch.zeros(1, 2, len(FSQ_LEVELS))
    features[0, 1, dimension] = value
    token_ids = tiny_encoder.quantizer.codes_to_ids(tiny_encoder.quantizer(features))
    assert token_ids[0, 0] >= 0 and token_ids[0, 1] == -1


@pytest.mark.parametrize("num_tokens", [0, -1, 1.5, True])
def test_a_number_of_tokens_below_one_is_refused(tiny_encoder, latents, num_tokens):
    with pytest.raises(ValueError, match="`num_tokens` must be a whole number of 1 or more"):
        tiny_encoder(latents, num_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_saving_and_loading_changes_no_bit(tiny_encoder, latents, tmp_path, dtype):
    tiny_encoder.to(dtype).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)

    assert isinstance(loaded, FlexTokEncoder) and loaded.dtype == dtype and not loaded.training
    assert loaded.config.to_dict() | {"_name_or_path": ""} == tiny_encoder.config.to_dict()
    for name, tensor in tiny_encoder.state_dict().items():
        assert loaded.state_dict()[name].equal(tensor), name
    assert loaded(latents.to(dtype)).features.equal(tiny_encoder(latents.to(dtype)).features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_an_encoder_loaded_in_half_precision_computes_in_it(tiny_encoder, latents, tmp_path, dtype):
    """Unlike weights, Transformers loads buffers in the dtype that the class creates them with."""
    tiny_encoder.save_pretrained(tmp_path)
    features = AutoModel.from_pretrained(tmp_path, dtype=dtype)(latents.to(dtype)).features
    assert features.dtype == dtype
    torch.testing.assert_close(features.float(), tiny_encoder(latents).features, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gradient_checkpointing_changes_nothing(latents, implementation):
    gradients = []
    for is_checkpointed in (False, True):
        encoder = make_encoder().train()
        encoder.set_attn_implementation(implementation)
        if is_checkpointed:
            encoder.gradient_checkpointing_enable()
        encoder(latents).codes.square().sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"hidden_size": 30}, "`hidden_size`.*multiple"),
        ({"num_registers": 0}, "`num_registers` must be 1 or more"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be 1 or more"),
        ({"fsq_levels": [8, 1]}, "`fsq_levels`"),
        ({"patch_size": "two"}, "patch_size"),
    ],
)
def test_an_invalid_configuration_is_refused(values, message):
    with pytest.raises(Exception, match=message):
        FlexTokEncoderConfig(**{"num_hidden_layers": 1, **SHAPES, **values})
