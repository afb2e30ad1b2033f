"""What training leaves behind: the saved model with its averaged weights, a card, and a repository on the Hub."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub import HfApi

from ..pipeline_flextok import FlexTokPipeline
from .checkpoints import finish_folder, unfinished_name
from .loop import LOG_FILE, Trainer
from .training_card import write_card


logger = logging.getLogger(__name__)


def export(trainer: Trainer, pipe: FlexTokPipeline, stage: str) -> Path:
    """Save the pipeline with the averaged weights, made by `stage`."""

    def save(folder: Path) -> None:
        pipe.save_pretrained(folder)
        if trainer.arguments.export_dtype != "float32":
            dtype = getattr(torch, trainer.arguments.export_dtype)
            FlexTokPipeline.from_pretrained(folder, dtype=dtype).save_pretrained(folder)

    return publish(trainer, stage, "pipeline", save)


def publish(trainer: Trainer, stage: str, name: str, save: Callable[[Path], None]) -> Path:
    """Let `save` fill a folder of the output with the averaged weights; it gets its name only when complete."""
    output_dir = Path(trainer.arguments.output_dir)
    folder = output_dir / name
    if trainer.accelerator.is_main_process:
        unfinished = unfinished_name(folder)
        with trainer.average.applied():
            save(unfinished)
        hub_name = trainer.arguments.hub_model_id or output_dir.resolve().name
        record = {"stage": stage, "steps": trainer.step, "images_per_step": trainer.images_per_step}
        record |= {"resolution": trainer.arguments.resolution, "arguments": asdict(trainer.arguments)}
        (unfinished / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        log = output_dir / LOG_FILE
        lines = log.read_text().splitlines() if log.is_file() else []
        write_card(unfinished, hub_name, [json.loads(line) for line in lines])
        finish_folder(folder)
        if trainer.arguments.push_to_hub:
            logger.info("Uploaded: %s", upload(folder, hub_name))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return folder


def upload(folder: Path, name: str) -> str:
    """Upload a folder to a model repository on the Hub, which is made if it is not there; returns its address."""
    api = HfApi()
    repository = api.create_repo(name, exist_ok=True)
    message = "Trained with flextok_hf"
    return api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message=message).commit_url
