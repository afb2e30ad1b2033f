"""Official checkpoints: a Hub id, folder or file -> its configuration and lazily read weights."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..models.saved_model import read_header
from .settings import MAX_CHARACTERS, Section, parse_settings, shorten


WEIGHTS_NAME = "model.safetensors"
VAE_CONFIG_NAME = "vae_config.json"
CONFIG_NAMES = {"tokenizer": "config.json", "prior": "config.yaml"}
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Parts of the configuration in the metadata of a single file; every library writes `format`.
METADATA_SECTIONS = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline")
METADATA_NAMES = {*METADATA_SECTIONS, "_target_", "format"}


class Weights:
    """Tensors of a safetensors file, memory-mapped and read one at a time."""

    def __init__(self, path: Path):
        read_header(path)
        self.path = path
        try:
            self.file = safe_open(path, "pt")
            slices = {name: self.file.get_slice(name) for name in sorted(self.file.keys())}
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is damaged or truncated ({error}). Fetch it again.") from None
        self.metadata: dict[str, str] = self.file.metadata() or {}
        self.shapes = {name: tuple(one.get_shape()) for name, one in slices.items()}
        unknown = {name: one.get_dtype() for name, one in slices.items() if one.get_dtype() not in DTYPES}
        if unknown:
            name, dtype = next(iter(unknown.items()))
            raise ValueError(
                f"{str(path)!r} holds `{name}` as {dtype}, but weights must be {', '.join(DTYPES)}. Convert it to one"
                " of them first."
            )
        self.dtypes = {name: DTYPES[one.get_dtype()] for name, one in slices.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def meta(self, name: str) -> Tensor:
        """Return a tensor's shape and data type without its values."""
        return torch.empty(self.shapes[name], dtype=self.dtypes[name], device="meta")

    def read(self, name: str) -> Tensor:
        """Return a tensor as it is stored; do not change it.

        Raises:
            ValueError: if it holds values that are not finite.
        """
        tensor = self.file.get_tensor(name)
        if not tensor.isfinite().all():
            raise ValueError(f"`{name}` in {str(self.path)!r} holds values that are not finite. Fetch it again.")
        return tensor


@dataclass(frozen=True)
class Checkpoint:
    """An opened official checkpoint.

    name: as the user gave it.
    folder: where its files are on this machine.
    is_local: the user gave a folder or file; its configuration may then refer to folders beside it.
    settings: its configuration.
    weights: its tensors.
    """

    name: str
    folder: Path
    is_local: bool
    settings: Section
    weights: Weights


def open_checkpoint(name: str | os.PathLike, kind: str, ignore: Sequence[str] = (), **hub_options: Any) -> Checkpoint:
    """Open an official checkpoint; no tensor values are read yet.

    Args:
        name: Hub id, folder or safetensors file.
        kind: "tokenizer" or "prior".
        ignore: paths of settings to ignore.
        hub_options: `revision`, `cache_dir`, `token` and `local_files_only` for the Hub.

    Raises:
        ValueError: if it is not such a checkpoint, or is damaged.
        OSError: if files are missing, or the Hub cannot be reached.
    """
    name = os.fspath(name)
    if not name:
        raise ValueError(f"The name of the {kind} is empty. Pass a Hub id, a folder or a safetensors file.")
    path = Path(name).expanduser()
    is_local = path.exists()
    if is_local and hub_options.get("revision") is not None:
        raise ValueError(f"{name!r} is a local path, which has no revisions. Leave out the revision.")
    folder = path if is_local else download(name, kind, hub_options)
    if is_local and not folder.is_dir():
        weights_path, folder = folder, folder.parent
        check_file(weights_path, name)
    else:
        weights_path = folder / WEIGHTS_NAME
        check_folder(folder, name)
    weights = Weights(weights_path)
    values = read_settings(name, kind, folder, weights, is_file=weights_path == path)
    ignored = frozenset([ignore] if isinstance(ignore, str) else ignore)
    return Checkpoint(name, folder, is_local, Section(values, name, ignored=ignored), weights)


def download(name: str, kind: str, hub_options: dict[str, Any]) -> Path:
    """Download the configuration and weights of a Hub repository, or find them in the cache."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name!r} is neither a folder or file nor a Hub id of the form owner/name.")
    validate_repo_id(name)
    patterns = [WEIGHTS_NAME, CONFIG_NAMES[kind], VAE_CONFIG_NAME]
    return Path(snapshot_download(name, allow_patterns=patterns, **hub_options))


def check_folder(folder: Path, name: str) -> None:
    """Raise an error unless a folder has weights that can be read."""
    if (folder / "model_index.json").is_file():
        raise ValueError(
            f"{name!r} is already a pipeline of this package. Load it with `FlexTokPipeline.from_pretrained`."
        )
    if (folder / WEIGHTS_NAME).is_file():
        return
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLE_ENDINGS)
    hint = f" Pickle files can run code and are not read: {', '.join(pickles)}." if pickles else ""
    raise FileNotFoundError(f"{name!r} has no `{WEIGHTS_NAME}`, the only weights file that is read.{hint}")


def check_file(path: Path, name: str) -> None:
    """Raise an error unless a path is a safetensors file."""
    if path.suffix in PICKLE_ENDINGS:
        raise ValueError(
            f"{name!r} is a pickle file, which can run code. Pass the safetensors file of the same release."
        )
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(f"{name!r} is not a safetensors file. Pass the folder of a checkpoint, or its weights.")


def read_settings(name: str, kind: str, folder: Path, weights: Weights, is_file: bool) -> Any:
    """Read the configuration: for a tokenizer `config.json` or the weights' metadata, for a prior `config.yaml`.

    If the user passed a folder, its configuration file takes precedence, as in the official loader from the Hub; if
    the user passed a file, its metadata does.
    """
    path = folder / CONFIG_NAMES[kind]
    has_metadata = kind == "tokenizer" and any(section in weights.metadata for section in METADATA_SECTIONS)
    if has_metadata and (is_file or not path.is_file()):
        return parse_metadata(name, weights.metadata)
    if path.is_file():
        return parse_settings(read_text(path), path.suffix.removeprefix("."), f"`{path.name}` of {name!r}")
    other = {"tokenizer": "prior", "prior": "tokenizer"}[kind]
    hint = f" It looks like a {other}: pass it as `{other}`." if (folder / CONFIG_NAMES[other]).is_file() else ""
    or_metadata = " and its weights carry no configuration" if kind == "tokenizer" else ""
    raise FileNotFoundError(f"{name!r} has no `{path.name}`{or_metadata}.{hint}")


def read_text(path: Path) -> str:
    """Read a configuration file, unless it is too large to be one.

    Raises:
        ValueError: if it is too large, or not text.
    """
    if path.stat().st_size > 4 * MAX_CHARACTERS:  # a character has four bytes at most
        raise ValueError(
            f"{str(path)!r} has {path.stat().st_size:,} bytes, but no configuration needs more than"
            f" {MAX_CHARACTERS:,}. It was not read."
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{str(path)!r} is not a text file. Fetch it again.") from None


def parse_metadata(name: str, metadata: dict[str, str]) -> dict[str, Any]:
    """Read the configuration in the metadata of a single file, one Python literal per section."""
    unknown = sorted(set(metadata) - METADATA_NAMES)
    if unknown:
        raise ValueError(f"the metadata of {name!r} has parts that flextok_hf does not know: {shorten(unknown)}.")
    values: dict[str, Any] = {
        section: parse_settings(metadata[section], "literal", f"`{section}` in the metadata of {name!r}")
        for section in METADATA_SECTIONS
        if section in metadata
    }
    if "_target_" in metadata:
        values["_target_"] = metadata["_target_"]
    return values
