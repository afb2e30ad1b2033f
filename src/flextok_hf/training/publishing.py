"""Results of training: the saved model with its averaged weights, a model card, and a repository on the Hub."""

import copy
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..cards.model_card import write_model_card
from ..cards.provenance import RECIPE_FILE
from ..cards.sections import training_facts
from ..models.low_rank import low_rank_layers
from ..pipelines.loading import FLOW_DECODER
from ..pipelines.pipeline_flextok import FlexTokPipeline
from ..utils.files import writing_error
from .arguments import TrainingArguments
from .checkpoints import finish_folder, unfinished_name
from .loop import Trainer
from .weights import unsharded


logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"  # in the output folder of a stage

Options = TypeVar("Options", bound=TrainingArguments)


def export(trainer: Trainer, pipe: FlexTokPipeline, stage: str, flow_decoder: ModelMixin | None = None) -> Path:
    """Save the pipeline trained by `stage`, or only its adapter, with the averaged weights.

    `flow_decoder`, which a distilled decoder learned from, goes beside it; an adapter of the distilled decoder becomes
    part of its weights, as it has a layer that the base does not have.
    """
    if trainer.arguments.lora_rank and flow_decoder is None:
        pipe.register_to_config(_name_or_path=getattr(trainer.arguments, trainer.arguments.START))
        return publish(trainer, stage, ADAPTER_FOLDER, partial(save_adapter, trainer, pipe))

    def save(folder: Path) -> None:
        names, modules = zip(*pipe.components.items(), strict=True)
        pipe.register_modules(**dict(zip(names, unsharded(trainer.raw_model, *modules), strict=True)))
        if not trainer.accelerator.is_main_process:
            return
        with_adapters_fused(pipe).save_pretrained(folder)
        if trainer.arguments.export_dtype != "float32":
            dtype = getattr(torch, trainer.arguments.export_dtype)
            FlexTokPipeline.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
        if flow_decoder is not None:
            flow_decoder.to(getattr(torch, trainer.arguments.export_dtype)).save_pretrained(folder / FLOW_DECODER)

    return publish(trainer, stage, "pipeline", save)


def with_adapters_fused(pipe: FlexTokPipeline) -> FlexTokPipeline:
    """Return the pipeline, or if its decoder has an adapter, a copy with that in the weights."""
    if not low_rank_layers(pipe.decoder):
        return pipe
    fused = FlexTokPipeline.from_pipe(pipe, decoder=copy.deepcopy(pipe.decoder).float())
    fused.fuse_lora()
    fused.unload_lora_weights()
    return fused


def save_adapter(trainer: Trainer, pipe: FlexTokPipeline, folder: Path) -> None:
    """Save the adapter in a pipeline's models."""
    if trainer.accelerator.is_main_process:
        pipe.save_lora_weights(folder)


def publish(trainer: Trainer, stage: str, name: str, save: Callable[[Path], None]) -> Path:
    """Let `save` fill an output folder with the averaged weights; it gets its final name once complete.

    Args:
        trainer: trainer that has finished.
        stage: vae, tokenizer or prior.
        name: name of the folder.
        save: called by all processes; only the main one writes.
    """
    folder = trainer.folder.path / name
    unfinished = unfinished_name(folder)
    try:
        with trainer.average.applied():
            save(unfinished)
        if trainer.accelerator.is_main_process:
            write_facts(trainer, stage, unfinished, folder)
            finish_folder(folder)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if (named := writing_error(error, folder)) is not None:
            raise named from error
        raise
    if trainer.accelerator.is_main_process and trainer.arguments.push_to_hub:
        logger.info("Uploaded: %s", upload(folder, hub_name(trainer.arguments)))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return folder


def write_facts(trainer: Trainer, stage: str, folder: Path, final_folder: Path) -> None:
    """Write how a model was trained, and its card, which names the repository if the model is uploaded."""
    arguments = asdict(trainer.arguments) | {"mixed_precision": trainer.accelerator.mixed_precision}
    record = {"stage": stage, "steps": trainer.step, "images_per_step": trainer.images_per_step}
    record |= {
        "arguments": arguments,
        **training_facts(arguments, trainer.folder.read_log(), trainer.images_per_step),
    }
    (folder / RECIPE_FILE).write_text(json.dumps(record, indent=2) + "\n")
    if final_folder.name != ADAPTER_FOLDER:  # whose card is its own
        name = hub_name(trainer.arguments)
        is_public = trainer.arguments.push_to_hub
        write_model_card(folder, name if is_public else None, final_folder=final_folder, title=name)


def hub_name(arguments: TrainingArguments) -> str:
    """Return the model's name on the Hub: `hub_model_id`, or the name of the output folder."""
    return arguments.hub_model_id or Path(arguments.output_dir).resolve().name


def check_upload(arguments: Options, accelerator: Accelerator) -> Options:
    """Create the repository before training, so that a missing permission shows immediately.

    Returns:
        The options with the full id of the repository.
    """
    if arguments.push_to_hub and accelerator.is_main_process:
        name = hub_name(arguments)
        try:
            repository = HfApi().create_repo(name, exist_ok=True)
            HfApi().auth_check(repository.repo_id, write=True)  # it may exist and belong to someone else
            return replace(arguments, hub_model_id=repository.repo_id)
        except (HfHubHTTPError, ValueError) as error:
            raise ValueError(f"`push_to_hub` cannot upload to {name!r}: {error}") from error
    return arguments


def upload(folder: Path, name: str) -> str:
    """Upload a folder to its repository on the Hub and return the URL of the commit."""
    api = HfApi()
    repository = api.create_repo(name, exist_ok=True).repo_id  # including the user name
    message = "Trained with flextok_hf"
    return api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message).commit_url
