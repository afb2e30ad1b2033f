"""Pictures or prompts -> pictures from 1, 2, 4, ... tokens. Every sample has a generator of its own, so that neither
batches nor processes change it, and all its token counts start from the same noise and the same tokens.

Letters: B batch, R side of the square pictures.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..embedded import resolve_model
from ..models.nested_dropout import token_ladder
from ..pipelines.pipeline_flextok import FlexTokPipeline
from .images import round_to_8_bits


ASSUMED_FLOPS = 3.5e14  # per second and H100-class accelerator: 35% of its dense bfloat16 peak


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are drawn; `None` is the default of the model. Names as in `FlexTokPipeline.__call__`."""

    num_inference_steps: int = 20
    guidance_scale: float | None = None
    guidance: str = "apg"
    prior_guidance_scale: float | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def resolved(self, pipe: FlexTokPipeline) -> "Sampling":
        """Return the same with the defaults of the model written out, as a protocol needs them."""
        values = asdict(self)
        for name in ("guidance_scale", "prior_guidance_scale"):
            if values[name] is None:
                values[name] = float(pipe.config[f"default_{name}"])
        return Sampling(**values)

    @property
    def decoding(self) -> dict[str, Any]:
        """Arguments of `detokenize` and `reconstruct`."""
        return {name: getattr(self, name) for name in ("num_inference_steps", "guidance_scale", "guidance")}

    @property
    def writing(self) -> dict[str, Any]:
        """Arguments of the prior's `generate`."""
        values = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p")}
        return values | {"guidance_scale": self.prior_guidance_scale, "do_sample": True}


def load_pipeline(model: str | None, device: str) -> FlexTokPipeline:
    """Return the pipeline to measure, the embedded one by default, without progress bars of its own."""
    pipe = FlexTokPipeline.from_pretrained(resolve_model(model)).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_token_counts(counts: Sequence[int] | None, num_registers: int) -> list[int]:
    """Return the token counts to measure, by default 1, 2, 4, ... and all.

    Raises:
        ValueError: if one is below 1 or above what the model has, or none is named.
    """
    if counts is None:
        return token_ladder(num_registers)
    wrong = [count for count in counts if not 1 <= count <= num_registers]
    if wrong or not counts:
        raise ValueError(
            f"`token_counts` {wrong or 'is empty'}: this model can be measured with 1 to {num_registers}."
        )
    return sorted(set(counts))


def seeded_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """Return one generator per sample, seeded with `seed` plus its index."""
    return [torch.Generator().manual_seed(seed + index) for index in indices]


def reconstruct(
    pipe: FlexTokPipeline, pixels: Tensor, counts: Sequence[int], indices: Sequence[int], seed: int, sampling: Sampling
) -> list[Tensor]:
    """Encode pictures once and draw them from each number of tokens.

    Args:
        pixels: (B, 3, R, R) uint8.
        counts: numbers of tokens.
        indices: of the samples, for their generators.
        seed: of the evaluation.
        sampling: settings.

    Returns:
        For each count, pictures (B, 3, R, R) uint8.
    """
    pictures = pipe.reconstruct(
        pixels, counts, generator=seeded_generators(seed, indices), output_type="pt", **sampling.decoding
    )
    return [round_to_8_bits(images) for images in pictures]


@torch.no_grad()
def generate(
    pipe: FlexTokPipeline,
    conditions: Sequence[Any],
    counts: Sequence[int],
    indices: Sequence[int],
    seed: int,
    sampling: Sampling,
) -> list[Tensor]:
    """Write tokens for prompts or classes once and draw each number of them.

    The pictures are those of `pipe(prompt, max_tokens=count, generator=...)`, at the cost of one run of the prior.

    Args:
        conditions: B prompts, or B classes.
        counts: numbers of tokens.
        indices: of the samples, for their generators.
        seed: of the evaluation.
        sampling: settings, with the defaults of the model written out.

    Returns:
        For each count, pictures (B, 3, R, R) uint8.
    """
    prompts, classes = (list(conditions), None) if isinstance(conditions[0], str) else (None, list(conditions))
    batch_size, inputs = pipe.encode_condition(prompts, classes, 1)
    generators = seeded_generators(seed, indices)
    noise = pipe.prepare_latents(batch_size, generators)  # before the tokens, as in calling the pipeline
    token_ids = pipe.prior.generate(**inputs, max_new_tokens=max(counts), generator=generators, **sampling.writing)
    token_ids = token_ids[:, 1:]  # (B, longest), without the start token
    pictures = [
        pipe.detokenize(token_ids[:, :count], latents=noise, output_type="pt", **sampling.decoding).images
        for count in counts
    ]
    return [round_to_8_bits(images) for images in pictures]


class FlopCounter(FlopCounterMode):
    """Counts floating-point operations, attention and oneDNN's products on CPUs included, which PyTorch leaves out."""

    def __init__(self, modules: nn.Module | None = None):
        def count_attention(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
            return sdpa_flop_count(query_shape, key_shape, value_shape)

        def count_product(rows_shape, *args, out_shape=None, **kwargs) -> int:
            return 2 * math.prod(rows_shape) * out_shape[-1]

        cpu_counts: dict[Any, Callable[..., int]] = {
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count_attention
        }
        if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            cpu_counts[torch.ops.mkldnn._linear_pointwise] = count_product
        super().__init__(modules, display=False, custom_mapping=cpu_counts)


def cost_of(num_images: int, seconds: float, flops: float, num_flop_images: int) -> dict[str, Any]:
    """Say what a protocol cost here and would cost at full size.

    Args:
        num_images: pictures drawn, all token counts counted.
        seconds: summed over processes.
        flops: operations counted in a part of the run.
        num_flop_images: pictures drawn in that part.
    """
    flop_per_image = flops / max(1, num_flop_images)
    return {
        "num_images": num_images,
        "images_per_s": num_images / max(seconds, 1e-9),
        "tflop_per_image": flop_per_image / 1e12,
        "assumed_flop_per_s_of_an_h100": ASSUMED_FLOPS,
        "projected_h100_hours_per_50k_images_and_token_count": 50_000 * flop_per_image / ASSUMED_FLOPS / 3600,
    }
