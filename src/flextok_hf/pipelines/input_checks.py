"""Checks of the pipeline's arguments; errors say what is allowed and how to fix the call."""

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.argument_checks import MAX_GUIDANCE_SCALE
from ..models.configuration_prior import FlexTokPriorConfig
from ..utils.numbers import is_finite_number, is_whole_number
from .guidance import check_guidance


MIN_TEMPERATURE = 1e-6  # below, float32 overflows


def check_prompts(prompt: Any, name: str = "prompt") -> list[str]:
    """Return the prompts as a list; an empty string is allowed and means unconditional.

    Raises:
        TypeError: if `prompt` is neither a string nor a list of strings.
        ValueError: if the list is empty, or a string is no text that could be encoded.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not all(isinstance(text, str) for text in prompts):
        raise TypeError(f"`{name}` must be a string or a list of strings, got {brief(prompt)}.")
    if len(prompts) == 0:
        raise ValueError(f"`{name}` is an empty list. Pass at least one prompt.")
    for text in prompts:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(
                f"`{name}` contains half of a character (a lone surrogate), which is no text: {brief(text)}. Decode"
                ' it again, for example with `errors="replace"`.'
            )
    return list(prompts)


def check_class_labels(class_labels: Any, config: FlexTokPriorConfig) -> Tensor:
    """Return class labels as a (B,) int64 tensor; names are looked up in `config.id2label`.

    Raises:
        TypeError: if they are neither whole numbers nor names.
        ValueError: if there are none, one is out of range or unknown, or the prior has no classes.
    """
    if config.num_classes is None:
        raise ValueError("`class_labels` were passed, but this model's prior has no classes. Pass a `prompt` instead.")
    labels = class_labels.tolist() if isinstance(class_labels, Tensor | np.ndarray) else class_labels
    labels = labels if isinstance(labels, list | tuple) else [labels]
    if len(labels) == 0:
        raise ValueError("`class_labels` is empty. Pass at least one class.")
    numbers = [find_class(label, config) if isinstance(label, str) else label for label in labels]
    for label in numbers:
        if not is_whole_number(label):
            raise TypeError(f"`class_labels` must be whole numbers or names, got {brief(label)}.")
        if not 0 <= label < config.num_classes:
            raise ValueError(
                f"`class_labels` must lie in [0, {config.num_classes}), the classes of this prior, got {label}."
            )
    return torch.tensor(numbers)


def find_class(name: str, config: FlexTokPriorConfig) -> int:
    """Return the number of the class called `name`."""
    names = config.id2label if len(config.id2label) == config.num_classes else {}
    for number, known in names.items():
        if known == name:
            return number
    if not names:
        raise ValueError(f"`class_labels` contains {name!r}, but this prior's classes have no names. Pass numbers.")
    similar = difflib.get_close_matches(name, names.values()) or list(names.values())[:10]
    raise ValueError(
        f"`class_labels` contains {name!r}, not one of the {len(names)} classes, such as {', '.join(similar)}."
    )


def check_sampling(
    num_inference_steps: Any,
    guidance_scale: Any,
    guidance: Any,
    output_type: Any,
    max_steps: int,
    output_types: Sequence[str],
) -> None:
    """Raise a ValueError or TypeError unless the sampling options of the flow decoder are valid."""
    is_allowed = is_whole_number(num_inference_steps) and 1 <= num_inference_steps <= max_steps
    if num_inference_steps is not None and not is_allowed:
        raise ValueError(
            f"`num_inference_steps` must be a whole number from 1 to {max_steps} (the scheduler's"
            f" `num_train_timesteps`), or `None` for the model's default, got {brief(num_inference_steps)}."
        )
    if not callable(guidance_scale):
        check_guidance_scale(guidance_scale, "guidance_scale", "a finite number or a function of sigma")
    check_guidance(guidance)
    if not isinstance(output_type, str) or output_type not in output_types:
        raise ValueError(f"`output_type` must be one of {', '.join(output_types)}, got {brief(output_type)}.")


def check_guidance_scale(scale: Any, name: str, what: str = "a finite number") -> float:
    """Return a guidance scale as a plain number.

    Raises:
        TypeError: if it is not a finite number.
        ValueError: if it is so large that results would overflow.
    """
    if not is_finite_number(scale):
        raise TypeError(f"`{name}` must be {what}, got {brief(scale)}.")
    if abs(float(scale)) > MAX_GUIDANCE_SCALE:
        raise ValueError(
            f"`{name}` must lie within {MAX_GUIDANCE_SCALE:g} of 0, got {brief(scale)}; 1 is no guidance."
        )
    return float(scale)


def brief(value: Any) -> str:
    """Return `repr(value)`, or its start if it is long; numbers of thousands of digits have no `repr`."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def check_generation(**options: Any) -> dict[str, Any]:
    """Return the options of the prior's sampling as plain numbers.

    Args:
        options: `prior_guidance_scale`, `temperature` of 1e-6 or more, `top_k` of 0 or more, `top_p` in (0, 1].

    Raises:
        TypeError: if one is not a finite number.
        ValueError: if one is out of range.
    """
    scale = options.pop("prior_guidance_scale")
    checked: dict[str, Any] = {"prior_guidance_scale": check_guidance_scale(scale, "prior_guidance_scale")}
    allowed = {
        "temperature": (lambda value: value >= MIN_TEMPERATURE, f"a finite number of {MIN_TEMPERATURE:g} or more"),
        "top_k": (lambda value: value >= 0 and value == int(value), "a whole number of 0 or more; 0 is all"),
        "top_p": (lambda value: 0 < value <= 1, "a number in (0, 1]; 1 is all"),
    }
    for name, value in options.items():
        is_allowed, what = allowed[name]
        if not is_finite_number(value):
            raise TypeError(f"`{name}` must be {what}, got {brief(value)}.")
        if not is_allowed(value):
            raise ValueError(f"`{name}` must be {what}, got {value!r}.")
        checked[name] = int(value) if name == "top_k" else float(value)
    return checked


def spread_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, batch_size: int
) -> list[torch.Generator] | torch.Generator | None:
    """Check that a list of generators has one per sample; a single generator or `None` is returned as is.

    Raises:
        TypeError: if they are not generators.
        ValueError: if the number of generators differs from `batch_size`.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if not isinstance(generator, list | tuple) or not all(isinstance(each, torch.Generator) for each in generator):
        raise TypeError(
            f"`generator` must be a `torch.Generator` or a list of them, got {brief(generator)}. For a seed, pass"
            " `torch.Generator().manual_seed(seed)`."
        )
    if len(generator) != batch_size:
        raise ValueError(
            f"`generator` has {len(generator)} entries for {batch_size} images. Pass a single generator, or one per"
            " image (prompts times `num_images_per_prompt`)."
        )
    return list(generator)


def check_callback(callback: Any, tensor_inputs: Any, allowed: Sequence[str]) -> None:
    """Raise a TypeError or ValueError unless a callback and the names of the tensors that it wants are valid."""
    if callback is not None and not callable(callback):
        raise TypeError(f"`callback_on_step_end` must be a function, got {brief(callback)}.")
    if not isinstance(tensor_inputs, list | tuple) or not all(name in allowed for name in tensor_inputs):
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` must be a list of names, out of {list(allowed)}, got"
            f" {brief(tensor_inputs)}."
        )


def apply_changes(changes: Any, latents: Tensor) -> Tensor:
    """Return the latents (B, C, h, w) after a callback, which may have returned `{"latents": new ones}` or `None`.

    Raises:
        TypeError: if it returned anything else than a dictionary of tensors.
        ValueError: if it returned a name that is not known, or latents of another shape.
    """
    if changes is not None and not isinstance(changes, dict):
        raise TypeError(
            f"`callback_on_step_end` must return None or a dictionary, {{'latents': latents}}, got {brief(changes)}."
        )
    unknown = sorted(set(changes or {}) - {"latents"}, key=str)
    if unknown:
        raise ValueError(f"`callback_on_step_end` returned {unknown}, but only 'latents' can be changed.")
    changed = latents if changes is None else changes.get("latents", latents)
    if not isinstance(changed, Tensor) or changed.shape != latents.shape:
        got = tuple(changed.shape) if isinstance(changed, Tensor) else brief(changed)
        error = ValueError if isinstance(changed, Tensor) else TypeError
        raise error(f"`callback_on_step_end` must return latents of the shape {tuple(latents.shape)}, got {got}.")
    return changed.to(latents)


def check_prompt_embeds(
    prompt_embeds: Any, attention_mask: Any, hidden_size: int, prefix: str = ""
) -> tuple[Tensor, Tensor]:
    """Return embedded prompts (P, M, hidden_size) and their mask (P, M), of ones if it is `None`.

    Args:
        prefix: start of the names of the arguments, "" or "negative_".

    Raises:
        TypeError: if they are not tensors, of floats and of whole numbers or booleans.
        ValueError: if the shapes do not fit, a prompt is masked entirely, or values are not finite.
    """
    name, mask_name = f"`{prefix}prompt_embeds`", f"`{prefix}prompt_attention_mask`"
    if not isinstance(prompt_embeds, Tensor) or not prompt_embeds.is_floating_point():
        raise TypeError(
            f"{name} must be a tensor of floats, as `encode_prompt` returns it, got {brief(prompt_embeds)}."
        )
    if prompt_embeds.ndim != 3 or 0 in prompt_embeds.shape or prompt_embeds.shape[2] != hidden_size:
        raise ValueError(
            f"{name} must have the shape (prompts, length, {hidden_size}), got {tuple(prompt_embeds.shape)}. Use the"
            " text encoder that the prior was trained with (`encode_prompt`)."
        )
    if not prompt_embeds.isfinite().all():
        raise ValueError(f"{name} contains values that are not finite. Encode the prompts again, in float32.")
    if attention_mask is None:
        return prompt_embeds, prompt_embeds.new_ones(prompt_embeds.shape[:2], dtype=torch.long)
    if not isinstance(attention_mask, Tensor) or attention_mask.is_floating_point() or attention_mask.is_complex():
        raise TypeError(f"{mask_name} must be a tensor of whole numbers or booleans, got {brief(attention_mask)}.")
    if attention_mask.shape != prompt_embeds.shape[:2] or not attention_mask.bool().any(dim=1).all():
        raise ValueError(
            f"{mask_name} must have the shape {tuple(prompt_embeds.shape[:2])} like {name}, with a 1 in every row, got"
            f" {brief(attention_mask)}."
        )
    return prompt_embeds, attention_mask.long()
