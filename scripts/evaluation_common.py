"""What the evaluation scripts share: reading the prepared pictures, running the pipeline, writing results."""

import argparse
import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

import diffusers
import torch
import transformers
from datasets import load_dataset
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from flextok_hf.embedded import embedded_model
from flextok_hf.evaluation import stack_pictures, weights_hash
from flextok_hf.nested_dropout import token_ladder
from flextok_hf.outputs import write_atomically
from flextok_hf.pipeline_flextok import FlexTokPipeline


DECODER_SETTINGS = ("num_inference_steps", "guidance_scale")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every evaluation has."""
    parser.add_argument("--data", required=True, type=Path, help="folder made by prepare_embedded_data.py")
    parser.add_argument("--output", required=True, type=Path, help="folder for the results; made if missing")
    parser.add_argument("--model", help="folder or Hub id; by default the embedded model")
    parser.add_argument("--device", default="cpu", help="where to run the model")
    parser.add_argument("--token_counts", type=int, nargs="+", help="tokens per picture; by default 1, 2, 4, ... all")
    parser.add_argument("--batch_size", type=int, default=32, help="pictures made at a time")
    parser.add_argument("--seed", type=int, default=0, help="picture i of a set is drawn with seed + i")
    parser.add_argument("--num_inference_steps", type=int, help="by default that of the pipeline")
    parser.add_argument("--guidance_scale", type=float, help="by default that of the pipeline")


def draw_rows(items: Sequence, count: int | None, seed: int) -> list:
    """Return `count` items drawn at random, in their order; all of them if `count` is `None`."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    return [items[index] for index in sorted(order[:count])]


def chosen_settings(options: argparse.Namespace, more: Sequence[str] = ()) -> dict:
    """Return the sampling settings given on the command line; the pipeline's defaults stand for the others."""
    names = (*DECODER_SETTINGS, *more)
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def load_rows(folder: Path) -> list[dict]:
    """Return the prepared pictures of both splits, train first."""
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "validation")}
    data = load_dataset("parquet", data_files=files)
    return [row for split in files for row in data[split]]


def load_pipeline(options: argparse.Namespace) -> FlexTokPipeline:
    """Return the pipeline to measure, without progress bars of its own.

    Raises:
        ValueError: if a token count is below 1 or above what the model has.
    """
    pipe = FlexTokPipeline.from_pretrained(options.model or embedded_model()).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    if options.token_counts is None:
        options.token_counts = token_ladder(pipe.num_registers)
    wrong = [count for count in options.token_counts if not 1 <= count <= pipe.num_registers]
    if wrong:
        raise ValueError(f"`--token_counts` {wrong} cannot be measured: this model has 1 to {pipe.num_registers}.")
    return pipe


def describe_run(pipe: FlexTokPipeline, options: argparse.Namespace, more: Sequence[str] = ()) -> dict:
    """Return what a reader needs to repeat the run: model, settings, device, versions."""
    modules = {name: module for name, module in pipe.components.items() if isinstance(module, nn.Module)}
    packages = {"torch": torch, "transformers": transformers, "diffusers": diffusers}
    return {
        "model": options.model or "embedded",
        "weights_sha256": weights_hash(modules),
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
        "settings": chosen_settings(options, more) or "defaults of the pipeline",
        "token_counts": options.token_counts,
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine(),
        "versions": {name: package.__version__ for name, package in packages.items()},
    }


def seeded_generators(seed: int, count: int) -> list[torch.Generator]:
    """Return one generator per picture, so that a picture does not depend on its batch."""
    return [torch.Generator().manual_seed(seed + number) for number in range(count)]


def chunks(items: Sequence, size: int, bar: tqdm) -> Iterator[tuple[int, Sequence]]:
    """Yield the offset and the content of consecutive pieces, and advance the bar after each."""
    for start in range(0, len(items), size):
        yield start, items[start : start + size]
        bar.update(len(items[start : start + size]))


def reconstruct(
    pipe, pictures: Sequence[Image.Image], num_tokens: int, options: argparse.Namespace, bar: tqdm
) -> Tensor:
    """Return pictures encoded with `num_tokens` tokens and decoded again, (B, 3, H, W)."""
    settings = chosen_settings(options)
    batches = []
    for start, batch in chunks(pictures, options.batch_size, bar):
        generators = seeded_generators(options.seed + start, len(batch))
        token_ids = pipe.tokenize(list(batch), max_tokens=num_tokens)
        output = pipe.detokenize(token_ids, generator=generators, **settings)
        batches.append(stack_pictures(output.images))
    return torch.cat(batches)


def to_pil(picture: Tensor) -> Image.Image:
    """Return a picture (3, H, W) in [0, 1] as PIL."""
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())


def write_results(folder: Path, name: str, record: dict, markdown: str) -> None:
    """Write `name`.json and `name`.md to a folder, each as a whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {".json": json.dumps(record, indent=2) + "\n", ".md": markdown}
    for ending, text in texts.items():
        write_atomically(folder / f"{name}{ending}", lambda path: Path(path).write_text(text, encoding="utf-8"))
