"""Settings of classes of Diffusers, which it does not check, in configuration files."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from diffusers import AutoencoderKL
from diffusers.models.activations import ACT2CLS

from ..utils.numbers import is_finite_number
from .argument_checks import MAX_SIZE


Describe = Callable[[str], str]  # a setting by name -> the setting and its file, for messages
# By the type of the default value: what is allowed, in words and as a check
TYPES: dict[type, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: (f"a whole number from 1 to {MAX_SIZE}", lambda value: type(value) is int and 1 <= value <= MAX_SIZE),
    float: ("a finite number", is_finite_number),
    str: ("a string", lambda value: isinstance(value, str)),
    tuple: ("a list", lambda value: isinstance(value, list | tuple) and len(value) > 0),
}
BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}


def describe_in(path: Path) -> Describe:
    return lambda name: f"`{name}` in {str(path)!r}"


def refuse(what: str, allowed: str, value: Any) -> NoReturn:
    raise ValueError(f"{what} must be {allowed}, got {repr(value)[:80]}. Correct it, or fetch the file again.")


def check_types(kind: type, settings: dict[str, Any], describe: Describe) -> None:
    """Raise a ValueError if a setting does not have the type of its default value in the class."""
    for name, parameter in inspect.signature(kind).parameters.items():
        default, value = parameter.default, settings.get(name)
        of_type = float if default is None and "float" in str(parameter.annotation) else type(default)
        is_optional = name not in settings or (default is None and value is None)
        if is_optional or of_type not in TYPES or (name == "sample_size" and isinstance(value, list)):
            continue
        allowed, is_allowed = TYPES[of_type]
        if not is_allowed(value):
            refuse(describe(name), allowed, value)


def check_vae_settings(settings: dict[str, Any], describe: Describe) -> None:
    """Check the settings of an `AutoencoderKL`; missing ones have the defaults of Diffusers.

    Args:
        settings: by name; names that the class does not have are left alone.
        describe: returns a setting and where it is, for messages.

    Raises:
        ValueError: if a setting has a wrong type or value, or contradicts another one.
    """
    check_types(AutoencoderKL, settings, describe)
    defaults = {name: one.default for name, one in inspect.signature(AutoencoderKL).parameters.items()}
    values = {**defaults, **settings}
    channels, groups = values["block_out_channels"], values["norm_num_groups"]
    if not all(type(one) is int and 1 <= one <= MAX_SIZE and one % groups == 0 for one in channels):
        allowed = f"whole numbers up to {MAX_SIZE}, each a multiple of `norm_num_groups` ({groups})"
        refuse(describe("block_out_channels"), allowed, channels)
    for name, known in BLOCKS.items():
        if not all(isinstance(one, str) and one in known for one in values[name]):
            refuse(describe(name), f"a list of {' or '.join(known)}", values[name])
        if len(values[name]) != len(channels):
            refuse(describe(name), f"as long as `block_out_channels` ({len(channels)})", values[name])
    if values["act_fn"] not in ACT2CLS:
        refuse(describe("act_fn"), f"one of {', '.join(ACT2CLS)}", values["act_fn"])
    for name in ("in_channels", "out_channels"):
        if values[name] != 3:
            refuse(describe(name), "3, for red, green and blue", values[name])
    if not values["scaling_factor"] > 0:
        refuse(describe("scaling_factor"), "above 0", values["scaling_factor"])
