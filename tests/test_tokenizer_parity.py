"""Encoder, quantizer, decoder, guidance and sampling give the numbers of the official code (float32, CPU)."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from official_weights import load_official_tokenizer
from safetensors.torch import load_file

from flextok_hf import FlexTokPipeline
from flextok_hf.flow import sample_sigma
from flextok_hf.guidance import Guidance
from flextok_hf.latents import decode_latents, encode_latents


FOLDER = Path(__file__).parent / "fixtures" / "tokenizer" / "pub_a_base"
ATOL = 3e-5
META = json.loads((FOLDER / "meta.json").read_text())
GOLDENS = load_file(FOLDER / "goldens.safetensors")
KEEP_MIXED = torch.tensor(META["keep_mixed"])
VELOCITIES = [
    (sigma, kind) for sigma in ("1.0", "0.75", "0.3", "0.05") for kind in ("full", "keep_mixed", "keep_2", "uncond")
]


@pytest.fixture(scope="module")
def pipe():
    encoder, decoder, vae = load_official_tokenizer(FOLDER)
    pipe = FlexTokPipeline(encoder, decoder, FlowMatchEulerDiscreteScheduler(), vae=vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_golden(actual, name, index=slice(None)):
    torch.testing.assert_close(actual, GOLDENS[name][index], atol=ATOL, rtol=0)


def record_outputs(modules):
    """Keep the output of each module while a model runs."""
    outputs = {}
    handles = [
        module.register_forward_hook(lambda *args, name=name: outputs.__setitem__(name, args[-1]))
        for name, module in modules.items()
    ]
    return outputs, handles


@torch.no_grad()
def test_latents(pipe):
    assert_golden(encode_latents(pipe.vae, GOLDENS["images"]), "latents")


@torch.no_grad()
def test_encoder_stages(pipe):
    blocks = {
        "first": pipe.encoder.blocks[0],
        "last": pipe.encoder.blocks[-1],
        "patches": pipe.encoder.patch_embedding,
    }
    outputs, handles = record_outputs(blocks)
    features = pipe.encoder.compute_features(GOLDENS["latents"])
    for handle in handles:
        handle.remove()
    assert_golden(outputs["patches"].unflatten(1, (4, 4)), "enc_patches_in")
    assert_golden(outputs["first"], "enc_block0_out")
    assert_golden(outputs["last"], "enc_trunk_out", (slice(None), slice(16, None)))  # the registers
    assert_golden(features, "enc_registers")


@torch.no_grad()
def test_codes_and_ids_are_exact(pipe):
    output = pipe.encoder(GOLDENS["latents"])
    assert torch.equal(output.token_ids, GOLDENS["token_ids"])
    assert torch.equal(output.codes, GOLDENS["codes"])


@torch.no_grad()
def test_pictures_to_ids_through_the_pipeline(pipe):
    token_ids = pipe.tokenize(list(GOLDENS["images"].clamp(-1, 1) / 2 + 0.5))
    assert torch.equal(token_ids, GOLDENS["token_ids"])


def test_quantizer(pipe):
    quantizer = pipe.encoder.quantizer
    assert_golden(quantizer.bound(GOLDENS["fsq.z"]), "fsq.bounded")
    assert_golden(quantizer.bound(GOLDENS["enc_registers"]), "fsq_bounded")
    assert_golden(quantizer(GOLDENS["fsq.z"]), "fsq.codes")
    assert torch.equal(quantizer.codes_to_ids(GOLDENS["fsq.codes"]), GOLDENS["fsq.ids"])
    assert_golden(quantizer.ids_to_codes(GOLDENS["fsq.lookup_ids"]), "fsq.lookup_codes")
    assert_golden(quantizer.ids_to_codes(GOLDENS["token_ids"]), "codes_from_ids")


@torch.no_grad()
def test_time_embedding(pipe):
    assert_golden(pipe.decoder.time_embedder(GOLDENS["time.t"]), "time.emb")


@torch.no_grad()
@pytest.mark.parametrize(("sigma", "kind"), VELOCITIES)
def test_velocity(pipe, sigma, kind):
    velocity = pipe.decoder(
        GOLDENS[f"vel.t{sigma}.x"],
        torch.full((3,), float(sigma)),
        GOLDENS["codes"],
        torch.tensor(META[kind]) if kind in META else None,
        torch.full((3,), kind == "uncond"),
    ).velocity
    assert_golden(velocity, f"vel.t{sigma}.{kind}")


@torch.no_grad()
@pytest.mark.parametrize(("kind", "longest"), [("keep_mixed", 16), ("keep_2", 2), ("keep_2", 5), ("uncond", 1)])
def test_velocity_with_merged_registers(pipe, kind, longest):
    """Codes that nobody keeps are left out, and all dropped registers become one."""
    inputs = (GOLDENS["vel.t0.3.x"], torch.full((3,), 0.3), GOLDENS["codes"][:, :longest])
    num_tokens = torch.tensor(META[kind]) if kind in META else None
    velocity = pipe.decoder(*inputs, num_tokens, torch.full((3,), kind == "uncond")).velocity
    assert_golden(velocity, f"vel.t0.3.{kind}")


@torch.no_grad()
def test_decoder_stages_with_a_noise_level_and_length_per_sample(pipe):
    decoder = pipe.decoder
    modules = {"first": decoder.transformer_blocks[0], "last": decoder.transformer_blocks[-1]}
    modules |= {"patches": decoder.patch_embedding, "temb": decoder.time_embedder}
    outputs, handles = record_outputs(modules)
    velocity = decoder(GOLDENS["velmix.x"], GOLDENS["velmix.t"], GOLDENS["codes"], KEEP_MIXED).velocity
    for handle in handles:
        handle.remove()
    assert_golden(decoder.embed_codes(GOLDENS["codes"], KEEP_MIXED, None), "velmix.keep_mixed.registers_in")
    assert_golden(outputs["patches"].unflatten(1, (4, 4)), "velmix.keep_mixed.patches_in")
    assert_golden(outputs["temb"], "velmix.keep_mixed.temb")
    assert_golden(outputs["first"], "velmix.keep_mixed.block0_out")
    assert_golden(outputs["last"], "velmix.keep_mixed.trunk_out")
    assert_golden(velocity, "velmix.keep_mixed")


@torch.no_grad()
def test_unconditional_velocity_with_a_noise_level_per_sample(pipe):
    ignored = torch.ones(3, dtype=torch.bool)
    codes = GOLDENS["codes"]
    registers = pipe.decoder.embed_codes(codes, KEEP_MIXED, ignored)
    velocity = pipe.decoder(GOLDENS["velmix.x"], GOLDENS["velmix.t"], codes, KEEP_MIXED, ignored).velocity
    assert_golden(registers, "velmix.uncond.registers_in")
    assert_golden(velocity, "velmix.uncond")


def sample(pipe, steps, scale, guidance="apg", counts=KEEP_MIXED, callback=None):
    return pipe.integrate_flow(GOLDENS["noise"], GOLDENS["codes"], counts, steps, scale, guidance, callback)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "scale", "guidance"), [("g1", 1.0, "cfg"), ("cfg3", 3.0, "cfg"), ("apg7.5", 7.5, "apg")]
)
def test_four_euler_steps(pipe, name, scale, guidance):
    assert_golden(sample(pipe, 4, scale, guidance), f"sample.{name}.latents")


@torch.no_grad()
@pytest.mark.parametrize(("name", "scale", "guidance"), [("cfg3", 3.0, "cfg"), ("apg7.5", 7.5, "apg")])
def test_every_point_of_the_trajectory(pipe, name, scale, guidance):
    points = []
    sample(pipe, 4, scale, guidance, callback=lambda pipe, step, timestep, tensors: points.append(tensors["latents"]))
    # the golden holds the latents at which the velocity was evaluated, so the noise first and not the result
    assert_golden(torch.stack([GOLDENS["noise"], *points[:-1]]), f"sample.{name}.traj")


@torch.no_grad()
def test_guidance_scale_as_a_function_of_sigma(pipe):
    latents = sample(pipe, 3, lambda sigma: 1 + 2 * sigma, "cfg")
    assert_golden(latents, "sample.cfg_ramp.latents")


@torch.no_grad()
def test_one_step_with_all_tokens(pipe):
    assert_golden(sample(pipe, 1, 2.0, counts=torch.full((3,), 16)), "sample.full_apg2_1step.latents")


@torch.no_grad()
def test_decoded_pictures(pipe):
    assert_golden(decode_latents(pipe.vae, GOLDENS["sample.apg7.5.latents"][:2]), "sample.apg7.5.images")
    assert_golden(decode_latents(pipe.vae, GOLDENS["sample.cfg3.latents"][:1]), "sample.cfg3.image0")
    assert_golden(decode_latents(pipe.vae, GOLDENS["sample.g1.latents"][:1]), "sample.g1.image0")


def test_noise_of_a_seeded_generator(pipe):
    noise = pipe.prepare_latents(3, torch.Generator().manual_seed(123))
    assert_golden(noise, "api.noise_seed123")


@torch.no_grad()
def test_public_detokenize_of_sequences_of_different_lengths(pipe):
    sequences = [ids[:count] for ids, count in zip(GOLDENS["token_ids"], META["keep_mixed"], strict=True)]
    generator = torch.Generator().manual_seed(123)
    latents = pipe.detokenize(sequences, 2, 7.5, generator=generator, output_type="latent").images
    assert_golden(decode_latents(pipe.vae, latents[-1:]), "api.detok_apg7.5_2steps_seed123.image_last")


def test_projected_guidance_over_three_steps():
    guide = Guidance("apg")
    for step in range(3):
        pair = GOLDENS["apg.cond"][step : step + 1], GOLDENS["apg.uncond"][step : step + 1]
        assert_golden(guide(*pair, 7.5), "apg.out_s7.5", slice(step, step + 1))


def test_classifier_free_guidance():
    assert_golden(Guidance("cfg")(GOLDENS["apg.cond"], GOLDENS["apg.uncond"], 3.0), "apg.out_cfg_s3")


@pytest.mark.parametrize("name", ["uniform", "mode", "logit_normal"])
def test_training_noise_levels(monkeypatch, name):
    key = {"uniform": "train.uniform", "mode": "train.mode0.25", "logit_normal": "train.logitnormal"}[name]
    draws = GOLDENS[f"{key}.draw"]
    if name == "logit_normal":
        draws = torch.special.ndtr(draws.double()).float()  # the golden draws are normal, ours start out uniform
    monkeypatch.setattr(torch, "rand", lambda *args, **options: draws)
    assert_golden(sample_sigma(len(draws), name, mode_scale=0.25), f"{key}.sigma")
