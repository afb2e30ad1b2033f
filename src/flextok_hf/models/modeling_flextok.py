"""FlexTok tokenizer as one Transformers model: images -> token ids, codes, features.

Letters: B batch, K registers, H W height and width of the images.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import can_return_tuple

from .configuration_flextok import FlexTokConfig
from .latents import check_token_ids, encode_latents
from .modeling_encoder import FlexTokEncoder, FlexTokEncoderOutput
from .whole_weights import WholeWeightsMixin


class FlexTokModel(WholeWeightsMixin, PreTrainedModel):
    """Turns images into token ids: the VAE, if there is one, and the encoder of a `FlexTokPipeline`.

    Args:
        config: configuration of both.
        encoder, vae: trained components to use instead of new ones.
    """

    config_class = FlexTokConfig
    base_model_prefix = ""  # two equal parts, no headless base model
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncoderBlock", "AutoencoderKL"]
    _supports_sdpa = True

    def __init__(self, config: FlexTokConfig, encoder: FlexTokEncoder | None = None, vae: AutoencoderKL | None = None):
        super().__init__(config)
        self.encoder = FlexTokEncoder(self.config.encoder_config) if encoder is None else encoder
        if vae is None and config.vae_config is not None:
            vae = AutoencoderKL.from_config(config.vae_config)
        self.vae = vae
        self.post_init()

    @classmethod
    def from_pipeline(cls, pipe: Any) -> "FlexTokModel":
        """Return a model of the encoder and the VAE of a `FlexTokPipeline`, which it shares."""
        vae_config = None if pipe.vae is None else dict(pipe.vae.config)
        config = FlexTokConfig(encoder_config=pipe.encoder.config, vae_config=vae_config)
        return cls(config, pipe.encoder, pipe.vae).eval()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the encoder has its own rule, and the VAE initializes itself."""

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        num_tokens: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> FlexTokEncoderOutput:
        """Tokenize images; no gradient reaches the VAE.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1], as `FlexTokImageProcessor` returns them.
            num_tokens: maximum number of tokens per image; `None`, or more than there are, means all.
            output_hidden_states, output_attentions: as in `FlexTokEncoder`.

        Returns:
            What `FlexTokEncoder` returns.

        Raises:
            ValueError: outside of training, if features are not finite; the message says why.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states or None  # else the encoder's own setting
        if output_attentions is None:
            output_attentions = self.config.output_attentions or None
        latents = encode_latents(self.vae, pixel_values).to(self.encoder.dtype)  # (B, C, h, w)
        output = self.encoder(latents, num_tokens, output_hidden_states, output_attentions, return_dict=True)
        if not self.training and not torch.compiler.is_compiling():  # reads a value, which would stall a training
            check_token_ids(output.token_ids, pixel_values, self.encoder, self.vae)
        return output
