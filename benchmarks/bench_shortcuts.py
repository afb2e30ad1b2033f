"""Opt-in approximations on the embedded model: time per image, and PSNR to 100 Euler steps in float32.

    python benchmarks/bench_shortcuts.py [--data FOLDER] [--num-prompts 24] [--results FOLDER]

All variants decode the same tokens from the same noise. With `--data`, a folder of prepared images with names
(docs/evaluation.md), they are also checked for what their prompt names. Last line: JSON.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    MagCacheConfig,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from flextok_hf import FlexTokPipeline
from flextok_hf.evaluation.adherence import Check, Reference, score
from flextok_hf.evaluation.conditions import STYLES_WITHOUT_LIKENESS
from flextok_hf.evaluation.images import EvaluationImages, draw_rows, load_split
from flextok_hf.pipelines.guidance import guidance_interval
from flextok_hf.pipelines.loading import FLOW_DECODER, load_pipeline


REFERENCE_STEPS, STEPS = 100, 20
PROMPTS = ["a cat", "a red apple", "a dog", "a house", "a tree", "a car", "a fish", "the sun"]
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 1.0}
CHECKS = (Check("name", ("name",)),)


@dataclass(frozen=True, kw_only=True)
class Shortcut:
    """One variant of sampling."""

    name: str
    num_steps: int = STEPS
    scale: Callable[[float], Any] = float  # guidance scale, from the model's default
    scheduler: SchedulerMixin = field(default_factory=FlowMatchEulerDiscreteScheduler)
    cache: Callable[[list[float]], Any] | None = None  # from the growth of the updates, see `calibration`
    dtype: torch.dtype = torch.float32
    decoder: str = FLOW_DECODER  # subfolder of the embedded model


def first_block_cache(threshold: float) -> Callable[[list[float]], FirstBlockCacheConfig]:
    return lambda growth: FirstBlockCacheConfig(threshold=threshold)


def mag_cache(threshold: float) -> Callable[[list[float]], MagCacheConfig]:
    return lambda growth: MagCacheConfig(threshold=threshold, num_inference_steps=len(growth), mag_ratios=growth)


SHORTCUTS = [
    Shortcut(name="100 Euler steps", num_steps=REFERENCE_STEPS),  # first, since the others are compared with it
    Shortcut(name="20 Euler steps"),
    Shortcut(name="distilled decoder, 4 steps", num_steps=4, decoder="decoder"),
    Shortcut(name="distilled decoder, 2 steps", num_steps=2, decoder="decoder"),
    Shortcut(name="distilled decoder, 1 step", num_steps=1, decoder="decoder"),
    Shortcut(name="10 Euler steps", num_steps=10),
    Shortcut(name="4 Euler steps", num_steps=4),
    Shortcut(name="bfloat16", dtype=torch.bfloat16),
    Shortcut(name="guidance for sigma in [0.2, 0.9]", scale=lambda scale: guidance_interval(scale, 0.2, 0.9)),
    Shortcut(name="guidance for sigma in [0.4, 0.9]", scale=lambda scale: guidance_interval(scale, 0.4, 0.9)),
    Shortcut(name="FirstBlockCache, threshold 0.05", cache=first_block_cache(0.05)),
    Shortcut(name="FirstBlockCache, threshold 0.15", cache=first_block_cache(0.15)),
    Shortcut(name="MagCache, threshold 0.06", cache=mag_cache(0.06)),
    Shortcut(name="MagCache, threshold 0.2", cache=mag_cache(0.2)),
    Shortcut(name="Euler, grid shifted by 2", scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0)),
    Shortcut(name="UniPC, 10 steps", num_steps=10, scheduler=UniPCMultistepScheduler(**FLOW)),
    Shortcut(name="Heun, 10 steps of 2 calls", num_steps=10, scheduler=FlowMatchHeunDiscreteScheduler()),
]


@contextmanager
def calibration(pipe: FlexTokPipeline) -> Iterator[list[float]]:
    """Record the ratio of the update of all blocks to that of the previous step, which MagCache relies on."""
    blocks, norms, growth = pipe.decoder.transformer_blocks, [], []
    first: list[Tensor] = []

    def note_update(module, arguments, output) -> None:
        norm = (output - first.pop()).float().norm(dim=-1)
        growth.append((norm / norms[-1]).mean().item() if norms else 1.0)
        norms.append(norm)

    with ExitStack() as stack:
        stack.callback(blocks[0].register_forward_pre_hook(lambda _, arguments: first.append(arguments[0])).remove)
        stack.callback(blocks[-1].register_forward_hook(note_update).remove)
        yield growth


def read_prompts(
    data: Path | None, num_prompts: int, resolution: int
) -> tuple[list[str], list[dict], Reference | None]:
    """Return prompts and, if `data` is given, what each asks for and the real images to compare with."""
    if data is None:
        return [PROMPTS[i % len(PROMPTS)] for i in range(num_prompts)], [], None
    rows = [row for split in ("train", "validation") for row in load_split(str(data), split)]
    rows = [row for row in rows if row["style"] not in STYLES_WITHOUT_LIKENESS]
    chosen = draw_rows(list({row["name"]: row for row in rows}.values()), num_prompts, seed=0)
    reference = Reference(EvaluationImages(rows, resolution).read_all(), rows)
    return [row["prompt"] for row in chosen], chosen, reference


def decode(pipe: FlexTokPipeline, shortcut: Shortcut, token_ids: Tensor, noise: Tensor, growth: list[float]) -> Tensor:
    """Return images (B, 3, R, R) in [0, 1]."""
    pipe.scheduler = shortcut.scheduler
    if shortcut.cache is not None:
        pipe.decoder.enable_cache(shortcut.cache(growth))
    scale = shortcut.scale(pipe.config.default_guidance_scale)
    try:
        options = {"num_inference_steps": shortcut.num_steps, "guidance_scale": scale, "latents": noise}
        return pipe.detokenize(token_ids, **options, output_type="pt").images.float()
    finally:
        if shortcut.cache is not None:
            pipe.decoder.disable_cache()


def main() -> None:
    parser = harness.build_parser(__doc__)
    parser.add_argument("--data", type=Path, help="prepared images with names, to measure the share of correct images")
    parser.add_argument("--num-prompts", type=int, default=24, help="images per variant (24)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    pipes = {
        kind: load_pipeline(device=options.device, dtype=kind[0], decoder=kind[1])
        for kind in sorted({(shortcut.dtype, shortcut.decoder) for shortcut in SHORTCUTS}, key=str)
    }
    for each in pipes.values():
        each.set_progress_bar_config(disable=True)
    pipe = pipes[torch.float32, FLOW_DECODER]
    prompts, wanted, reference = read_prompts(options.data, options.num_prompts, pipe.resolution)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    token_ids = pipe(prompts, generator=generators, num_inference_steps=1, output_type="latent").token_ids
    noise = pipe.prepare_latents(len(prompts), generators)
    with calibration(pipe) as growth:
        pipe.detokenize(token_ids[:1], STEPS, 1.0, latents=noise[:1], output_type="latent")

    rows: list[dict[str, Any]] = []
    target = None
    for shortcut in SHORTCUTS:
        decoded: list[Tensor] = []
        drawing = pipes[shortcut.dtype, shortcut.decoder]
        calls = {"decode": lambda: decoded.append(decode(drawing, shortcut, token_ids, noise, growth))}
        num_repeats = options.repeats or (1 if shortcut.num_steps == REFERENCE_STEPS else 3)
        timing = harness.measure(calls, options.device, num_repeats)["decode"]
        images = decoded[-1].cpu()
        target = images if target is None else target
        errors = (images - target).square().mean(dim=(1, 2, 3))
        rows.append({"name": shortcut.name, "ms_per_image": 1000 * timing["median_s"] / len(prompts)})
        rows[-1]["psnr_db"] = (-10 * errors.log10()).median().item() if errors.all() else None
        if reference is not None:
            rows[-1]["right_name"] = score(reference, CHECKS, images, wanted)["name"]["share"]
        rows[-1]["timing"] = timing
        print({name: harness.show(value) for name, value in rows[-1].items() if name != "timing"}, flush=True)
    usual_ms = rows[1]["ms_per_image"]
    shown = [row | {"speed_up": usual_ms / row["ms_per_image"], "psnr_db": row["psnr_db"] or ""} for row in rows]
    columns = ["name", "ms_per_image", "speed_up", "psnr_db"] + ["right_name"] * (reference is not None)
    table = harness.print_table(shown, columns)
    record = {"machine": harness.describe_machine(options.device), "num_images": len(prompts), "rows": rows}
    harness.finish("shortcuts", record, [table], options.results)


if __name__ == "__main__":
    main()
