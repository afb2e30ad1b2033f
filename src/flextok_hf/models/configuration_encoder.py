"""Configuration of the FlexTok encoder."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .patches import check_positions


TOKEN_LAYOUTS = ("registers", "grid")


@strict
class FlexTokEncoderConfig(PreTrainedConfig):
    """Configuration of `FlexTokEncoder`; defaults to the published d12 size (Bachmann et al., arXiv 2502.13967).

    Args:
        in_channels (`int`): channels of the latents; 3 for a pixel-space model.
        patch_size (`int`): side of a square patch, in latent cells.
        grid_size (`int`): side of the position grid, in patches; latents have at most `grid_size * patch_size` cells
            per side with `positions` "crop".
        hidden_size (`int`): width; a multiple of `head_dim` and of 4.
        num_hidden_layers (`int`): number of blocks.
        head_dim (`int`): width of each attention head.
        token_layout (`str`): "registers", an ordered sequence in which every prefix describes the whole image; or
            "grid", one token per patch in raster order, the paper's 2D control.
        num_registers (`int`): maximum number of tokens per image; `grid_size ** 2` for a grid.
        fsq_levels (`list[int]`): quantization levels per code dimension; their product is the codebook size.
        positions (`str`): of other shapes than the trained square: "crop", those of its upper left corner, as in
            published models; or "stretch", the square spread over the shape.
        shape_conditioning (`bool`): whether the registers are told size and proportions of the image; with "stretch".
    """

    model_type = "flextok_encoder"

    in_channels: int = 16
    patch_size: int = 2
    grid_size: int = 16
    hidden_size: int = 768
    num_hidden_layers: int = 12
    head_dim: int = 64
    token_layout: str = "registers"
    num_registers: int = 256
    fsq_levels: list[int] | tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    positions: str = "crop"
    shape_conditioning: bool = False

    def __post_init__(self, **kwargs):
        self.fsq_levels = list(self.fsq_levels)  # JSON has no tuples: reloaded configs stay equal
        super().__post_init__(**kwargs)

    @property
    def num_attention_heads(self) -> int:
        """Number of heads of each block."""
        return self.hidden_size // self.head_dim

    def validate_architecture(self):
        """Raise an error if the values are inconsistent."""
        widths = ("in_channels", "patch_size", "grid_size", "hidden_size", "head_dim")
        for name in (*widths, "num_hidden_layers", "num_registers"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {getattr(self, name)}.")
        if self.hidden_size % self.head_dim or self.hidden_size % 4:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `head_dim` ({self.head_dim}) and of 4."
            )
        check_token_layout(self.token_layout, self.num_registers, self.grid_size)
        check_positions(self.positions, self.shape_conditioning, self.token_layout)
        if not self.fsq_levels or min(self.fsq_levels) < 2:
            raise ValueError(f"`fsq_levels` must list 2 or more levels per dimension, got {self.fsq_levels}.")


def check_token_layout(token_layout: str, num_registers: int, grid_size: int) -> None:
    """Raise an error if the layout is unknown, or if a grid does not have exactly one token per patch."""
    if not isinstance(token_layout, str) or token_layout not in TOKEN_LAYOUTS:
        raise ValueError(f"`token_layout` must be one of {', '.join(TOKEN_LAYOUTS)}, got {token_layout!r}.")
    if token_layout == "grid" and num_registers != grid_size**2:
        raise ValueError(
            f"`num_registers` is {num_registers}, but a grid has a token per patch: with `grid_size` {grid_size}, set"
            f" it to {grid_size**2}."
        )
