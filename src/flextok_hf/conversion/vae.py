"""The VAE of an official tokenizer: an `AutoencoderKL` of Diffusers, stored in the same file."""

import inspect
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from huggingface_hub import hf_hub_download

from ..models.settings_checks import check_vae_settings
from .components import Component, Recipe, build
from .references import resolve_reference
from .settings import Section, parse_settings
from .source import VAE_CONFIG_NAME, Checkpoint, read_text


VAE_PREFIX = "vae.vae."
# What the official code builds unless the checkpoint specifies another VAE
PUBLISHED_ARCHITECTURE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
KNOWN_SETTINGS = tuple(inspect.signature(AutoencoderKL.__init__).parameters)[1:]
MAX_BLOCKS, MAX_LAYERS = 16, 64


def read_vae(settings: Section, checkpoint: Checkpoint, notes: list[str], **hub_options: Any) -> Component:
    """Read the VAE; its scaling factor is that of the checkpoint, or else of its own configuration.

    Args:
        settings: of the VAE.
        checkpoint: the one they belong to.
        notes: differences from the official code are appended to it.
        hub_options: for downloading the VAE configuration that the checkpoint refers to.
    """
    settings.target("flextok.vae_wrapper.StableDiffusionVAE")
    settings.skip("frozen", "force_vae_encode", "learnable_logvar")
    latent_channels, scaling_factor = settings.count("latent_channels"), settings.number("scaling_factor", None)
    config = read_architecture(settings, checkpoint, hub_options)
    if config is None:
        config = PUBLISHED_ARCHITECTURE | {"latent_channels": latent_channels}
    if config.get("latent_channels") != latent_channels:
        raise ValueError(
            f"{settings.describe('latent_channels')} is {latent_channels}, but the configuration of its VAE says"
            f" {config.get('latent_channels')}."
        )
    if scaling_factor:  # the official code treats 0 as missing
        config["scaling_factor"] = scaling_factor
    if not config.get("scaling_factor"):
        raise ValueError(
            f"{settings.describe('scaling_factor')} is missing, and no VAE configuration specifies it. Without it,"
            " the scale of the latents is unknown."
        )
    check_vae_settings(config, lambda name: f"`vae_config.{name}` of {checkpoint.name!r}")
    if settings.flag("sample_posterior", True):
        notes.append(
            "The official code samples latents from the VAE's posterior (`sample_posterior` is true); here they are"
            " its mean, so that an image always gives the same ids."
        )
    precision = settings.text("dtype_override", None)
    if precision not in (None, "fp32"):
        notes.append(f"The official code runs the VAE in {precision}; here it runs in the precision of the pipeline.")

    model = build(lambda: AutoencoderKL(**config), checkpoint.name)
    return Component(model, {name: Recipe((VAE_PREFIX + name,)) for name in model.state_dict()}, checkpoint.weights)


def read_architecture(settings: Section, checkpoint: Checkpoint, hub_options: dict[str, Any]) -> dict[str, Any] | None:
    """Read the VAE configuration that the checkpoint refers to or has beside it; `None` for the published one."""
    reference = settings.text("hf_hub_path", None)
    if reference is None:
        path = checkpoint.folder / VAE_CONFIG_NAME
        if not path.is_file():
            return None
    else:
        remedy = f"Set it to null and put the configuration of the VAE beside the weights as `{VAE_CONFIG_NAME}`."
        found = resolve_reference(reference, checkpoint, settings.describe("hf_hub_path"), remedy)
        if isinstance(found, str):
            found = Path(hf_hub_download(found, "config.json", **hub_options)).parent
        path = found / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{settings.describe('hf_hub_path')} {reference!r} has no `config.json`.")
    config = parse_settings(read_text(path), "json", f"`{path.name}` of the VAE of {checkpoint.name!r}")
    section = Section(config, checkpoint.name, VAE_CONFIG_NAME.removesuffix(".json"), settings.ignored)
    return check_architecture(section)


def check_architecture(section: Section) -> dict[str, Any]:
    """Return the settings of an `AutoencoderKL`; refuse other classes, unknown names and excessive depths."""
    section.expect("_class_name", "AutoencoderKL", default="AutoencoderKL")
    section.skip(*(key for key in section.values if key.startswith("_")))
    for key in ("down_block_types", "up_block_types"):
        known = PUBLISHED_ARCHITECTURE[key][0]
        blocks = section.take(key, (list, tuple), "a list")
        if len(blocks) > MAX_BLOCKS or any(block != known for block in blocks):
            raise ValueError(f"{section.describe(key)} must be a list of {known!r}.")
    if section.count("layers_per_block", 1) > MAX_LAYERS:
        raise ValueError(f"{section.describe('layers_per_block')} must be at most {MAX_LAYERS}.")
    section.number("scaling_factor", None)
    section.skip(*KNOWN_SETTINGS)
    section.close()
    return {key: value for key, value in section.values.items() if not key.startswith("_")}
