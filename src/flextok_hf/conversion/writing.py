"""Write converted models: one tensor at a time into files of limited size, a folder as a whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor
from tqdm.auto import tqdm

from ..utils.files import check_output_folder, temporary_beside, writing_error
from .components import Component


DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a folder to fill; it is renamed to `path` in one step on success and deleted on failure.

    Args:
        path: must not exist or be an empty folder; its parent must exist.
    """
    path = check_output_folder(path)
    temporary = temporary_beside(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.is_dir():
            path.rmdir()  # it is empty; some systems cannot rename over it
        os.replace(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if (named := writing_error(error, path)) is not None:
            raise named from error
        raise


def check_space(folder: Path, needed: int) -> None:
    """Raise an OSError if fewer than `needed` bytes are free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{str(folder)!r} has {free / 1e9:.1f} GB of free space, but {needed / 1e9:.1f} GB are needed.")


def num_bytes(layout: Layout) -> int:
    return sum(dtype.itemsize * prod(shape) for dtype, shape in layout.values())


def write_component(
    folder: Path, component: Component, dtype: torch.dtype | None, max_shard_bytes: int, title: str | None = None
) -> None:
    """Write configuration and weights as `save_pretrained` would, with only one tensor in memory at a time.

    Args:
        folder: created if it does not exist.
        component: the model to write.
        dtype: of the weights; `None` keeps the stored data type.
        max_shard_bytes: maximum size of a weight file, unless a single tensor is larger.
        title: name of the progress bar; `None` shows none.
    """
    folder.mkdir(exist_ok=True)
    layout, model = component.layout(dtype), component.model
    if isinstance(model, ModelMixin):
        stem = "diffusion_pytorch_model"
        model.save_config(folder)
    else:
        stem = "model"
        dtypes = {str(one).removeprefix("torch.") for one, _ in layout.values()}
        model.config.dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    is_hidden = True if title is None else None  # None: shown only in a terminal
    tensors = tqdm(component.tensors(dtype), title, len(layout), unit=" tensors", disable=is_hidden, leave=False)
    write_shards(folder, stem, layout, iter(tensors), max_shard_bytes)


def write_shards(
    folder: Path, stem: str, layout: Layout, tensors: Iterator[tuple[str, Tensor]], max_shard_bytes: int
) -> None:
    """Write tensors, given in the order of `layout`, to one file, or to several with an index."""
    shards: list[Layout] = [{}]
    for name, entry in layout.items():
        if shards[-1] and num_bytes(shards[-1]) + num_bytes({name: entry}) > max_shard_bytes:
            shards.append({})
        shards[-1][name] = entry
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file_name = f"{stem}{suffix}.safetensors"
        write_safetensors(folder / file_name, shard, tensors)
        weight_map.update(dict.fromkeys(shard, file_name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": num_bytes(layout)}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_safetensors(path: Path, layout: Layout, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write a file in the format of https://github.com/huggingface/safetensors, with one tensor in memory at a time.

    Args:
        path: output file.
        layout: data type and shape of every tensor.
        tensors: at least those of `layout`, in its order; only those are consumed.
    """
    header: dict = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in layout.items():
        end = position + dtype.itemsize * prod(shape)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in layout.items():
            given_name, tensor = next(tensors)
            assert given_name == name and (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), name
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
