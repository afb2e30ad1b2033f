"""The parser of the command line: mistakes in one line, with the option that was probably meant."""

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn


class OneLineErrorParser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line instead of printing the whole usage."""

    given: Sequence[str] = ()
    parsers: "Mapping[str, OneLineErrorParser]" = {}  # of the commands

    def parse_known_args(self, args=None, namespace=None):
        """Parse as usual, and keep the words for error messages."""
        self.given = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def parse_args(self, args=None, namespace=None):
        """Parse as usual; options that a command does not have are reported by its own parser."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = self.parsers.get(str(getattr(options, "command", "")), self)
            parser.error(parser.describe_unknown() or f"unrecognized arguments: {' '.join(unknown)}")
        return options

    def describe_unknown(self) -> str:
        """Name the first option that was given and that there is not, and the one with the most similar name."""
        known = list(self._option_string_actions)
        for word in self.given:
            option = word.split("=")[0]
            if word.startswith("--") and not any(name.startswith(option) for name in known):
                similar = difflib.get_close_matches(option, known, 1)
                return f"unknown option {option}" + (f", did you mean {similar[0]}?" if similar else "")
        return ""

    def error(self, message: str) -> NoReturn:
        """Print `message` and a pointer to `--help`, then exit with code 2."""
        if "required" in message:  # a mistyped option is missing under its right name
            unknown = self.describe_unknown()
            message = f"{unknown} ({message})" if unknown else message
        self.exit(2, f"flextok: error: {message} (see `{self.prog} --help`)\n")


class WideHelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keep every option and its help on one line, so that a command's help fits a screen."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)
