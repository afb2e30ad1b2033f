"""Components: one of our models on the meta device, and how its tensors are made from official ones."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .settings import shorten_list
from .source import Weights


def same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Recipe:
    """How one of our tensors is made: the names of official tensors, and a function that combines them."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor] = same


@dataclass(frozen=True)
class Component:
    """One of our models and where its weights come from.

    model: on the meta device, so its tensors have shapes but no values.
    recipes: one for each entry of its state dict.
    weights: the official file.
    """

    model: nn.Module
    recipes: dict[str, Recipe]
    weights: Weights

    def check(self) -> None:
        """Raise a ValueError if tensors are missing or have the wrong shape; no values are read."""
        missing = [name for recipe in self.recipes.values() for name in recipe.sources if name not in self.weights]
        if missing:
            raise ValueError(
                f"{str(self.weights.path)!r} lacks tensors: {shorten_list(missing)}. It is incomplete, or its"
                " configuration is that of other weights."
            )
        for name, expected in self.model.state_dict().items():
            recipe = self.recipes[name]
            if self.shape_of(recipe) != tuple(expected.shape):
                found = ", ".join(f"`{source}` {self.weights.shapes[source]}" for source in recipe.sources)
                raise ValueError(
                    f"{str(self.weights.path)!r} holds {found}, which does not give the shape"
                    f" {tuple(expected.shape)} that the configuration asks for. They do not match."
                )

    def shape_of(self, recipe: Recipe) -> tuple[int, ...] | None:
        """Return the shape that a recipe gives, or `None` if its tensors cannot be combined."""
        try:
            return tuple(recipe.make(*(self.weights.meta(source) for source in recipe.sources)).shape)
        except (RuntimeError, IndexError, ValueError):
            return None

    def layout(self, dtype: torch.dtype | None) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return the data type and shape of every tensor; `dtype=None` keeps the stored data type."""
        layout, most_common = {}, Counter(self.weights.dtypes.values()).most_common(1)[0][0]
        for name, expected in self.model.state_dict().items():
            recipe = self.recipes[name]
            stored = {self.weights.dtypes[source] for source in recipe.sources} or {most_common}
            kind = dtype or (stored.pop() if len(stored) == 1 else torch.float32)
            layout[name] = (kind, tuple(expected.shape))
        return layout

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Read the tensors one at a time, each into its own memory; `dtype=None` keeps the stored data type.

        Raises:
            ValueError: if values are not finite, or too large for `dtype`.
        """
        for name, (kind, shape) in self.layout(dtype).items():
            recipe = self.recipes[name]
            made = recipe.make(*(self.weights.read(source) for source in recipe.sources))
            tensor = torch.empty(shape, dtype=kind).copy_(made)
            if tensor.dtype != made.dtype and not tensor.isfinite().all():
                raise ValueError(
                    f"{shorten_list(list(recipe.sources))} in {str(self.weights.path)!r} holds values too large for"
                    f" {kind}. Choose bfloat16 or float32."
                )
            yield name, tensor

    def load(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the model with its weights, in evaluation mode."""
        self.model.load_state_dict(dict(self.tensors(dtype)), assign=True)
        return self.model.eval()


def check_nothing_left(weights: Weights, components: Iterable[Component], is_ignored: Callable[[str], bool]) -> None:
    """Raise a ValueError if the file holds tensors that no recipe uses.

    Args:
        weights: the official file.
        components: everything made from it.
        is_ignored: returns whether the tensor of a given name may stay unused.
    """
    used = {name for one in components for recipe in one.recipes.values() for name in recipe.sources}
    left = [name for name in weights.shapes if name not in used and not is_ignored(name)]
    if left:
        raise ValueError(
            f"{str(weights.path)!r} holds tensors that flextok_hf does not know: {shorten_list(left)}. They may change"
            " what the model computes, so the checkpoint is not converted."
        )


def check_shape(weights: Weights, name: str, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless a tensor exists with the shape that the configuration asks for."""
    found = weights.shapes.get(name)
    if found != shape:
        state = "is missing" if found is None else f"has the shape {found}"
        raise ValueError(f"`{name}` in {str(weights.path)!r} {state}, but the configuration asks for {shape}.")


def check_num_blocks(weights: Weights, prefix: str, num_blocks: int) -> None:
    """Raise a ValueError unless the tensors under `prefix` are those of `num_blocks` blocks, numbered from 0."""
    indices = {name.removeprefix(prefix).partition(".")[0] for name in weights.shapes if name.startswith(prefix)}
    if len(indices) != num_blocks:
        raise ValueError(
            f"{str(weights.path)!r} holds {len(indices)} blocks `{prefix}...`, but the configuration asks for"
            f" {num_blocks}."
        )


def build(make: Callable[[], nn.Module], name: str) -> nn.Module:
    """Build a model of the checkpoint `name` on the meta device, without memory for its weights.

    Raises:
        ValueError: if its settings do not fit together.
    """
    try:
        with torch.device("meta"):
            return make()
    except Exception as error:  # settings of an untrusted file can fail anywhere in the libraries
        raise ValueError(f"The model {name!r} cannot be built from its configuration: {error}") from error
