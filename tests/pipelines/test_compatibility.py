"""Components that do not fit together are refused when a pipeline is made of them, with the names of both settings."""

import copy

import pytest
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tiny_models import make_decoder, make_encoder, make_prior

from flextok_hf import FlexTokPipeline
from flextok_hf.training.text import build_text_encoder


GRID = {"token_layout": "grid", "num_registers": 16}
MISFITS = {
    "fewer registers in the decoder": ({"decoder": {"num_registers": 5}}, "num_registers", "num_registers"),
    "more registers in the decoder": ({"decoder": {"num_registers": 64}}, "num_registers", "num_registers"),
    "a grid of tokens for registers": ({"encoder": GRID}, "token_layout", "token_layout"),
    "registers for a grid of tokens": ({"decoder": GRID}, "token_layout", "token_layout"),
    "another number of code dimensions": ({"encoder": {"fsq_levels": [3, 5, 5]}}, "fsq_levels", "code_dim"),
    "codes of one dimension": ({"decoder": {"code_dim": 1}}, "fsq_levels", "code_dim"),
    "latents of other channels": ({"decoder": {"in_channels": 4}}, "in_channels", "in_channels"),
    "latents of another size": ({"decoder": {"grid_size": 8}}, "grid_size", "grid_size"),
    "patches of another size": ({"encoder": {"patch_size": 2}}, "patch_size", "patch_size"),
    "a VAE of other channels": ({"vae": 4}, "latent_channels", "in_channels"),
    "a prior of a smaller codebook": ({"prior": {"codebook_size": 14}}, "fsq_levels", "codebook_size"),
    "a prior of a larger codebook": ({"prior": {"codebook_size": 64000}}, "fsq_levels", "codebook_size"),
    "a prior of shorter sequences": ({"prior": {"max_position_embeddings": 5}}, "num_registers", "max_position_emb"),
    "a prior of longer sequences": ({"prior": {"max_position_embeddings": 7}}, "num_registers", "max_position_emb"),
    "a wider text encoder": ({"text_encoder": 64}, "hidden_size", "text_hidden_size"),
}


def build_prior(text_hidden_size, **changes):
    prior = make_prior(text_hidden_size=text_hidden_size)
    config = {**prior.config.to_dict(), **changes, "bos_token_id": None}
    return type(prior)(type(prior.config)(**config))


@pytest.mark.parametrize("name", MISFITS)
def test_the_error_names_both_settings(tiny_pipeline, name):
    changes, one, other = MISFITS[name]
    parts = {
        "encoder": make_encoder(**changes.get("encoder", {})),
        "decoder": make_decoder(**changes.get("decoder", {})),
        "prior": build_prior(32, **changes.get("prior", {})),
        "text_encoder": build_text_encoder(tiny_pipeline.tokenizer, changes.get("text_encoder", 32), 1, 0.0),
        "vae": AutoencoderKL(latent_channels=changes.get("vae", 3), block_out_channels=(32,), norm_num_groups=8),
    }
    (changed,) = changes
    with pytest.raises(ValueError, match=f"(?s)do not fit together: .*{one}.* but .*{other}.*") as caught:
        FlexTokPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), tokenizer=tiny_pipeline.tokenizer, **parts)
    assert f"`{changed}`" in str(caught.value)


def test_a_mismatched_component_passed_to_from_pretrained_is_refused(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="`num_registers` of the `encoder` is 6, but `num_registers` of the `decoder`"
    ):
        FlexTokPipeline.from_pretrained(tmp_path, decoder=make_decoder(num_registers=4))


def test_components_that_fit_are_accepted_and_parts_may_be_missing(tiny_pipeline):
    parts = {name: copy.copy(part) for name, part in tiny_pipeline.components.items()}
    FlexTokPipeline(**parts)
    for missing in ("encoder", "decoder", "prior", "text_encoder"):
        FlexTokPipeline(**{**parts, missing: None})
