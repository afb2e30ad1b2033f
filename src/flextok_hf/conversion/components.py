"""Components: a model of ours without values, and for each of its tensors the official ones it is made from."""

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
    """How a tensor of ours comes about: the names of official tensors, and what to do with them."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor] = same


@dataclass(frozen=True)
class Component:
    """One of our models and how to fill it.

    model: on the meta device, where tensors have shapes and no values.
    recipes: one for each entry of its state dictionary.
    weights: the official file.
    """

    model: nn.Module
    recipes: dict[str, Recipe]
    weights: Weights

    def check(self) -> None:
        """Raise a ValueError if the file lacks tensors, or they have other shapes; no values are read."""
        missing = [name for recipe in self.recipes.values() for name in recipe.sources if name not in self.weights]
        if missing:
            raise ValueError(
                f"{str(self.weights.path)!r} lacks tensors: {shorten_list(missing)}. It is incomplete, or its"
                " configuration belongs to other weights."
            )
        for name, expected in self.model.state_dict().items():
            recipe = self.recipes[name]
            if self.shape_of(recipe) != tuple(expected.shape):
                found = ", ".join(f"`{source}` {self.weights.shapes[source]}" for source in recipe.sources)
                raise ValueError(
                    f"{str(self.weights.path)!r} holds {found}, which does not give the shape"
                    f" {tuple(expected.shape)} that the configuration asks for. They do not belong together."
                )

    def shape_of(self, recipe: Recipe) -> tuple[int, ...] | None:
        """Return the shape that a recipe gives, `None` if its tensors do not fit together."""
        try:
            return tuple(recipe.make(*(self.weights.meta(source) for source in recipe.sources)).shape)
        except (RuntimeError, IndexError, ValueError):
            return None

    def layout(self, dtype: torch.dtype | None) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return data type and shape of every tensor; `dtype` is `None` for what is stored."""
        layout, most_common = {}, Counter(self.weights.dtypes.values()).most_common(1)[0][0]
        for name, expected in self.model.state_dict().items():
            recipe = self.recipes[name]
            stored = {self.weights.dtypes[source] for source in recipe.sources} or {most_common}
            kind = dtype or (stored.pop() if len(stored) == 1 else torch.float32)
            layout[name] = (kind, tuple(expected.shape))
        return layout

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Read one tensor after the other, in memory of its own; `dtype` is `None` for what is stored.

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
        """Return the model with its values, in evaluation mode."""
        self.model.load_state_dict(dict(self.tensors(dtype)), assign=True)
        return self.model.eval()


def check_nothing_left(weights: Weights, components: Iterable[Component], is_ignored: Callable[[str], bool]) -> None:
    """Raise a ValueError if the file holds tensors that no recipe uses.

    Args:
        weights: the official file.
        components: all that is made from it.
        is_ignored: tells the names of tensors that may be left over.
    """
    used = {name for one in components for recipe in one.recipes.values() for name in recipe.sources}
    left = [name for name in weights.shapes if name not in used and not is_ignored(name)]
    if left:
        raise ValueError(
            f"{str(weights.path)!r} holds tensors that flextok_hf does not know: {shorten_list(left)}. They may change"
            " what the model computes, so the checkpoint is not converted."
        )


def check_shape(weights: Weights, name: str, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless a tensor is there in the shape that the configuration asks for."""
    found = weights.shapes.get(name)
    if found != shape:
        state = "is missing" if found is None else f"has the shape {found}"
        raise ValueError(f"`{name}` in {str(weights.path)!r} {state}, and the configuration asks for {shape}.")


def check_num_blocks(weights: Weights, prefix: str, num_blocks: int) -> None:
    """Raise a ValueError unless the tensors under `prefix` are those of `num_blocks` blocks, numbered from 0."""
    indices = {name.removeprefix(prefix).partition(".")[0] for name in weights.shapes if name.startswith(prefix)}
    if len(indices) != num_blocks:
        raise ValueError(
            f"{str(weights.path)!r} holds {len(indices)} blocks `{prefix}...`, and the configuration asks for"
            f" {num_blocks}."
        )


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a model without memory for its values.

    Raises:
        ValueError: if its settings do not fit together.
    """
    try:
        with torch.device("meta"):
            return make()
    except Exception as error:  # settings of an untrusted file can fail anywhere in the libraries
        raise ValueError(f"the model cannot be built from its configuration: {error}") from error
