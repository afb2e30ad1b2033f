"""The training data of a stage: loaded, cached and served in batches to its processes."""

import logging
import math
from collections import Counter

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL

from ..data.batches import TrainingBatches, build_dataloader
from ..data.buckets import Shape, bucket_shapes
from ..data.columns import Columns
from ..data.image_dataset import ImageDataset
from ..data.image_stream import StreamedImageDataset
from ..data.latent_cache import LatentDataset, cache_latents
from ..data.samples import ImageTransform
from ..data.training_dataset import load_training_dataset
from ..models.latents import downsampling_factor
from .arguments import TrainingArguments


logger = logging.getLogger(__name__)

TrainingData = ImageDataset | StreamedImageDataset | LatentDataset


def patch_side(vae: AutoencoderKL | None, *models: torch.nn.Module) -> int:
    """Return what the sides of an image must be multiples of, in pixels: whole patches of the models."""
    return downsampling_factor(vae) * math.lcm(*(model.config.patch_size for model in models))


def load_train_data(arguments: TrainingArguments, columns: Columns, unit: int) -> ImageDataset | StreamedImageDataset:
    """Load the training data; the sides of the images are multiples of `unit`."""
    crop = (arguments.random_flip, arguments.random_crop, arguments.min_crop_scale)
    shapes: tuple[Shape, ...] = ()
    if arguments.buckets or arguments.max_area is not None:
        shapes = bucket_shapes(arguments.max_area or arguments.resolution**2, unit, not arguments.buckets)
        logger.info("Height x width of the training images: %s.", ", ".join("%d x %d" % shape for shape in shapes))
    transform = ImageTransform(arguments.resolution, *crop, shapes)
    return load_training_dataset(
        arguments.train_data,
        transform=transform,
        columns=columns,
        streaming=arguments.streaming,
        shuffle_buffer=arguments.shuffle_buffer,
        cache_in_memory=arguments.cache_in_memory,
        num_workers=arguments.dataloader_num_workers,
        max_samples=arguments.max_train_samples,
        seed=arguments.seed,
        fail_on_unreadable=arguments.fail_on_unreadable,
        config_name=arguments.dataset_config_name,
    )


def cached(dataset: TrainingData, vae: AutoencoderKL | None, arguments: TrainingArguments) -> LatentDataset:
    """Replace the images of a dataset with their latents."""
    if vae is None or not isinstance(dataset, ImageDataset) or arguments.cache_in_memory:
        raise ValueError(
            "`cache_latents` needs a `vae`, and does not work with `streaming` or with `cache_in_memory`, which keeps"
            " images. Leave it out, or the others."
        )
    return cache_latents(dataset, vae, arguments.dataloader_num_workers)


def serve(arguments: TrainingArguments, accelerator: Accelerator, dataset: TrainingData) -> TrainingBatches:
    """Return this process's share of the training data, in batches."""
    row_shapes = getattr(dataset, "row_shapes", None)
    if row_shapes is not None and accelerator.is_main_process:
        batch = arguments.train_batch_size * accelerator.num_processes
        for (height, width), count in sorted(Counter(row_shapes).items()):
            note = "" if count >= batch else f", fewer than the {batch} of a batch: they are never used"
            logger.log(logging.WARNING if note else logging.INFO, "%d x %d: %d rows%s", height, width, count, note)
    dataloader = build_dataloader(
        dataset,
        arguments.train_batch_size,
        seed=arguments.seed,
        num_workers=arguments.dataloader_num_workers,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )
    return TrainingBatches(dataloader)
