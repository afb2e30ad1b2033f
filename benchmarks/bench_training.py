"""Time training steps of a tokenizer on images from a parquet file; the last line of the output is JSON.

python benchmarks/bench_training.py [--width 384] [--depth 6] [--batch_size 8] [--steps 6] [--compile]
"""

import argparse
import json
import platform
import resource
import statistics
import tempfile
import time
from io import BytesIO
from pathlib import Path

import datasets
import diffusers
import torch
import transformers

from flextok_hf.data.synthetic import draw_scene, make_scene
from flextok_hf.training import throughput
from flextok_hf.training.arguments import TokenizerArguments
from flextok_hf.training.stages import train_tokenizer


NUM_IMAGES = 256
IMAGE_SIDE = 256  # of the stored JPEG files, which the loader resizes


def write_images(path: Path) -> None:
    """Write synthetic images as JPEG to a parquet file."""
    images = []
    for index in range(NUM_IMAGES):
        content = BytesIO()
        draw_scene(make_scene(index), IMAGE_SIDE).save(content, format="JPEG", quality=90)
        images.append({"bytes": content.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(str(path))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Train for a few steps and return the median of each logged metric, without the first step."""
    write_images(folder / "train.parquet")
    arguments = TokenizerArguments(
        output_dir=str(folder / "run"),
        train_data=[str(folder / "train.parquet")],
        resolution=options.resolution,
        num_registers=256,
        encoder_hidden_size=options.width,
        encoder_num_layers=options.depth,
        encoder_patch_size=options.resolution // 16,
        decoder_hidden_size=options.width,
        decoder_num_layers=options.depth,
        decoder_patch_size=options.resolution // 16,
        train_batch_size=options.batch_size,
        max_train_steps=1 + options.steps,
        dataloader_num_workers=options.workers,
        mixed_precision=options.mixed_precision,
        compile=options.compile,
        logging_steps=1,
        checkpointing_steps=10**6,
        validation_steps=0,
    )
    train_tokenizer(arguments)
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    names = ("images_per_s", "tflops_per_process", "data_wait_share")
    figures = {name: statistics.median(entry[name] for entry in log[1:]) for name in names}
    shares = [entry["matmul_share"] for entry in log[1:]]
    rate = figures["tflops_per_process"] / statistics.median(shares)
    return {
        **{name: round(value, 4) for name, value in figures.items()},
        "gflop_per_image": round(1e3 * figures["tflops_per_process"] / figures["images_per_s"], 1),
        "first_step_s": round(options.batch_size / log[0]["images_per_s"], 2),
        "matmul_tflops_before": round(rate, 4),
        "matmul_share": round(statistics.median(shares), 3),
        "matmul_share_spread": round(max(shares) - min(shares), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=384, help="width of encoder and decoder")
    parser.add_argument("--depth", type=int, default=6, help="blocks of encoder and decoder each")
    parser.add_argument("--resolution", type=int, default=64, help="image side in pixels, always 16 x 16 patches")
    parser.add_argument("--batch_size", type=int, default=8, help="images per step")
    parser.add_argument("--steps", type=int, default=6, help="timed steps")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument(
        "--processor_time", action="store_true", help="measure CPU time, for a busy machine; use with one thread"
    )
    options = parser.parse_args()
    if options.processor_time:
        throughput.clock = time.process_time

    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.mixed_precision]
    record = {
        **vars(options),
        **figures,
        "matmul_tflops_after": round(throughput.measure_matmul_rate(device, dtype) / 1e12, 4),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "device": str(device),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, diffusers)},
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
