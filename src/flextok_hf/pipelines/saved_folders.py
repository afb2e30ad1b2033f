"""Folders with a saved pipeline: checked component by component before and after Diffusers loads them."""

import glob
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.modeling_decoder import FlexTokFlowDecoder
from ..models.modeling_encoder import FlexTokEncoder
from ..models.modeling_prior import FlexTokPriorForCausalLM
from ..models.saved_model import (
    MAX_LAYERS,
    REMEDY,
    Shapes,
    check_files,
    check_folder,
    check_foreign_model,
    check_loaded,
    check_plausible,
    check_saved_model,
    lacking,
    missing_names,
    named_errors,
    read_settings,
)
from ..models.settings_checks import check_types, describe_in
from ..models.whole_weights import WholeWeightsMixin
from ..utils.numbers import is_finite_number


INDEX = "model_index.json"
KINDS: dict[str, type] = {
    "encoder": FlexTokEncoder,
    "decoder": FlexTokFlowDecoder,
    "prior": FlexTokPriorForCausalLM,
    "vae": ModelMixin,
    "text_encoder": PreTrainedModel,
    "scheduler": SchedulerMixin,
    "tokenizer": PreTrainedTokenizerBase,
}
LIBRARIES = ("diffusers", "transformers", "flextok_hf")


@dataclass(frozen=True)
class SavedModel:
    """A model of another library in a saved pipeline; `stored` is `None` if its weights could not be looked at."""

    kind: Any
    folder: Path
    variant: str | None
    stored: Shapes | None


def load_checked(
    cls: type[DiffusionPipeline], load: Callable[..., Any], name: str | os.PathLike, options: dict[str, Any]
) -> Any:
    """Load a pipeline whose files and components are all checked.

    Args:
        cls: the class, which can download a pipeline.
        load: loads a folder.
        name: folder or Hub id.
        options: of `from_pretrained`.
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"`pretrained_model_name_or_path` must be a folder or a Hub id, got {name!r}.")
    if options.get("use_safetensors") is None:
        options["use_safetensors"] = True  # pickle files can run code: only on request
    source = f"the pipeline {str(name)!r}"
    with named_errors(source, str(name)):
        folder = name if os.path.isdir(name) else cls.download(name, **options)
        saved = check_saved_pipeline(Path(folder), options)
        pipe = load(folder, **options)
        for part, model in saved.items():
            check_complete(model, pipe.components[part], options["use_safetensors"])
        for part, component in pipe.components.items():
            if isinstance(component, nn.Module) and (part in options or not isinstance(component, WholeWeightsMixin)):
                check_loaded(component, f"the `{part}` of {source}")
        pipe.register_to_config(_name_or_path=name)
    return pipe


def check_saved_pipeline(folder: Path, options: dict[str, Any]) -> dict[str, SavedModel]:
    """Check the folder of a pipeline before it is loaded; our own models check theirs themselves.

    Args:
        folder: on this machine.
        options: of `from_pretrained`, with the components that are not loaded from the folder.

    Returns:
        The models of other libraries.
    """
    place = folder / INDEX
    check_files(folder)
    if not place.is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no `{INDEX}`, so it is not a saved pipeline.")
    index, saved = read_settings(place), {}
    for name, value in index.items():
        if name.startswith("default_") and value is not None and not is_finite_number(value):
            raise ValueError(f"`{name}` in {str(place)!r} must be a number or null, got {value!r}. {REMEDY}")
    for name, expected in KINDS.items():
        entry = index.get(name, [None, None])
        if name in options or entry == [None, None]:
            continue
        kind = find_class(entry, f"`{name}` in {str(place)!r}", expected)
        part = folder / name if (folder / name).is_dir() else folder
        if not issubclass(kind, ModelMixin | PreTrainedModel):
            settings = check_folder(part)
            if issubclass(kind, SchedulerMixin):
                path = part / "scheduler_config.json"
                check_types(kind, settings.get(path.name, {}), describe_in(path))
                check_plausible(settings.get(path.name, {}), MAX_LAYERS, path)
        elif not issubclass(kind, WholeWeightsMixin):
            saved[name] = check_model(part, kind, options)
    return saved


def find_class(entry: Any, where: str, expected: type) -> type:
    """Return the class of an entry of the index, which must be of one of three libraries and of the expected kind."""
    is_entry = isinstance(entry, list) and len(entry) == 2 and all(isinstance(one, str) for one in entry)
    if not is_entry or entry[0].partition(".")[0] not in LIBRARIES:
        raise ValueError(
            f"{where} must be a list of a library ({', '.join(LIBRARIES)}) and one of its classes, got"
            f" {str(entry)[:80]!r}. Save the pipeline again, or pass this component to `from_pretrained`."
        )
    kind = getattr(importlib.import_module(entry[0]), entry[1], None)
    if not isinstance(kind, type) or not issubclass(kind, expected):
        raise ValueError(f"{where} must be a {expected.__name__}, got {entry[1]!r}. {REMEDY}")
    return kind


def check_model(folder: Path, kind: type, options: dict[str, Any]) -> SavedModel:
    """Check the folder of a model of another library."""
    variant = options.get("variant")
    if variant is not None and not any(folder.glob(f"*.{glob.escape(variant)}.*")):
        variant = None  # not every component has it
    stored = check_saved_model(folder, kind, variant, options["use_safetensors"])
    if issubclass(kind, PreTrainedModel):
        check_foreign_model(folder, kind, stored)
    return SavedModel(kind, folder, variant, stored)


def check_complete(saved: SavedModel, model: nn.Module, use_safetensors: bool) -> None:
    """Raise a ValueError if a loaded model of another library has weights that its files lack."""
    if saved.stored is not None and not missing_names(model.state_dict(keep_vars=True), saved.stored):
        return
    # Other names: only the library knows whether it renames them. It does not keep its report, so it loads again.
    options = {"variant": saved.variant, "use_safetensors": use_safetensors, "output_loading_info": True}
    _, report = saved.kind.from_pretrained(saved.folder, **options)
    if report["missing_keys"]:
        raise lacking(saved.kind, saved.folder, sorted(report["missing_keys"]))
