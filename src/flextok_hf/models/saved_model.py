"""Folders with a saved model: checked by name before the libraries, which trust their files, read them."""

import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from .argument_checks import MAX_SIZE
from .settings_checks import check_types, check_vae_settings, describe_in, refuse


Shapes = dict[str, tuple[int, ...]]
REMEDY = "Fetch or save it again."
# Limits that no model reaches; the largest tokenizers, of many languages, have about half of it
MAX_HEADER_BYTES, MAX_JSON_BYTES, MAX_TEXT_BYTES = 8 * 2**20, 4 * 2**20, 64 * 2**20
MAX_LAYERS = 1000
TEXT_ENDINGS = (".json", ".txt", ".model", ".jinja")
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
WORD_LISTS = ("known_names", "known_words")  # of a prior, which checks them; all other lists have a value per layer
NOT_SETTINGS = ("tokenizer.json", "vocab.json")  # large, and read by libraries that check them


@contextmanager
def named_errors(source: str, name: str) -> Iterator[None]:
    """Turn what the libraries raise for bad files into a ValueError or OSError that names them; only done here.

    Args:
        source: what is loaded, in words.
        name: its folder or Hub id; errors of these types that mention it are kept.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, ValueError | OSError) and name in str(error):
            raise
        if isinstance(error, RuntimeError) and torch.get_default_device().type == "meta":
            raise  # about the call, not about files
        # the loop of Diffusers over the components of a pipeline does not say which one failed
        frames = [frame for frame, _ in walk_tb(error.__traceback__) if frame.f_code.co_name == "load_sub_model"]
        part = f"`{frames[0].f_locals.get('name')}` of " if frames else ""
        reason = " ".join(str(error).split())[:600]
        kind = OSError if isinstance(error, OSError | SafetensorError) else ValueError
        raise kind(
            f"{part}{source} cannot be loaded ({type(error).__name__}: {reason}). Check the arguments of the call; if"
            " they are right, fetch or save the files again."
        ) from error


def check_files(folder: Path) -> None:
    """Raise an error unless all files of a folder, or those they link to, are regular files of a plausible size."""
    for entry in os.scandir(folder):
        try:
            status = entry.stat()
        except FileNotFoundError:  # a link to nothing: as good as no file
            continue
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise ValueError(f"{entry.path!r} is a device, pipe or socket, or links to one. Put a regular file there.")
        if entry.name.endswith(TEXT_ENDINGS):
            limit = (
                MAX_TEXT_BYTES if entry.name in NOT_SETTINGS or not entry.name.endswith(".json") else MAX_JSON_BYTES
            )
            if status.st_size > limit:
                raise ValueError(
                    f"{entry.path!r} has {status.st_size:,} bytes, but no model needs more than {limit:,}. {REMEDY}"
                )


def read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON file with a group of settings; all numbers must be finite."""

    def refuse_constant(constant: str) -> None:
        raise ValueError(f"it holds the number {constant}")

    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not a JSON file with settings: {error}. {REMEDY}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} must hold a group of settings, got a {type(values).__name__}. {REMEDY}")
    return values


def check_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the settings in the JSON files of a folder, by file name, after checking all its files."""
    check_files(folder)
    paths = [path for path in sorted(folder.glob("*.json")) if path.name not in NOT_SETTINGS and path.is_file()]
    return {path.name: read_settings(path) for path in paths}


def read_header(path: Path) -> bytes:
    """Read the header of a safetensors file.

    Raises:
        ValueError: if the file cannot be in this format, or its header is too long.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{str(path)!r} is damaged, truncated or not a safetensors file: it has {size:,} bytes, but its header"
                f" claims {length:,}. {REMEDY}"
            )
        if length > MAX_HEADER_BYTES:
            raise ValueError(
                f"{str(path)!r} has a header of {length:,} bytes, but no checkpoint needs more than"
                f" {MAX_HEADER_BYTES:,}. It was not read."
            )
        return file.read(length)


def read_shapes(path: Path, is_quantized: bool = False) -> Shapes:
    """Read the names and shapes of the tensors of a weight file from its header, which must account for every byte."""
    try:
        text = read_header(path)
    except ValueError as error:
        raise OSError(f"The checkpoint file {error}") from error
    except OSError as error:
        raise OSError(f"The checkpoint file {str(path)!r} cannot be read ({error}). {REMEDY}") from error
    try:
        header = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        size = 8 + len(text) + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size != path.stat().st_size:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, but its header accounts for {size:,}")
        for name, entry in header.items():  # positions are whole numbers in some models
            if "F" not in entry["dtype"] and not is_quantized and not name.endswith("_ids"):
                raise ValueError(f"{name!r} is stored as {entry['dtype']}, but weights are floating point numbers")
        return {name: tuple(entry["shape"]) for name, entry in header.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"The checkpoint file {str(path)!r} cannot be read ({error}). {REMEDY}") from error


def read_index(path: Path, ending: str) -> dict[str, list[str]]:
    """Read which tensors the shards of a model hold; all must be files of this kind in the folder of the index."""
    index = read_settings(path)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places or not isinstance(index.get("metadata"), dict):
        raise ValueError(f"{str(path)!r} must have the groups `metadata` and `weight_map`. {REMEDY}")
    shards: dict[str, list[str]] = {}
    for name, shard in places.items():
        if not isinstance(shard, str) or "/" in shard or "\\" in shard or not shard.endswith(ending):
            raise ValueError(
                f"{str(path)!r} says that {name!r} is in {shard!r}, but it must be the name of a `{ending}` file in"
                " the same folder. Save the model again."
            )
        shards.setdefault(shard, []).append(name)
    for shard in shards:
        if not (path.parent / shard).is_file():
            raise FileNotFoundError(f"{str(path)!r} names {shard!r}, which is not there. {REMEDY}")
    return shards


def weight_names(kind: type, variant: str | None, use_safetensors: bool) -> tuple[str, str, str]:
    """Return the names of a class's weight file, of the index of several files, and a pattern for these."""
    stem = "diffusion_pytorch_model" if issubclass(kind, ModelMixin) else "model"
    if not use_safetensors and stem == "model":
        stem = "pytorch_model"
    ending, dot = ".safetensors" if use_safetensors else ".bin", "" if variant is None else f".{variant}"
    return f"{stem}{dot}{ending}", f"{stem}{ending}.index{dot}.json", f"{stem}{dot}-*{ending}"


def local_folder(name: str | os.PathLike, file_names: Sequence[str], **hub_options: Any) -> Path:
    """Return the folder called `name`, or else that of a repository on the Hub, with these files downloaded.

    Args:
        name: folder or Hub id.
        file_names: or patterns of them.
        hub_options: `revision`, `cache_dir`, `token`, `local_files_only` and `force_download`; others are ignored.
    """
    if os.path.isdir(name):
        return Path(name)
    name = os.fspath(name)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name!r} is neither a folder nor a Hub id of the form owner/name.")
    options = {key: hub_options[key] for key in HUB_OPTIONS if hub_options.get(key) is not None}
    return Path(snapshot_download(name, allow_patterns=list(file_names), **options))


def read_weights(
    folder: Path, kind: type, variant: str | None, use_safetensors: bool, is_quantized: bool
) -> Shapes | None:
    """Read the shapes of the tensors that a class would load from a folder; `None` for pickle files."""
    single, index = (folder / name for name in weight_names(kind, variant, use_safetensors)[:2])
    ending = single.suffix
    if index.is_file() and (issubclass(kind, ModelMixin) or not single.is_file()):  # which of both the library reads
        shapes: Shapes = {}
        for shard, names in read_index(index, ending).items():
            found = read_shapes(folder / shard, is_quantized) if use_safetensors else {}
            missing = sorted(set(names) - set(found)) if use_safetensors else []
            if missing:
                raise lacking(kind, folder / shard, missing)
            shapes.update(found)
    elif single.is_file():
        shapes = read_shapes(single, is_quantized) if use_safetensors else {}
    else:
        pickles = sorted(path.name for path in folder.glob("*.bin")) if use_safetensors else []
        hint = "Pickle files can run code and are read with `use_safetensors=False` only." if pickles else REMEDY
        raise FileNotFoundError(f"{str(folder)!r} has no `{single.name}`, the weights of {kind.__name__}. {hint}")
    return shapes if use_safetensors else None


def lacking(kind: type, place: str | Path, names: list[str]) -> ValueError:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ValueError(
        f"The checkpoint file of {kind.__name__} in {str(place)!r} lacks weights: {', '.join(names[:8])}{more}. Fetch"
        " or save it again, and check that its config.json matches these weights."
    )


def check_plausible(value: Any, max_layers: int, place: Path, name: str = "") -> None:
    """Raise a ValueError for sizes in a configuration that no model has, before anything of that size is made."""
    if isinstance(value, dict):
        for key, entry in value.items():
            check_plausible(entry, max_layers, place, key)
    elif isinstance(value, list) and name not in WORD_LISTS:
        check_plausible(len(value), max_layers, place, f"the number of layers in {name}")
        for entry in value:
            check_plausible(entry, max_layers, place, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        limit = max_layers if "layers" in name else MAX_SIZE
        if not abs(value) <= limit:
            raise ValueError(
                f"`{name}` in {str(place)!r} is {value}, but with these weights at most {limit}. {REMEDY}"
            )


def check_shapes(model: nn.Module, stored: Shapes, place: str | Path) -> None:
    """Raise a ValueError if a model on the meta device does not match its weight file, before memory is taken.

    Names may differ if the library renames tensors, but there cannot be more weights than in the file.
    """
    expected = model.state_dict(keep_vars=True)
    for name, tensor in expected.items():
        if name in stored and tuple(tensor.shape) != stored[name]:
            raise ValueError(
                f"The weights of {type(model).__name__} in {str(place)!r} hold `{name}` of shape {stored[name]}, but"
                f" its config.json asks for {tuple(tensor.shape)}. They do not match: fetch or save both again."
            )
    missing = missing_names(expected, stored)
    unknown = sum(math.prod(shape) for name, shape in stored.items() if name not in expected)
    if missing and sum(expected[name].numel() for name in missing) > unknown:
        raise lacking(type(model), place, missing)


def missing_names(expected: dict[str, Tensor], stored: Shapes) -> list[str]:
    """Return the tensors that a file lacks; one of several names of a shared tensor is enough."""
    if expected.keys() <= stored.keys():
        return []
    found = {id(tensor) for name, tensor in expected.items() if name in stored}
    return sorted(name for name, tensor in expected.items() if id(tensor) not in found)


def check_saved_model(folder: Path, kind: type, variant: str | None, use_safetensors: bool) -> Shapes | None:
    """Check the folder of a saved model before it is loaded.

    Args:
        folder: on this machine.
        kind: class of the model, of Transformers or Diffusers.
        variant: of the weights; `None` for the usual ones.
        use_safetensors: whether safetensors are read; False for pickle files, whose tensors are not looked at.

    Returns:
        Names and shapes of the stored tensors; `None` for pickle files.

    Raises:
        ValueError: if settings or weights are incomplete, do not match or are not plausible.
        OSError: if files are missing or damaged.
    """
    place, settings = folder / "config.json", check_folder(folder).get("config.json")
    if settings is None:
        raise FileNotFoundError(f"{str(folder)!r} has no `config.json`, the settings of {kind.__name__}. {REMEDY}")
    is_quantized = "quantization_config" in settings
    stored = read_weights(folder, kind, variant, use_safetensors, is_quantized)
    check_plausible(settings, max(MAX_LAYERS if stored is None else len(stored), 100), place)
    for name in ("dtype", "torch_dtype"):
        value = settings.get(name)
        if value is not None and not isinstance(getattr(torch, str(value), None), torch.dtype):
            refuse(f"`{name}` in {str(place)!r}", "a data type of PyTorch", value)
    if not isinstance(settings.get("model_type", ""), str):
        refuse(f"`model_type` in {str(place)!r}", "a string", settings["model_type"])
    if issubclass(kind, ModelMixin):
        check_types(kind, settings, describe_in(place))
    if issubclass(kind, AutoencoderKL):
        check_vae_settings(settings, describe_in(place))
    return None if is_quantized else stored


def check_foreign_model(folder: Path, kind: type[PreTrainedModel], stored: Shapes | None) -> None:
    """Compare the weights of a model of Transformers, which would fill the memory before it compares them itself."""
    place = folder / "config.json"
    with named_errors(f"the configuration {str(place)!r} of {kind.__name__}", str(folder)):
        with torch.device("meta"), no_init_weights():
            model = kind(kind.config_class.from_dict(read_settings(place)))
        model.tie_weights()
    if stored is not None:
        check_shapes(model, stored, folder)


def check_loaded(model: nn.Module, source: str) -> None:
    """Raise a ValueError if tensors of a loaded model have no values or weights are no real numbers.

    Offloaded weights are on the meta device, and quantized ones are whole numbers.
    """
    if getattr(model, "is_quantized", False) or hasattr(model, "hf_device_map"):
        return
    for prefix, module in model.named_modules():
        for name, tensor in [
            *module._parameters.items(),
            *module._buffers.items(),
        ]:
            is_weight = isinstance(tensor, nn.Parameter)
            if tensor is not None and (tensor.is_meta or is_weight and not tensor.is_floating_point()):
                state = "has no values" if tensor.is_meta else f"is stored as {tensor.dtype}"
                raise ValueError(f"`{prefix}.{name}` of {source} {state} after loading. {REMEDY}")
