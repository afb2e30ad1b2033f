"""Latents <-> patches, and their positions: a crop of the stored table, or the table spread over any shape.

Letters: B batch, C latent channels, h w grid of patches, N = h * w patches, p patch size, D hidden size, G side of the
position grid.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


POSITIONS = ("crop", "stretch")
MAX_ASPECT = 4  # of the longer side to the shorter one
MAX_AREA = 16  # times the trained area


def check_positions(positions: str, shape_conditioning: bool, token_layout: str) -> None:
    """Raise a ValueError unless the settings of a model that concern shapes fit together."""
    if not isinstance(shape_conditioning, bool):
        raise ValueError(f"`shape_conditioning` must be True or False, got {shape_conditioning!r}.")
    if positions not in POSITIONS:
        raise ValueError(f"`positions` must be one of {', '.join(POSITIONS)}, got {positions!r}.")
    if positions == "stretch" and token_layout != "registers":
        raise ValueError('`positions` "stretch" needs `token_layout` "registers": tokens of a grid belong to places.')
    if shape_conditioning and positions != "stretch":
        raise ValueError('`shape_conditioning` is True, but `positions` is "crop". Set them to "stretch".')


def is_allowed_grid(rows: int, columns: int, grid_size: int) -> bool:
    """Whether a model with stretched positions accepts a grid: not too long, not too large, and not empty."""
    is_long = rows > MAX_ASPECT * columns or columns > MAX_ASPECT * rows
    return not is_long and 0 < rows * columns <= MAX_AREA * grid_size**2


def sincos_positions(rows: Tensor, columns: Tensor, hidden_size: int) -> Tensor:
    """Sine-cosine positions at float64 coordinates (h,) and (w,).

    Returns:
        Positions (h, w, D), float32: a quarter each of sin(row), cos(row), sin(column), cos(column).
    """
    quarter = hidden_size // 4
    # float64, rounded once at the end: the table is a constant stored in the checkpoint
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device=rows.device) / quarter)
    angles = (rows[:, None] * frequencies, columns[:, None] * frequencies)
    of_rows, of_columns = (torch.cat([angle.sin(), angle.cos()], dim=-1) for angle in angles)  # (h or w, D / 2)
    of_rows = of_rows[:, None].expand(-1, columns.shape[0], -1)
    return torch.cat([of_rows, of_columns[None].expand(rows.shape[0], -1, -1)], dim=-1).float()


def sincos_position_table(hidden_size: int, grid_size: int) -> Tensor:
    """Sine-cosine positions of a square grid, (G, G, D)."""
    whole = torch.arange(grid_size, dtype=torch.float64, device="cpu")
    return sincos_positions(whole, whole, hidden_size)


def stretched_positions(rows: int, columns: int, grid_size: int, hidden_size: int, device: torch.device) -> Tensor:
    """Sine-cosine positions of a grid whose area covers that of the trained one, (N, D) float32.

    A patch is a square of the plane, so coordinates grow by the same step in both directions. For the trained grid
    they are whole numbers, and the result is its table.
    """
    step = grid_size / (rows * columns) ** 0.5
    lines = [(torch.arange(count, dtype=torch.float64, device=device) + 0.5) * step - 0.5 for count in (rows, columns)]
    return sincos_positions(lines[0], lines[1], hidden_size).flatten(0, 1)


@functools.lru_cache(maxsize=32)
def cached_positions(
    rows: int, columns: int, grid_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return `stretched_positions` as a cached tensor, computed on the CPU: not every device has float64."""
    with torch.inference_mode(False):  # a tensor made in inference mode could not be used in training later
        return stretched_positions(rows, columns, grid_size, hidden_size, torch.device("cpu")).to(device, dtype)


def shape_features(latent_shape: Sequence[int] | None, config: Any, like: Tensor) -> Tensor:
    """Describe a shape by the logarithms of its area, against the trained one, and of its proportions.

    Args:
        latent_shape: ends with height and width of the latents; `None` is the trained square.
        config: of the model, with its patch size and grid size.
        like: tensor of which the result has data type and device.

    Returns:
        Two numbers, (1, 2), both zero for the trained square.
    """
    if latent_shape is None:
        return like.new_zeros(1, 2)
    height, width = latent_shape[-2:]
    ratios = (height * width / (config.grid_size * config.patch_size) ** 2, height / width)
    return torch.stack([torch.full((), ratio, device=like.device) for ratio in ratios]).log()[None].to(like.dtype)


def features_of_sizes(sizes: Tensor, side: int) -> Tensor:
    """Describe images as `shape_features` does latents.

    Args:
        sizes: height and width of each image, (B, 2) integers.
        side: side of the trained square, in the same unit.

    Returns:
        Two numbers for each, (B, 2) float32.
    """
    height, width = sizes.double().unbind(-1)
    return torch.stack([height * width / side**2, height / width], dim=-1).log().float()


class PatchEmbedding(nn.Module):
    """Latents (B, C, h, w) -> patch tokens (B, N, D): linear projection plus fixed 2D positions.

    `mode` "crop" cuts the positions of smaller latents out of the table; "stretch" spreads any shape over it.
    """

    def __init__(self, in_channels: int, patch_size: int, grid_size: int, hidden_size: int, mode: str = "crop"):
        super().__init__()
        self.patch_size = patch_size
        self.mode = mode
        self.proj = nn.Linear(in_channels * patch_size**2, hidden_size)
        # persistent: the table belongs to the checkpoint, and Transformers does not rebuild unsaved buffers on load
        self.register_buffer("positions", sincos_position_table(hidden_size, grid_size))  # (G, G, D)

    def forward(self, latents: Tensor) -> Tensor:
        """Embed latents; raises `ValueError` unless the sides are multiples of the patch size and fit the mode."""
        rows, columns = self.count_patches(*latents.shape[-2:])
        # the stored table is used for the square that it belongs to: published ones are constants of the model
        if self.mode == "stretch" and not rows == columns == self.positions.shape[0]:
            positions = self.stretch(rows, columns, latents.device)
        else:
            positions = self.crop(rows, columns)
        # Transformers may load the table in a different dtype than the weights.
        return (self.proj(patchify(latents, self.patch_size)) + positions).to(latents.dtype)

    def crop(self, rows: int, columns: int) -> Tensor:
        """Return the upper left corner of the table, (N, D)."""
        if not torch.compiler.is_compiling():
            return self.positions[:rows, :columns].flatten(0, 1)
        # the strides of a view would make compiled code depend on the width
        row, column = (torch.arange(count, device=self.positions.device) for count in (rows, columns))
        return self.positions.flatten(0, 1)[(row[:, None] * self.positions.shape[0] + column).flatten()]

    def stretch(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return the positions of any grid, (N, D), in the precision of the table."""
        limit, _, hidden_size = self.positions.shape
        if not torch.compiler.is_compiling():
            return cached_positions(rows, columns, limit, hidden_size, self.positions.dtype, device)
        # compiled code computes them, so that all shapes share it
        return stretched_positions(rows, columns, limit, hidden_size, device).to(self.positions.dtype)

    def count_patches(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the grid of latents (B, C, height, width), if they are allowed."""
        rows, columns, limit = height // self.patch_size, width // self.patch_size, self.positions.shape[0]
        if self.mode == "stretch":
            fits = is_allowed_grid(rows, columns, limit)
            allowed = (
                f", with at most {MAX_AREA * limit**2} patches and no side more than {MAX_ASPECT} times the other"
            )
        else:
            fits = max(rows, columns) <= limit
            allowed = f" and at most {limit * self.patch_size} (`grid_size` {limit})"
        if height % self.patch_size or width % self.patch_size or not fits:
            raise ValueError(
                f"`latents` of {height} x {width} do not fit: each side must be a multiple of the patch size"
                f" {self.patch_size}{allowed}. Resize or crop the image first."
            )
        return rows, columns


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """Cut latents (B, C, h, w) into row-major patches (B, N, p * p * C), each as rows, columns, channels."""
    batch_size, channels, height, width = latents.shape
    patches = latents.reshape(
        batch_size, channels, height // patch_size, patch_size, width // patch_size, patch_size
    ).permute(0, 2, 4, 3, 5, 1)  # (B, rows, columns, p, p, C)
    return patches.flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Reassemble patches (B, N, p * p * C) into latents (B, C, height, width); the inverse of `patchify`."""
    batch_size, _, patch_dim = patches.shape
    rows, columns, channels = height // patch_size, width // patch_size, patch_dim // patch_size**2
    latents = patches.reshape(batch_size, rows, columns, patch_size, patch_size, channels)
    return latents.permute(0, 5, 1, 3, 2, 4).reshape(batch_size, channels, height, width)
