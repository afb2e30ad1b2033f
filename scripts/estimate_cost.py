r"""Estimate the cost of a training run from its configuration alone, without downloads or training.

    python scripts/estimate_cost.py tokenizer scripts/configs/paper/tokenizer_d12_d12.yaml ... --num_processes 64
    python scripts/estimate_cost.py prior scripts/configs/paper/prior_class_49m.yaml ... --num_processes 16
    python scripts/estimate_cost.py tokenizer scripts/configs/embedded_256_tokenizer.yaml \
        --vae scripts/configs/embedded_256_vae.yaml

FLOPs are counted at full length on PyTorch's meta device, activations in bfloat16 for one image and one or two
blocks on the CPU. Without `--vae`, a tokenizer's VAE has the published shape. Frozen text encoders and REPA networks
are not counted. Hours assume the utilization in the header.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from flextok_hf.training.arguments import PriorArguments, TokenizerArguments, TrainingArguments, VaeArguments
from flextok_hf.training.prior import build_prior
from flextok_hf.training.throughput import FORWARD_AND_BACKWARD
from flextok_hf.training.tokenizer import build_tokenizer
from flextok_hf.training.vae import build_vae
from flextok_hf.utils.flops import FlopCounter
from flextok_hf.utils.option_parsing import parse_arguments
from flextok_hf.utils.plain_errors import plain_errors


H100_FLOPS = 989e12  # bfloat16, dense, from the data sheet
ASSUMED_SHARE = 0.4
BYTES_PER_WEIGHT = 20  # float32: weight, gradient, two AdamW moments, EMA
TEXT_LENGTH, TEXT_WIDTH = 32, 2048  # tokens of a caption; width of Flan-T5-XL
CODEBOOK_SIZE, NUM_REGISTERS, NUM_CLASSES = 64_000, 256, 1000
HEADER = (
    "configuration",
    "weights (M)",
    "GFLOP per image",
    "images (M)",
    "EFLOP",
    f"H100 hours at {ASSUMED_SHARE:.0%} of {H100_FLOPS / 1e12:.0f} TFLOP/s",
    "states (GiB)",
    "activations per image (MiB)",
)


@dataclass(frozen=True)
class Work:
    """What a training step computes for one image."""

    trained: list[nn.Module]
    forward: Callable[[], object]
    frozen_forward: Callable[[], object] = lambda: None


def vae_work(arguments: VaeArguments, dtype: torch.dtype) -> Work:
    vae = build_vae(arguments).to(dtype)
    images = torch.zeros(1, 3, arguments.resolution, arguments.resolution, dtype=dtype)
    return Work([vae], lambda: vae(images))


def tokenizer_work(arguments: TokenizerArguments, dtype: torch.dtype, vae_config: Path | None = None) -> Work:
    vae = None
    if vae_config is not None:
        vae = build_vae(parse_arguments(VaeArguments, ["--config", str(vae_config)]))
    elif arguments.vae is not None:  # of the published shape; its name ends in the number of channels
        channels = int(arguments.vae.rpartition("_c")[2])
        vae = build_vae(VaeArguments(output_dir="", resolution=arguments.resolution, latent_channels=channels))
    encoder, decoder = build_tokenizer(arguments, vae)
    side = encoder.config.grid_size * encoder.config.patch_size
    latents = torch.zeros(1, encoder.config.in_channels, side, side, dtype=dtype)
    for model in (encoder, decoder):
        model.to(latents.device, dtype)  # their position tables are always created on the CPU
    images = torch.zeros(1, 3, arguments.resolution, arguments.resolution)
    copies = 2 if arguments.joint_lengths else 1

    def forward() -> None:
        codes = encoder.quantizer(encoder.compute_features(latents)).to(dtype)
        decoder(latents.repeat(copies, 1, 1, 1), torch.ones(copies), codes.repeat(copies, 1, 1))

    return Work([encoder, decoder], forward, lambda: None if vae is None else vae.encode(images))


def prior_work(arguments: PriorArguments, dtype: torch.dtype) -> Work:
    reads_text = arguments.caption_column is not None
    shapes = (TEXT_WIDTH, None) if reads_text else (None, NUM_CLASSES)
    prior = build_prior(arguments, CODEBOOK_SIZE, NUM_REGISTERS, *shapes).to(dtype)
    ids = torch.zeros(1, NUM_REGISTERS + 1, dtype=torch.int64)
    condition = {"class_labels": torch.zeros(1, dtype=torch.int64)}
    if reads_text:
        condition = {"encoder_hidden_states": torch.zeros(1, TEXT_LENGTH, TEXT_WIDTH, dtype=dtype)}
    return Work([prior], lambda: prior(input_ids=ids, labels=ids, **condition))


STAGES = {
    "vae": (VaeArguments, vae_work, ()),
    "tokenizer": (TokenizerArguments, tokenizer_work, ("encoder_num_layers", "decoder_num_layers")),
    "prior": (PriorArguments, prior_work, ("num_layers",)),
}


def count_weights(work: Work) -> int:
    return sum(weight.numel() for module in work.trained for weight in module.parameters())


def activation_bytes(work: Work) -> int:
    """Return the bytes saved for the backward pass, without weights."""
    seen = {weight.untyped_storage().data_ptr() for module in work.trained for weight in module.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = work.forward()
    del outputs
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in seen)


def estimate_activations(stage: str, arguments: TrainingArguments, vae_config: Path | None = None) -> int:
    """Measure one and two blocks and extrapolate to all of them, so that the full model need not fit in memory."""
    _, build, layer_options = STAGES[stage]
    build = build if vae_config is None else partial(build, vae_config=vae_config)
    if not layer_options:
        return activation_bytes(build(arguments, torch.float32)) // 2
    with_one = replace(arguments, **dict.fromkeys(layer_options, 1))
    total = base = activation_bytes(build(with_one, torch.bfloat16))
    for name in layer_options:
        per_block = activation_bytes(build(replace(with_one, **{name: 2}), torch.bfloat16)) - base
        total += per_block * (getattr(arguments, name) - 1)
    return total


def estimate(stage: str, path: Path, num_processes: int, vae_config: Path | None = None) -> list[str]:
    """Return the row of the table for one configuration."""
    kind, build, _ = STAGES[stage]
    build = build if vae_config is None else partial(build, vae_config=vae_config)
    arguments = parse_arguments(kind, ["--config", str(path)])
    with torch.device("meta"):
        work = build(arguments, torch.float32)
        with FlopCounter() as trained:
            work.forward()
        with FlopCounter() as frozen:
            work.frozen_forward()
    flops = FORWARD_AND_BACKWARD * trained.trained + frozen.trained
    images = arguments.max_train_steps * arguments.train_batch_size * arguments.gradient_accumulation_steps
    images *= num_processes
    weights = count_weights(work)
    figures = {
        "weights": weights / 1e6,
        "flops": flops / 1e9,
        "images": images / 1e6,
        "total": flops * images / 1e18,
        "hours": flops * images / (ASSUMED_SHARE * H100_FLOPS) / 3600,
        "states": BYTES_PER_WEIGHT * weights / 2**30,
        "activations": estimate_activations(stage, arguments, vae_config) / 2**20,
    }
    return [path.stem, *(f"{value:,.{0 if value >= 100 else 1}f}" for value in figures.values())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("configs", type=Path, nargs="+")
    parser.add_argument("--num_processes", type=int, default=1, help="processes that share the images of a step")
    parser.add_argument("--vae", type=Path, help="configuration of the VAE of a tokenizer")
    options = parser.parse_args()
    if options.vae is not None and options.stage != "tokenizer":
        parser.error("`--vae` applies to the stage tokenizer only.")
    print("| " + " | ".join(HEADER) + " |")
    print("|" + " --- |" * len(HEADER))
    for path in options.configs:
        print("| " + " | ".join(estimate(options.stage, path, options.num_processes, options.vae)) + " |", flush=True)


if __name__ == "__main__":
    with plain_errors():
        main()
