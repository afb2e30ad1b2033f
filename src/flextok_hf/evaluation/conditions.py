"""Datasets of images with prompts -> sets of conditions, with the attributes that each asks for."""

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from .adherence import Check, Reference, checks_for
from .images import draw_rows
from .measurement import Measurement
from .options import ConditionOptions


NAMING_ATTRIBUTES = ("name", "style")
# Styles that adherence skips: two photos of the same thing need not look alike, nor do two drawings by many hands.
STYLES_WITHOUT_LIKENESS = ("photo", "clip art")

Condition = dict  # attributes by name, and a prompt or class under "condition"


def has_value(row: dict, column: str) -> bool:
    """Whether a row has a prompt or class in a column; 0 is a class."""
    return row.get(column) not in (None, [], "")


def checksum(sets: Any) -> str:
    """Return 16 hexadecimal digits that identify sets of conditions, for the protocol."""
    return sha256(json.dumps(sets, sort_keys=True, default=str).encode()).hexdigest()[:16]


class ConditionedMeasurement(Measurement):
    """A measurement that generates images from prompts or classes and checks whether they show what was asked for.

    Args:
        name: name of the measurement.
        options: its options.
        attributes: what prompts can ask for if `options.attributes` is empty; by default name and style, if present.
    """

    options: ConditionOptions

    def __init__(self, name: str, options: ConditionOptions, attributes: Sequence[str] = ()):
        super().__init__(name, options)
        if self.pipe.prior is None:
            raise ValueError("This model has no prior, so it cannot generate. Measure its reconstruction instead.")
        self.all_rows = self.load_all_splits()
        known = self.all_rows[0]
        named = list(options.attributes or attributes)
        missing = [attribute for attribute in named if attribute not in known]
        if missing:
            raise ValueError(f"`attributes` {missing} are not columns of {options.data!r}, which has {list(known)}.")
        self.attributes = named or [name for name in NAMING_ATTRIBUTES if name in known]
        self.has_prompt_sets = {"styled_prompt", "prompt", "everyday", *NAMING_ATTRIBUTES} <= set(known)
        if self.has_prompt_sets:
            self.all_rows = [row for row in self.all_rows if row["style"] not in STYLES_WITHOUT_LIKENESS]
        self.checks: tuple[Check, ...] = checks_for(self.attributes) if self.attributes else ()
        self.protocol |= {"attributes": self.attributes, "max_prompts": options.max_prompts}
        self.reference: Reference | None = None
        if self.checks:
            self.pixels = self.images(self.all_rows).read_all()
            self.reference = Reference(self.pixels, [self.attributes_of(row) for row in self.all_rows])
            self.protocol["neighbors"] = self.reference.description

    def attributes_of(self, row: dict) -> Condition:
        """Return the attributes of a row that a condition can ask for."""
        return {name: row[name] for name in self.attributes}

    def draw(self, items: Sequence) -> list:
        """Return at most `max_prompts` of the items, drawn at random."""
        return draw_rows(items, self.options.max_prompts, self.options.seed)

    def prompt_sets(self) -> dict[str, list[Condition]]:
        """Return the sets of a prepared dataset: trained and held-out combinations of name and style, plain names."""

        def styled(split: str) -> list[Condition]:
            chosen = [row for row in self.all_rows if row["split"] == split]
            if split == "validation":  # data without this column hold out combinations only
                chosen = [row for row in chosen if row.get("held_out", True)]
            return [self.attributes_of(row) | {"condition": row["styled_prompt"]} for row in chosen]

        def plain(rows: Sequence[dict]) -> list[Condition]:
            by_name = {row["name"]: {"name": row["name"], "condition": row["prompt"]} for row in rows}
            return list(by_name.values())

        sets = {
            "trained": styled("train"),
            "held_out": styled("validation"),
            "everyday": plain([row for row in self.all_rows if row["everyday"]]),
            "plain": plain(self.all_rows),
        }
        return {name: self.draw(conditions) for name, conditions in sets.items() if conditions}

    def column_set(self, column: str, rows: Sequence[dict]) -> list[Condition]:
        """Return the conditions in a column of prompts or classes; of several wordings, the first."""
        if column not in rows[0]:
            raise ValueError(f"{column!r} is not a column of {self.options.data!r}, which has {list(rows[0])}.")

        def first(value: str | int | list[str]) -> str | int:
            return value[0] if isinstance(value, list) else value

        drawn = self.draw([row for row in rows if has_value(row, column)])
        if not drawn:
            raise ValueError(f"{column!r} of {self.options.data!r} holds no prompt or class in any row.")
        return [self.attributes_of(row) | {"condition": first(row[column])} for row in drawn]
