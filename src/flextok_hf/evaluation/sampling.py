"""Images or prompts -> images from 1, 2, 4, ... tokens. Every sample has its own generator, so that it does
not depend on batches or processes, and all its token counts start from the same noise and the same tokens.

Letters: B batch, R side of the square images.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.default_steps import NUM_INFERENCE_STEPS
from ..pipelines.pipeline_flextok import FlexTokPipeline
from .images import round_to_8_bits


ASSUMED_FLOPS = 3.5e14  # per second on an H100-class accelerator: 35% of its dense bfloat16 peak


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings, named as in `FlexTokPipeline.__call__`; `None` is the default of the model."""

    num_inference_steps: int | dict[str, int] | None = None
    guidance_scale: float | None = None
    guidance: str = "apg"
    prior_guidance_scale: float | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def resolved(self, pipe: FlexTokPipeline) -> "Sampling":
        """Return the same settings with the defaults of the model filled in, for the protocol."""
        values = asdict(self)
        for name in ("guidance_scale", "prior_guidance_scale"):
            if values[name] is None:
                values[name] = float(pipe.config[f"default_{name}"])
        if values["num_inference_steps"] is None:  # a number, or a table by number of tokens
            values["num_inference_steps"] = pipe.decoder.config.default_num_inference_steps or NUM_INFERENCE_STEPS
        return Sampling(**values)

    @property
    def decoding(self) -> dict[str, Any]:
        """Arguments of `detokenize` and `reconstruct`."""
        steps = self.num_inference_steps
        return self.described | {"num_inference_steps": steps if isinstance(steps, int) else None}

    @property
    def described(self) -> dict[str, Any]:
        """The same for the protocol: a model's table of steps is spelled out."""
        return {name: getattr(self, name) for name in ("num_inference_steps", "guidance_scale", "guidance")}

    @property
    def writing(self) -> dict[str, Any]:
        """Arguments of the pipeline's `token_writer`."""
        return {name: getattr(self, name) for name in ("prior_guidance_scale", "temperature", "top_k", "top_p")}


def seeded_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """Return one generator per sample, seeded with `seed` plus its index."""
    return [torch.Generator().manual_seed(seed + index) for index in indices]


def reconstruct(
    pipe: FlexTokPipeline, pixels: Tensor, counts: Sequence[int], indices: Sequence[int], seed: int, sampling: Sampling
) -> list[Tensor]:
    """Encode images once and decode them from each number of tokens.

    Args:
        pixels: (B, 3, R, R) uint8.
        counts: numbers of tokens.
        indices: sample indices, added to `seed` for the generators.
        seed: seed of the evaluation.
        sampling: sampling settings.

    Returns:
        For each count, images (B, 3, R, R) uint8.
    """
    columns = pipe.reconstruct(
        pixels, counts, generator=seeded_generators(seed, indices), output_type="pt", **sampling.decoding
    )
    return [round_to_8_bits(images) for images in columns]


@torch.no_grad()
def generate(
    pipe: FlexTokPipeline,
    conditions: Sequence[Any],
    counts: Sequence[int],
    indices: Sequence[int],
    seed: int,
    sampling: Sampling,
) -> list[Tensor]:
    """Generate tokens for prompts or classes once and decode each number of them.

    The images equal those of `pipe(prompt, max_tokens=count, generator=...)`, at the cost of one run of the prior.

    Args:
        conditions: B prompts, or B classes.
        counts: numbers of tokens.
        indices: sample indices, added to `seed` for the generators.
        seed: seed of the evaluation.
        sampling: sampling settings, with the defaults of the model filled in.

    Returns:
        For each count, images (B, 3, R, R) uint8.
    """
    prompts, classes = (list(conditions), None) if isinstance(conditions[0], str) else (None, list(conditions))
    generators = seeded_generators(seed, indices)
    no_prefix = pipe.encode_prefix(None, None, None)
    writer = pipe.token_writer(prompts, classes, 1, max(counts), no_prefix, generator=generators, **sampling.writing)
    noise = pipe.prepare_latents(len(writer.counts), generators)  # before the tokens, as the pipeline does
    token_ids = writer.write(max(counts))  # (B, longest)
    columns = [
        pipe.detokenize(token_ids[:, :count], latents=noise, output_type="pt", **sampling.decoding).images
        for count in counts
    ]
    return [round_to_8_bits(images) for images in columns]


def cost_of(num_images: int, seconds: float, flops: float, num_flop_images: int) -> dict[str, Any]:
    """Return the measured cost, and the projected cost at full size.

    Args:
        num_images: images generated, over all token counts.
        seconds: summed over processes.
        flops: operations counted in part of the run.
        num_flop_images: images generated in that part.
    """
    flop_per_image = flops / max(1, num_flop_images)
    return {
        "num_images": num_images,
        "images_per_s": num_images / max(seconds, 1e-9),
        "tflop_per_image": flop_per_image / 1e12,
        "assumed_flop_per_s_of_an_h100": ASSUMED_FLOPS,
        "projected_h100_hours_per_50k_images_and_token_count": 50_000 * flop_per_image / ASSUMED_FLOPS / 3600,
    }
