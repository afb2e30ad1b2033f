"""Encoder, quantizer, decoder, guidance and sampling give the numbers of the official code (float32, CPU).

Both public ways are tested: a folder is loaded as a pipeline, a single file is converted and then loaded.
"""

import json
import shutil

import paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from flextok_hf import FlexTokPipeline
from flextok_hf.conversion.convert import convert_checkpoint
from flextok_hf.models.latents import decode_latents, encode_latents
from flextok_hf.pipelines.flow import sample_sigma
from flextok_hf.pipelines.guidance import Guidance


FIXTURES = paths.FIXTURES / "tokenizer"
VARIANTS = ("pub_a_base", "pub_b_wide", "pub_c_fsq")
ATOL = 3e-5
SIGMAS, KINDS = ("1.0", "0.75", "0.3", "0.05"), ("full", "keep_mixed", "keep_2", "uncond")


class Golden:
    """Recorded outputs of the official code for one checkpoint, and our pipeline of it."""

    def __init__(self, variant, pipe):
        self.pipe = pipe
        self.tensors = load_file(FIXTURES / variant / "goldens.safetensors")
        self.meta = json.loads((FIXTURES / variant / "meta.json").read_text())
        self.keep_mixed = torch.tensor(self.meta["keep_mixed"])
        self.batch_size = len(self.keep_mixed)

    def __getitem__(self, name):
        return self.tensors[name]

    def check(self, actual, name, index=slice(None)):
        """Compare with the recorded output of this name."""
        torch.testing.assert_close(actual, self[name][index], atol=ATOL, rtol=0)

    def sample(self, steps, scale, guidance="apg", counts=None, callback=None):
        counts = self.keep_mixed if counts is None else counts
        return self.pipe.integrate_flow(self["noise"], self["codes"], counts, steps, scale, guidance, callback)


def load_folder(variant, folder):
    """Load a folder laid out like a Hub repository, with no configuration in the weights file."""
    shutil.copytree(FIXTURES / variant, folder)
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")
    return FlexTokPipeline.from_original(str(folder))


def convert_file(variant, folder):
    """Convert a single file that contains its configuration, then load, save and load again."""
    shutil.copytree(FIXTURES / variant, folder, ignore=shutil.ignore_patterns("config.json"))
    if (FIXTURES / variant / "vae").exists():
        shutil.copy(FIXTURES / variant / "vae" / "config.json", folder / "vae")
    convert_checkpoint(folder / "converted", str(folder / "model.safetensors"))
    FlexTokPipeline.from_pretrained(folder / "converted").save_pretrained(folder / "saved")
    return FlexTokPipeline.from_pretrained(folder / "saved")


@pytest.fixture(scope="module", params=[load_folder, convert_file])
def load(request):
    return request.param


@pytest.fixture(scope="module", params=VARIANTS)
def golden(request, load, tmp_path_factory):
    pipe = load(request.param, tmp_path_factory.mktemp("official") / request.param)
    pipe.set_progress_bar_config(disable=True)
    return Golden(request.param, pipe)


def record_outputs(modules):
    """Record the output of each module during a forward pass."""
    outputs = {}
    handles = [
        module.register_forward_hook(lambda *args, name=name: outputs.__setitem__(name, args[-1]))
        for name, module in modules.items()
    ]
    return outputs, handles


@torch.no_grad()
def test_latents(golden):
    golden.check(encode_latents(golden.pipe.vae, golden["images"]), "latents")
    posterior = golden.pipe.vae.encode(golden["images"]).latent_dist
    golden.check(posterior.mean, "vae_mean")
    golden.check(posterior.logvar, "vae_logvar")


@torch.no_grad()
def test_encoder_stages(golden):
    encoder = golden.pipe.encoder
    outputs, handles = record_outputs(
        {"first": encoder.blocks[0], "last": encoder.blocks[-1], "patches": encoder.patch_embedding}
    )
    features = encoder.compute_features(golden["latents"])
    for handle in handles:
        handle.remove()
    golden.check(outputs["patches"].unflatten(1, (4, 4)), "enc_patches_in")
    golden.check(outputs["first"][0], "enc_block0_out")
    golden.check(outputs["last"][0], "enc_trunk_out", (slice(None), slice(16, None)))  # the registers
    golden.check(features, "enc_registers")


@torch.no_grad()
def test_codes_and_ids_are_exact(golden):
    output = golden.pipe.encoder(golden["latents"])
    assert torch.equal(output.token_ids, golden["token_ids"])
    assert torch.equal(output.codes, golden["codes"])


@torch.no_grad()
def test_images_to_ids_through_the_pipeline(golden):
    token_ids = golden.pipe.tokenize(list(golden["images"].clamp(-1, 1) / 2 + 0.5))
    assert torch.equal(token_ids, golden["token_ids"])


def test_quantizer(golden):
    quantizer = golden.pipe.encoder.quantizer
    golden.check(quantizer.bound(golden["fsq.z"]), "fsq.bounded")
    golden.check(quantizer.bound(golden["enc_registers"]), "fsq_bounded")
    golden.check(quantizer(golden["fsq.z"]), "fsq.codes")
    assert torch.equal(quantizer.codes_to_ids(golden["fsq.codes"]), golden["fsq.ids"])
    golden.check(quantizer.ids_to_codes(golden["fsq.lookup_ids"]), "fsq.lookup_codes")
    golden.check(quantizer.ids_to_codes(golden["token_ids"]), "codes_from_ids")


@torch.no_grad()
def test_time_embedding(golden):
    embedder, frequencies = golden.pipe.decoder.time_embedder, []
    handle = embedder.linear_1.register_forward_pre_hook(lambda module, args: frequencies.append(args[0]))
    golden.check(embedder(golden["time.t"]), "time.emb")
    handle.remove()
    # within one float32 step at angles up to 1000; multiplying in another order is ten times further off
    torch.testing.assert_close(frequencies[0], golden["time.freq"], atol=5e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("kind", KINDS)
def test_velocity(golden, sigma, kind):
    velocity = golden.pipe.decoder(
        golden[f"vel.t{sigma}.x"],
        torch.full((golden.batch_size,), float(sigma)),
        golden["codes"],
        torch.tensor(golden.meta[kind]) if kind in golden.meta else None,
        torch.full((golden.batch_size,), kind == "uncond"),
    ).velocity
    golden.check(velocity, f"vel.t{sigma}.{kind}")


@torch.no_grad()
@pytest.mark.parametrize(("kind", "longest"), [("keep_mixed", None), ("keep_2", 2), ("keep_2", 5), ("uncond", 1)])
def test_velocity_with_merged_registers(golden, kind, longest):
    """Codes that no sample keeps are omitted, and all dropped registers are merged into one."""
    batch = golden.batch_size
    inputs = (golden["vel.t0.3.x"], torch.full((batch,), 0.3), golden["codes"][:, :longest])
    num_tokens = torch.tensor(golden.meta[kind]) if kind in golden.meta else None
    velocity = golden.pipe.decoder(*inputs, num_tokens, torch.full((batch,), kind == "uncond")).velocity
    golden.check(velocity, f"vel.t0.3.{kind}")


@torch.no_grad()
def test_decoder_stages_with_a_noise_level_and_length_per_sample(golden):
    decoder, codes = golden.pipe.decoder, golden["codes"]
    modules = {"first": decoder.transformer_blocks[0], "last": decoder.transformer_blocks[-1]}
    modules |= {"patches": decoder.patch_embedding, "temb": decoder.time_embedder}
    outputs, handles = record_outputs(modules)
    velocity = decoder(golden["velmix.x"], golden["velmix.t"], codes, golden.keep_mixed).velocity
    for handle in handles:
        handle.remove()
    golden.check(decoder.embed_codes(codes, golden.keep_mixed, None), "velmix.keep_mixed.registers_in")
    golden.check(outputs["patches"].unflatten(1, (4, 4)), "velmix.keep_mixed.patches_in")
    golden.check(outputs["temb"], "velmix.keep_mixed.temb")
    golden.check(outputs["first"], "velmix.keep_mixed.block0_out")
    golden.check(outputs["last"], "velmix.keep_mixed.trunk_out")
    golden.check(velocity, "velmix.keep_mixed")


@torch.no_grad()
def test_unconditional_velocity_with_a_noise_level_per_sample(golden):
    decoder, codes = golden.pipe.decoder, golden["codes"]
    is_unconditional = torch.ones(golden.batch_size, dtype=torch.bool)
    registers = decoder.embed_codes(codes, golden.keep_mixed, is_unconditional)
    velocity = decoder(golden["velmix.x"], golden["velmix.t"], codes, golden.keep_mixed, is_unconditional).velocity
    golden.check(registers, "velmix.uncond.registers_in")
    golden.check(velocity, "velmix.uncond")


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "scale", "guidance"), [("g1", 1.0, "cfg"), ("cfg3", 3.0, "cfg"), ("apg7.5", 7.5, "apg")]
)
def test_four_euler_steps(golden, name, scale, guidance):
    golden.check(golden.sample(4, scale, guidance), f"sample.{name}.latents")


@torch.no_grad()
@pytest.mark.parametrize(("name", "scale", "guidance"), [("cfg3", 3.0, "cfg"), ("apg7.5", 7.5, "apg")])
def test_every_point_of_the_trajectory(golden, name, scale, guidance):
    points, times = [], []

    def keep(pipe, step, timestep, tensors):
        points.append(tensors["latents"])
        times.append(timestep / 1000)

    golden.sample(4, scale, guidance, callback=keep)
    golden.check(torch.stack(times), "sample.traj_t")
    # the recording has the latents at which the velocity was evaluated: the noise first, and not the result
    golden.check(torch.stack([golden["noise"], *points[:-1]]), f"sample.{name}.traj")


@torch.no_grad()
def test_guidance_scale_as_a_function_of_sigma(golden):
    golden.check(golden.sample(3, lambda sigma: 1 + 2 * sigma, "cfg"), "sample.cfg_ramp.latents")


@torch.no_grad()
def test_one_step_with_all_tokens(golden):
    all_tokens = torch.full((golden.batch_size,), golden.pipe.num_registers)
    golden.check(golden.sample(1, 2.0, counts=all_tokens), "sample.full_apg2_1step.latents")


@torch.no_grad()
def test_decoded_images(golden):
    vae = golden.pipe.vae
    for name, key in (("apg7.5", "images"), ("cfg3", "image0"), ("g1", "image0")):
        images = golden[f"sample.{name}.{key}"]
        golden.check(decode_latents(vae, golden[f"sample.{name}.latents"][: len(images)]), f"sample.{name}.{key}")


def test_noise_of_a_seeded_generator(golden):
    golden.check(
        golden.pipe.prepare_latents(golden.batch_size, torch.Generator().manual_seed(123)), "api.noise_seed123"
    )


@torch.no_grad()
def test_public_detokenize_of_sequences_of_different_lengths(golden):
    sequences = [ids[:count] for ids, count in zip(golden["token_ids"], golden.meta["keep_mixed"], strict=True)]
    generator = torch.Generator().manual_seed(123)
    latents = golden.pipe.detokenize(sequences, 2, 7.5, generator=generator, output_type="latent").images
    golden.check(decode_latents(golden.pipe.vae, latents[-1:]), "api.detok_apg7.5_2steps_seed123.image_last")


def test_projected_guidance_over_three_steps(golden):
    guide = Guidance("apg")
    for step in range(3):
        pair = golden["apg.cond"][step : step + 1], golden["apg.uncond"][step : step + 1]
        golden.check(guide(*pair, 7.5), "apg.out_s7.5", slice(step, step + 1))


def test_classifier_free_guidance(golden):
    golden.check(Guidance("cfg")(golden["apg.cond"], golden["apg.uncond"], 3.0), "apg.out_cfg_s3")


@pytest.mark.parametrize("name", ["uniform", "mode", "logit_normal"])
def test_training_noise_levels(golden, monkeypatch, name):
    key = {"uniform": "train.uniform", "mode": "train.mode0.25", "logit_normal": "train.logitnormal"}[name]
    draws = golden[f"{key}.draw"]
    if name == "logit_normal":
        draws = torch.special.ndtr(draws.double()).float()  # the recorded draws are normal, ours start as uniform
    monkeypatch.setattr(torch, "rand", lambda *args, **options: draws)
    golden.check(sample_sigma(len(draws), name, mode_scale=0.25), f"{key}.sigma")
