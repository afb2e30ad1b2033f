"""Configuration of the FlexTok tokenizer as one model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_encoder import FlexTokEncoderConfig


@strict
class FlexTokConfig(PreTrainedConfig):
    """Configuration of `FlexTokModel`.

    Args:
        encoder_config (`FlexTokEncoderConfig` or `dict`): configuration of the encoder.
        vae_config (`dict`): configuration of the VAE, a Diffusers `AutoencoderKL`; `None` for a pixel-space model.
    """

    model_type = "flextok"
    sub_configs = {"encoder_config": FlexTokEncoderConfig}

    encoder_config: FlexTokEncoderConfig | dict[str, Any] | None = None
    vae_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        if not isinstance(self.encoder_config, FlexTokEncoderConfig):
            self.encoder_config = FlexTokEncoderConfig(**(self.encoder_config or {}))
        if isinstance(self.vae_config, dict):  # without where the VAE came from, and as lists, which JSON has
            self.vae_config = {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in self.vae_config.items()
                if not name.startswith("_")
            }
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Raise an error if the VAE's latents do not fit the encoder."""
        needed = self.encoder_config.in_channels  # type: ignore[union-attr]
        channels = (self.vae_config or {}).get("latent_channels", needed)
        if channels != needed:
            raise ValueError(f"`encoder_config` needs latents of {needed} channels, but `vae_config` has {channels}.")

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["encoder_config"]["_name_or_path"] = ""  # where it was loaded from is nobody else's business
        return output
