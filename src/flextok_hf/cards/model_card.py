"""Model cards, generated from the files in a model's folder rather than written by hand.

Besides configuration and weights, the folder of a saved model may hold:

    training.json      options, duration and hardware of the training; written by training
    original.json      what the model was converted from; written by the conversion
    model_card.yaml    what no other file holds: title, license, data and its terms, limits; part of the recipe
    results/*.json     result files of the evaluation scripts
    images/*           images for the card
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from ..utils.files import read_json, write_text
from ..utils.tables import measure_title
from .provenance import (
    FACTS_FILE,
    ORIGINAL_FILE,
    RECIPE_FILE,
    all_starting_points,
    hub_ids,
    is_hub_id,
    origins,
    starting_point,
)
from .sections import (
    component_folders,
    data_section,
    image_side,
    is_figure,
    model_section,
    results_section,
    training_section,
)


CARD_FILE = "README.md"
RESULTS_FOLDER, IMAGES_FOLDER, OUTDATED_FOLDER = "results", "images", "outdated"
FACT_NAMES = (
    *("title", "summary", "prompt", "license", "license_name", "language", "base_model"),
    *("data", "data_note", "datasets", "limits"),
)
# This line marks a generated card: such a card is replaced, a hand-written one is not.
MARK = "Written by flextok_hf from the files of this repository."
DIFFUSERS_MARK = "This model card has been automatically generated."
METHOD = "(Bachmann et al., 2025, [arXiv 2502.13967](https://arxiv.org/abs/2502.13967))"
TAGS = ["flextok", "image-tokenizer", "arxiv:2502.13967"]


def write_model_card(
    folder: str | Path,
    name: str | None = None,
    changed_from: str | Path | None = None,
    final_folder: str | Path | None = None,
    title: str | None = None,
) -> Path:
    """Write `README.md` for a saved pipeline or VAE from the files next to it (see the top of this module).

    Args:
        folder: the model, with whichever of these files exist.
        name: what users load it by, such as a Hub id; by default the path of the folder.
        changed_from: the model that this one was made from, if its weights may have changed in an unrecorded way.
        final_folder: where the folder will be moved.
        title: of the card, unless the facts have one; by default `name`, or the name of the folder.

    Returns:
        The path of the card.

    Raises:
        ValueError: if `model_card.yaml` has unknown facts, or metadata that huggingface_hub rejects.
    """
    folder = Path(folder)
    facts = read_facts(folder / FACTS_FILE)
    record, original = read_json(folder / RECIPE_FILE, {}), read_json(folder / ORIGINAL_FILE, {})
    results = {path.stem: read_json(path) for path in sorted((folder / RESULTS_FOLDER).glob("*.json"))}
    results = {key: value for key, value in results.items() if value.get("results")}
    place = Path(final_folder or folder)
    title = title or name or place.resolve().name
    started_from = [starting_point(changed_from)] if changed_from else []
    based_on = [*filter(is_hub_id, origins(original)), *hub_ids([*all_starting_points(record), *started_from])]
    data = card_data(folder, facts, title, results, list(dict.fromkeys(based_on)))
    sections = {
        "Use": usage(folder, name or loadable_path(place), facts),
        "Images": images_section(folder),
        "Model": model_section(folder),
        "Data": data_section(record, facts, started_from),
        "Training": training_section(record, original),
        "Evaluation": results_section(results),
        "Limitations and bias": limits(folder, facts),
    }
    if changed_from:
        sections["Training"] = f"Made from `{started_from[0]['name']}`. Any further training is not recorded."
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    title = facts.get("title") or title
    text = f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{summary(folder, facts)}\n\n{body}\n\n{MARK}\n"
    ModelCard(text)  # rejects metadata that cannot be read back
    path = folder / CARD_FILE
    write_text(path, text)
    return path


class CardMixin:
    """Mixin that lets `FlexTokPipeline` save and upload itself with a model card."""

    def save_pretrained(self: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save the pipeline as Diffusers does, with a model card generated from what is known about the model.

        Recipe, result files and images of the loaded model are copied along, unless its weights changed; those of a
        model with other weights that the folder holds are moved to `outdated/` in it. A hand-written card is kept.
        """
        set_outdated_apart(self.components, Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if not kwargs.get("push_to_hub"):  # otherwise the upload wrote the card
            write_saved_card(self.config.get("_name_or_path"), Path(save_directory), None)

    def _upload_folder(self: Any, working_dir: str | Path, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # Diffusers calls this once the pipeline is saved for upload, with a placeholder card or the one from the Hub.
        write_saved_card(self.config.get("_name_or_path"), Path(working_dir), repo_id)
        return super()._upload_folder(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]


def write_saved_card(source_name: str | None, folder: Path, name: str | None) -> None:
    """Write the card of a pipeline that was just saved.

    Args:
        source_name: folder or Hub id that it was loaded from, if any.
        folder: where it was saved.
        name: what users load it by.
    """
    changed_from = None
    if source_name:
        source = Path(source_name)
        if not (source / "model_index.json").is_file():
            changed_from = source_name  # from the Hub, or deleted
        elif source.resolve() != folder.resolve() and not carry_card_files(source, folder):
            changed_from = source_name
    if is_replaceable(folder / CARD_FILE):
        write_model_card(folder, name, changed_from=changed_from)


def read_facts(path: Path) -> dict[str, Any]:
    """Read `model_card.yaml`; unknown names are an error."""
    facts = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    unknown = sorted(set(facts) - set(FACT_NAMES)) if isinstance(facts, dict) else [type(facts).__name__]
    if unknown:
        raise ValueError(f"{path} holds {unknown}, which a card does not use. Choose from {', '.join(FACT_NAMES)}.")
    return facts


def is_replaceable(card: Path) -> bool:
    """Whether a card may be overwritten: it does not exist, is generated, or is the placeholder of Diffusers."""
    if not card.is_file():
        return True
    text = card.read_text(encoding="utf-8")
    return MARK in text or DIFFUSERS_MARK in text


def carry_card_files(source: Path, target: Path) -> bool:
    """Copy recipe, facts, results and images to a newly saved folder if it holds the same weights.

    Returns:
        Whether the weights are the same; if not, nothing is copied.
    """
    if not same_weights(source, target):
        return False
    for name in (RECIPE_FILE, ORIGINAL_FILE, FACTS_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for name in (RESULTS_FOLDER, IMAGES_FOLDER):
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
    return True


def set_outdated_apart(components: Mapping[str, Any], folder: Path) -> None:
    """Move recipe, results and images in a folder to `outdated/` if its model has other weights than `components`.

    Called before that model is replaced: the card of the new one must not state what was measured on the old one.
    """
    outdated = [folder / name for name in (RECIPE_FILE, ORIGINAL_FILE, RESULTS_FOLDER, IMAGES_FOLDER)]
    outdated = [path for path in outdated if path.exists()]
    if not outdated or holds_weights(folder, components):
        return
    for path in outdated:
        shutil.rmtree(folder / OUTDATED_FOLDER / path.name, ignore_errors=True)
        (folder / OUTDATED_FOLDER).mkdir(exist_ok=True)
        path.replace(folder / OUTDATED_FOLDER / path.name)


def holds_weights(folder: Path, components: Mapping[str, Any]) -> bool:
    """Whether a saved model has the weights of `components`, whatever their stored precision."""
    states = {name: part.state_dict() for name, part in components.items() if hasattr(part, "state_dict")}
    parts = component_folders(folder)
    if parts.keys() != states.keys():
        return False
    for name, part in parts.items():
        files = sorted(part.glob("*.safetensors"))
        if not files:
            return False
        for path in files:
            with safe_open(path, framework="pt") as weights:
                for key in weights.keys():
                    current = states[name].get(key)
                    if current is None or current.is_meta:
                        return False
                    if not weights.get_tensor(key).float().equal(current.detach().cpu().float()):
                        return False
    return True


def same_weights(source: Path, target: Path) -> bool:
    """Whether two saved models have the same components with equal weights, whatever their stored precision."""
    parts = component_folders(source)
    if parts.keys() != component_folders(target).keys():
        return False
    return all(equal_tensors(part, component_folders(target)[name]) for name, part in parts.items())


def equal_tensors(source: Path, target: Path) -> bool:
    """Compare the tensors in two folders of weight files, with only one pair in memory at a time.

    Folders without safetensors, whose weights are pickled or missing, are never equal: they are not opened.
    """
    files = [sorted(folder.glob("*.safetensors")) for folder in (source, target)]
    opened = [[safe_open(path, framework="pt") for path in paths] for paths in files]
    owners = [{key: weights for weights in group for key in weights.keys()} for group in opened]
    if not owners[0] or owners[0].keys() != owners[1].keys():
        return False
    for key in owners[0]:
        first, second = (owner[key].get_tensor(key).float() for owner in owners)
        if first.shape != second.shape or not first.equal(second):
            return False
    return True


def card_data(
    folder: Path, facts: Mapping[str, Any], name: str, results: Mapping[str, Any], based_on: list[str]
) -> ModelCardData:
    """Return the metadata of a card; `based_on` are Hub ids."""
    has_prior = (folder / "prior").is_dir()
    return ModelCardData(
        license=facts.get("license"),
        license_name=facts.get("license_name"),
        language=facts.get("language") or ("en" if (folder / "text_encoder").is_dir() else None),
        library_name="flextok_hf" if (folder / "model_index.json").is_file() else "diffusers",
        pipeline_tag="text-to-image" if has_prior else "image-to-image",
        tags=TAGS,
        datasets=facts.get("datasets"),
        base_model=facts.get("base_model") or based_on or None,
        model_name=name.split("/")[-1],
        eval_results=evaluation_results(results, "text-to-image" if has_prior else "image-to-image") or None,
    )


def evaluation_results(results: Mapping[str, Any], task: str) -> list[EvalResult]:
    """Return the results with all tokens as metadata, for result files with one set of images."""
    entries = []
    for name, record in results.items():
        by_count = record["results"]
        if not all(str(key).isdigit() for key in by_count):
            continue
        count = max(by_count, key=int)
        for key, value in by_count[count].items():
            if is_figure(value):
                entries.append(
                    EvalResult(
                        task_type=task,
                        dataset_type=name,
                        dataset_name=f"{name}, {record.get('count', '?')} images",
                        metric_type=key,
                        metric_name=f"{measure_title(key)}, {count} tokens",
                        metric_value=value.get("mean", value.get("share")),
                    )
                )
    return entries


def summary(folder: Path, facts: Mapping[str, Any]) -> str:
    """Describe the model in two sentences."""
    if facts.get("summary"):
        return f"{facts['summary'].strip()} The method is FlexTok {METHOD}."
    if not (folder / "encoder").is_dir():
        return f"A VAE for FlexTok models {METHOD}."
    what = "generates images, and turns images" if (folder / "prior").is_dir() else "turns images"
    return (
        f"A FlexTok model {METHOD}: it {what} into ordered tokens and back. Any number of tokens gives an image:"
        " the first ones set its content, later ones add detail."
    )


def loadable_path(folder: Path) -> str:
    """Return a path that loads here: relative to the current folder if the model is below it."""
    folder = folder.resolve()
    return os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)


def usage(folder: Path, name: str, facts: Mapping[str, Any]) -> str:
    """Return example code that loads and uses the model."""
    quoted = json.dumps(name)
    if not (folder / "model_index.json").is_file():
        return f"```python\nfrom diffusers import AutoencoderKL\n\nvae = AutoencoderKL.from_pretrained({quoted})\n```"
    lines = ["from flextok_hf import FlexTokPipeline", "", f"pipe = FlexTokPipeline.from_pretrained({quoted})"]
    if folder.resolve().name == "embedded_model" and folder.resolve().parent.name == "flextok_hf":
        lines = ["from flextok_hf import FlexTokPipeline, embedded_model", ""]
        lines += ["pipe = FlexTokPipeline.from_pretrained(embedded_model())"]
    reads = read_json(folder / "prior" / "config.json", {})
    if (folder / "text_encoder").is_dir() and reads:
        prompt = facts.get("prompt") or next(iter(reads.get("known_names") or []), "a prompt")
        lines += [f"image = pipe({json.dumps(prompt, ensure_ascii=False)}, max_tokens=8).images[0]"]
    elif reads.get("num_classes"):
        lines += ["image = pipe(class_labels=[0], max_tokens=8).images[0]"]
    lines += [
        'token_ids = pipe.tokenize("photo.jpg")  # coarse first',
        "few = pipe.detokenize(token_ids[:, :4]).images[0]",
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def images_section(folder: Path) -> str:
    """Show the images next to the model, captioned with their file names."""
    files = sorted(path for path in (folder / IMAGES_FOLDER).glob("*") if path.is_file())
    return "\n\n".join(f"![{path.stem.replace('_', ' ')}]({IMAGES_FOLDER}/{path.name})" for path in files)


def limits(folder: Path, facts: Mapping[str, Any]) -> str:
    """Describe the limitations of the model."""
    lines = [facts["limits"].strip()] if facts.get("limits") else []
    side = image_side(folder)
    if side is not None:
        lines.append(
            f"Images are {side} x {side} pixels. Content that the training images lack is reconstructed as the"
            " nearest thing they contain, and the model inherits their biases. An image from few tokens is a plausible"
            " guess, not a faithful copy: do not rely on its details."
        )
    return "\n\n".join(lines)
