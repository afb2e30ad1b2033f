"""Tokenize an image dataset once, so that a prior can be trained without the tokenizer.

    python scripts/tokenize_dataset.py --train_data FOLDER_OR_NAME --output tokens --caption_column text --crops 4
    accelerate launch scripts/tokenize_dataset.py ...        (several processes, one device each)

Writes parquet shards with one row per image: `token_ids` as a list of crops, coarsest token first, their `height` and
`width` in pixels, and the caption and class columns unchanged. The first crop is the center of the image, the others
are random. A shard appears when it is complete; a rerun with the same options creates only the missing shards.
Unreadable images are skipped and listed in the JSON file next to their shard.
"""

import argparse
import json
import logging
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from datasets import Sequence, Value
from huggingface_hub import DatasetCard, DatasetCardData
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from flextok_hf import FlexTokPipeline, embedded_model
from flextok_hf.cli.arguments import size_or_keep
from flextok_hf.data.columns import Columns
from flextok_hf.data.image_dataset import ImageDataset
from flextok_hf.data.samples import ImageTransform, read_image
from flextok_hf.data.seeds import draw_seed
from flextok_hf.data.skipped_rows import UnreadableRow
from flextok_hf.data.training_dataset import load_training_dataset
from flextok_hf.pipelines.bulk_tokenization import tokenize_batches
from flextok_hf.pipelines.sizes import SizeRules
from flextok_hf.utils.files import read_json, write_atomically, write_text
from flextok_hf.utils.measures import weights_hash
from flextok_hf.utils.plain_errors import plain_errors


logger = logging.getLogger(__name__)

COLUMNS = ["token_ids", "height", "width"]


class ImageCrops(Dataset):
    """Rows of a dataset: (row, uint8 crops (crops, 3, H, W) or `None`, values to keep, reason if no crops)."""

    def __init__(self, dataset: ImageDataset, rows: list[int], options: argparse.Namespace, rules: SizeRules):
        self.dataset = dataset
        self.rules, self.size = rules, options.size
        self.rows = rows
        self.num_crops = options.crops
        self.seed = options.seed
        resolution = dataset.transform.resolution
        self.center = ImageTransform(resolution)
        self.random = ImageTransform(resolution, random_crop=True)
        self.random_flip = options.random_flip

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | None, dict[str, Any], str]:
        row = self.rows[index]
        values = dict(self.dataset.rows[row])
        try:
            image = read_image(values.pop(self.dataset.columns.image))
            for name, value in values.items():
                if value is None or value == []:
                    raise UnreadableRow(f"its '{name}' is empty")
        except UnreadableRow as error:
            return row, None, values, str(error)
        size = self.rules.chooser(self.size)(image.height, image.width)
        values["height"], values["width"] = size
        crops = [self.center.to_pixels(image, shape=size)]
        for number in range(1, self.num_crops):
            generator = torch.Generator().manual_seed(draw_seed(self.seed, row, number))
            pixels = self.random.to_pixels(image, generator, size)
            is_flipped = self.random_flip and torch.rand((), generator=generator).item() < 0.5
            crops.append(pixels.flip(-1) if is_flipped else pixels)
        return row, torch.stack(crops), values, ""


class ShardWriter:
    """Collects rows in the order of the dataset and writes each shard after its last row."""

    def __init__(self, options: argparse.Namespace, dataset: ImageDataset, codebook_size: int):
        self.options = options
        self.num_rows = len(dataset)
        id_type = Value("uint16" if codebook_size <= 2**16 else "uint32")
        kept = {name: dataset.rows.features[name] for name in (options.caption_column, options.class_column) if name}
        sides = {name: Value("int32") for name in ("height", "width")}
        self.features = datasets.Features({"token_ids": Sequence(Sequence(id_type)), **sides, **kept})
        self.rows: dict[str, list] = {name: [] for name in self.features}
        self.skipped: dict[int, str] = {}

    def shard_of(self, row: int) -> int:
        return row // self.options.shard_size

    def path(self, shard: int) -> Path:
        """Return the path of a shard, named in the usual pattern of the Hub."""
        count = -(-self.num_rows // self.options.shard_size)
        return self.options.output / f"{self.options.split}-{shard:05d}-of-{count:05d}.parquet"

    def missing_rows(self, process_index: int, num_processes: int) -> list[int]:
        """Return the rows of the shards that this process has to create."""
        count = -(-self.num_rows // self.options.shard_size)
        shards = [shard for shard in range(process_index, count, num_processes) if not self.path(shard).is_file()]
        size = self.options.shard_size
        return [row for shard in shards for row in range(shard * size, min(self.num_rows, (shard + 1) * size))]

    def add(self, row: int, token_ids: list | None, values: dict[str, Any], reason: str) -> None:
        """Add the next row; without token ids it is recorded as skipped, with the `reason`."""
        if token_ids is None:
            self.skipped[row] = reason
        else:
            for name, value in {"token_ids": token_ids, **values}.items():
                self.rows[name].append(value)
        if row + 1 == self.num_rows or self.shard_of(row + 1) != self.shard_of(row):
            self.write(self.shard_of(row))

    def write(self, shard: int) -> None:
        """Write a shard, after its report: if the shard exists, so does the report."""
        report = {"rows": len(self.rows["token_ids"]), "skipped": self.skipped}
        path = self.path(shard)
        write_text(path.with_suffix(".json"), json.dumps(report) + "\n")
        table = datasets.Dataset.from_dict(self.rows, features=self.features)
        write_atomically(path, table.to_parquet)
        self.rows = {name: [] for name in self.features}
        self.skipped = {}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options; those shared with `train.py` have the same names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--train_data", nargs="+", required=True, help="folder, parquet files, Hub dataset, or synthetic"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards; created if missing")
    parser.add_argument("--model", help="folder or Hub id of the tokenizer (the embedded model)")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--caption_column", help="column to keep: a caption or a list of captions")
    parser.add_argument("--class_column", help="column to keep: class labels")
    parser.add_argument("--max_train_samples", type=int, help="use only the first rows")
    parser.add_argument("--crops", type=int, default=1, help="crops per image; the first is the center (1)")
    parser.add_argument(
        "--size", type=size_or_keep, help="keep: the proportions of each image; or a side, or HxW (the model's square)"
    )
    parser.add_argument("--random_flip", action="store_true", help="flip half of the crops except the first")
    parser.add_argument("--max_tokens", type=int, help="tokens to keep per image (all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=32, help="crops per batch (32)")
    parser.add_argument("--shard_size", type=int, default=10_000, help="images per file (10,000)")
    parser.add_argument("--dataloader_num_workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", help="device (default: chosen by accelerate)")
    options = parser.parse_args(argv)
    for name in ("crops", "batch_size", "shard_size"):
        if getattr(options, name) < 1:
            parser.error(f"`--{name}` must be 1 or more, got {getattr(options, name)}.")
    for name in ("caption_column", "class_column"):
        if getattr(options, name) in COLUMNS:
            parser.error(f"`--{name}` {getattr(options, name)!r} is a column of the output. Rename it first.")
    return options


def check_settings(options: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Store the settings that determine the ids next to the shards, and refuse to mix shards of different settings.

    Raises:
        ValueError: if the folder holds shards that were created with other settings.
    """
    path = options.output / "settings.json"
    if not path.is_file():
        write_text(path, json.dumps(facts, indent=2) + "\n")
        return
    earlier = read_json(path)
    # the weights matter, not their location
    changed = [name for name in facts if name != "model" and earlier.get(name) != facts[name]]
    if changed:
        lines = ", ".join(f"{name} was {earlier.get(name)!r} and is {facts[name]!r}" for name in changed)
        raise ValueError(
            f"`--output` {str(options.output)!r} holds shards of other settings: {lines}. Choose another folder."
        )


def describe(options: argparse.Namespace, pipe: FlexTokPipeline, num_rows: int) -> dict[str, Any]:
    """Return all settings that determine the content of the shards."""
    names = ("train_data", "split", "image_column", "caption_column", "class_column", "crops", "random_flip", "seed")
    modules = {name: getattr(pipe, name) for name in ("encoder", "vae") if getattr(pipe, name) is not None}
    return {
        **{name: getattr(options, name) for name in (*names, "shard_size", "dtype")},
        "size": list(options.size) if isinstance(options.size, tuple) else options.size,
        "columns": COLUMNS,
        "model": options.model or "embedded",
        "weights_sha256": weights_hash(modules),
        "codebook_size": pipe.codebook_size,
        "num_registers": pipe.num_registers,
        "num_tokens": min(options.max_tokens or pipe.num_registers, pipe.num_registers),
        "resolution": pipe.resolution,
        "num_rows": num_rows,
    }


def tokenize_rows(pipe: FlexTokPipeline, crops: ImageCrops, options: argparse.Namespace) -> Iterator[tuple]:
    """Yield (row, ids of its crops or `None`, values, reason) in the order of the rows."""
    loader = DataLoader(
        crops,
        batch_size=max(1, options.batch_size // options.crops),
        num_workers=options.dataloader_num_workers,
        collate_fn=list,
    )
    waiting: deque[tuple[list[tuple], list[list[int]]]] = deque()  # rows read, and groups whose ids are to come

    def pixel_batches() -> Iterator[torch.Tensor]:
        for rows in loader:
            groups: dict[torch.Size, list[int]] = {}  # rows of one size
            for index, (_, pixels, *_) in enumerate(rows):
                if pixels is not None:
                    groups.setdefault(pixels.shape, []).append(index)
            waiting.append((rows, list(groups.values())))
            for members in groups.values():
                yield torch.cat([rows[index][1] for index in members])

    def finished() -> Iterator[tuple]:
        while waiting and not waiting[0][1]:
            for row, _, values, reason in waiting.popleft()[0]:
                yield row, found.pop(row, None), values, reason

    found: dict[int, list] = {}
    for token_ids in tokenize_batches(pipe, pixel_batches(), options.max_tokens):
        yield from finished()  # rows without a readable image
        rows, groups = waiting[0]
        for index, of_image in zip(groups.pop(0), token_ids.split(options.crops), strict=True):
            found[rows[index][0]] = of_image.tolist()
        yield from finished()
    yield from finished()


def write_card(options: argparse.Namespace, writer: ShardWriter, facts: dict[str, Any]) -> None:
    """Write a README.md that describes the ids and how to load them."""
    reports = [read_json(path) for path in sorted(options.output.glob(f"{options.split}-*.json"))]
    num_rows, num_skipped = (sum(counts) for counts in zip(*((r["rows"], len(r["skipped"])) for r in reports)))
    data_files = [{"split": options.split, "path": f"{options.split}-*.parquet"}]
    metadata = DatasetCardData(
        tags=["flextok", "image-tokens"], configs=[{"config_name": "default", "data_files": data_files}]
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    text = f"""---
{metadata.to_yaml()}
---

# Images as FlexTok tokens

{num_rows:,} images as token ids; {num_skipped:,} could not be read and are skipped. `token_ids` holds a list of crops
per image, the first of which is the center, and `height` and `width` their size in pixels. Each crop is a list of
{facts["num_tokens"]} ids below {facts["codebook_size"]:,}, coarsest first, and any prefix describes the image. Created
by `scripts/tokenize_dataset.py` of flextok_hf. The ids are only valid for the tokenizer with these weights. The terms
of the source apply to images and captions.

```python
from datasets import load_dataset

rows = load_dataset("parquet", data_files="{options.split}-*.parquet", split="train")
first_crop = rows[0]["token_ids"][0]
```

| setting | value |
| --- | --- |
{table}
"""
    write_atomically(options.output / "README.md", lambda name: DatasetCard(text).save(name))


def main(argv: list[str] | None = None) -> None:
    """Tokenize the missing shards and report the speed."""
    options = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    state = PartialState(cpu=options.device == "cpu")
    pipe = FlexTokPipeline.from_pretrained(options.model or embedded_model(), dtype=getattr(torch, options.dtype))
    pipe.to(options.device or state.device)
    dataset = load_training_dataset(
        options.train_data[0] if len(options.train_data) == 1 else options.train_data,
        options.split,
        transform=ImageTransform(pipe.resolution),
        columns=Columns(options.image_column, options.caption_column, options.class_column),
        max_samples=options.max_train_samples,
        seed=options.seed,
    )
    facts = describe(options, pipe, len(dataset))
    options.output.mkdir(parents=True, exist_ok=True)
    with state.main_process_first():
        check_settings(options, facts)
    writer = ShardWriter(options, dataset, pipe.codebook_size)
    rows = writer.missing_rows(state.process_index, state.num_processes)
    crops = ImageCrops(dataset, rows, options, pipe.size_rules)
    start, num_images = time.perf_counter(), 0
    with tqdm(total=len(crops), unit=" images", disable=not state.is_main_process) as progress:
        for row, token_ids, values, reason in tokenize_rows(pipe, crops, options):
            if token_ids is None:
                logger.warning("Row %d is skipped: %s", row, reason)
            writer.add(row, token_ids, values, reason)
            num_images += 1
            progress.update()
    seconds = time.perf_counter() - start
    state.wait_for_everyone()
    if state.is_main_process:
        write_card(options, writer, facts)
    speed = f"{options.crops * num_images / seconds:.1f} crops/s"
    print(f"{options.output}: {num_images} images in {seconds:.1f} s, {speed}, process {state.process_index}")


if __name__ == "__main__":
    with plain_errors():
        main()
