"""Sections of a model card, each made from one kind of file: configuration, recipe, results.

Only JSON files and the headers of weight files are read.
"""

import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..utils.files import read_json
from ..utils.tables import markdown_table, measure_title
from .provenance import all_starting_points, earlier_recipes, origins, provenance, source_line, starting_points


COMPONENT_TITLES = {
    "vae": "VAE",
    "encoder": "encoder",
    "decoder": "flow decoder",
    "flow_decoder": "flow decoder before distillation",
    "prior": "prior",
    "text_encoder": "text encoder",
}


def stage_name(record: Mapping[str, Any]) -> str:
    """Return the stage that a recipe belongs to: vae, tokenizer or prior."""
    arguments = record["arguments"]
    named = "prior" if "tokenizer" in arguments else "tokenizer" if "num_registers" in arguments else "vae"
    return record.get("stage") or named


def count_weights(folder: Path) -> tuple[int, str]:
    """Return the number of weights in the files of a folder, buffers included, and their dtypes ("float16")."""
    sizes: dict[str, int] = {}  # by name, since a folder may hold the same weights in two precisions
    kinds = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():
                view = weights.get_slice(name)
                sizes[name] = math.prod(view.get_shape())
                kinds.add(str(view.get_dtype()).replace("F", "float").replace("Bfloat", "bfloat"))
    return sum(sizes.values()), " and ".join(sorted(kinds))


def component_folders(folder: Path) -> dict[str, Path]:
    """Return the components of a pipeline that have weights; a VAE saved on its own is its only component."""
    if (folder / "model_index.json").is_file():
        return {name: folder / name for name in COMPONENT_TITLES if (folder / name / "config.json").is_file()}
    return {"vae": folder}


def image_side(folder: Path) -> int | None:
    """Return the side of the square images of a pipeline in pixels, from its configuration."""
    decoder, vae = read_json(folder / "decoder" / "config.json", {}), read_json(folder / "vae" / "config.json", {})
    if not decoder:
        return None
    side = decoder["grid_size"] * decoder["patch_size"]
    return side * 2 ** (len(vae["block_out_channels"]) - 1) if vae else side


def model_section(folder: Path) -> str:
    """Describe the components of the model and its tokens."""
    rows = []
    for name, part in component_folders(folder).items():
        weights, kind = count_weights(part)
        known = [f"{weights:,}", kind] if kind else ["not read", "?"]  # only safetensors are opened
        rows.append([COMPONENT_TITLES[name], *known])
    lines = [markdown_table(["component", "weights", "stored as"], rows)]
    encoder = read_json(folder / "encoder" / "config.json", {})
    if encoder:
        levels, registers = encoder["fsq_levels"], encoder["num_registers"]
        size, side = math.prod(levels), image_side(folder)
        lines.append(
            f"Images of {side} x {side} pixels become 1 to {registers} tokens. Each token is one of {size:,} codes"
            f" (finite scalar quantization with {' x '.join(map(str, levels))} levels), or {math.log2(size):.1f} bits;"
            f" all tokens of an image take {registers * math.log2(size) / 8:.0f} bytes."
            + ("" if (folder / "vae").is_dir() else " The model works in pixel space, without a VAE.")
        )
    decoder = read_json(folder / "decoder" / "config.json", {})
    if decoder.get("predicts") == "mean_velocity":
        low, high = decoder["guidance_range"]
        scales = f"a guidance scale of {low:g}" if low == high else f"guidance scales from {low:g} to {high:g}"
        lines.append(
            f"The decoder is distilled to few steps: it predicts the mean velocity over a step"
            f" ([arXiv 2510.24474](https://arxiv.org/abs/2510.24474)), with {scales} in its weights."
        )
        if (folder / "flow_decoder").is_dir():
            lines[-1] += (
                " The decoder it learned from takes any guidance scale, number of steps and solver:"
                ' `FlexTokFlowDecoder.from_pretrained(..., subfolder="flow_decoder")`, passed as `decoder`.'
            )
    steps = decoder.get("default_num_inference_steps")
    if isinstance(steps, Mapping):
        lines.append(
            "Default steps of the decoder: " + ", ".join(f"{n} from {c} tokens" for c, n in steps.items()) + "."
        )
    elif steps:
        lines.append(f"Default steps of the decoder: {steps}.")
    return "\n\n".join(lines)


def training_facts(arguments: Mapping[str, Any], log: Sequence[Mapping[str, Any]], images_per_step: int) -> dict:
    """Return what `training.json` should hold for a card besides options and steps.

    Args:
        arguments: the options of the stage.
        log: the entries of its log.
        images_per_step: images per optimizer step.

    Returns:
        `hardware`, the `seconds` that the steps took, `earlier`, the recipes of the previous stages, and
        `started_from`, what is known about other models that training started from.
    """
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{torch.get_num_threads()} CPU threads ({platform.machine()})"
    seconds = round(logged_seconds(log, images_per_step), 1)
    before = {"earlier": earlier_recipes(arguments), "started_from": starting_points(arguments)}
    return {"hardware": hardware, "seconds": seconds, **before}


def training_section(record: Mapping[str, Any], original: Mapping[str, Any] | None = None) -> str:
    """Describe how all stages were trained, from `training.json`, or what the model was converted from."""
    if original:
        names = " and ".join(f"`{name}`" for name in origins(original))
        return (
            f"Converted from {names}, with the same weights. See there for how they were trained; their license"
            " applies to this copy too."
        )
    if not record.get("arguments"):
        return "How it was trained is not recorded."
    return "\n\n".join(stage_recipe(stage) for stage in [*record.get("earlier", ()), record])


def stage_recipe(record: Mapping[str, Any]) -> str:
    """Describe how one stage was trained."""
    arguments = record["arguments"]
    per_step = record.get("images_per_step", arguments.get("train_batch_size"))
    line = f"Stage `{stage_name(record)}`: {record['steps']:,} steps of {per_step} images"
    line += f", {duration(record['seconds'])}" if record.get("seconds") else ""
    line += f" on {record['hardware']}" if record.get("hardware") else ""
    line += f", precision {'float32' if arguments['mixed_precision'] == 'no' else arguments['mixed_precision']}"
    line += f", seed {arguments['seed']}." if "seed" in arguments else "."
    rows = [[f"`{name}`", f"`{value}`"] for name, value in arguments.items() if is_telling(value)]
    options = markdown_table(["option", "value"], rows)
    return f"{line}\n\n<details><summary>All options</summary>\n\n{options}\n\n</details>"


def is_telling(value: Any) -> bool:
    """Whether a training option is worth showing: set, and not an absolute path on the training machine."""
    return value is not None and not (isinstance(value, str) and Path(value).is_absolute())


def logged_seconds(log: Sequence[Mapping[str, Any]], images_per_step: int) -> float:
    """Add up the time of a run from the speeds in its log; steps repeated after a resume count once."""
    seconds, last_step = 0.0, 0
    for entry in log:
        if entry.get("images_per_s"):
            seconds += max(0, entry["step"] - last_step) * images_per_step / entry["images_per_s"]
            last_step = max(last_step, entry["step"])
    return seconds


def duration(seconds: float) -> str:
    """Format a duration, for example as `35 minutes` or `3.5 hours`."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def data_section(
    record: Mapping[str, Any], facts: Mapping[str, Any], started_from: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Describe the training data and its terms, and the models that training started from, with theirs."""
    arguments = record.get("arguments", {})
    lines = [facts["data_note"].strip()] if facts.get("data_note") else []
    for source in facts.get("data", ()):
        lines.append(source_line(source))
    if not facts.get("data"):
        names = [source for source in arguments.get("train_data", ()) if is_telling(source)]
        lines.append(f"Trained on: {', '.join(f'`{name}`' for name in names) or 'not recorded'}.")
        lines.append("The terms of this data are not stated here; they apply to anyone who uses the model.")
    bullets = [line for line in lines if line.startswith("- ")]
    lines = [*(line for line in lines if line not in bullets), *(["\n".join(bullets)] if bullets else [])]
    before = provenance([*all_starting_points(record), *started_from])
    return "\n\n".join(filter(None, [*lines, before]))


def results_section(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Show result files, by name: the evaluation protocol, and the results per number of tokens."""
    parts = []
    for name, record in results.items():
        settings = record.get("settings", "pipeline defaults")
        if isinstance(settings, Mapping):
            settings = ", ".join(f"{option} {value}" for option, value in settings.items())
        protocol = {
            "images": record.get("real_images") or record.get("count"),
            "settings": settings,
            "seed": record.get("seed"),
            "device": record.get("device"),
            "weights": str(record.get("weights_sha256", ""))[:16] or None,
        }
        line = "; ".join(f"{key} {value}" for key, value in protocol.items() if value is not None)
        parts.append(f"### {name.replace('_', ' ').capitalize()}\n\n{line}.\n\n{results_table(record['results'])}")
    return "\n\n".join(parts)


def results_table(results: Mapping[str, Any]) -> str:
    """Format results with a row per number of tokens: {count: {metric: value}} or {set: {count: {metric: value}}}.

    For several sets, only the first metric is shown, with one column per set.
    """
    if all(str(key).isdigit() for key in results):
        measures = [key for key, value in next(iter(results.values())).items() if is_figure(value)]
        header = ["tokens", *(measure_title(key) for key in measures)]
        rows = [[count, *(cell(row[key]) for key in measures)] for count, row in results.items()]
        return markdown_table(header, rows)
    counts = list(next(iter(results.values())))
    measure = next(key for key, value in next(iter(results.values()))[counts[0]].items() if is_figure(value))
    header = ["tokens", *(key.replace("_", " ") for key in results)]
    by_count = [(count, [results[key].get(count, {}).get(measure) for key in results]) for count in counts]
    rows = [[count, *("" if figure is None else cell(figure) for figure in row)] for count, row in by_count]
    title = measure_title(measure)
    return f"Metric: {title}.\n\n{markdown_table(header, rows)}"


def is_figure(value: Any) -> bool:
    """Whether a value in a result file is a metric with its confidence interval."""
    return isinstance(value, Mapping) and ("mean" in value or "share" in value)


def cell(value: Mapping[str, float]) -> str:
    """Return a share or a mean with its 95% confidence interval: `81% (78 to 84)`, `13.70 (13.10 to 14.25)`."""
    if "share" in value:
        return f"{value['share']:.0%} ({100 * value['low']:.0f} to {100 * value['high']:.0f})"
    return f"{value['mean']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
