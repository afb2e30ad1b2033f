"""Settings of an `AutoencoderKL`, which Diffusers does not check."""

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

from diffusers import AutoencoderKL
from diffusers.models.activations import ACT2CLS

from ..utils.numbers import is_finite_number


PARAMETERS = inspect.signature(AutoencoderKL).parameters
BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}


def check_vae_settings(values: dict[str, Any], describe: Callable[[str], str]) -> None:
    """Check settings from a file; missing ones have the defaults of Diffusers.

    Args:
        values: by name; names that the class does not have are left alone.
        describe: returns a setting and where it is, for messages.

    Raises:
        ValueError: if a setting has a wrong type or value, or contradicts another one.
    """

    def refuse(name: str, allowed: str) -> NoReturn:
        text = repr(settings[name])
        raise ValueError(f"{describe(name)} must be {allowed}, got {text[:80]}. Correct it, or fetch the file again.")

    settings: dict[str, Any] = {name: values.get(name, one.default) for name, one in PARAMETERS.items()}
    for name, value in settings.items():
        default = PARAMETERS[name].default
        if isinstance(default, bool) and not isinstance(value, bool):
            refuse(name, "true or false")
        elif name == "sample_size" and isinstance(value, list):  # height and width
            continue
        elif type(default) is int and not (type(value) is int and value >= 1):
            refuse(name, "a whole number of 1 or more")
    channels = settings["block_out_channels"]
    if not isinstance(channels, list | tuple) or not channels:
        refuse("block_out_channels", "a list of whole numbers")
    groups = settings["norm_num_groups"]
    if not all(type(one) is int and one >= 1 and one % groups == 0 for one in channels):
        refuse("block_out_channels", f"whole numbers, each a multiple of `norm_num_groups` ({groups})")
    for name, known in BLOCKS.items():
        blocks = settings[name]
        if not isinstance(blocks, list | tuple) or not all(isinstance(one, str) and one in known for one in blocks):
            refuse(name, f"a list of {' or '.join(known)}")
        if len(blocks) != len(channels):
            refuse(name, f"as many names as `block_out_channels` has entries ({len(channels)})")
    if not isinstance(settings["act_fn"], str) or settings["act_fn"] not in ACT2CLS:
        refuse("act_fn", f"one of {', '.join(ACT2CLS)}")
    for name in ("in_channels", "out_channels"):
        if settings[name] != 3:
            refuse(name, "3, for red, green and blue")
    for name, allowed in (("scaling_factor", "a number above 0"), ("shift_factor", "a number or null")):
        value = settings[name]
        is_null = name == "shift_factor" and value is None
        if not is_null and not (is_finite_number(value) and (value > 0 or name == "shift_factor")):
            refuse(name, allowed)
