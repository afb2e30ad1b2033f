"""Draw a photo in several shapes with one or more models, and measure how much of held-out photos comes back.

    python scripts/compare_shapes.py --models embedded runs/shapes_tokenizer/pipeline --image docs/assets/pyramid.jpg
    python scripts/compare_shapes.py --models embedded runs/shapes_tokenizer/pipeline --data data/caltech101_128

The first writes `shapes.webp` to `--output` (docs/assets): a row per model with the photo in its own proportions from
more and more tokens, and all of its tokens drawn as a square and in the shape turned by 90 degrees. The second crops
every photo to a square, 16:9 and 9:16 of the same area, and prints PSNR per shape and number of tokens, with 95%
bootstrap intervals over the photos, also of the differences from squares and from the first model.
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flextok_hf import FlexTokPipeline, embedded_model
from flextok_hf.data.columns import Columns, undecoded
from flextok_hf.data.samples import read_image
from flextok_hf.data.sources import load_rows
from flextok_hf.evaluation.intervals import percentile_interval, poisson_weights
from flextok_hf.pipelines.images import load_image, prepare_each, resize_and_crop
from flextok_hf.pipelines.loading import use_flow_decoder
from flextok_hf.utils.files import save_image
from flextok_hf.utils.measures import peak_signal_to_noise
from flextok_hf.utils.sheets import contact_sheet, token_count_title


PROPORTIONS = {"square": (1, 1), "16:9": (9, 16), "9:16": (16, 9)}  # height to width
DRAWN_COUNTS, MEASURED_COUNTS = (4, 16, 64, 256), (16, 64, 256)
NUM_STEPS = 10  # of measurements, without guidance
BATCH_SIZE = 8


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def used_counts(pipe: FlexTokPipeline, counts: tuple[int, ...]) -> list[int]:
    """Return those numbers of tokens that the model has, and all of its tokens."""
    return sorted({count for count in counts if count < pipe.num_registers} | {pipe.num_registers})


def load(name: str) -> FlexTokPipeline:
    """Load the tokenizer of a pipeline."""
    unused = {"prior": None, "text_encoder": None, "tokenizer": None}
    folder = embedded_model() if name == "embedded" else name
    pipe = FlexTokPipeline.from_pretrained(folder, **unused)
    use_flow_decoder(pipe, folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_row(pipe: FlexTokPipeline, photo: Image.Image, seed: int) -> tuple[list[Image.Image], list[str]]:
    """Return the images of one model, and their titles."""
    read = pipe.tokenize([photo], size="keep", return_dict=True)
    height, width = read.sizes[0]
    counts = used_counts(pipe, DRAWN_COUNTS)
    drawn = [(count, height, width) for count in counts]
    drawn += [(counts[-1], pipe.resolution, pipe.resolution), (counts[-1], width, height)]
    images = [
        pipe.detokenize(read.token_ids[:, :count], height=rows, width=columns, generator=seeded(seed)).images[0]
        for count, rows, columns in drawn
    ]
    titles = ["photo", *map(token_count_title, counts), "as a square", "turned"]
    return [resize_and_crop(photo, (height, width)), *images], titles


@torch.no_grad()
def measure(pipe: FlexTokPipeline, photos: list[Image.Image]) -> dict[tuple[str, int], Tensor]:
    """Return the PSNR of each photo, per shape and number of tokens; every photo has noise of its own."""
    values: dict[tuple[str, int], list[Tensor]] = {}
    counts = used_counts(pipe, MEASURED_COUNTS)
    for shape, proportions in PROPORTIONS.items():
        size = pipe.size_rules.keep(*proportions)
        for first in range(0, len(photos), BATCH_SIZE):
            batch = photos[first : first + BATCH_SIZE]
            originals = torch.stack(prepare_each(batch, lambda *_, size=size: size)) / 2 + 0.5
            generators = [seeded(first + number) for number in range(len(batch))]
            settings = {"num_inference_steps": NUM_STEPS, "guidance_scale": 1.0, "output_type": "pt", "size": size}
            columns = pipe.reconstruct(originals, counts, generator=generators, **settings)
            for count, images in zip(counts, columns, strict=True):
                values.setdefault((shape, count), []).append(peak_signal_to_noise(images, originals))
    return {key: torch.cat(parts).double() for key, parts in values.items()}


def describe(values: Tensor) -> str:
    """Return a mean with its interval, in dB."""
    weights = poisson_weights(range(len(values)))
    low, high = percentile_interval((weights * values[:, None]).sum(0) / weights.sum(0))
    return f"{values.mean():.2f} ({low:.2f} to {high:.2f})"


def report(measured: dict[str, dict[tuple[str, int], Tensor]]) -> dict[str, dict[str, str]]:
    """Return a line per model, shape and number of tokens: PSNR, and its difference from two others."""
    first = next(iter(measured.values()))
    lines = {}
    for name, values in measured.items():
        for (shape, count), psnr in values.items():
            line = {"psnr_db": describe(psnr)}
            if shape != "square":
                line["minus_square"] = describe(psnr - values["square", count])
            if values is not first and (shape, count) in first:
                line["minus_first_model"] = describe(psnr - first[shape, count])
            lines[f"{name}, {shape}, {token_count_title(count)}"] = line
    return lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["embedded"], help="folders or Hub ids, or `embedded`")
    parser.add_argument("--titles", nargs="+", help="title of each model in the figure (its name)")
    parser.add_argument("--image", type=Path, help="photo to draw; without one there is no figure")
    parser.add_argument("--data", help="held-out photos to measure: parquet files, a folder or a Hub id")
    parser.add_argument("--num_images", type=int, default=64, help="photos to measure, spread over the data (64)")
    parser.add_argument("--output", type=Path, default=Path("docs/assets"), help="folder for the figure")
    parser.add_argument("--seed", type=int, default=0, help="of the noise of the figure")
    options = parser.parse_args()
    if options.titles and len(options.titles) != len(options.models):
        parser.error(f"`--titles` has {len(options.titles)} entries, but there are {len(options.models)} `--models`.")
    return options


def main() -> None:
    options = parse_arguments()
    pipes = {name: load(name) for name in options.models}
    if options.image is not None:
        rows = [draw_row(pipe, load_image(options.image), options.seed) for pipe in pipes.values()]
        sheet = contact_sheet([row for row, _ in rows], rows[0][1], row_titles=options.titles or options.models)
        options.output.mkdir(parents=True, exist_ok=True)
        save_image(sheet, options.output / "shapes.webp")
    if options.data is not None:
        rows = undecoded(load_rows(options.data, "validation"), Columns())
        chosen = range(0, len(rows), max(1, len(rows) // options.num_images))[: options.num_images]
        photos = [read_image(rows[row]["image"]) for row in chosen]
        print(json.dumps(report({name: measure(pipe, photos) for name, pipe in pipes.items()}), indent=1))


if __name__ == "__main__":
    main()
