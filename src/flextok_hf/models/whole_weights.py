"""Loading of saved weights: all of them, or an error."""

import os
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from .saved_model import (
    Shapes,
    check_loaded,
    check_saved_model,
    check_shapes,
    lacking,
    local_folder,
    named_errors,
    weight_names,
)


# Of the model that is being loaded: its class, the shapes of its stored tensors, and where they are
STORED: ContextVar[tuple[type, Shapes, str] | None] = ContextVar("STORED", default=None)


class WholeWeightsMixin:
    """Makes `from_pretrained` refuse damaged or incomplete weights; must precede the library's base class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a model from a folder or the Hub as its library does, but never with missing weights.

        The libraries only warn about them: Transformers initializes them randomly, Diffusers not at all. Pickle files
        (`.bin`) are read with `use_safetensors=False` only. Settings and headers are compared before memory is taken.

        Raises:
            ValueError: if weights are missing or do not match the settings, or settings are not valid.
            OSError: if files are missing or cannot be read.
        """
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True  # pickle files can run code: only on request
        with_report = kwargs.pop("output_loading_info", False)
        name = pretrained_model_name_or_path
        source = f"{cls.__name__} in {str(name)!r}"
        with named_errors(source, str(name)):
            folder, stored = name, None
            if name is not None and kwargs.get("state_dict") is None:  # otherwise there are no files
                folder, stored = _check(cls, name, kwargs)
            if kwargs.get("ignore_mismatched_sizes"):
                stored = None
            token = STORED.set(None if stored is None else (cls, stored, str(name)))
            try:
                model, report = super().from_pretrained(  # type: ignore[misc]
                    folder, *args, output_loading_info=True, **kwargs
                )
            finally:
                STORED.reset(token)
            if report["missing_keys"]:
                raise lacking(cls, str(name), sorted(report["missing_keys"]))
            check_loaded(model, source)
        if str(folder) != str(name):  # the id, not the folder in the cache
            _set_name(model, name)
        return (model, report) if with_report else model

    def post_init(self):
        """Finish the model as Transformers does; one that is being loaded is still on the meta device here."""
        super().post_init()  # type: ignore[misc]
        loading = STORED.get()
        if loading is not None and type(self) is loading[0]:
            check_shapes(self, *loading[1:])


def _check(kind: type, name: str | os.PathLike, options: dict[str, Any]) -> tuple[Path, Shapes | None]:
    """Return the folder of a model and the shapes of its tensors, both checked."""
    inner, variant, is_safe = options.get("subfolder") or "", options.get("variant"), options["use_safetensors"]
    names = ("config.json", "generation_config.json", *weight_names(kind, variant, is_safe))
    folder = local_folder(name, [os.path.join(inner, one) for one in names], **options)
    return folder, check_saved_model(folder / inner, kind, variant, is_safe)


def _set_name(model: Any, name: str) -> None:
    if isinstance(model, ModelMixin):
        model.register_to_config(_name_or_path=name)
    else:
        model.name_or_path = model.config.name_or_path = name
