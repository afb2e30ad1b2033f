"""Pictures and figures while training: what each stage has learned so far, on one sheet.

Letters: B batch, R side of the square pictures.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ..evaluation import peak_signal_to_noise
from ..images import to_output
from ..nested_dropout import token_ladder
from ..outputs import save_picture
from ..pipeline_flextok import FlexTokPipeline
from ..sheets import contact_sheet, token_count_title
from .arguments import PriorArguments, TokenizerArguments, TrainingArguments
from .data import ImageTransform, load_training_dataset


VALIDATION_STEPS = 12  # Euler steps of validation pictures: enough to judge, a quarter of the time of good ones
VALIDATION_GUIDANCE = 2.0

Validate = Callable[[int], dict[str, float]]


def load_validation_pictures(arguments: TrainingArguments) -> Tensor | None:
    """Return held-out pictures (B, 3, R, R) in [0, 1], spread over the data; None if the options name none."""
    source = arguments.validation_data
    if source is None and arguments.train_data == ["synthetic"]:
        source = ["synthetic"]
    if source is None:
        return None
    dataset = load_training_dataset(
        source,
        split="validation",
        transform=ImageTransform(arguments.resolution),
        image_column=arguments.image_column,
    )
    stride = max(1, len(dataset) // arguments.num_validation_images)
    rows = range(0, len(dataset), stride)[: arguments.num_validation_images]
    return torch.stack([dataset[row]["pixel_values"] for row in rows]) / 2 + 0.5


def save_sheet(columns: list[Tensor], titles: list[str], arguments: TrainingArguments, step: int) -> None:
    """Write columns of pictures, each (B, 3, R, R) in [0, 1], side by side into the output folder."""
    pictures = [to_output(column.cpu() * 2 - 1) for column in columns]
    rows = [list(row) for row in zip(*pictures, strict=True)]
    save_picture(contact_sheet(rows, titles), Path(arguments.output_dir) / f"validation-{step}.png")


def vae_validation(arguments: TrainingArguments, vae: AutoencoderKL) -> Validate | None:
    """Make the function that encodes and decodes held-out pictures; None without pictures."""
    originals = load_validation_pictures(arguments)
    if originals is None:
        return None

    def validate(step: int) -> dict[str, float]:
        pixel_values = originals.to(vae.device) * 2 - 1
        decoded = vae.decode(vae.encode(pixel_values).latent_dist.mode()).sample.float().cpu()
        pictures = (decoded / 2 + 0.5).clamp(0, 1)
        save_sheet([originals, pictures], ["original", "decoded"], arguments, step)
        return {"psnr": peak_signal_to_noise(pictures, originals).mean().item()}

    return validate


def tokenizer_validation(arguments: TokenizerArguments, pipe: FlexTokPipeline) -> Validate | None:
    """Make the function that draws held-out pictures with growing numbers of tokens; None without pictures."""
    originals = load_validation_pictures(arguments)
    if originals is None:
        return None
    counts = token_ladder(pipe.num_registers)

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
        save_sheet([originals, *pictures], ["original", *map(token_count_title, counts)], arguments, step)
        return {
            f"psnr_{count}": peak_signal_to_noise(images.cpu(), originals).mean().item()
            for count, images in zip(counts, pictures, strict=True)
        }

    return validate


def prior_validation(arguments: PriorArguments, pipe: FlexTokPipeline) -> Validate | None:
    """Make the function that draws the validation prompts with growing numbers of tokens; None without prompts."""
    prompts = arguments.validation_prompts
    if not prompts:
        return None
    counts = token_ladder(pipe.num_registers)[::2]

    def validate(step: int) -> dict[str, float]:
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(arguments.seed) for _ in prompts]
        token_ids = pipe(prompts, generator=generators, num_inference_steps=1, output_type="latent").token_ids
        noise = pipe.prepare_latents(len(prompts), torch.Generator().manual_seed(arguments.seed))
        columns = [
            pipe.detokenize(
                token_ids[:, :count], VALIDATION_STEPS, VALIDATION_GUIDANCE, latents=noise, output_type="pt"
            ).images
            for count in counts
        ]
        save_sheet(columns, [token_count_title(count) for count in counts], arguments, step)
        return {"distinct_first_ids": float(token_ids[:, 0].unique().numel())}

    return validate
