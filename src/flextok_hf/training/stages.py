"""The stages of training from options to a saved pipeline: data, model, loop, validation, export."""

import itertools
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
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, T5EncoderModel

from ..card_sections import RECIPE_FILE, training_facts
from ..model_card import write_model_card
from ..pipeline_flextok import FlexTokPipeline
from .arguments import PriorArguments, TokenizerArguments, TrainingArguments, VaeArguments
from .caching import LatentDataset, cache_latents
from .data import (
    ImageDataset,
    ImageTransform,
    StreamedImageDataset,
    build_dataloader,
    load_training_dataset,
    training_batches,
)
from .loop import AveragedWeights, Trainer, build_accelerator, split_by_decay
from .prior import PriorForTraining, build_prior
from .text import build_text_encoder, train_text_tokenizer
from .tokenizer import TokenizerForTraining, build_tokenizer
from .vae import VaeForTraining, build_vae, measure_scaling_factor
from .validation import prior_validation, tokenizer_validation, vae_validation


SCALING_BATCHES = 16  # training batches from which the scale of the latents is measured

TrainingData = ImageDataset | StreamedImageDataset | LatentDataset


def train_vae(arguments: VaeArguments) -> Path:
    """Train the VAE, measure the scale of its latents, and save it.

    Returns:
        The folder of the VAE, `output_dir/vae`, for the option `vae` of the next stage.
    """
    accelerator = build_accelerator(arguments)
    set_seed(arguments.seed)
    vae = build_vae(arguments)
    if arguments.pretrained_vae is not None:
        vae = AutoencoderKL.from_pretrained(arguments.pretrained_vae)
    if arguments.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    model = VaeForTraining(vae, arguments).to(memory_format=torch.channels_last)
    if arguments.compile:
        vae.encoder.compile()
        vae.decoder.compile()
    trainer = Trainer(arguments, accelerator, model, split_by_decay([model], arguments.learning_rate))
    trainer.resume()
    batches = batch_source(arguments, accelerator, load_train_data(arguments))
    trainer.train(batches, vae_validation(arguments, vae))

    def save(folder: Path) -> None:
        pixel_values = (batch["pixel_values"] for batch in itertools.islice(batches(0), SCALING_BATCHES))
        vae.register_to_config(scaling_factor=measure_scaling_factor(vae, pixel_values))
        vae.to(getattr(torch, arguments.export_dtype)).save_pretrained(folder)

    return publish(trainer, "vae", save)


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
    dataset = load_train_data(arguments)
    if arguments.cache_latents:
        dataset = cached(dataset, vae, arguments)
    if arguments.gradient_checkpointing:
        encoder.gradient_checkpointing_enable()
        decoder.enable_gradient_checkpointing()
    model = TokenizerForTraining(encoder, decoder, arguments, vae)
    if arguments.compile:
        for block in (*encoder.blocks, *decoder.transformer_blocks):  # compiled once for all blocks of a kind
            block.compile()
    encoder_learning_rate = arguments.learning_rate * arguments.encoder_learning_rate_scale
    groups = split_by_decay([encoder], encoder_learning_rate) + split_by_decay([decoder], arguments.learning_rate)
    trainer = Trainer(arguments, accelerator, model, groups)
    trainer.resume()
    pipe = FlexTokPipeline(encoder, decoder, FlowMatchEulerDiscreteScheduler(), vae=vae)
    trainer.train(batch_source(arguments, accelerator, dataset), tokenizer_validation(arguments, pipe))
    return export(trainer, pipe)


def train_prior(arguments: PriorArguments) -> Path:
    """Train a prior for a tokenizer, and save both as a pipeline that draws from prompts or classes.

    Returns:
        The folder of the pipeline, `output_dir/pipeline`.

    Raises:
        ValueError: if the options do not name exactly one of captions and classes, or these cannot be had.
    """
    if (arguments.caption_column is None) == (arguments.class_column is None):
        raise ValueError("Name either `caption_column` or `class_column`, the condition that the prior learns.")
    accelerator = build_accelerator(arguments)
    set_seed(arguments.seed)
    pipe = FlexTokPipeline.from_pretrained(arguments.tokenizer).to(accelerator.device)
    arguments.resolution = pipe.resolution
    dataset = load_train_data(arguments, arguments.caption_column, arguments.class_column)
    if arguments.caption_column is None:
        if not dataset.class_names:
            raise ValueError(
                f"`class_column` {arguments.class_column!r} has no list of class names, so none can be counted."
            )
        text_tokenizer, text_encoder = None, None
        prior = build_prior(arguments, pipe, None, len(dataset.class_names))
    else:
        text_tokenizer, text_encoder = text_components(arguments, dataset)
        prior = build_prior(arguments, pipe, text_encoder.config.d_model, None)
    if arguments.cache_latents:
        dataset = cached(dataset, pipe.vae, arguments)
    if arguments.gradient_checkpointing:
        prior.gradient_checkpointing_enable()
    model = PriorForTraining(prior, text_encoder, text_tokenizer, pipe, arguments)
    if arguments.compile:
        for block in prior.blocks:
            block.compile(dynamic=True)  # texts differ in length
    trainer = Trainer(arguments, accelerator, model, split_by_decay([model], arguments.learning_rate))
    trainer.resume()
    pipe.register_modules(prior=prior, text_encoder=text_encoder, tokenizer=text_tokenizer)
    trainer.train(batch_source(arguments, accelerator, dataset), prior_validation(arguments, pipe))
    return export(trainer, pipe)


def text_components(
    arguments: PriorArguments, dataset: TrainingData
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load the frozen text encoder that the options name, or make a small one to be trained along."""
    if arguments.text_encoder is not None:
        text_encoder = T5EncoderModel.from_pretrained(arguments.text_encoder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(arguments.text_encoder, model_max_length=arguments.max_text_length)
        return tokenizer, text_encoder.requires_grad_(False).eval()
    if not isinstance(dataset, ImageDataset):
        raise ValueError(
            "A text tokenizer cannot be learned from a stream: turn off `streaming` or name a `text_encoder`."
        )
    tokenizer = train_text_tokenizer(dataset.all_captions(), arguments.text_vocab_size, arguments.max_text_length)
    encoder = build_text_encoder(tokenizer, arguments.text_hidden_size, arguments.text_num_layers, arguments.dropout)
    return tokenizer, encoder


def load_train_data(
    arguments: TrainingArguments, caption_column: str | None = None, class_column: str | None = None
) -> TrainingData:
    """Load the training pictures, with their conditions if columns are named."""
    return load_training_dataset(
        arguments.train_data,
        transform=ImageTransform(arguments.resolution, random_flip=arguments.random_flip),
        image_column=arguments.image_column,
        caption_column=caption_column,
        class_column=class_column,
        streaming=arguments.streaming,
        cache_in_memory=arguments.cache_in_memory,
        num_workers=arguments.dataloader_num_workers,
        max_samples=arguments.max_train_samples,
        seed=arguments.seed,
    )


def cached(dataset: TrainingData, vae: AutoencoderKL | None, arguments: TrainingArguments) -> LatentDataset:
    """Replace the pictures of a data set by their latents."""
    if vae is None or not isinstance(dataset, ImageDataset) or arguments.cache_in_memory:
        raise ValueError(
            "`cache_latents` needs a `vae`, and goes neither with `streaming` nor with `cache_in_memory`, which keeps"
            " pictures. Leave it out, or the others."
        )
    return cache_latents(dataset, vae, arguments.dataloader_num_workers)


def batch_source(
    arguments: TrainingArguments, accelerator: Accelerator, dataset: TrainingData
) -> Callable[[int], Iterator[dict[str, Any]]]:
    """Serve the training data; the result gives batches without end from a number on."""
    dataloader = build_dataloader(
        dataset,
        arguments.train_batch_size,
        seed=arguments.seed,
        num_workers=arguments.dataloader_num_workers,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )
    return lambda first_batch: training_batches(dataloader, first_batch)


def export(trainer: Trainer, pipe: FlexTokPipeline) -> Path:
    """Save the pipeline with the averaged weights."""

    def save(folder: Path) -> None:
        pipe.save_pretrained(folder)
        if trainer.arguments.export_dtype != "float32":
            dtype = getattr(torch, trainer.arguments.export_dtype)
            FlexTokPipeline.from_pretrained(folder, dtype=dtype).save_pretrained(folder)

    return publish(trainer, "pipeline", save)


def publish(trainer: Trainer, name: str, save: Callable[[Path], None]) -> Path:
    """Let `save` fill a folder of the output with the averaged weights; it gets its name only when complete."""
    folder = Path(trainer.arguments.output_dir) / name
    if trainer.accelerator.is_main_process:
        unfinished = folder.with_suffix(".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        with AveragedWeights(trainer):
            save(unfinished)
        output_dir = Path(trainer.arguments.output_dir)
        arguments = json.loads((output_dir / "arguments.json").read_text())
        log_file = output_dir / "log.jsonl"
        log = [json.loads(line) for line in log_file.read_text().splitlines()] if log_file.is_file() else []
        images_per_step = trainer.arguments.train_batch_size * trainer.arguments.gradient_accumulation_steps
        images_per_step *= trainer.accelerator.num_processes
        record = {"arguments": arguments, "steps": trainer.step, "images_per_step": images_per_step}
        record |= training_facts(arguments, log, images_per_step)
        (unfinished / RECIPE_FILE).write_text(json.dumps(record, indent=2) + "\n")
        write_model_card(unfinished, output_dir.resolve().name)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
    trainer.accelerator.wait_for_everyone()
    return folder
