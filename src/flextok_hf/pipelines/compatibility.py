"""Which settings of a pipeline's components have to agree; compared when a pipeline is made of them."""

import math
from collections.abc import Callable
from typing import Any


Reading = tuple[str, str, Callable[[Any], Any]]  # component, setting in words, how to read it


def setting(component: str, name: str) -> Reading:
    """Return how to read one setting of a component; `None` if the component has no such setting."""
    return component, f"`{name}`", lambda config: getattr(config, name, None)


def latent_side(component: str) -> Reading:
    """Return how to read the side of the latents from encoder or decoder."""
    return component, "`grid_size` times `patch_size`", lambda config: config.grid_size * config.patch_size


CODE_DIM: Reading = ("encoder", "the length of `fsq_levels`", lambda config: len(config.fsq_levels))
CODEBOOK_SIZE: Reading = ("encoder", "the product of `fsq_levels`", lambda config: math.prod(config.fsq_levels))
SAME = [
    (setting("encoder", "token_layout"), setting("decoder", "token_layout")),
    (setting("encoder", "num_registers"), setting("decoder", "num_registers")),
    (setting("encoder", "in_channels"), setting("decoder", "in_channels")),
    (latent_side("encoder"), latent_side("decoder")),
    (setting("encoder", "positions"), setting("decoder", "positions")),
    (CODE_DIM, setting("decoder", "code_dim")),
    (setting("vae", "latent_channels"), setting("encoder", "in_channels")),
    (setting("vae", "latent_channels"), setting("decoder", "in_channels")),
    (CODEBOOK_SIZE, setting("prior", "codebook_size")),
    (setting("encoder", "num_registers"), setting("prior", "max_position_embeddings")),
    (setting("text_encoder", "hidden_size"), setting("prior", "text_hidden_size")),
]


def check_components(**components: Any) -> None:
    """Compare the settings of components by name; `None` stands for one that is not there.

    Raises:
        ValueError: if two settings differ, with both names and values.
    """
    for readings in SAME:
        parts: list[Any] = [components.get(component) for component, _, _ in readings]
        if any(part is None for part in parts):
            continue
        values = [read(part.config) for part, (_, _, read) in zip(parts, readings, strict=True)]
        if values[0] != values[1] and None not in values:
            said = [
                f"{what} of the `{component}` is {value!r}" for (component, what, _), value in zip(readings, values)
            ]
            raise ValueError(
                f"These components do not fit together: {said[0]}, but {said[1]}. Use ones that were trained together."
            )
