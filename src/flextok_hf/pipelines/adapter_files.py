"""Files of adapters: one safetensors file holds the LoRA of all parts of a pipeline, with its settings as metadata."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..embedded import EMBEDDED_MODEL_FOLDER
from ..models.low_rank import LowRankAdapter
from ..models.saved_model import local_folder, read_header
from ..utils.files import read_json, write_atomically
from ..utils.numbers import is_finite_number


FACTS_KEY = "flextok_adapter"  # of a file's metadata: the tokens that it was trained with, and its base model
SAVED_FOLDER, INDEX = "adapters", "adapters.json"  # in the folder of a pipeline that was saved with adapters

Adapter = dict[str, LowRankAdapter]  # by the part of the pipeline


def check_target(save_directory: str | os.PathLike, **texts: Sequence[str]) -> Path:
    """Check where an adapter goes and what its card says, by name of the argument; returns the folder."""
    if not isinstance(save_directory, str | os.PathLike) or os.path.isfile(save_directory):
        raise ValueError(f"`save_directory` must be a folder, got {str(save_directory)[:200]!r}.")
    for name, values in texts.items():
        if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"`{name}` must be a list of strings, got {str(values)[:80]!r}.")
    return Path(save_directory)


def write_file(adapter: Adapter, facts: dict[str, Any], path: Path) -> None:
    """Write an adapter in the format of Diffusers, with facts about the model that it is for."""
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for part, own in adapter.items():
        tensors |= {f"{part}.{key}": value.cpu().contiguous() for key, value in own.tensors.items()}
        settings |= {f"{part}.{key}": value for key, value in own.settings.items()}
    metadata = {LORA_ADAPTER_METADATA_KEY: settings, FACTS_KEY: facts}
    texts = {"format": "pt", **{key: json.dumps(value, sort_keys=True) for key, value in metadata.items()}}
    content = save(tensors, texts)  # `save_file` would let nobody else read it
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(content))


def facts_of(config: Any, encoder: Any, adapter: Adapter, prompts: Sequence[str]) -> dict[str, Any]:
    """Return what an adapter's file says about the model that it is for, and about itself."""
    base = str(config.get("_name_or_path") or "")
    if Path(base).is_dir():  # where it lies on this machine is nobody's business
        base = "the embedded model" if Path(base) == EMBEDDED_MODEL_FOLDER else Path(base).name
    return {
        "base_model": base,
        "token_layout": encoder.config.token_layout,
        "num_registers": encoder.config.num_registers,
        "codebook_size": encoder.quantizer.codebook_size,
        "changes_token_ids": "encoder" in adapter,
        "prompts": list(prompts),
    }


def find_file(
    name: str | os.PathLike, weight_name: str | None, subfolder: str | None, hub_options: dict[str, Any]
) -> Path:
    """Return the file of an adapter, which is downloaded if `name` is a Hub id."""
    if not isinstance(name, str | os.PathLike) or not str(name):
        raise TypeError(
            f"`pretrained_model_name_or_path` must be a folder, a file or a Hub id, got {str(name)[:80]!r}."
        )
    path = Path(name)
    if path.is_file():
        path, weight_name = path.parent, path.name
    weight_name = LORA_WEIGHT_NAME_SAFE if weight_name is None else weight_name
    for argument, value in (("weight_name", weight_name), ("subfolder", subfolder)):
        if value is not None and (not isinstance(value, str) or ".." in value or "\0" in value):
            raise ValueError(f"`{argument}` must be a name within the folder or repository, got {str(value)[:80]!r}.")
    if not weight_name.endswith(".safetensors"):
        raise ValueError(
            f"`weight_name` {weight_name!r} is not a safetensors file, and other files can run code. Convert it first."
        )
    inner = os.path.join(subfolder or "", weight_name)
    try:
        folder = path if path.is_dir() else local_folder(str(name), [inner], **hub_options)
    except (OSError, ValueError) as error:
        raise OSError(
            f"`pretrained_model_name_or_path` {str(name)[:200]!r} is no folder, and the Hub did not give it: {error}"
        ) from error
    if not (folder / inner).is_file():
        others = sorted(file.name for file in (folder / (subfolder or "")).glob("*.safetensors"))
        hint = f"It has {', '.join(others[:8])}: pass one as `weight_name`." if others else "Check the path."
        pickles = any((folder / (subfolder or "")).glob("*.bin"))
        hint = "Pickle files (.bin) can run code and are not read: convert them." if pickles and not others else hint
        within_folder = f" (`subfolder` {subfolder!r})" if subfolder else ""
        raise FileNotFoundError(
            f"`pretrained_model_name_or_path` {str(name)!r} has no {inner!r}{within_folder}, the weights of an"
            f" adapter. {hint}"
        )
    return folder / inner


def read_file(path: Path, source: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return the tensors of an adapter's file, PEFT's settings, and the facts about its base model."""
    try:
        read_header(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            groups = [json.loads(metadata.get(key, "{}")) for key in (LORA_ADAPTER_METADATA_KEY, FACTS_KEY)]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # whatever the parsers raise for damaged files
        if isinstance(error, MemoryError):
            raise
        raise OSError(f"{source} cannot be read ({str(error)[:300]}). Fetch or save it again.") from error
    if not all(isinstance(group, dict) for group in groups) or not groups[0]:
        raise ValueError(
            f"{source} has no settings of LoRA in its metadata ({LORA_ADAPTER_METADATA_KEY}), so its scale is unknown."
            " Save it with `save_lora_weights`, or with Diffusers 0.33 or newer."
        )
    prompts = groups[1].setdefault("prompts", [])
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"{source}: `prompts` in its metadata must be a list of texts, got {str(prompts)[:80]}.")
    return tensors, *groups


def read_index(path: Path) -> tuple[list[str], dict[str, float], bool]:
    """Return the adapters that a pipeline was saved with, the weights of the active ones, and whether they are on."""
    index = read_json(path)
    entries: list[Any] = [
        index.get(key) if isinstance(index, dict) else None for key in ("adapters", "active", "is_on")
    ]
    names, active, is_on = entries
    is_valid = isinstance(names, list) and isinstance(active, dict) and isinstance(is_on, bool)
    if not is_valid or not set(active) <= set(names) or not all(map(is_finite_number, active.values())):
        raise ValueError(
            f"{str(path)!r} must list `adapters`, those `active` with weights, and `is_on`. Save it again."
        )
    return names, active, is_on


def within(part: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the entries whose names begin with a part of the pipeline, without it."""
    return {name[len(part) + 1 :]: value for name, value in values.items() if name.startswith(f"{part}.")}


def remove_saved_adapters(folder: Path) -> None:
    """Remove the adapters of a pipeline that was saved in this folder before."""
    if (folder / SAVED_FOLDER / INDEX).is_file():
        shutil.rmtree(folder / SAVED_FOLDER)
