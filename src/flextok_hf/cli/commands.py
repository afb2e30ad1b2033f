"""The commands of the command line; `arguments.py` parses and checks their arguments."""

import argparse
import itertools
import json
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from ..embedded import embedded_model, list_models
from ..pipelines.bulk_tokenization import tokenize_batches
from ..pipelines.images import load_image, prepare_each, resize_and_crop
from ..pipelines.known_words import known_names
from ..pipelines.loading import load_pipeline
from ..pipelines.pipeline_flextok import FlexTokPipeline
from ..pipelines.token_checks import check_token_counts
from ..utils.files import ANIMATED, numbered_paths, read_json, save_animation, save_image
from ..utils.sheets import contact_sheet, token_count_title
from .token_files import parse_token_file, write_token_file


# Maximum number of images in memory at a time; more are processed in batches.
BATCH_SIZE = 16
FRAME_MS = 700


def generate(options: argparse.Namespace) -> None:
    """Generate images from a prompt."""
    pipe = open_pipeline(options)
    paths = numbered_paths(options.output, options.num_images)
    for start, batch in batches(paths, options, "images", pipe):
        # One generator per image: image n of seed s is the first image of seed s + n, whatever the batch.
        result = pipe(
            **condition(pipe, options.prompt),
            max_tokens=options.max_tokens,
            num_images_per_prompt=len(batch),
            image=options.image,
            keep_tokens=options.keep_tokens,
            **sampling(options),
            generator=[seeded(options.seed + start + number) for number in range(len(batch))],
        )
        for number, (path, image, token_ids) in enumerate(zip(batch, result.images, result.token_ids)):
            save_image(image, path)
            size, length = f"{image.width} x {image.height}", token_count_title(len(token_ids))
            report(options, f"{path}: {size}, {length}, seed {options.seed + start + number}")


def stream(options: argparse.Namespace) -> None:
    """Save the image at increasing token counts, as files or as one animation."""
    pipe = open_pipeline(options)
    pipe.set_progress_bar_config(disable=True if options.quiet else None, leave=False)
    path = Path(options.output)
    width = len(str(pipe.num_registers))
    frames = []
    for count, image in pipe.stream(
        **condition(pipe, options.prompt),
        token_counts=options.token_counts,
        generator=seeded(options.seed),
        **sampling(options),
    ):
        frames.append(image)
        if path.suffix.lower() != ANIMATED:
            frame_path = path.with_stem(f"{path.stem}-{count:0{width}d}")
            save_image(image, frame_path)
            report(options, f"{frame_path}: {token_count_title(count)}")
    if path.suffix.lower() == ANIMATED:
        save_animation(frames, path, options.frame_ms or FRAME_MS)
        report(options, f"{path}: {len(frames)} frame{'s'[: len(frames) > 1]}, up to {token_count_title(count)}")


def condition(pipe: FlexTokPipeline, prompt: str) -> dict[str, Any]:
    """Return the prompt as an argument of the pipeline: a text, or for a class prior a class name or number."""
    has_classes = pipe.prior is not None and pipe.prior.config.num_classes is not None
    if has_classes and pipe.prior.config.text_hidden_size is None:
        return {"class_labels": int(prompt) if prompt.isdecimal() else prompt}
    return {"prompt": prompt}


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling options of prior and decoder, under the names of the pipeline's call."""
    names = ("num_inference_steps", "guidance_scale", "prior_guidance_scale", "temperature", "top_k", "top_p")
    height, width = options.size or (None, None)
    return {"height": height, "width": width, **{name: getattr(options, name) for name in names}}


def tokenize(options: argparse.Namespace) -> None:
    """Turn photos into a JSON file of token ids."""
    pipe = open_pipeline(options)
    start = time.perf_counter()
    choose_size = pipe.size_rules.chooser(options.size)
    sizes: list[tuple[int, int]] = []

    def read() -> Iterator[torch.Tensor]:  # in batches of one size
        for _, batch in batches(options.photos, options, "photos", pipe):
            pixels = prepare_each([load_image(path) for path in batch], choose_size)
            sizes.extend((image.shape[1], image.shape[2]) for image in pixels)
            for _, group in itertools.groupby(pixels, key=lambda image: image.shape):
                yield torch.stack(list(group))

    rows = [ids for batch in tokenize_batches(pipe, read(), options.max_tokens) for ids in batch.tolist()]
    speed = len(rows) / (time.perf_counter() - start)
    images = [
        {"file": path, "height": height, "width": width, "token_ids": ids}
        for path, (height, width), ids in zip(options.photos, sizes, rows, strict=True)
    ]
    write_token_file(options.output, images, pipe.codebook_size, pipe.num_registers)
    report(options, f"{options.output}: {len(rows)} x {token_count_title(len(rows[0]))}, {speed:.1f} photos/s")


def detokenize(options: argparse.Namespace) -> None:
    """Turn a file of token ids back into images."""
    content = read_json(options.ids)
    pipe = open_pipeline(options)
    sequences, sizes = parse_token_file(content, options.ids, pipe.codebook_size, pipe.num_registers)
    if options.size is not None:
        sizes = [options.size] * len(sequences)
    sequences = [sequence[: options.max_tokens] for sequence in sequences]
    paths = numbered_paths(options.output, len(sequences))
    start_s = time.perf_counter()
    for start, batch in batches(paths, options, "images", pipe):
        rows = slice(start, start + len(batch))
        images = pipe.detokenize(
            [torch.tensor(sequence) for sequence in sequences[rows]],
            height=[None if size is None else size[0] for size in sizes[rows]],
            width=[None if size is None else size[1] for size in sizes[rows]],
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            generator=[seeded(options.seed + start + number) for number in range(len(batch))],
        ).images
        for path, image, sequence in zip(batch, images, sequences[start:]):
            save_image(image, path)
            report(options, f"{path}: {image.width} x {image.height}, {token_count_title(len(sequence))}")
    report(options, f"{len(paths) / (time.perf_counter() - start_s):.2f} images/s")


def reconstruct(options: argparse.Namespace) -> None:
    """Save a contact sheet: a row per photo, a column per token count."""
    pipe = open_pipeline(options)
    counts = check_token_counts(options.max_tokens, pipe.num_registers)
    choose_size = pipe.size_rules.chooser(options.size)
    rows: list[list[Image.Image]] = []
    for start, batch in batches(options.photos, options, "photos", pipe):
        photos = [load_image(path) for path in batch]
        columns = pipe.reconstruct(
            photos,
            max_tokens=counts,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            generator=[seeded(options.seed + start + number) for number in range(len(batch))],
            size=options.size,
        )
        sizes = [choose_size(photo.height, photo.width) for photo in photos]
        originals = [fit_original(photo, size) for photo, size in zip(photos, sizes, strict=True)]
        rows += [list(row) for row in zip(originals, *columns)]
    titles = ["original", *map(token_count_title, counts)]
    sheet = contact_sheet(rows, titles)
    save_image(sheet, options.output)
    report(options, f"{options.output}: {len(rows)} row{'s'[: len(rows) > 1]}, {', '.join(titles)}")


def fit_original(photo: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Crop a photo to the proportions of a size, at least 128 pixels long, to show what the model sees."""
    scale = max(1, 128 / max(size))
    return resize_and_crop(photo, (max(1, round(size[0] * scale)), max(1, round(size[1] * scale))))


def demo(options: argparse.Namespace) -> None:
    """Serve the demo page until interrupted."""
    try:
        from ..demo.page import build_demo, launch_options
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError('the demo needs Gradio; install it: pip install "flextok_hf[demo]"') from error
    is_embedded = options.model == embedded_model()
    page = build_demo(open_pipeline(options), "the embedded model" if is_embedded else options.model)
    page.launch(server_name=options.host, server_port=options.port, quiet=options.quiet, **launch_options())


def convert(options: argparse.Namespace) -> None:
    """Convert official checkpoints to a folder."""
    from ..conversion.convert import convert_checkpoint  # here, so that other commands do not wait for it

    set_verbosity(options)
    notes = convert_checkpoint(
        options.output,
        options.tokenizer,
        options.prior,
        options.text_encoder,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        revision=options.revision,
        prior_revision=options.prior_revision,
        ignore=options.ignore,
        is_quiet=options.quiet,
    )
    for note in notes:
        report(options, f"note: {note}")
    report(options, f"{options.output}: {'a prior' if options.tokenizer is None else 'a pipeline'}")


def info(options: argparse.Namespace) -> None:
    """Print the components and sizes of a model, or the models known by name."""
    if options.models:
        models = list_models()
        print(json.dumps(models, indent=2) if options.json else models_table(models))
        return
    pipe = open_pipeline(options)
    if options.names:
        known = known_names(pipe.prior)
        if not known:
            raise ValueError(
                "this model does not say what it was trained on; scripts/collect_words.py adds that to a prior that"
                " reads text"
            )
        print(json.dumps(known, indent=2, ensure_ascii=False) if options.json else names_list(known))
        return
    folder = Path(options.model)
    components = {}
    for name, component in pipe.components.items():
        if component is None:
            continue
        entry: dict[str, Any] = {"class": type(component).__name__}
        if isinstance(component, torch.nn.Module):
            entry["parameters"] = sum(parameter.numel() for parameter in component.parameters())
        if folder.is_dir():
            entry["bytes_on_disk"] = sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file())
        components[name] = entry
    facts = {
        "model": options.model,
        "resolution": pipe.resolution,
        "num_registers": pipe.num_registers,
        "codebook_size": pipe.codebook_size,
        "components": components,
    }
    print(json.dumps(facts, indent=2) if options.json else info_table(facts))


def names_list(known: dict[str, list[str]]) -> str:
    """Return the lists of `flextok info --names`, wrapped to the width of the terminal."""
    titles = {"classes": "classes", "names": "names", "other_words": "other words, the most frequent first"}
    width = shutil.get_terminal_size().columns
    return "\n\n".join(
        f"{len(texts):,} {titles[kind]}\n" + textwrap.fill(", ".join(texts), width, break_on_hyphens=False)
        for kind, texts in known.items()
        if texts
    )


def models_table(models: list[dict[str, str]]) -> str:
    """Return the models of `flextok info --models` as a readable table."""
    rows = [list(models[0]), *(list(model.values()) for model in models)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def info_table(facts: dict[str, Any]) -> str:
    """Return the facts of `flextok info` as a readable table."""
    side = facts["resolution"]
    lines = [
        f"model       {facts['model']}",
        f"images      {side} x {side}",
        f"tokens      1 to {facts['num_registers']} per image, {facts['codebook_size']:,} codes",
        "",
        f"{'component':<14}{'class':<34}{'parameters':>14}{'on disk':>12}",
    ]
    for name, entry in facts["components"].items():
        parameters = f"{entry['parameters']:,}" if "parameters" in entry else "-"
        on_disk = f"{entry['bytes_on_disk'] / 2**20:.1f} MiB" if "bytes_on_disk" in entry else "-"
        lines.append(f"{name:<14}{entry['class']:<34}{parameters:>14}{on_disk:>12}")
    total = sum(entry.get("parameters", 0) for entry in facts["components"].values())
    total_bytes = sum(entry.get("bytes_on_disk", 0) for entry in facts["components"].values())
    lines.append(f"{'total':<48}{total:>14,}{f'{total_bytes / 2**20:.1f} MiB' if total_bytes else '-':>12}")
    return "\n".join(lines)


def open_pipeline(options: argparse.Namespace) -> FlexTokPipeline:
    """Load the pipeline in the options onto their device."""
    set_verbosity(options)
    return load_pipeline(options.model, options.device, getattr(torch, options.dtype))


def set_verbosity(options: argparse.Namespace) -> None:
    """Hide the loading bars of the libraries, and with `--quiet` also their warnings."""
    if options.quiet:
        diffusers_logging.set_verbosity_error()
        transformers_logging.set_verbosity_error()
    # Their loading bars would distract from the bars that show how long the work takes.
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def batches(
    items: Sequence, options: argparse.Namespace, unit: str, pipe: FlexTokPipeline
) -> Iterator[tuple[int, Sequence]]:
    """Yield (index of the first item, items) in batches of `BATCH_SIZE`, with one progress bar."""
    # One batch: the pipeline's own bar, over decoder steps, says more. Several: a bar over all items.
    is_single = len(items) <= BATCH_SIZE
    is_hidden = True if options.quiet else None  # None: shown only in a terminal
    pipe.set_progress_bar_config(disable=is_hidden if is_single else True, leave=False)
    with tqdm(total=len(items), unit=f" {unit}", disable=True if is_single else is_hidden, leave=False) as progress:
        for start in range(0, len(items), BATCH_SIZE):
            batch = items[start : start + BATCH_SIZE]
            yield start, batch
            progress.update(len(batch))


def seeded(seed: int) -> torch.Generator:
    """Return a CPU generator, so that a seed gives the same random numbers on every device."""
    return torch.Generator("cpu").manual_seed(seed)


def report(options: argparse.Namespace, line: str) -> None:
    """Print one line about a result, unless `--quiet` is set."""
    if not options.quiet:
        print(line)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "generate": generate,
    "stream": stream,
    "tokenize": tokenize,
    "detokenize": detokenize,
    "reconstruct": reconstruct,
    "demo": demo,
    "convert": convert,
    "info": info,
}
