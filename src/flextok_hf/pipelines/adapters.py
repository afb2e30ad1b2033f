"""Adapters of a pipeline: LoRA of encoder, decoder and prior in one file, with the methods of Diffusers' pipelines."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..cards.adapter_card import CARD_NAME, adapter_card
from ..models.low_rank import (
    check_adapter_name,
    check_fits,
    merge,
    need_peft,
    parse_adapter,
    put_in,
    read_adapters,
    restore,
    take_out,
    taken_out,
)
from ..models.saved_model import check_files, local_folder
from ..utils.files import write_text
from ..utils.numbers import is_finite_number
from ..utils.words import split_words
from .adapter_files import (
    INDEX,
    LORA_WEIGHT_NAME_SAFE,
    SAVED_FOLDER,
    Adapter,
    check_target,
    facts_of,
    find_file,
    read_file,
    read_index,
    remove_saved_adapters,
    within,
    write_file,
)


PARTS = ("encoder", "decoder", "prior")


class AdapterMixin(DiffusionPipeline):
    """What a pipeline does with adapters; those not in use, or at weight 0, leave no trace in the models.

    Attributes:
        _adapters: all adapters by name, as far as the models do not hold them.
        _adapter_weights: the weights of those that are active.
        _adapters_on: false between `disable_lora` and `enable_lora`.
        _unfused: the weights before `fuse_lora`, by part and layer; empty if nothing is fused.
        _adapter_prompts: what each was trained to draw, as far as its file says.
    """

    _adapters: dict[str, Adapter]
    _adapter_weights: dict[str, float]
    _adapters_on: bool
    _unfused: dict[str, dict[str, Tensor]]
    _adapter_prompts: dict[str, list[str]]

    def __init__(self) -> None:
        super().__init__()
        self._reset_adapters()

    def load_lora_weights(
        self,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str | None = None,
        weight_name: str | None = None,
        subfolder: str | None = None,
        **hub_options: Any,
    ) -> None:
        """Load an adapter, which becomes the only active one; `set_adapters` activates several.

        Args:
            pretrained_model_name_or_path: folder, safetensors file or Hub id.
            adapter_name: name for the other methods; "default_0", "default_1", ... if there is none.
            weight_name: file in the folder or repository; "pytorch_lora_weights.safetensors" by default.
            subfolder: of the folder or repository.
            hub_options: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`.

        Raises:
            ValueError: if it is not a LoRA, or of a model with other layers, sizes or tokens.
            OSError: if files are missing or damaged, or the Hub cannot be reached.
        """
        need_peft()
        self._check_unfused("load_lora_weights")
        self._read_models()
        if adapter_name is None:
            number = next(n for n in range(len(self._adapters) + 1) if f"default_{n}" not in self._adapters)
            adapter_name = f"default_{number}"
        if check_adapter_name(adapter_name) in self._adapters:
            raise ValueError(
                f"`adapter_name` {adapter_name!r} is taken. Choose another, or call `delete_adapters` first."
            )
        path = find_file(pretrained_model_name_or_path, weight_name, subfolder, hub_options)
        self._adapters[adapter_name] = self._read_adapter(path, adapter_name)
        self._adapter_weights = {adapter_name: 1.0}
        self._apply()

    def save_lora_weights(
        self,
        save_directory: str | os.PathLike,
        adapter_name: str | None = None,
        prompts: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> None:
        """Save an adapter as one safetensors file with its settings, and a card beside it.

        Args:
            save_directory: folder, created if needed; upload it with `huggingface_hub.upload_folder`.
            adapter_name: which one; may be left out if there is only one.
            prompts: what it was trained to draw, for the card; their words will not be reported as unknown.
            notes: further sentences for the card.
        """
        self._read_models()
        name = self._only(adapter_name)
        folder = check_target(save_directory, prompts=prompts, notes=notes)
        if prompts:
            self._adapter_prompts[name] = list(prompts)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(self._adapters[name], self._facts(name), folder / LORA_WEIGHT_NAME_SAFE)
        if not (folder / CARD_NAME).exists():
            write_text(folder / CARD_NAME, adapter_card(self._facts(name), self._adapters[name], notes))

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Activate adapters, all at once, with weights that multiply what they add; others become inactive.

        Args:
            adapter_names: one or several.
            adapter_weights: one for all, or one for each; `None` means 1. At 0, an adapter is the same as not there.
        """
        self._check_unfused("set_adapters")
        self._read_models()
        names = self._known(adapter_names)
        weights = adapter_weights if isinstance(adapter_weights, list | tuple) else [adapter_weights] * len(names)
        weights = [1.0 if weight is None else weight for weight in weights]
        if len(weights) != len(names) or not all(is_finite_number(weight) for weight in weights):
            raise ValueError(
                f"`adapter_weights` must be a finite number, or one for each of the {len(names)} adapters, got"
                f" {str(adapter_weights)[:80]}."
            )
        self._adapter_weights = dict(zip(names, map(float, weights), strict=True))
        self._adapters_on = True
        self._apply()

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of the adapters of each part."""
        self._read_models()
        named = {part: [name for name, own in self._adapters.items() if part in own] for part in PARTS}
        return {part: names for part, names in named.items() if names}

    def get_active_adapters(self) -> list[str]:
        """Return the names of the active adapters."""
        self._read_models()
        return list(self._adapter_weights) if self._adapters_on else []

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget adapters by name."""
        self._check_unfused("delete_adapters")
        self._read_models()
        for name in self._known(adapter_names):
            del self._adapters[name]
            self._adapter_weights.pop(name, None)
        self._apply()

    def disable_lora(self) -> None:
        """Turn all adapters off: the models are those without, bit for bit. `enable_lora` turns them on again."""
        self._turn("disable_lora", False)

    def enable_lora(self) -> None:
        """Turn the active adapters on again after `disable_lora`."""
        self._turn("enable_lora", True)

    def unload_lora_weights(self) -> None:
        """Forget all adapters. What `fuse_lora` added stays, as in Diffusers; call `unfuse_lora` before to undo it."""
        for model in self._adapted_parts().values():
            take_out(model)
        self._reset_adapters()

    def fuse_lora(self, lora_scale: float = 1.0, adapter_names: str | Sequence[str] | None = None) -> None:
        """Add adapters to the weights, so that they cost nothing; a copy of these weights is kept for `unfuse_lora`.

        Args:
            lora_scale: multiplies what the adapters add.
            adapter_names: which ones, at weight 1 unless they are active; the active ones by default.

        Raises:
            ValueError: if something is fused already, weights are quantized, or no adapter is active.
        """
        self._check_unfused("fuse_lora")
        self._read_models()
        if not is_finite_number(lora_scale):
            raise ValueError(f"`lora_scale` must be a finite number, got {str(lora_scale)[:80]}.")
        if adapter_names is not None:
            self._adapter_weights = {n: self._adapter_weights.get(n, 1.0) for n in self._known(adapter_names)}
        if not self._adapter_weights or not self._adapters_on:
            raise ValueError(
                "`fuse_lora` found no active adapter. Pass `adapter_names`, or call `set_adapters` first."
            )
        self._apply()
        for part, model in self._adapted_parts().items():
            self._unfused[part] = merge(model, float(lora_scale))

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`: the weights are those of before, bit for bit, and the adapters are active again."""
        if not self._unfused:
            raise ValueError("`unfuse_lora` was called, but no adapter is fused.")
        for part, originals in self._unfused.items():
            restore(getattr(self, part), originals)
        self._unfused = {}
        self._apply()

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save the pipeline as Diffusers does, and its adapters in a folder of their own that `from_pretrained` finds.

        The models are saved without adapters; after `fuse_lora`, with what it added.
        """
        remove_saved_adapters(Path(save_directory))
        with taken_out(self._adapted_parts().values()):
            super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("push_to_hub"):  # otherwise the upload wrote them
            self._write_adapters(Path(save_directory))

    def _upload_folder(self, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
        self._write_adapters(Path(working_dir))
        return super()._upload_folder(working_dir, *args, **kwargs)

    # State

    def _reset_adapters(self) -> None:
        self._adapters, self._adapter_weights, self._adapter_prompts = {}, {}, {}
        self._adapters_on, self._unfused = True, {}

    def _adapted_parts(self) -> dict[str, nn.Module]:
        parts = {part: getattr(self, part) for part in PARTS}
        return {part: model for part, model in parts.items() if getattr(model, "peft_config", None)}

    def _read_models(self) -> None:
        """Learn of adapters that were trained, or put into the models by other means, since the last call."""
        for part, model in self._adapted_parts().items():
            adapters, weights = read_adapters(model)
            for name, adapter in adapters.items():
                if name not in self._adapters or part not in self._adapters[name]:
                    check_adapter_name(name)
                self._adapters.setdefault(name, {})[part] = adapter
            self._adapter_weights.update(weights)

    def _apply(self) -> None:
        """Make the models hold exactly the adapters that count."""
        weights = {name: weight for name, weight in self._adapter_weights.items() if weight and self._adapters_on}
        for part in PARTS:
            model = getattr(self, part)
            if model is not None:
                take_out(model)
                chosen = {name: self._adapters[name][part] for name in weights if part in self._adapters[name]}
                if chosen:
                    put_in(model, chosen, weights)

    def _turn(self, method: str, is_on: bool) -> None:
        self._check_unfused(method)
        self._read_models()
        self._adapters_on = is_on
        self._apply()

    def _check_unfused(self, method: str) -> None:
        if self._unfused:
            raise ValueError(f"Adapters are fused into the weights: call `unfuse_lora` before `{method}`.")

    def _known(self, adapter_names: Any) -> list[str]:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        is_list = isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names)
        unknown = [name for name in names if name not in self._adapters] if is_list else [adapter_names]
        if unknown:
            raise ValueError(
                f"`adapter_names` must be names of adapters, which are {sorted(self._adapters)}, got"
                f" {str(unknown)[:200]}. Load them first."
            )
        return list(dict.fromkeys(names))

    def _only(self, adapter_name: str | None) -> str:
        if isinstance(adapter_name, str) and adapter_name in self._adapters:
            return adapter_name
        if adapter_name is None and len(self._adapters) == 1:
            return next(iter(self._adapters))
        raise ValueError(
            f"`adapter_name` must be one of this pipeline's adapters, which are {sorted(self._adapters)}, got"
            f" {str(adapter_name)[:80]!r}."
        )

    # Files

    def _facts(self, name: str) -> dict[str, Any]:
        return facts_of(self.config, self.encoder, self._adapters[name], self._adapter_prompts.get(name, []))

    def _read_adapter(self, path: Path, adapter_name: str) -> Adapter:
        source = f"The adapter {str(path)!r}"
        tensors, settings, facts = read_file(path, source)
        self._adapter_prompts[adapter_name] = prompts = facts.get("prompts", [])
        for name in ("token_layout", "num_registers", "codebook_size"):
            own = (
                self.encoder.quantizer.codebook_size if name == "codebook_size" else getattr(self.encoder.config, name)
            )
            if name in facts and facts[name] != own:
                raise ValueError(
                    f"{source} was trained for a model whose `{name}` is {str(facts[name])[:80]}, but that of this one"
                    f" is {own}: token ids mean something else. Load that model."
                )
        adapter = {}
        for part in sorted({name.partition(".")[0] for name in tensors}, key=lambda part: (part in PARTS, part)):
            if part not in PARTS:
                raise ValueError(f"{source} adapts {part!r}, but a FlexTok pipeline adapts {', '.join(PARTS)}.")
            if getattr(self, part) is None:
                raise ValueError(f"{source} adapts the `{part}`, but this pipeline has none. Load one that has.")
            own_settings, own_tensors = (within(part, values) for values in (settings, tensors))
            adapter[part] = parse_adapter(own_settings, own_tensors, source)
            check_fits(adapter[part], getattr(self, part), part, source)
        self._reported_words.update(split_words(" ".join(prompts)))
        return adapter

    def _write_adapters(self, folder: Path) -> None:
        self._read_models()
        if self._unfused or not self._adapters:
            return
        (folder / SAVED_FOLDER).mkdir(exist_ok=True)
        for name in self._adapters:
            path = folder / SAVED_FOLDER / f"{name}.safetensors"
            write_file(self._adapters[name], self._facts(name), path)
        index = {"adapters": list(self._adapters), "active": self._adapter_weights, "is_on": self._adapters_on}
        write_text(folder / SAVED_FOLDER / INDEX, json.dumps(index, indent=2) + "\n")

    def _load_saved_adapters(self, name: str | os.PathLike, options: dict[str, Any]) -> None:
        """Load what `save_pretrained` wrote beside the models of a folder or Hub repository."""
        folder = local_folder(name, [f"{SAVED_FOLDER}/*"], **options) / SAVED_FOLDER
        if not (folder / INDEX).is_file():
            return
        need_peft()
        check_files(folder)
        names, active, is_on = read_index(folder / INDEX)
        for one in names:
            self._adapters[one] = self._read_adapter(folder / f"{check_adapter_name(one)}.safetensors", one)
        self._adapter_weights, self._adapters_on = active, is_on
        self._apply()
