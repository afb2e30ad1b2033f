"""Configuration of a checkpoint as plain data: parsed within limits, read by name, never executed."""

import ast
import json
import math
import re
from collections import Counter
from typing import Any

import yaml


MAX_CHARACTERS = 100_000  # per text; published configurations have about a tenth of that
MAX_DEPTH = 30
MAX_COUNT = 2**31 - 1
REQUIRED = object()


class PlainLoader(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys, and aliases that make a short text huge."""

    def get_single_node(self):
        """Build the tree of nodes; refuse it if writing out its aliases would make it too large."""
        node = super().get_single_node()
        if node is not None and written_out(node, {}) > MAX_CHARACTERS:
            raise yaml.YAMLError(f"its aliases stand for more than {MAX_CHARACTERS:,} characters, or for themselves")
        return node

    def construct_mapping(self, node, deep=False):
        """Build a dictionary; refuse duplicate keys."""
        refuse_repeated([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-05 as a string; the official loader reads it as a number
PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def written_out(node: yaml.Node, sizes: dict[int, float]) -> float:
    """Return about how many characters a node has if every alias is written out; infinite if it contains itself."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf  # until it is known
        parts = [node] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            parts = [one for pair in node.value for one in pair]
        own = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
        sizes[id(node)] = 1 + own + sum(written_out(one, sizes) for one in parts if one is not node)
    return sizes[id(node)]


def refuse_repeated(names: list) -> None:
    """Raise a ValueError if a name occurs more than once."""
    repeated = [str(name) for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"it has {shorten_list(repeated)} more than once")


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the entries of a JSON object as a dictionary; refuse duplicate names."""
    refuse_repeated([name for name, _ in pairs])
    return dict(pairs)


def parse_literal_or_json(text: str) -> Any:
    """Parse a Python literal, or else JSON."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError) as error:
        try:
            return json.loads(text, object_pairs_hook=unique_pairs)
        except json.JSONDecodeError:
            # report the first error, unless it only shows the address of an object in memory
            if "malformed node" in str(error):
                raise ValueError("it holds more than plain values") from None
            raise error from None


PARSERS = {
    "literal": parse_literal_or_json,
    "json": lambda text: json.loads(text, object_pairs_hook=unique_pairs),
    "yaml": lambda text: yaml.load(text, Loader=PlainLoader),
}


def parse_settings(text: str, kind: str, name: str) -> Any:
    """Parse the text of a configuration into dictionaries, lists, strings, numbers, booleans and `None`.

    Args:
        text: untrusted.
        kind: "literal" (of Python, or else JSON), "json" or "yaml".
        name: what is parsed, for messages.

    Raises:
        ValueError: if the text is too long, cannot be parsed, is nested too deeply or holds other values.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"{name} has {len(text):,} characters, but no configuration needs more than {MAX_CHARACTERS:,}. This is"
            " not a checkpoint that flextok_hf can convert."
        )
    try:
        value = PARSERS[kind](text)
        refuse_other_data(value, MAX_DEPTH)
    except (ValueError, SyntaxError, TypeError, yaml.YAMLError, RecursionError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200] or "it is nested too deeply"
        raise ValueError(f"{name} cannot be read as {kind} data: {reason}. Fetch it again.") from None
    return value


def refuse_other_data(value: Any, depth: int) -> None:
    """Raise a ValueError unless `value` is plain data, at most `depth` levels deep, with finite numbers."""
    if depth == 0:
        raise ValueError("it is nested too deeply")
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("it has keys that are not strings")
        for entry in value.values():
            refuse_other_data(entry, depth - 1)
    elif isinstance(value, list | tuple):
        for entry in value:
            refuse_other_data(entry, depth - 1)
    elif not (value is None or isinstance(value, str | bool | int | float)):
        raise ValueError(f"it holds {type(value).__name__} values")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"it holds the number {value}")


class Section:
    """A named part of a configuration. Settings are taken by name; `close` refuses those that were not taken."""

    def __init__(self, values: Any, source: str, path: str = "", ignored: frozenset[str] = frozenset()):
        """Wrap a group of settings.

        Args:
            values: a dictionary.
            source: name of the checkpoint, for messages.
            path: of this part in the configuration, with dots between names.
            ignored: paths of settings to ignore.
        """
        self.source, self.path, self.ignored = source, path, ignored
        if not isinstance(values, dict):
            raise ValueError(f"{self.describe()} must be a group of settings, got {shorten(values)}.")
        self.values = {name: value for name, value in values.items() if self.join(name) not in ignored}
        self.left = set(self.values)
        self.parts: list[Section] = []

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def join(self, name: str) -> str:
        """Return the path of a setting of this part."""
        return f"{self.path}.{name}" if self.path else name

    def describe(self, name: str | None = None) -> str:
        """Return the name of this part, or of a setting in it, and of its checkpoint, for messages."""
        path = self.path if name is None else self.join(name)
        return f"`{path}` of {self.source!r}" if path else f"the configuration of {self.source!r}"

    def take(self, name: str, kinds: type | tuple[type, ...], expected: str, default: Any = REQUIRED) -> Any:
        """Return a setting after checking its type.

        Args:
            name: of the setting.
            kinds: allowed types.
            expected: the allowed types in words.
            default: value if the setting is missing; `None` is accepted only if it is the default.
        """
        self.left.discard(name)
        value = self.values.get(name, default)
        if value is REQUIRED:
            raise ValueError(f"{self.describe(name)} is missing and has no safe default. It must be {expected}.")
        is_flag = isinstance(value, bool) and kinds is not bool
        if value is not default and (is_flag or not isinstance(value, kinds)):
            raise ValueError(f"{self.describe(name)} must be {expected}, got {shorten(value)}.")
        return value

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        return self.take(name, str, "a string", default)

    def flag(self, name: str, default: Any = REQUIRED) -> Any:
        return self.take(name, bool, "true or false", default)

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        value = self.take(name, (int, float), "a number", default)
        return value if value is default else float(value)

    def count(self, name: str, default: Any = REQUIRED) -> Any:
        """Take a whole number of at least 1."""
        value = self.take(name, int, "a whole number", default)
        if value is not default and not 1 <= value <= MAX_COUNT:
            raise ValueError(f"{self.describe(name)} must be between 1 and {MAX_COUNT}, got {value}.")
        return value

    def counts(self, name: str, length: int | None = None) -> list[int]:
        """Take a list of whole numbers of at least 1, exactly `length` of them if given."""
        expected = "a list of whole numbers" if length is None else f"a list of {length} whole numbers"
        values = self.take(name, (list, tuple), expected)
        are_counts = all(isinstance(value, int) and value is not True and 1 <= value <= MAX_COUNT for value in values)
        if not are_counts or not values or len(values) > 64 or length not in (None, len(values)):
            raise ValueError(f"{self.describe(name)} must be {expected} of 1 or more, got {shorten(values)}.")
        return list(values)

    def section(self, name: str) -> "Section":
        """Take a group of settings."""
        values = self.take(name, dict, "a group of settings")
        self.parts.append(Section(values, self.source, self.join(name), self.ignored))
        return self.parts[-1]

    def expect(self, name: str, *allowed: Any, default: Any = REQUIRED) -> None:
        """Refuse a setting unless its value is one that our models support.

        Args:
            name: of the setting.
            default: value if the setting is missing.
            allowed: supported values.
        """
        self.left.discard(name)
        value = self.values.get(name, default)
        if value is REQUIRED:
            raise ValueError(f"{self.describe(name)} is missing. It must be {' or '.join(map(repr, allowed))}.")
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            raise ValueError(
                f"{self.describe(name)} is {shorten(value)}, which flextok_hf does not support. It must be"
                f" {' or '.join(map(repr, allowed))}."
            )

    def target(self, *known: str) -> str:
        """Take the official class name of this part, one of `known`; it is compared, never imported."""
        name = self.text("_target_")
        if name not in known:
            raise ValueError(
                f"{self.describe('_target_')} is {shorten(name)}, which flextok_hf does not convert. It must be"
                f" {' or '.join(known)}. (Class names are only compared; nothing is imported or run.)"
            )
        self.skip("_partial_")
        return name

    def skip(self, *names: str) -> None:
        """Ignore settings that do not change what a trained model computes."""
        self.left.difference_update(names)

    def unread(self) -> list[str]:
        """Return the paths of the settings that were not taken."""
        # keys of the official code's data dictionary are wiring, which is fixed here
        own = [name for name in self.values if name in self.left and not name.endswith(("_key", "_keys"))]
        return [self.join(name) for name in own] + [path for part in self.parts for path in part.unread()]

    def close(self) -> None:
        """Raise a ValueError that lists the settings that were not taken."""
        unread = self.unread()
        if unread:
            raise ValueError(
                f"{self.source!r} has settings that flextok_hf does not know: {shorten_list(unread)}. If you are sure"
                " that they do not change what the model computes, pass them in `ignore` (`--ignore`)."
            )


def shorten(value: Any) -> str:
    """Return a value as text that is short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def shorten_list(names: list[str], limit: int = 8) -> str:
    """Return the first names of a list, and how many more there are, as text."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"`{name}`"[:200] for name in names[:limit]) + more
