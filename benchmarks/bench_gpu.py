"""All benchmarks on a GPU in two minutes: bfloat16, eager and compiled, compared with the hardware limits.

    python benchmarks/bench_gpu.py --results FOLDER [--budget 115] [--only eager prior]
    python benchmarks/bench_gpu.py --device cpu --tiny --backend eager        (tests the code without a GPU)

Weights are random and created on the device. The most important groups come first; results are written after each
group. A failed scenario is recorded with its error; scenarios beyond the time budget are listed. Last line: JSON.
"""

import functools
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import models
import plain_path as plain
import torch
import torch.nn.functional as F
from bench_prior import GUIDANCE_SCALE as PRIOR_GUIDANCE_SCALE
from bench_prior import sample

from flextok_hf import FlexTokPipeline, FlexTokPriorForCausalLM
from flextok_hf.models.latents import decode_latents, encode_latents
from flextok_hf.models.layers import append_bias_dimensions, attend
from flextok_hf.pipelines.guided_velocity import GuidedVelocity


START = time.perf_counter()
DTYPE = torch.bfloat16
GUIDANCE_SCALE = 7.5
NUM_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One call in one variant."""

    name: str
    size: str
    variant: str  # "plain", "eager", "compiled", "graphs"
    batch_size: int
    num_tokens: int = models.NUM_REGISTERS


@dataclass
class Work:
    """What to time, and its FLOPs per image."""

    call: Callable[[], Any]
    flops: float = 0.0
    num_repeats: int = 5


def velocity_work(pipe: FlexTokPipeline, scenario: Scenario, device: str) -> Work:
    """One guided step."""
    size, count = scenario.batch_size, scenario.num_tokens
    latents = torch.randn(size, 16, 32, 32, device=device)
    codes = torch.rand(size, count, 6, device=device) * 2 - 1
    num_tokens, sigma = torch.full((size,), count), torch.full((size,), 0.5, device=device)
    if scenario.variant == "plain":
        inputs = (pipe.decoder, latents.to(DTYPE), sigma, codes, num_tokens.to(device))
        flops = 2 * models.decoder_flops(pipe.decoder)
        return Work(lambda: [plain.velocity(*inputs, is_unconditional) for is_unconditional in (False, True)], flops)
    levels = torch.tensor([0.5, 0.25])  # more than one, as in sampling, so that compiled code is reused
    velocity_at = GuidedVelocity(pipe.decoder, levels, codes, num_tokens, GUIDANCE_SCALE)
    flops = sum(models.decoder_flops(pipe.decoder, slots) for slots in (min(count + 1, models.NUM_REGISTERS), 1))
    return Work(lambda: velocity_at(latents, 0), flops, num_repeats=10)


def encode_work(pipe: FlexTokPipeline, scenario: Scenario, device: str) -> Work:
    """Latents to features."""
    latents = torch.randn(scenario.batch_size, 16, 32, 32, device=device, dtype=DTYPE)
    if scenario.variant == "plain":
        return Work(lambda: plain.features(pipe.encoder, latents), models.encoder_flops(pipe.encoder.config))
    flops = models.encoder_flops(pipe.encoder.config, scenario.num_tokens)
    return Work(lambda: pipe.encoder.compute_features(latents, scenario.num_tokens), flops, num_repeats=10)


def vae_work(pipe: FlexTokPipeline, scenario: Scenario, device: str) -> Work:
    """Pixels to latents, or latents to pixels."""
    is_encode = scenario.name == "encode_vae"
    shape = (3, 256, 256) if is_encode else (16, 32, 32)
    inputs = torch.randn(scenario.batch_size, *shape, device=device, dtype=DTYPE)
    flops = models.vae_flops()["encode" if is_encode else "decode"]
    if scenario.variant == "plain":
        return Work(lambda: (pipe.vae.encode if is_encode else pipe.vae.decode)(inputs), flops)
    return Work(lambda: (encode_latents if is_encode else decode_latents)(pipe.vae, inputs), flops)


def tokenize_work(pipe: FlexTokPipeline, scenario: Scenario, device: str) -> Work:
    """Images that are already on the device to ids."""
    pixels = torch.randint(0, 256, (scenario.batch_size, 3, 256, 256), dtype=torch.uint8, device=device)
    encoding = encode_work(pipe, scenario, device)
    flops = models.vae_flops()["encode"] + encoding.flops
    if scenario.variant == "plain":
        pixel_values = pixels.to(DTYPE) / 127.5 - 1
        return Work(lambda: plain.tokenize(pipe, pixel_values), flops, num_repeats=3)
    return Work(lambda: pipe.tokenize_pixels(pixels, scenario.num_tokens), flops, num_repeats=3)


def detokenize_work(pipe: FlexTokPipeline, scenario: Scenario, device: str) -> Work:
    """Ids to images with 20 guided steps."""
    shape = (scenario.batch_size, scenario.num_tokens)
    token_ids = torch.randint(0, pipe.codebook_size, shape, device=device)
    noise = torch.randn(scenario.batch_size, 16, 32, 32, device=device)
    flops = NUM_STEPS * velocity_work(pipe, scenario, device).flops + models.vae_flops()["decode"]
    if scenario.variant == "plain":
        inputs = (pipe, token_ids, noise, NUM_STEPS, GUIDANCE_SCALE)
        return Work(lambda: plain.detokenize(*inputs), flops, num_repeats=1)
    options = {"latents": noise, "output_type": "pt"}
    return Work(lambda: pipe.detokenize(token_ids, NUM_STEPS, GUIDANCE_SCALE, **options), flops, num_repeats=2)


WORKS = {
    "velocity": velocity_work,
    "encode": encode_work,
    "encode_vae": vae_work,
    "decode_vae": vae_work,
    "tokenize": tokenize_work,
    "detokenize": detokenize_work,
}


def attention_rows(device: str, is_tiny: bool) -> Iterator[dict[str, Any]]:
    """Yield timings of the ways to weight merged registers, for the layout of 32 kept tokens."""
    batch_size, heads, length = (2, 2, 17) if is_tiny else (64, 12, 289)
    query, key, value = (torch.randn(batch_size, length, heads, 64, device=device, dtype=DTYPE) for _ in range(3))
    bias = torch.zeros(batch_size, length, device=device)
    bias[:, -1] = 5.4
    mask = bias.to(DTYPE)[:, None, None]
    ways = {
        "without bias": lambda: attend(query, key, value, scale=0.125),
        "bias as mask": lambda: attend(query, key, value, mask, scale=0.125),
        "bias as head dimensions": lambda: attend(
            *append_bias_dimensions(query, key, bias, 0.125), F.pad(value, (0, 8)), scale=0.125
        ),
    }
    for name, timing in harness.measure(ways, device, 20).items():
        yield {"name": f"attention {name}", "size": f"{length} x {heads}", "batch_size": batch_size, **timing}


def prior_row(prior: FlexTokPriorForCausalLM, scenario: Scenario, device: str, floor_s: float) -> dict[str, Any]:
    """Return tokens per second of the prior with guidance, compared with reading its weights once per token."""
    batch_size, count = scenario.batch_size, scenario.num_tokens
    if scenario.variant == "plain":
        conditions, negative = models.text_conditions(prior, batch_size)

        def call(num_tokens: int) -> float:
            start = time.perf_counter()
            plain.generate(prior, num_tokens, conditions, negative, PRIOR_GUIDANCE_SCALE)
            harness.synchronize(device)
            return (time.perf_counter() - start) / num_tokens

    else:
        options = {} if scenario.variant == "eager" else {"cache_implementation": "static"}

        def call(num_tokens: int) -> float:
            times = sorted(sample(prior, num_tokens, batch_size, device, **options))
            return times[len(times) // 2]

    start = time.perf_counter()
    call(min(4, count))
    first_s = time.perf_counter() - start
    token_s = call(count)
    return {
        **asdict(scenario),
        "first_s": first_s,
        "median_s": token_s,
        "tokens_per_s": batch_size / token_s,
        "share_of_bandwidth": floor_s / token_s,
        "peak_mib": harness.peak_memory(lambda: call(min(4, count)), device),
    }


class Bench:
    """Runs scenarios until the budget is spent; a failing scenario does not stop the others."""

    def __init__(self, device: str, budget_s: float, results: Path | None, compile_options: dict[str, Any]):
        self.device = device
        self.budget_s = budget_s
        self.results = results
        self.compile_options = compile_options
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        self.pipe: FlexTokPipeline | None = None
        self.prior: FlexTokPriorForCausalLM | None = None
        matmul, flops = harness.matmul_call(DTYPE, device)
        read, num_bytes = harness.read_call(device)
        timings = harness.measure({"matmul": matmul, "read": read}, device, 10)
        self.flops_per_s = flops / timings["matmul"]["median_s"]
        self.bytes_per_s = num_bytes / timings["read"]["median_s"]

    def attempt(self, label: str, estimate_s: float, produce: Callable[[], Iterator[dict[str, Any]]]) -> None:
        """Add the rows of `produce`, or record why there are none."""
        elapsed = time.perf_counter() - START
        if elapsed + estimate_s > self.budget_s:
            self.skipped.append(label)
            return
        try:
            for row in produce():
                self.add(row)
        except Exception as error:  # anything may fail on untested hardware
            traceback.print_exc()
            self.add({"name": label, "error": f"{type(error).__name__}: {str(error)[:200]}"})
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def add(self, row: dict[str, Any]) -> None:
        """Add a row with its speedup over the plain path, whose work is the same for any number of tokens."""
        same = ("name", "size", "batch_size")
        plain_rows = [each for each in self.rows if each.get("variant") == "plain"]
        peers = [each for each in plain_rows if all(each[key] == row.get(key) for key in same)]
        if peers and "error" not in row:
            row["speed_up"] = peers[-1]["median_s"] / row["median_s"]
        self.rows.append(row)
        shown = {name: harness.show(value) for name, value in row.items() if value is not None}
        print(f"{time.perf_counter() - START:6.1f} s {shown}", flush=True)

    def tokenizer(self, size: str, variant: str, estimate_s: float, *cases: tuple[str, int, int]) -> None:
        """Time calls of a tokenizer of one size; each case is a name, a batch size and a number of tokens."""
        for name, batch_size, num_tokens in cases:
            options = {"name": name, "size": size, "variant": variant}
            scenario = Scenario(**options, batch_size=batch_size, num_tokens=num_tokens)
            call = functools.partial(self.time, scenario)
            self.attempt(f"{name} {size} {variant} {batch_size}", estimate_s, lambda call=call: iter([call()]))

    def generation(self, size: str, variant: str, num_tokens: int, estimate_s: float, *batch_sizes: int) -> None:
        """Time a prior of one size."""
        for batch_size in batch_sizes:
            scenario = Scenario(name="prior", size=size, variant=variant, batch_size=batch_size, num_tokens=num_tokens)
            call = functools.partial(self.time_prior, scenario)
            self.attempt(f"prior {size} {variant} {batch_size}", estimate_s, lambda call=call: iter([call()]))

    def pipeline(self, size: str, variant: str) -> FlexTokPipeline:
        """Return the pipeline of a size; it is reused until another size or compilation is requested."""
        kind = (size, variant if variant in ("compiled", "graphs") else "eager")
        if self.pipe is None or self.pipe_kind != kind:
            self.pipe = None
            self.pipe, self.pipe_kind = models.build_tokenizer(size, self.device, DTYPE), kind
            if kind[1] != "eager":
                mode = {"mode": "reduce-overhead"} if variant == "graphs" else {}
                self.pipe.enable_compile(**self.compile_options, **mode)
        return self.pipe

    @torch.no_grad()
    def time(self, scenario: Scenario) -> dict[str, Any]:
        work = WORKS[scenario.name](self.pipeline(scenario.size, scenario.variant), scenario, self.device)
        start = time.perf_counter()
        peak_mib = harness.peak_memory(work.call, self.device)  # includes compilation and setup
        first_s = time.perf_counter() - start
        timing = harness.measure({"call": work.call}, self.device, work.num_repeats, has_warm_up=False)["call"]
        rate = work.flops * scenario.batch_size / timing["median_s"]
        return {
            **asdict(scenario),
            "first_s": first_s,
            **timing,
            "images_per_s": scenario.batch_size / timing["median_s"],
            "tflop_per_s": rate / 1e12,
            "share_of_matmul": rate / self.flops_per_s,
            "peak_mib": peak_mib,
        }

    @torch.no_grad()
    def time_prior(self, scenario: Scenario) -> dict[str, Any]:
        if self.prior is None or self.prior_size != scenario.size:
            self.prior = None
            self.prior, self.prior_size = models.build_prior(scenario.size, self.device, DTYPE), scenario.size
        floor_s = models.step_bytes(self.prior) / self.bytes_per_s
        return prior_row(self.prior, scenario, self.device, floor_s)

    def finish(self) -> None:
        """Write the results so far."""
        columns = ["name", "size", "variant", "batch_size", "num_tokens", "first_s", "median_s", "speed_up"]
        columns += ["images_per_s", "tokens_per_s", "tflop_per_s", "share_of_matmul", "share_of_bandwidth", "peak_mib"]
        shown = [
            {name: "" if row.get(name) is None else row[name] for name in [*columns, "error"]} for row in self.rows
        ]
        limits = {"matmul_tflop_per_s": self.flops_per_s / 1e12, "memory_gb_per_s": self.bytes_per_s / harness.GIGA}
        record = {
            "machine": harness.describe_machine(self.device),
            **limits,
            "seconds": round(time.perf_counter() - START, 1),
            "rows": [
                {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}
                for row in self.rows
            ],
            "skipped": self.skipped,
        }
        heading = "bfloat16; " + ", ".join(f"{name} {harness.show(value)}" for name, value in limits.items())
        parts = [heading, harness.print_table(shown, [*columns, "error"])]
        if self.skipped:
            parts.append(
                f"Not measured, over the budget of {self.budget_s:.0f} s: {', '.join(dict.fromkeys(self.skipped))}."
            )
        harness.finish("gpu", record, parts, self.results)


def plan(bench: Bench, is_tiny: bool) -> dict[str, Callable[[], None]]:
    """Return groups of scenarios, the most important first."""
    small, large, prior, large_prior = ("tiny",) * 4 if is_tiny else ("d12-d12", "d18-d28", "113M", "3B")
    many, few, length = (2, 2, 4) if is_tiny else (64, 16, 256)
    whole = [("detokenize", many, 32), ("detokenize", many, 256), ("tokenize", many, 256), ("tokenize", many, 32)]
    whole += [("detokenize", 1, 32), ("detokenize", 1, 256), ("tokenize", 1, 256)]
    parts = [("encode", many, 256), ("encode", many, 32), ("velocity", many, 32), ("velocity", many, 256)]
    plain_whole = [("detokenize", many, 256), ("tokenize", many, 256), ("detokenize", 1, 256), ("tokenize", 1, 256)]
    plain_parts = [("encode", many, 256), ("velocity", many, 256)]
    vae = [("encode_vae", few, 256), ("decode_vae", few, 256)]
    larger = [("detokenize", few, 256), ("detokenize", few, 32), ("tokenize", few, 256), ("detokenize", 1, 32)]

    def eager() -> None:
        bench.tokenizer(small, "plain", 4, *plain_whole, *plain_parts, *vae)
        bench.tokenizer(small, "eager", 4, *whole, *parts, *vae)

    def prior_eager() -> None:
        bench.generation(prior, "plain", length, 8, 1)
        bench.generation(prior, "eager", length, 5, 1, many)

    def large_group() -> None:
        bench.tokenizer(large, "plain", 6, larger[0])
        bench.tokenizer(large, "eager", 5, *larger)
        bench.tokenizer(large, "compiled", 12, *larger)

    return {
        "eager": eager,
        "prior": prior_eager,
        "compiled": lambda: bench.tokenizer(small, "compiled", 8, *whole, *parts),
        "compiled-prior": lambda: bench.generation(prior, "compiled", length, 20, 1, many),
        "large": large_group,
        "graphs": lambda: bench.tokenizer(small, "graphs", 15, ("detokenize", 1, 32)),
        "large-prior": lambda: bench.generation(large_prior, "eager", min(length, 64), 8, 1),
        "attention": lambda: bench.attempt("attention", 2, lambda: attention_rows(bench.device, is_tiny)),
    }


def main() -> None:
    parser = harness.build_parser(__doc__)
    parser.add_argument("--budget", type=float, default=115, help="seconds after which no scenario is started (115)")
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="groups of scenarios, see `plan` (all)")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to test the code")
    parser.add_argument("--backend", default="inductor", help="backend of torch.compile (inductor)")
    options = parser.parse_args()
    if options.device != "cuda" and not options.tiny:
        parser.error(f"the sizes need a GPU, but the device is {options.device}. Add --tiny to test the code.")
    bench = Bench(options.device, options.budget, options.results, {"backend": options.backend})
    groups = plan(bench, options.tiny)
    unknown = set(options.only or groups) - set(groups)
    if unknown:
        parser.error(f"unknown groups in --only: {', '.join(sorted(unknown))}. Choose from {', '.join(groups)}.")
    for name in options.only or groups:
        groups[name]()
        bench.finish()


if __name__ == "__main__":
    main()
