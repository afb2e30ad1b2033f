"""Images to tokens and back at the published d12-d12 size: the package compared with the plain path in one run.

    python benchmarks/bench_tokenizer.py [--device cuda] [--results FOLDER] [--only detokenize]

Weights are random. The plain path (`plain_path.py`) does all the work of the official code. Last line: JSON.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import harness
import models
import plain_path as plain
import torch

from flextok_hf import FlexTokPipeline
from flextok_hf.models.latents import decode_latents, encode_latents
from flextok_hf.models.packed_linear import packed_weights
from flextok_hf.pipelines.guided_velocity import GuidedVelocity


GUIDANCE_SCALE = 7.5
DTYPES = ("float32", "bfloat16")  # where a CPU emulates the second one, the plain VAE takes hours


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One call, timed on both paths."""

    part: str  # name of a function of `CALLS`
    dtype: str = "float32"
    batch_size: int = 1  # images per call
    num_tokens: int = models.NUM_REGISTERS  # tokens per image
    num_repeats: int = 7


SCENARIOS = [
    Scenario(part=part, dtype=dtype, batch_size=batch_size, num_tokens=num_tokens)
    for dtype in DTYPES
    for part, batch_size, num_tokens in [
        ("encode_vae", 1, 256),
        ("decode_vae", 1, 256),
        ("encode", 1, 256),
        ("encode", 1, 32),
        ("encode", 4, 256),
        ("velocity", 1, 256),
        ("velocity", 1, 32),
        ("velocity", 4, 32),
        ("tokenize", 1, 256),
        ("tokenize", 1, 32),
    ]
] + [
    Scenario(part="detokenize", dtype=dtype, num_tokens=num_tokens, num_repeats=1)
    for dtype in DTYPES
    for num_tokens in (32, 256)
]


@dataclass
class Pair:
    """The two calls to time, and the FLOPs of the package's call."""

    plain: Callable[[], Any]
    package: Callable[[], Any]
    flops: int
    is_loop: bool = False  # timed as inside a sampling loop, with packed weights


def encode_vae(pipe: FlexTokPipeline, scenario: Scenario, device: str) -> Pair:
    """Pixels to latents."""
    pixel_values = torch.rand(scenario.batch_size, 3, 256, 256, device=device, dtype=pipe.vae.dtype) * 2 - 1
    return Pair(
        lambda: pipe.vae.encode(pixel_values).latent_dist.mode(),
        lambda: encode_latents(pipe.vae, pixel_values),
        models.vae_flops()["encode"],
    )


def decode_vae(pipe: FlexTokPipeline, scenario: Scenario, device: str) -> Pair:
    """Latents to pixels."""
    latents = torch.randn(scenario.batch_size, 16, 32, 32, device=device, dtype=pipe.vae.dtype)
    return Pair(
        lambda: pipe.vae.decode(latents).sample,
        lambda: decode_latents(pipe.vae, latents),
        models.vae_flops()["decode"],
    )


def encode(pipe: FlexTokPipeline, scenario: Scenario, device: str) -> Pair:
    """Latents to features: only the encoder."""
    latents = torch.randn(scenario.batch_size, 16, 32, 32, device=device, dtype=pipe.encoder.dtype)
    return Pair(
        lambda: plain.features(pipe.encoder, latents),
        lambda: pipe.encoder.compute_features(latents, scenario.num_tokens),
        models.encoder_flops(pipe.encoder.config, scenario.num_tokens),
    )


def velocity(pipe: FlexTokPipeline, scenario: Scenario, device: str) -> Pair:
    """One guided step of the decoder, with and without tokens."""
    latents = torch.randn(scenario.batch_size, 16, 32, 32, device=device)
    codes = torch.rand(scenario.batch_size, scenario.num_tokens, 6, device=device) * 2 - 1
    num_tokens = torch.full((scenario.batch_size,), scenario.num_tokens)
    sigma = torch.full((scenario.batch_size,), 0.5, device=device)
    velocity_at = GuidedVelocity(pipe.decoder, sigma[:1], codes, num_tokens, GUIDANCE_SCALE)
    inputs = (latents.to(pipe.decoder.dtype), sigma, codes, num_tokens.to(device))
    slots = [min(scenario.num_tokens + 1, models.NUM_REGISTERS), 1]
    return Pair(
        lambda: [plain.velocity(pipe.decoder, *inputs, is_unconditional) for is_unconditional in (False, True)],
        lambda: velocity_at(latents, 0),
        sum(models.decoder_flops(pipe.decoder, num_slots) for num_slots in slots),
        is_loop=True,
    )


def tokenize(pipe: FlexTokPipeline, scenario: Scenario, device: str) -> Pair:
    """Images to ids, the whole call."""
    images = torch.rand(scenario.batch_size, 3, 256, 256, device=device)
    return Pair(
        lambda: plain.tokenize(pipe, images * 2 - 1),
        lambda: pipe.tokenize(images, scenario.num_tokens),
        models.vae_flops()["encode"] + models.encoder_flops(pipe.encoder.config, scenario.num_tokens),
    )


def detokenize(pipe: FlexTokPipeline, scenario: Scenario, device: str, num_steps: int = 20) -> Pair:
    """Ids to images with 20 guided steps, the whole call."""
    shape = (scenario.batch_size, scenario.num_tokens)
    token_ids = torch.randint(0, pipe.codebook_size, shape, device=device)
    noise = torch.randn(scenario.batch_size, 16, 32, 32, device=device)
    return Pair(
        lambda: plain.detokenize(pipe, token_ids, noise, num_steps, GUIDANCE_SCALE),
        lambda: pipe.detokenize(token_ids, num_steps, GUIDANCE_SCALE, latents=noise, output_type="pt"),
        models.vae_flops()["decode"] + num_steps * velocity(pipe, scenario, device).flops,
    )


CALLS = {function.__name__: function for function in (encode_vae, decode_vae, encode, velocity, tokenize, detokenize)}


@torch.no_grad()
def run(scenario: Scenario, pipe: FlexTokPipeline, device: str) -> dict[str, Any]:
    """Time both paths in turn; `share_of_matmul` is relative to a large matmul at the same precision in this run."""
    pair = CALLS[scenario.part](pipe, scenario, device)
    flops = pair.flops * scenario.batch_size
    is_long = scenario.part == "detokenize"  # no warm-up, since its parts ran before
    with packed_weights(pipe.decoder, num_calls=1000) if pair.is_loop else nullcontext():
        matmul, matmul_flops = harness.matmul_call(getattr(torch, scenario.dtype), device, flops)
        calls = {"plain": pair.plain, "package": pair.package, "product": matmul}
        timings = harness.measure(calls, device, scenario.num_repeats, has_warm_up=not is_long)
    record = {**asdict(scenario), **{f"{name}_s": timing["median_s"] for name, timing in timings.items()}}
    record |= {
        "speed_up": record["plain_s"] / record["package_s"],
        "images_per_s": scenario.batch_size / record["package_s"],
        "gflop": flops / harness.GIGA,
        "matmul_gflop_per_s": matmul_flops / record.pop("product_s") / harness.GIGA,
        "timings": timings,
    }
    record["share_of_matmul"] = record["gflop"] / record["package_s"] / record["matmul_gflop_per_s"]
    if is_long:
        for way in ("plain", "package"):
            # in a separate process, since this one keeps memory from earlier calls
            record[f"{way}_peak_mib"] = harness.in_new_process(peak_memory, scenario, way, device)
    return record


@torch.no_grad()
def peak_memory(scenario: Scenario, way: str, device: str) -> int | None:
    """Return the peak MiB during sampling, with the fewest steps that reach the peak of a long run."""
    pipe = models.build_tokenizer("d12-d12", device, getattr(torch, scenario.dtype))
    pair = detokenize(pipe, scenario, device, num_steps=2)
    return harness.peak_memory(getattr(pair, way), device)


def main() -> None:
    parser = harness.build_parser(__doc__)
    parser.add_argument("--only", choices=CALLS, nargs="+", help="parts to time (all)")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=DTYPES, help="precisions to time (both)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for dtype in options.dtypes:
        chosen = [each for each in SCENARIOS if each.dtype == dtype and each.part in (options.only or CALLS)]
        pipe = models.build_tokenizer("d12-d12", options.device, getattr(torch, dtype))
        for scenario in chosen:
            scenario = replace(scenario, num_repeats=options.repeats or scenario.num_repeats)
            rows.append(run(scenario, pipe, options.device))
            print({name: harness.show(value) for name, value in rows[-1].items() if name != "timings"}, flush=True)
    for row in rows:  # half precision is also compared with the plain path in float32
        key = (row["part"], row["batch_size"], row["num_tokens"])
        same = [each for each in rows if (each["part"], each["batch_size"], each["num_tokens"]) == key]
        row["speed_up_to_float32"] = next(each["plain_s"] for each in same) / row["package_s"]
    columns = ["part", "dtype", "batch_size", "num_tokens", "plain_s", "package_s", "speed_up", "speed_up_to_float32"]
    columns += ["images_per_s", "matmul_gflop_per_s", "share_of_matmul", "plain_peak_mib", "package_peak_mib"]
    for row in rows:
        row.setdefault("plain_peak_mib", "")
        row.setdefault("package_peak_mib", "")
    table = harness.print_table(rows, columns)
    record = {"machine": harness.describe_machine(options.device), "rows": rows}
    harness.finish("tokenizer", record, [table], options.results)


if __name__ == "__main__":
    main()
