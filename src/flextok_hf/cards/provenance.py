"""What a model was made from: the models that it started from, their licenses and data."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..utils.files import read_json


RECIPE_FILE, FACTS_FILE = "training.json", "model_card.yaml"
ORIGINAL_FILE = "original.json"  # what a converted model was converted from
# Options of training that name a model
START_OPTIONS = ("vae", "tokenizer", "pretrained_vae", "pretrained_tokenizer", "pretrained_prior")


def earlier_recipes(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the recipes of the stages that a stage builds on, earliest first, from the folders of their models."""
    recipes: list[dict[str, Any]] = []
    for option in START_OPTIONS:
        if arguments.get(option):
            record = read_json(Path(arguments[option]) / RECIPE_FILE, {})
            earlier = [*record.pop("earlier", []), record] if record else []
            recipes += [recipe for recipe in earlier if recipe not in recipes]
    return recipes


def starting_points(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what is known about the models that a stage starts from; of an earlier stage, its recipe says it all."""
    points = [(option, starting_point(arguments[option])) for option in START_OPTIONS if arguments.get(option)]
    kept: list[dict[str, Any]] = []
    for option, point in points:
        if (option.startswith("pretrained_") or len(point) > 1 or is_hub_id(point["name"])) and point not in kept:
            kept.append(point)
    return kept


def starting_point(source: str | Path) -> dict[str, Any]:
    """Return the name of a model, and title, license and data from its card, or what it was converted from."""
    folder = Path(source)
    path = folder / FACTS_FILE
    facts = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    facts = facts if isinstance(facts, dict) else {}
    num_parts = 2 if folder.name in ("pipeline", "vae") else 1  # of runs; never the whole path on this machine
    name = str(source) if is_hub_id(str(source)) else "/".join(folder.parts[-num_parts:])
    point = {key: facts[key] for key in ("title", "license", "data_note", "data", "base_model") if facts.get(key)}
    if sources := origins(read_json(folder / ORIGINAL_FILE, {})):
        point["converted_from"] = sources
    return {"name": name, **point}


def is_hub_id(name: str) -> bool:
    """Whether a name is one of the Hub, and not a folder here."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def origins(original: Mapping[str, Any]) -> list[str]:
    """Return the sources of a converted model, from its `original.json`."""
    parts = (original.get(name, {}) for name in ("tokenizer", "prior"))
    return [part["source"] for part in parts if isinstance(part, Mapping) and part.get("source")]


def all_starting_points(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the models that any stage in a recipe started from, the earliest first."""
    points: list[dict[str, Any]] = []
    for stage in (*record.get("earlier", ()), record):
        points += [point for point in stage.get("started_from", ()) if point not in points]
    return points


def hub_ids(points: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the models on the Hub among starting points, and those that they were made from."""
    names: list[str] = []
    for point in points:
        more = point.get("base_model", [])
        names += [point["name"], *point.get("converted_from", []), *([more] if isinstance(more, str) else more)]
    return [name for name in dict.fromkeys(names) if is_hub_id(name)]


def provenance(points: Iterable[Mapping[str, Any]]) -> str:
    """Describe the models that a model started from, with their licenses and data; empty if there are none."""
    parts = []
    for point in points:
        title = f" ({point['title']})" if point.get("title") else ""
        lines = [f"Started from `{point['name']}`{title}, license: {point.get('license', 'see its card')}."]
        if point.get("converted_from"):
            names = " and ".join(f"`{name}`" for name in point["converted_from"])
            lines = [f"Started from `{point['name']}`, converted from {names}: their license and data apply."]
        if point.get("data_note"):
            lines.append(f"Its data: {point['data_note'].strip()}")
        sources = [source_line(source) for source in point.get("data", ())]
        if sources:
            lines.append(("" if point.get("data_note") else "Its data:\n\n") + "\n".join(sources))
        parts.append("\n\n".join(lines))
    return "\n\n".join(parts)


def source_line(source: Mapping[str, Any]) -> str:
    """Return a list entry about a source of data: name, license, address."""
    parts = [source["name"], source.get("license"), f"<{source['url']}>" if source.get("url") else None]
    return "- " + ", ".join(filter(None, parts))
