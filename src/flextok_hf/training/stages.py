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
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, T5EncoderModel

from ..evaluation import peak_signal_to_noise
from ..images import to_output
from ..outputs import save_picture
from ..pipeline_flextok import FlexTokPipeline
from ..sheets import contact_sheet, token_count_title
from .arguments import PriorArguments, TokenizerArguments, TrainingArguments
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


VALIDATION_STEPS = 12  # Euler steps of validation pictures: enough to judge, a quarter of the time of good ones
VALIDATION_GUIDANCE = 2.0


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
    batches = batch_source(arguments, accelerator, load_train_data(arguments))
    trainer.train(batches, tokenizer_validation(arguments, pipe))
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
    if arguments.gradient_checkpointing:
        prior.gradient_checkpointing_enable()
    model = PriorForTraining(prior, text_encoder, text_tokenizer, pipe, arguments)
    if arguments.compile:
        prior.compile(dynamic=True)
    trainer = Trainer(arguments, accelerator, model, split_by_decay([model], arguments.learning_rate))
    trainer.resume()
    pipe.register_modules(prior=prior, text_encoder=text_encoder, tokenizer=text_tokenizer)
    trainer.train(batch_source(arguments, accelerator, dataset), prior_validation(arguments, pipe))
    return export(trainer, pipe)


def text_components(
    arguments: PriorArguments, dataset: ImageDataset | StreamedImageDataset
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
    captions = [row[arguments.caption_column] for row in dataset.rows]
    texts = [text for caption in captions for text in ([caption] if isinstance(caption, str) else caption)]
    tokenizer = train_text_tokenizer(texts, arguments.text_vocab_size, arguments.max_text_length)
    encoder = build_text_encoder(tokenizer, arguments.text_hidden_size, arguments.text_num_layers, arguments.dropout)
    return tokenizer, encoder


def load_train_data(
    arguments: TrainingArguments, caption_column: str | None = None, class_column: str | None = None
) -> ImageDataset | StreamedImageDataset:
    """Load the training pictures, with their conditions if columns are named."""
    return load_training_dataset(
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


def batch_source(
    arguments: TrainingArguments, accelerator: Accelerator, dataset: ImageDataset | StreamedImageDataset
) -> Callable[[int], Iterator[dict[str, Any]]]:
    """Serve the training data; the result gives batches without end from a number on."""
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
    """Make the function that draws held-out pictures with growing numbers of tokens; None without pictures."""
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
    originals = (
        torch.stack([dataset[index]["pixel_values"] for index in range(len(dataset))]) / 2 + 0.5
    )  # (B, 3, R, R)
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


def prior_validation(arguments: PriorArguments, pipe: FlexTokPipeline) -> Callable[[int], dict[str, float]] | None:
    """Make the function that draws the validation prompts with growing numbers of tokens; None without prompts."""
    prompts = arguments.validation_prompts
    if not prompts:
        return None
    counts = [2**power for power in range(0, pipe.num_registers.bit_length(), 2) if 2**power <= pipe.num_registers]

    def validate(step: int) -> dict[str, float]:
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(arguments.seed) for _ in prompts]
        token_ids = pipe(prompts, generator=generators, num_inference_steps=1, output_type="latent").token_ids
        noise = pipe.prepare_latents(len(prompts), torch.Generator().manual_seed(arguments.seed))
        columns = [
            pipe.detokenize(token_ids[:, :count], VALIDATION_STEPS, VALIDATION_GUIDANCE, latents=noise).images
            for count in counts
        ]
        rows = [list(row) for row in zip(*columns, strict=True)]
        sheet = contact_sheet(rows, [token_count_title(count) for count in counts])
        save_picture(sheet, Path(arguments.output_dir) / f"validation-{step}.png")
        return {"distinct_first_ids": float(token_ids[:, 0].unique().numel())}

    return validate


def export(trainer: Trainer, pipe: FlexTokPipeline) -> Path:
    """Save the pipeline with the averaged weights; it appears under its name only when complete."""
    folder = Path(trainer.arguments.output_dir) / "pipeline"
    if trainer.accelerator.is_main_process:
        unfinished = folder.with_suffix(".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        with AveragedWeights(trainer):
            pipe.save_pretrained(unfinished)
        if trainer.arguments.export_dtype != "float32":
            dtype = getattr(torch, trainer.arguments.export_dtype)
            FlexTokPipeline.from_pretrained(unfinished, dtype=dtype).save_pretrained(unfinished)
        arguments = (Path(trainer.arguments.output_dir) / "arguments.json").read_text()
        record = {"arguments": json.loads(arguments), "steps": trainer.step}
        (unfinished / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
    trainer.accelerator.wait_for_everyone()
    return folder
