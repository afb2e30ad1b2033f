"""The stages of training from options to a saved pipeline: data, model, loop, validation, export."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from ..evaluation import peak_signal_to_noise
from ..images import to_output
from ..outputs import save_picture
from ..pipeline_flextok import FlexTokPipeline
from ..sheets import contact_sheet, token_count_title
from .arguments import TokenizerArguments, TrainingArguments
from .data import ImageTransform, build_dataloader, load_training_dataset, training_batches
from .loop import AveragedWeights, Trainer, build_accelerator, split_by_decay
from .tokenizer import TokenizerForTraining, build_tokenizer


VALIDATION_STEPS = 12  # Euler steps of validation pictures: enough to judge, a quarter of the time of good ones


def train_tokenizer(arguments: TokenizerArguments) -> Path:
    """Train encoder and flow decoder, and save them as a pipeline.

    Returns:
        The folder of the pipeline, `output_dir/pipeline`.
    """
    accelerator = build_accelerator(arguments)
    set_seed(arguments.seed)
    vae = None if arguments.vae is None else AutoencoderKL.from_pretrained(arguments.vae).requires_grad_(False).eval()
    if arguments.pretrained_tokenizer is None:
        encoder, decoder = build_tokenizer(arguments, vae)
    else:
        source = FlexTokPipeline.from_pretrained(arguments.pretrained_tokenizer, prior=None, text_encoder=None)
        encoder, decoder = source.encoder, source.decoder
    if vae is not None:
        vae.to(accelerator.device)
    if arguments.gradient_checkpointing:
        encoder.gradient_checkpointing_enable()
        decoder.enable_gradient_checkpointing()
    model = TokenizerForTraining(encoder, decoder, arguments, vae)
    if arguments.compile:
        encoder.compile_features()
        decoder.compile()
    encoder_learning_rate = arguments.learning_rate * arguments.encoder_learning_rate_scale
    groups = split_by_decay([encoder], encoder_learning_rate) + split_by_decay([decoder], arguments.learning_rate)
    trainer = Trainer(arguments, accelerator, model, groups)
    trainer.resume()
    pipe = FlexTokPipeline(encoder, decoder, FlowMatchEulerDiscreteScheduler(), vae=vae)
    trainer.train(batch_source(arguments, accelerator), tokenizer_validation(arguments, pipe))
    return export(trainer, pipe)


def batch_source(
    arguments: TrainingArguments,
    accelerator: Accelerator,
    caption_column: str | None = None,
    class_column: str | None = None,
) -> Callable[[int], Iterator[dict[str, Any]]]:
    """Load the training data; the result gives batches without end from a number on."""
    dataset = load_training_dataset(
        source_of(arguments.train_data),
        transform=ImageTransform(arguments.resolution, random_flip=arguments.random_flip),
        image_column=arguments.image_column,
        caption_column=caption_column,
        class_column=class_column,
        streaming=arguments.streaming,
        cache_in_memory=arguments.cache_in_memory,
        max_samples=arguments.max_train_samples,
        seed=arguments.seed,
    )
    dataloader = build_dataloader(
        dataset,
        arguments.train_batch_size,
        seed=arguments.seed,
        num_workers=arguments.dataloader_num_workers,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    return lambda first_batch: training_batches(dataloader, first_batch)


def source_of(names: list[str]) -> str | list[str]:
    """A single name is a data set of any kind, several are files."""
    return names[0] if len(names) == 1 else names


def tokenizer_validation(
    arguments: TokenizerArguments, pipe: FlexTokPipeline
) -> Callable[[int], dict[str, float]] | None:
    """Make the function that draws held-out pictures from growing numbers of tokens; None without held-out pictures."""
    source = arguments.validation_data
    if source is None and arguments.train_data == ["synthetic"]:
        source = ["synthetic"]
    if source is None:
        return None
    dataset = load_training_dataset(
        source_of(source),
        split="validation",
        transform=ImageTransform(arguments.resolution),
        image_column=arguments.image_column,
        max_samples=arguments.num_validation_images,
    )
    originals = torch.stack([dataset[index]["pixel_values"] for index in range(len(dataset))]) / 2 + 0.5  # (B, 3, R, R)
    counts = [2**power for power in range(pipe.num_registers.bit_length()) if 2**power <= pipe.num_registers]

    def validate(step: int) -> dict[str, float]:
        pipe.set_progress_bar_config(disable=True)
        pictures = pipe.reconstruct(
            originals,
            max_tokens=counts,
            num_inference_steps=VALIDATION_STEPS,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(arguments.seed),
            output_type="pt",
        )
        columns = [to_output(images * 2 - 1) for images in (originals, *(images.cpu() for images in pictures))]
        rows = [list(row) for row in zip(*columns, strict=True)]
        titles = ["original", *map(token_count_title, counts)]
        save_picture(contact_sheet(rows, titles), Path(arguments.output_dir) / f"validation-{step}.png")
        return {
            f"psnr_{count}": peak_signal_to_noise(images.cpu(), originals).mean().item()
            for count, images in zip(counts, pictures, strict=True)
        }

    return validate


def export(trainer: Trainer, pipe: FlexTokPipeline) -> Path:
    """Save the pipeline with the averaged weights; it appears under its name only when complete."""
    folder = Path(trainer.arguments.output_dir) / "pipeline"
    if trainer.accelerator.is_main_process:
        unfinished = folder.with_suffix(".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        with AveragedWeights(trainer):
            pipe.save_pretrained(unfinished)
        arguments = (Path(trainer.arguments.output_dir) / "arguments.json").read_text()
        record = {"arguments": json.loads(arguments), "steps": trainer.step}
        (unfinished / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
    trainer.accelerator.wait_for_everyone()
    return folder
