"""The commands of the command line; `arguments.py` parses and checks their arguments."""

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..embedded import embedded_model
from ..pipelines.bulk_tokenization import tokenize_batches
from ..pipelines.images import prepare_each, resize_and_crop
from ..pipelines.pipeline_flextok import FlexTokPipeline
from ..pipelines.token_checks import check_token_counts
from ..utils.files import ANIMATED, numbered_paths, read_json, save_animation, save_image
from ..utils.sheets import contact_sheet, token_count_title
from . import personalize
from .info import info
from .opening import open_pipeline, report, set_verbosity
from .photos import PhotoReader
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
        if path.suffix.lower() not in ANIMATED:
            frame_path = path.with_stem(f"{path.stem}-{count:0{width}d}")
            save_image(image, frame_path)
            report(options, f"{frame_path}: {token_count_title(count)}")
    if path.suffix.lower() in ANIMATED:
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
    choose_size, reader = pipe.size_rules.chooser(options.size), PhotoReader(options.found)
    sizes: list[tuple[int, int]] = []

    def read() -> Iterator[torch.Tensor]:  # in batches of one size
        for _, batch in batches(options.photos, options, "photos", pipe):
            photos = reader.read(batch)
            pixels = prepare_each(photos, choose_size) if photos else []
            sizes.extend((image.shape[1], image.shape[2]) for image in pixels)
            for _, group in itertools.groupby(pixels, key=lambda image: image.shape):
                yield torch.stack(list(group))

    rows = [ids for batch in tokenize_batches(pipe, read(), options.max_tokens) for ids in batch.tolist()]
    reader.check_any()
    speed = len(rows) / (time.perf_counter() - start)
    images = [
        {"file": path, "height": height, "width": width, "token_ids": ids}
        for path, (height, width), ids in zip(reader.used, sizes, rows, strict=True)
    ]
    write_token_file(options.output, images, pipe.codebook_size, pipe.num_registers)
    reader.report(options)
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
    """Save a contact sheet with a column per token count and a row per photo; or into a folder, a sheet per photo."""
    sheets = {} if Path(options.output).suffix else sheet_paths(options)
    pipe = open_pipeline(options)
    pipe.set_progress_bar_config(disable=True)
    counts = check_token_counts(options.max_tokens, pipe.num_registers)
    choose_size, reader = pipe.size_rules.chooser(options.size), PhotoReader(options.found)
    titles = ["original", *map(token_count_title, counts)]
    rows: list[list[Image.Image]] = []
    total = len(options.photos) * len(counts)
    is_hidden = True if options.quiet else None  # None: shown only in a terminal
    with tqdm(total=total, unit=" images", disable=is_hidden, leave=False) as progress:
        for start in range(0, len(options.photos), BATCH_SIZE):
            batch = options.photos[start : start + BATCH_SIZE]
            photos = reader.read(batch)
            progress.total -= (len(batch) - len(photos)) * len(counts)
            if not photos:
                continue
            columns = reconstruct_batch(pipe, photos, counts, options, start, progress.update)
            sizes = [choose_size(photo.height, photo.width) for photo in photos]
            originals = [fit_original(photo, size) for photo, size in zip(photos, sizes, strict=True)]
            new_rows = [list(row) for row in zip(originals, *columns, strict=True)]
            if not sheets:
                rows += new_rows
                continue
            for path, row in zip(reader.used[-len(photos) :], new_rows, strict=True):
                sheets[path].parent.mkdir(parents=True, exist_ok=True)
                save_image(contact_sheet([row], titles), sheets[path])
    reader.check_any()
    if not sheets:
        save_image(contact_sheet(rows, titles), options.output)
    reader.report(options)
    what = f"{len(reader.used)} {'sheet' if sheets else 'row'}{'s'[: len(reader.used) > 1]}"
    report(options, f"{options.output}: {what}, {', '.join(titles)}")


def reconstruct_batch(
    pipe: FlexTokPipeline,
    photos: list[Image.Image],
    counts: list[int],
    options: argparse.Namespace,
    start: int,
    update: Callable[[int], Any],
) -> list[list[Image.Image]]:
    """Return what `pipe.reconstruct` does, column by column, so that `update` learns of every one.

    Args:
        pipe: the model.
        photos: a batch.
        counts: numbers of tokens, one column each.
        options: of the command.
        start: number of the first photo: photo n of seed s is decoded from the noise of seed s + n.
        update: called with the number of new images.
    """
    read = pipe.tokenize(photos, max(counts), options.size, return_dict=True)
    generators = [seeded(options.seed + start + number) for number in range(len(photos))]
    noise = pipe.prepare_latents(len(photos), generators, sizes=read.sizes)
    columns = []
    for count in counts:
        decoding = {"num_inference_steps": options.num_inference_steps, "guidance_scale": options.guidance_scale}
        columns.append(pipe.detokenize(read.token_ids[:, :count], latents=noise, **decoding).images)
        update(len(photos))
    return columns


def sheet_paths(options: argparse.Namespace) -> dict[str, Path]:
    """Return where the sheet of each photo goes: below the output folder as it is below the folder it was found in.

    Raises:
        ValueError: if two photos would have the same sheet.
    """
    folder, paths = Path(options.output), {}
    for photo in options.photos:
        paths[photo] = (
            folder / f"{os.path.relpath(photo, options.found.get(photo, os.path.dirname(photo) or '.'))}.png"
        )
    if len(set(paths.values())) < len(paths):
        raise ValueError(
            "two of the photos have the same name; reconstruct them one after the other, into two folders"
        )
    return paths


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
    page.launch(
        server_name=options.host,
        server_port=options.port,
        quiet=options.quiet,
        share=options.share,
        **launch_options(),
    )


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


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "generate": generate,
    "stream": stream,
    "tokenize": tokenize,
    "detokenize": detokenize,
    "reconstruct": reconstruct,
    "demo": demo,
    "personalize": personalize.run,
    "convert": convert,
    "info": info,
}
