r"""Train a small classifier whose features replace those of Inception when its weights are not available.

    python scripts/train_feature_network.py --data data/embedded128 --output scripts/assets/feature_network

The network is a Transformers ResNet, trained from scratch to classify the images of the train split. Writes to
`--output`: its weights in half precision (safetensors), its configuration, the preprocessing, and training.json with
the accuracy on the validation split. A Frechet distance in its features is not FID and is never called FID: it only
compares models that were measured with the same network, on the kinds of images it was trained on.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetForImageClassification

from flextok_hf.evaluation.feature_networks import TRAINING_RECORD
from flextok_hf.evaluation.images import EvaluationImages, load_split
from flextok_hf.utils.files import write_text
from flextok_hf.utils.plain_errors import plain_errors


MEAN, STD = 0.5, 0.25  # of the input, per channel; close to the image statistics


def read_split(data: str, split: str, column: str, side: int) -> tuple[Tensor, list[str]]:
    """Return the images of a split, (N, 3, side, side) uint8, and their labels."""
    rows = load_split(data, split)
    if column not in rows.column_names:
        raise ValueError(f"`--label_column` is {column!r}, but {data} has {', '.join(rows.column_names)}.")
    return EvaluationImages(rows, side).read_all(), [str(value) for value in rows[column]]


def augment(pixels: Tensor, generator: torch.Generator, flip: bool) -> Tensor:
    """Return shifted, zoomed, flipped and recolored images, float in [0, 1], from images (B, 3, R, R) uint8."""
    size = len(pixels)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(size, *shape, generator=generator)

    images = pixels.float() / 255
    theta = torch.zeros(size, 2, 3)
    mirror = torch.where(draw(0, 1) < 0.5, -1.0, 1.0) if flip else torch.ones(size)
    zoom = draw(0.8, 1.15)
    theta[:, 0, 0], theta[:, 1, 1] = mirror * zoom, zoom
    theta[:, :, 2] = draw(-0.15, 0.15, 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    contrast, brightness = draw(0.75, 1.25, 1, 1, 1), draw(-0.1, 0.1, 3, 1, 1)
    return ((images - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)


def build_network(class_names: list[str], hidden_sizes: list[int]) -> ResNetForImageClassification:
    """Build a ResNet with random weights and one basic block per stage; the last width is the number of features."""
    names = dict(enumerate(class_names))
    config = ResNetConfig(
        embedding_size=hidden_sizes[0],
        hidden_sizes=hidden_sizes,
        depths=[1] * len(hidden_sizes),
        layer_type="basic",
        id2label=names,
        label2id={name: number for number, name in names.items()},
    )
    return ResNetForImageClassification(config)


@torch.no_grad()
def measure_accuracy(network: torch.nn.Module, pixels: Tensor, targets: Tensor) -> float:
    """Return the top-1 accuracy on images (N, 3, R, R) uint8."""
    network.eval()
    hits = [
        network(pixel_values=(part.float() / 255 - MEAN) / STD).logits.argmax(dim=1) == wanted
        for part, wanted in zip(pixels.split(256), targets.split(256), strict=True)
    ]
    network.train()
    return torch.cat(hits).double().mean().item()


def train(network: torch.nn.Module, pixels: Tensor, targets: Tensor, options: argparse.Namespace) -> None:
    """Train with AdamW, a one-cycle learning rate and label smoothing."""
    generator = torch.Generator().manual_seed(options.seed)
    steps_per_epoch = len(pixels) // options.batch_size
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=options.epochs * steps_per_epoch, pct_start=0.15
    )
    network.train()
    for _ in tqdm(range(options.epochs), unit="epoch"):
        order = torch.randperm(len(pixels), generator=generator)[: steps_per_epoch * options.batch_size]
        for chosen in order.split(options.batch_size):
            images = augment(pixels[chosen], generator, options.flip)
            logits = network(pixel_values=(images - MEAN) / STD).logits
            loss = F.cross_entropy(logits, targets[chosen], label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with the splits train and validation")
    parser.add_argument("--output", required=True, type=Path, help="folder for the network; created if missing")
    parser.add_argument("--name", help="name of the network in result files (default: the folder name)")
    parser.add_argument("--label_column", default="name", help="column with class labels")
    parser.add_argument("--side", type=int, default=64, help="side of the network input in pixels")
    parser.add_argument("--hidden_sizes", type=int, nargs="+", default=[32, 64, 96, 64], help="layer widths")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the images")
    parser.add_argument("--batch_size", type=int, default=128, help="images per step")
    parser.add_argument("--learning_rate", type=float, default=6e-3, help="peak learning rate")
    parser.add_argument("--weight_decay", type=float, default=0.05, help="weight decay of AdamW")
    parser.add_argument("--flip", action="store_true", help="flip half of the images")
    parser.add_argument("--seed", type=int, default=0, help="seed for weights, order and augmentation")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    torch.manual_seed(options.seed)
    pixels, labels = read_split(options.data, "train", options.label_column, options.side)
    held_out, held_out_labels = read_split(options.data, "validation", options.label_column, options.side)
    class_names = sorted(set(labels))
    number_of = {name: number for number, name in enumerate(class_names)}
    is_known = torch.tensor([label in number_of for label in held_out_labels])
    held_out = held_out[is_known]
    held_out_targets = torch.tensor([number_of[label] for label in held_out_labels if label in number_of])
    network = build_network(class_names, options.hidden_sizes)
    start = time.perf_counter()
    train(network, pixels, torch.tensor([number_of[label] for label in labels]), options)

    network = network.half().float()  # measure the weights as they are stored
    record = {
        "name": options.name or options.output.resolve().name,
        "validation_accuracy": round(measure_accuracy(network, held_out, held_out_targets), 4),
        "validation_images": len(held_out),
        "training_images": len(pixels),
        "classes": len(class_names),
        "chance": round(1 / len(class_names), 6),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "options": {key: str(value) for key, value in vars(options).items() if key not in ("data", "output")},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    network.half().save_pretrained(options.output)
    processing = {
        "size": {"height": options.side, "width": options.side},
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }
    for name, content in {"preprocessor_config.json": processing, TRAINING_RECORD: record}.items():
        text = json.dumps(content, indent=2) + "\n"
        write_text(options.output / name, text)
    print(json.dumps(record))


if __name__ == "__main__":
    with plain_errors():
        main()
