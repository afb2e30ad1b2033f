"""Options from a YAML file and the command line."""

import argparse
import difflib
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_arguments(kind: type, argv: list[str]) -> Any:
    """Parse the options of a dataclass: `--config file.yaml` sets defaults, other flags override them.

    Raises:
        SystemExit: an option is missing, unknown or of the wrong type.
        ValueError: the YAML file has an unknown option, or a value is not allowed.
        FileNotFoundError: the YAML file does not exist.
    """
    # no abbreviations: a misspelled flag must not be taken for another one
    parser = HfArgumentParser(kind, description=kind.__doc__, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with defaults for these options.")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    config, flags = finder.parse_known_args(argv)
    if config.config is not None:
        known = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
        flags = [*read_flags(Path(config.config), known), *flags]
    arguments, *_ = parser.parse_args_into_dataclasses(flags)
    return arguments


def read_flags(path: Path, known: dict[str, argparse.Action]) -> list[str]:
    """Turn a YAML file into flags, so that its values are checked like those on the command line.

    Args:
        path: the YAML file.
        known: options that exist, by name.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not valid YAML, or has an unknown option or one with no value or too many.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`config` {str(path)!r} is no file. Recipes are in scripts/configs.")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"`config` {str(path)!r} contains no valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"`config` {str(path)!r} must hold lines `option: value`, got {values!r}.")
    unknown = [str(name) for name in values if name not in known]
    if unknown:
        hints = [match for name in unknown for match in difflib.get_close_matches(name, known, n=1)]
        meant = f" Did you mean {', '.join(hints)}?" if hints else ""
        raise ValueError(f"{path} has unknown options: {', '.join(unknown)}.{meant} `--help` lists the valid ones.")
    flags = []
    for name, value in values.items():
        default = known[name].default
        if value is None or value == []:
            if value != default:
                raise ValueError(f"`{name}` in {path} is empty. Leave it out to get the default, {default!r}.")
        elif isinstance(value, bool) and not isinstance(default, bool):
            raise ValueError(
                f"`{name}` in {path} is a word that YAML reads as {value}: put it in quotes, or pass another value."
            )
        elif isinstance(value, list):
            if known[name].nargs != "+":
                raise ValueError(f"`{name}` in {path} takes one value, got {value}.")
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={value}")
    return flags
