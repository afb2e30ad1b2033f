"""The training stages, from options to a saved model: data, model, loop, validation, export."""

import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, T5EncoderModel

from ..data.columns import Columns
from ..data.image_dataset import ImageDataset
from ..data.token_dataset import check_token_data
from ..models.configuration_encoder import FlexTokEncoderConfig
from ..models.modeling_prior import FlexTokPriorForCausalLM
from ..pipelines.pipeline_flextok import FlexTokPipeline
from ..utils.words import MAX_CAPTION_ROWS, MAX_NAMES, MAX_WORDS, collect_words
from .adapters import add_adapters
from .arguments import PriorArguments, TokenizerArguments, TrainingArguments, VaeArguments, check_shapes
from .checkpoints import find_checkpoint
from .loop import Trainer
from .optimization import split_by_decay
from .prior import PriorForTraining, build_prior
from .publishing import check_upload, export, publish
from .run_lock import locked
from .setup import build_accelerator, loading, start_trackers
from .starting_points import load_prior, load_tokenizer, load_whole
from .text import build_text_encoder, train_text_tokenizer
from .tokenizer import TokenizerForTraining, build_tokenizer
from .training_data import TrainingData, cached, load_train_data, patch_side, serve
from .vae import VaeForTraining, build_vae, measure_scaling_factor
from .validation import (
    choose_images,
    choose_other_shapes,
    held_out_batches,
    load_validation_data,
    prior_validation,
    tokenizer_validation,
    vae_validation,
)
from .weights import unsharded


logger = logging.getLogger(__name__)

SCALING_BATCHES = 16  # training batches used to measure the scale of the latents

Options = TypeVar("Options", bound=TrainingArguments)


def stage(train: Callable[[Options, Accelerator], Path]) -> Callable[[Options], Path]:
    """Let a stage check what can be checked up front, set up devices and seed, and hold the lock of its folder."""

    def run(arguments: Options) -> Path:
        find_checkpoint(arguments)
        accelerator = build_accelerator(arguments)
        with locked(Path(arguments.output_dir), accelerator):
            start_trackers(arguments, accelerator)
            arguments = check_upload(arguments, accelerator)
            set_seed(arguments.seed)
            return train(arguments, accelerator)

    run.__name__, run.__doc__ = train.__name__, train.__doc__
    return run


@stage
def train_vae(arguments: VaeArguments, accelerator: Accelerator) -> Path:
    """Train the VAE, measure the scale of its latents, and save it.

    Returns:
        The folder of the VAE, `output_dir/vae`, for the option `vae` of the next stage.
    """
    vae = build_vae(arguments)
    columns = Columns(arguments.image_column)
    dataset = load_train_data(arguments, columns, patch_side(vae))
    held_out = load_validation_data(arguments, columns)
    if arguments.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    model = VaeForTraining(vae, arguments).to(memory_format=torch.channels_last)
    if arguments.compile:
        if arguments.adversarial_weight > 0:  # needs several backward passes through the decoder
            torch._functorch.config.donated_buffer = False
        vae.encoder.compile()
        vae.decoder.compile()
    trainer = Trainer(arguments, accelerator, model, split_by_decay([model], arguments.learning_rate))
    trainer.resume()
    batches = serve(arguments, accelerator, dataset)
    preview = vae_validation(choose_images(arguments, held_out), vae)
    trainer.train(batches, preview, held_out_batches(arguments, held_out, accelerator))

    def save(folder: Path) -> None:
        (trained,) = unsharded(model, vae)
        if accelerator.is_main_process:
            pixel_values = (batch["pixel_values"] for batch in itertools.islice(batches.start(), SCALING_BATCHES))
            trained.register_to_config(scaling_factor=measure_scaling_factor(trained, pixel_values))
            if arguments.export_dtype != "float32":
                trained.to(getattr(torch, arguments.export_dtype))
            trained.save_pretrained(folder)

    return publish(trainer, "vae", "vae", save)


@stage
def train_tokenizer(arguments: TokenizerArguments, accelerator: Accelerator) -> Path:
    """Train the encoder and the flow decoder, and save them as a pipeline.

    Returns:
        The folder of the pipeline, `output_dir/pipeline`.
    """
    vae = None
    if arguments.vae is not None:
        with loading("vae", arguments.vae):
            vae = AutoencoderKL.from_pretrained(arguments.vae)
    if arguments.pretrained_tokenizer is None:
        pipe = FlexTokPipeline(*build_tokenizer(arguments, vae), FlowMatchEulerDiscreteScheduler(), vae=vae)
    else:
        pipe, arguments = load_tokenizer(arguments, vae)
    encoder, decoder, vae = pipe.encoder, pipe.decoder, pipe.vae
    if vae is not None:
        vae.requires_grad_(False).eval().to(accelerator.device)
    columns = Columns(arguments.image_column)
    images = load_train_data(arguments, columns, patch_side(vae, encoder, decoder))
    held_out = load_validation_data(arguments, columns)
    others = choose_other_shapes(arguments, held_out, images.transform.shapes)
    dataset: TrainingData = cached(images, vae, arguments) if arguments.cache_latents else images
    if arguments.gradient_checkpointing:
        encoder.gradient_checkpointing_enable()
        decoder.enable_gradient_checkpointing()
    model = TokenizerForTraining(encoder, decoder, arguments, vae)
    add_adapters(arguments, accelerator, model)
    if arguments.compile:
        for block in (*encoder.blocks, *decoder.transformer_blocks):  # compiled once per kind of block
            block.compile()
    trainer = Trainer(arguments, accelerator, model, tokenizer_groups(arguments, model))
    trainer.resume()
    preview = tokenizer_validation(arguments, choose_images(arguments, held_out), pipe, others)
    batches = serve(arguments, accelerator, dataset)
    trainer.train(batches, preview, held_out_batches(arguments, held_out, accelerator))
    return export(trainer, pipe, "tokenizer")


def tokenizer_groups(arguments: TokenizerArguments, model: TokenizerForTraining) -> list[dict]:
    """Build the optimizer groups; encoder and decoder may have different learning rates."""

    def ratio(width: int) -> float:
        return 1.0 if arguments.mup_base_width is None else arguments.mup_base_width / width

    rate = arguments.learning_rate
    encoder, decoder = model.encoder, model.decoder
    groups = split_by_decay(
        [encoder], rate * arguments.encoder_learning_rate_scale, ratio(encoder.config.hidden_size)
    ) + split_by_decay([decoder], rate, ratio(decoder.config.hidden_size))
    if model.alignment is not None:
        groups += split_by_decay([model.alignment], rate)
    return [group for group in groups if group["params"]]


@stage
def train_prior(arguments: PriorArguments, accelerator: Accelerator) -> Path:
    """Train a prior for a tokenizer, and save both as a pipeline that generates from a prompt or class, or an adapter.

    With `token_column`, the tokenizer is loaded only for validation images and at the end.

    Returns:
        The folder of the pipeline, `output_dir/pipeline`.

    Raises:
        ValueError: the conditions that the options specify are not available.
    """
    with loading("tokenizer", arguments.tokenizer):
        config = FlexTokEncoderConfig.from_pretrained(arguments.tokenizer, subfolder="encoder")
    columns = prior_columns(arguments, config)
    if arguments.token_column is not None:
        check_token_data(arguments.train_data, arguments.tokenizer)
    pipe, unit = None, 1
    needs_images = arguments.token_column is None or (arguments.validation_prompts and arguments.validation_steps)
    if needs_images or arguments.shape_conditioning:  # which is relative to the tokenizer's square
        pipe = load_whole("tokenizer", arguments.tokenizer).to(accelerator.device)
        arguments = replace(arguments, resolution=pipe.resolution)
        check_shapes(arguments, pipe.decoder.config.positions)
        unit = patch_side(pipe.vae, pipe.encoder, pipe.decoder)
    dataset, held_out = load_train_data(arguments, columns, unit), load_validation_data(arguments, columns)
    class_names = dataset.class_names
    if held_out is not None:
        check_same_classes(held_out.class_names, class_names)
    prior, text_encoder, text_tokenizer, arguments = prior_components(arguments, config, dataset)
    if class_names is not None:
        prior.config.id2label = dict(enumerate(class_names))
    if arguments.caption_column is not None and isinstance(dataset, ImageDataset):  # a stream has no end to wait for
        names, words = collect_words(dataset.caption_rows(MAX_CAPTION_ROWS))  # in addition to those of a trained prior
        prior.config.known_names = sorted({*(prior.config.known_names or []), *names})[:MAX_NAMES]
        prior.config.known_words = list(dict.fromkeys([*words, *(prior.config.known_words or [])]))[:MAX_WORDS]
    if pipe is not None:
        pipe.register_modules(prior=prior, text_encoder=text_encoder, tokenizer=text_tokenizer)
    preview = prior_validation(arguments, pipe, class_names)
    if arguments.cache_latents:
        dataset = cached(dataset, None if pipe is None else pipe.vae, arguments)
    if arguments.gradient_checkpointing:
        prior.gradient_checkpointing_enable()
    model = PriorForTraining(prior, text_encoder, text_tokenizer, pipe, arguments)
    add_adapters(arguments, accelerator, model)
    if arguments.compile:
        for block in prior.blocks:
            block.compile(dynamic=True)  # texts differ in length
    groups = split_by_decay([model], arguments.learning_rate)
    trainer = Trainer(arguments, accelerator, model, groups, vocabulary_of(arguments, text_tokenizer, class_names))
    trainer.resume()
    batches = serve(arguments, accelerator, dataset)
    trainer.train(batches, preview, held_out_batches(arguments, held_out, accelerator))
    if pipe is None:
        pipe = load_whole("tokenizer", arguments.tokenizer)
        pipe.register_modules(prior=prior, text_encoder=text_encoder, tokenizer=text_tokenizer)
        trainer.arguments = replace(arguments, resolution=pipe.resolution)  # for the record; no images were read
    return export(trainer, pipe, "prior")


def prior_components(
    arguments: PriorArguments, config: FlexTokEncoderConfig, dataset: TrainingData
) -> tuple[FlexTokPriorForCausalLM, PreTrainedModel | None, PreTrainedTokenizerBase | None, PriorArguments]:
    """Load or build the prior, its text encoder and text tokenizer; the options get the sizes of what was loaded."""
    class_names = dataset.class_names
    if arguments.pretrained_prior is not None:
        return load_prior(arguments, config, class_names)
    text_tokenizer, text_encoder = None, None
    if arguments.caption_column is not None:
        text_tokenizer, text_encoder = text_components(arguments, dataset)
    prior = build_prior(
        arguments,
        math.prod(config.fsq_levels),
        config.num_registers,
        None if text_encoder is None else text_encoder.config.d_model,
        None if class_names is None else len(class_names),
    )
    return prior, text_encoder, text_tokenizer, arguments


def prior_columns(arguments: PriorArguments, config: FlexTokEncoderConfig) -> Columns:
    """Return the columns to read for training a prior for a tokenizer."""
    return Columns(
        arguments.image_column,
        arguments.caption_column,
        arguments.class_column,
        arguments.token_column,
        arguments.num_classes,
        config.num_registers,
        math.prod(config.fsq_levels),
        arguments.shape_conditioning,
    )


def check_same_classes(held_out: list[str] | None, trained: list[str] | None) -> None:
    """Raise a ValueError if validation and training data have different class names; numbers match any names."""
    numbers = [str(number) for number in range(len(trained or []))]
    if held_out == trained or numbers in (held_out, trained):
        return
    pairs = itertools.zip_longest(held_out or [], trained or [])
    there, here = next(pair for pair in pairs if pair[0] != pair[1])
    raise ValueError(
        f"`validation_data` and `train_data` have different classes, such as {there!r} and {here!r}. Use the same"
        " classes in the same order."
    )


def vocabulary_of(
    arguments: PriorArguments, text_tokenizer: PreTrainedTokenizerBase | None, class_names: list[str] | None
) -> list[str]:
    """Return what the data decide: the class names, or the tokens of a text tokenizer learned from the data."""
    if text_tokenizer is None:
        return class_names or []
    if arguments.text_encoder is not None or arguments.pretrained_prior is not None:
        return []
    pieces = text_tokenizer.get_vocab()
    return sorted(pieces, key=pieces.__getitem__)


def text_components(
    arguments: PriorArguments, dataset: TrainingData
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load the frozen text encoder that the options specify, or build a small one to train jointly."""
    if arguments.text_encoder is not None:
        with loading("text_encoder", arguments.text_encoder):
            text_encoder = T5EncoderModel.from_pretrained(arguments.text_encoder, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(
                arguments.text_encoder, model_max_length=arguments.max_text_length
            )
        return tokenizer, text_encoder.requires_grad_(False).eval()
    if not isinstance(dataset, ImageDataset):
        raise ValueError(
            "A text tokenizer cannot be learned from a stream: turn off `streaming` or set `text_encoder`."
        )
    captions = itertools.chain.from_iterable(dataset.caption_rows())
    tokenizer = train_text_tokenizer(captions, arguments.text_vocab_size, arguments.max_text_length)
    encoder = build_text_encoder(tokenizer, arguments.text_hidden_size, arguments.text_num_layers, arguments.dropout)
    return tokenizer, encoder
