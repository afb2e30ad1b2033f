"""Positions for any shape, and models that know the shape."""

import pytest
import torch
from tiny_models import FSQ_LEVELS, NUM_REGISTERS, make_decoder, make_encoder
from torch._dynamo.utils import counters

from flextok_hf.models.configuration_encoder import FlexTokEncoderConfig
from flextok_hf.models.modeling_decoder import FlexTokFlowDecoder
from flextok_hf.models.modeling_encoder import FlexTokEncoder
from flextok_hf.models.patches import PatchEmbedding, sincos_position_table, stretched_positions


STRETCH = {"positions": "stretch"}
CONDITIONED = {"positions": "stretch", "shape_conditioning": True}
SHAPES = [(4, 4), (2, 2), (2, 8), (8, 2), (3, 5), (6, 6), (16, 4), (1, 3)]  # in patches
CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def latents_of(rows, columns, batch_size=2):
    return torch.randn(batch_size, 3, 4 * rows, 4 * columns, generator=seeded(7))


def decoder_inputs(rows, columns, num_tokens=NUM_REGISTERS, batch_size=2):
    codes = torch.rand(batch_size, num_tokens, len(FSQ_LEVELS), generator=seeded(1)) * 2 - 1
    return latents_of(rows, columns, batch_size), torch.full((batch_size,), 0.4), codes


@pytest.mark.parametrize("grid_size, hidden_size", [(1, 4), (4, 32), (7, 64), (14, 768), (16, 1152), (32, 256)])
def test_stretched_positions_of_the_trained_square_are_its_table(grid_size, hidden_size):
    table = sincos_position_table(hidden_size, grid_size)
    stretched = stretched_positions(grid_size, grid_size, grid_size, hidden_size, CPU)
    assert stretched.equal(table.flatten(0, 1))


@pytest.mark.parametrize("rows, columns", SHAPES)
def test_stretched_positions_are_centered_squares_of_the_trained_area(rows, columns):
    grid_size, hidden_size = 4, 32
    positions = stretched_positions(rows, columns, grid_size, hidden_size, CPU).unflatten(0, (rows, columns))
    step = grid_size / (rows * columns) ** 0.5
    for row in range(rows):
        expected = torch.tensor((row + 0.5) * step - 0.5, dtype=torch.float64)
        assert positions[row, 0, 0] == expected.sin().float()  # the first frequency is 1
    middle = torch.tensor((columns * step - 1) / 2, dtype=torch.float64)
    turned = stretched_positions(columns, rows, grid_size, hidden_size, CPU).unflatten(0, (columns, rows))
    assert turned.transpose(0, 1).roll(hidden_size // 2, -1).equal(positions)
    if columns % 2:
        assert positions[0, columns // 2, hidden_size // 2] == middle.sin().float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_shapes_get_positions_in_the_precision_of_the_table(dtype):
    embedding = PatchEmbedding(3, 2, 4, 16, "stretch").to(dtype)
    torch.nn.init.zeros_(embedding.proj.weight)
    torch.nn.init.zeros_(embedding.proj.bias)
    expected = stretched_positions(2, 6, 4, 16, CPU).to(dtype)
    assert embedding(torch.zeros(1, 3, 4, 12, dtype=dtype))[0].equal(expected)


@pytest.mark.parametrize("height, width", [(0, 8), (8, 0), (3, 8), (8, 7), (2, 10), (10, 2), (36, 32), (4, 20)])
def test_latents_of_wrong_shapes_are_refused_with_what_is_allowed(height, width):
    allowed = "multiple of the patch size 2, with at most 256 patches and no side more than 4 times the other"
    with pytest.raises(ValueError, match=f"`latents` of {height} x {width} .*{allowed}"):
        PatchEmbedding(3, 2, 4, 16, "stretch")(torch.zeros(1, 3, height, width))


@torch.no_grad()
def test_squares_of_the_trained_side_do_not_depend_on_the_settings():
    latents, (noisy, sigma, codes) = latents_of(4, 4), decoder_inputs(4, 4)
    plain = make_encoder()(latents), make_decoder()(noisy, sigma, codes)
    for settings in (STRETCH, CONDITIONED):
        encoder, decoder = make_encoder(**settings), make_decoder(**settings)
        encoder.load_state_dict(make_encoder().state_dict(), strict=False)
        decoder.load_state_dict(make_decoder().state_dict(), strict=False)
        if "shape_conditioning" in settings:
            torch.nn.init.normal_(encoder.shape_proj.weight)
            torch.nn.init.normal_(decoder.shape_proj.weight)
        assert encoder(latents).features.equal(plain[0].features)
        assert decoder(noisy, sigma, codes).velocity.equal(plain[1].velocity)


@torch.no_grad()
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_new_models_ignore_the_shape_until_they_are_trained(rows, columns):
    config = {"in_channels": 3, "patch_size": 4, "grid_size": 4, "hidden_size": 32, "head_dim": 16}
    latents, (noisy, sigma, codes) = latents_of(rows, columns), decoder_inputs(rows, columns)
    features, modulations = [], []
    for settings in (STRETCH, CONDITIONED):
        encoder = make_encoder(**settings)
        assert not settings.get("shape_conditioning") or not encoder.shape_proj.weight.any()
        decoder = FlexTokFlowDecoder(**config, num_layers=1, num_registers=6, code_dim=2, **settings).eval()
        reference = FlexTokFlowDecoder(**config, num_layers=1, num_registers=6, code_dim=2, **STRETCH).eval()
        torch.nn.init.normal_(reference.transformer_blocks[0].modulation.weight, generator=seeded())
        torch.nn.init.normal_(reference.velocity_proj.weight, generator=seeded(1))
        if not modulations:
            state = reference.state_dict()
        encoder.load_state_dict(make_encoder(**STRETCH).state_dict(), strict=False)
        decoder.load_state_dict(state, strict=False)
        features.append(encoder(latents).features)
        modulations.append(decoder(noisy, sigma, codes).velocity)
    assert features[0].equal(features[1]) and modulations[0].equal(modulations[1])


@torch.no_grad()
def test_conditioned_models_tell_shapes_apart():
    for model in (make_encoder(**CONDITIONED), make_decoder(**CONDITIONED)):
        torch.nn.init.normal_(model.shape_proj.weight, generator=seeded())
        trained = lambda rows, columns: (  # noqa: E731
            model(latents_of(rows, columns)).features
            if isinstance(model, FlexTokEncoder)
            else model(*decoder_inputs(rows, columns)).velocity
        )
        with_shape = trained(2, 8)
        torch.nn.init.zeros_(model.shape_proj.weight)
        assert (with_shape - trained(2, 8)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("settings", [STRETCH, CONDITIONED])
def test_the_first_tokens_of_every_shape_do_not_depend_on_the_rest(rows, columns, settings):
    encoder, latents = make_encoder(**settings), latents_of(rows, columns)
    everything = encoder(latents).token_ids
    for count in range(1, NUM_REGISTERS + 1):
        assert encoder(latents, count).token_ids.equal(everything[:, :count])


@torch.no_grad()
def test_modulation_computed_ahead_knows_the_shape():
    decoder = make_decoder(**CONDITIONED)
    for rows, columns in SHAPES:
        noisy, sigma, codes = decoder_inputs(rows, columns)
        ahead = decoder.compute_modulation(sigma, noisy.shape)
        assert decoder(noisy, None, codes, modulation=ahead).velocity.equal(decoder(noisy, sigma, codes).velocity)
    assert decoder.compute_modulation(sigma).equal(decoder.compute_modulation(sigma, (16, 16)))


def test_every_parameter_of_a_conditioned_model_gets_a_gradient():
    encoder, decoder = make_encoder(**CONDITIONED), make_decoder(**CONDITIONED)
    codes = encoder(latents_of(2, 8)).codes
    noisy, sigma, _ = decoder_inputs(2, 8)
    unconditional = torch.tensor([False, True])
    decoder(noisy, sigma, codes, torch.tensor([3, 6]), unconditional).velocity.square().sum().backward()
    for model in (encoder, decoder):
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing
        assert model.shape_proj.weight.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("settings", [STRETCH, CONDITIONED])
def test_models_for_all_shapes_survive_saving(settings, tmp_path):
    for model, kind in ((make_encoder(**settings), FlexTokEncoder), (make_decoder(**settings), FlexTokFlowDecoder)):
        model.save_pretrained(tmp_path / kind.__name__)
        again = kind.from_pretrained(tmp_path / kind.__name__).eval()
        assert again.config.positions == "stretch"
        assert all(value.equal(again.state_dict()[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_compiled_models_share_graphs_between_shapes():
    plain_encoder, encoder = make_encoder(**CONDITIONED), make_encoder(**CONDITIONED)
    plain, decoder = make_decoder(**CONDITIONED), make_decoder(**CONDITIONED)
    options = {"backend": "eager", "fullgraph": True, "dynamic": True}
    torch._dynamo.reset()
    counters.clear()
    decoder.compile(**options)
    encoder.compute_features = torch.compile(encoder.compute_features, **options)
    for rows, columns in [(2, 8), (3, 5), (6, 7), (16, 4), (4, 4)]:
        inputs = decoder_inputs(rows, columns, num_tokens=5)
        torch.testing.assert_close(decoder(*inputs).velocity, plain(*inputs).velocity)
        latents = latents_of(rows, columns)
        torch.testing.assert_close(encoder.compute_features(latents, 5), plain_encoder.compute_features(latents, 5))
    assert counters["stats"]["unique_graphs"] <= 6


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"shape_conditioning": 1}, "shape_conditioning"),
        ({"positions": None}, "positions"),
        ({"positions": "free"}, "`positions` must be one of crop, stretch, got 'free'"),
        ({"shape_conditioning": True}, '`shape_conditioning` is True, but `positions` is "crop"'),
        ({"positions": "stretch", "token_layout": "grid", "num_registers": 16}, '"stretch" needs `token_layout`'),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_decoder(**settings)
    with pytest.raises(Exception, match=message):  # huggingface_hub's error for strict configurations
        FlexTokEncoderConfig(grid_size=4, patch_size=4, hidden_size=32, head_dim=16, **settings)
