"""Validation during training: metrics and a sheet of images for each stage.

Letters: B batch, H W sides of the images, R side of square ones.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.batches import build_dataloader
from ..data.buckets import Shape, nearest_shape
from ..data.columns import Columns
from ..data.image_dataset import ImageDataset
from ..data.samples import ImageTransform
from ..data.training_dataset import load_training_dataset
from ..models.nested_dropout import token_ladder
from ..pipelines.images import to_output
from ..pipelines.pipeline_flextok import FlexTokPipeline
from ..utils.measures import peak_signal_to_noise
from ..utils.sheets import contact_sheet, token_count_title
from .arguments import PriorArguments, TrainingArguments
from .loop import Preview


VALIDATION_STEPS = 12  # Euler steps of validation images: enough to judge, in a quarter of the time of good ones
VALIDATION_GUIDANCE = 2.0
VALIDATION_PROPORTIONS = ((1, 1), (9, 16), (16, 9))  # of the shapes that are measured besides the model's square


def load_validation_data(arguments: TrainingArguments, columns: Columns) -> ImageDataset | None:
    """Load the held-out rows as in training but without augmentation; `None` if there are none."""
    source = arguments.validation_data
    if source is None and arguments.train_data == ["synthetic"]:
        source = ["synthetic"]
    if source is None or not arguments.validation_steps:
        return None
    return load_training_dataset(
        source,
        split="validation",
        transform=ImageTransform(arguments.resolution),
        columns=columns,
        fail_on_unreadable=arguments.fail_on_unreadable,
        config_name=arguments.dataset_config_name,
    )


def held_out_batches(
    arguments: TrainingArguments, dataset: ImageDataset | None, accelerator: Accelerator
) -> DataLoader | None:
    """Return the held-out rows in batches, in their order; `None` if there are none."""
    if dataset is None:
        return None
    return build_dataloader(
        dataset,
        arguments.train_batch_size,
        shuffle=False,
        drop_last=False,
        num_workers=0,  # a few rows now and then: not worth worker processes
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )


def choose_images(
    arguments: TrainingArguments, dataset: ImageDataset | None, shape: Shape | None = None
) -> Tensor | None:
    """Return images to reconstruct, (B, 3, H, W) in [0, 1], spread over the data; `None` without data.

    They are squares for the validation sheet, or the same images cropped to another shape.
    """
    if dataset is None:
        return None
    if shape is not None:
        dataset = copy(dataset)
        dataset.transform = replace(dataset.transform, shapes=(shape,))
    stride = max(1, len(dataset) // arguments.num_validation_images)
    rows = range(0, len(dataset), stride)[: arguments.num_validation_images]
    return torch.stack([dataset[row, row]["pixel_values"] for row in rows]) / 2 + 0.5


def build_sheet(columns: list[Tensor], titles: list[str], row_titles: Sequence[str] | None = None) -> Image.Image:
    """Arrange columns of images, each (B, 3, R, R) in [0, 1], side by side."""
    images = [to_output(column.cpu() * 2 - 1) for column in columns]
    return contact_sheet([list(row) for row in zip(*images, strict=True)], titles, row_titles=row_titles)


def vae_validation(originals: Tensor | None, vae: AutoencoderKL) -> Preview | None:
    """Return a function that encodes and decodes held-out images; `None` without images."""
    if originals is None:
        return None

    def preview() -> tuple[dict[str, float], Image.Image]:
        pixel_values = originals.to(vae.device) * 2 - 1
        decoded = vae.decode(vae.encode(pixel_values).latent_dist.mode()).sample.float().cpu()
        images = (decoded / 2 + 0.5).clamp(0, 1)
        psnr = peak_signal_to_noise(images, originals).mean().item()
        return {"psnr": psnr}, build_sheet([originals, images], ["original", "decoded"])

    return preview


def choose_other_shapes(
    arguments: TrainingArguments, dataset: ImageDataset | None, shapes: Sequence[Shape]
) -> list[Tensor]:
    """Return the same images in typical shapes of the training: wide, tall, and the square if it is another one."""
    typical = dict.fromkeys(nearest_shape(size, shapes) for size in VALIDATION_PROPORTIONS) if shapes else {}
    others = [shape for shape in typical if shape != (arguments.resolution,) * 2]
    found = [choose_images(arguments, dataset, shape) for shape in others]
    return [images for images in found if images is not None]


def fast_sampling(pipe: FlexTokPipeline, guidance_scale: float) -> dict[str, Any]:
    """Return how validation samples; a distilled decoder has steps and guidance scales of its own."""
    if pipe.decoder.predicts_mean:
        return {"num_inference_steps": None, "guidance_scale": None}
    return {"num_inference_steps": VALIDATION_STEPS, "guidance_scale": guidance_scale}


def tokenizer_validation(
    arguments: TrainingArguments, images: Tensor | None, pipe: FlexTokPipeline, others: Sequence[Tensor] = ()
) -> Preview | None:
    """Return a function that reconstructs held-out images from growing numbers of tokens; `None` without images.

    Those in `others`, each (B, 3, H, W) of one shape, are reconstructed from all tokens only, to save time.
    """
    if images is None:
        return None
    counts = token_ladder(pipe.num_registers)

    def measure(originals: Tensor, counts: list[int]) -> tuple[list[Tensor], list[float]]:
        columns = pipe.reconstruct(
            originals,
            max_tokens=counts,
            **fast_sampling(pipe, guidance_scale=1.0),
            generator=torch.Generator().manual_seed(arguments.seed),
            output_type="pt",
            size=(originals.shape[2], originals.shape[3]),
        )
        return columns, [peak_signal_to_noise(column.cpu(), originals).mean().item() for column in columns]

    def preview() -> tuple[dict[str, float], Image.Image]:
        pipe.set_progress_bar_config(disable=True)
        columns, values = measure(images, counts)
        metrics = {f"psnr_{count}": value for count, value in zip(counts, values, strict=True)}
        for originals in others:
            (value,) = measure(originals, counts[-1:])[1]
            metrics[f"psnr_{counts[-1]}_{originals.shape[2]}x{originals.shape[3]}"] = value
        return metrics, build_sheet([images, *columns], ["original", *map(token_count_title, counts)])

    return preview


def prior_validation(
    arguments: PriorArguments, pipe: FlexTokPipeline | None, class_names: list[str] | None
) -> Preview | None:
    """Return a function that generates images of the validation prompts with growing numbers of tokens, or `None`."""
    if not arguments.validation_prompts or pipe is None:
        return None
    counts = token_ladder(pipe.num_registers)
    condition = prompts_or_classes(arguments.validation_prompts, class_names)
    num_rows = len(arguments.validation_prompts)

    def preview() -> tuple[dict[str, float], Image.Image]:
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(arguments.seed) for _ in range(num_rows)]
        token_ids = pipe.generate_tokens(**condition, generator=generators)
        noise = pipe.prepare_latents(num_rows, torch.Generator().manual_seed(arguments.seed))
        columns = [
            pipe.detokenize(
                token_ids[:, :count], **fast_sampling(pipe, VALIDATION_GUIDANCE), latents=noise, output_type="pt"
            ).images
            for count in counts
        ]
        titles = [token_count_title(count) for count in counts]
        sheet = build_sheet(columns, titles, arguments.validation_prompts)
        return {"distinct_first_ids": float(token_ids[:, 0].unique().numel())}, sheet

    return preview


def prompts_or_classes(prompts: list[str], class_names: list[str] | None) -> dict[str, list]:
    """Return the arguments of a pipeline call for prompts, or for classes given by name.

    Raises:
        ValueError: there is no class with that name.
    """
    if class_names is None:
        return {"prompt": prompts}
    for name in prompts:
        if name not in class_names:
            shown = ", ".join(class_names[:20]) + (" ..." if len(class_names) > 20 else "")
            raise ValueError(f"`validation_prompts` contains {name!r}, which is not a class. Classes: {shown}.")
    return {"class_labels": [class_names.index(name) for name in prompts]}
