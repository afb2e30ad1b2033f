"""The whole table on an accelerator within two minutes: bfloat16, eager and compiled, against the machine's limits.

    python benchmarks/bench_gpu.py [--budget 110] [--only eager prior] [--results FOLDER]
    python benchmarks/bench_gpu.py --device cpu --tiny --backend eager        (tries the code where there is no GPU)

Weights are random and made on the device. A scenario that fails is recorded with its error, and those that no longer
fit into the budget of seconds are recorded as skipped. Last line: JSON.
"""

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import harness
import models
import plain_path as plain
import torch
from bench_prior import write

from flextok_hf import FlexTokPipeline
from flextok_hf.guided_velocity import GuidedVelocity
from flextok_hf.latents import decode_latents, encode_latents
from flextok_hf.layers import append_bias_dimensions, attend


START = time.perf_counter()
DTYPE = torch.bfloat16
GUIDANCE_SCALE = 7.5
GROUPS = ("attention", "eager", "prior", "compiled", "compiled-prior", "large", "large-prior", "graphs")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One call in one way."""

    name: str
    size: str
    variant: str  # "plain", "eager", "compiled", "graphs"
    batch_size: int
    num_tokens: int = models.NUM_REGISTERS


@dataclass
class Work:
    """What to time, and what it amounts to per picture."""

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
    velocity_at = GuidedVelocity(pipe.decoder, sigma[:1], codes, num_tokens, GUIDANCE_SCALE)
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
    """Pictures that are on the device already to ids."""
    pixels = torch.randint(0, 256, (scenario.batch_size, 3, 256, 256), dtype=torch.uint8, device=device)
    flops = models.vae_flops()["encode"] + models.encoder_flops(pipe.encoder.config, scenario.num_tokens)
    return Work(lambda: pipe.tokenize_pixels(pixels, scenario.num_tokens), flops, num_repeats=3)


def detokenize_work(pipe: FlexTokPipeline, scenario: Scenario, device: str, num_steps: int = 20) -> Work:
    """Ids to pictures with 20 guided steps."""
    shape = (scenario.batch_size, scenario.num_tokens)
    token_ids = torch.randint(0, pipe.codebook_size, shape, device=device)
    noise = torch.randn(scenario.batch_size, 16, 32, 32, device=device)
    options = {"latents": noise, "output_type": "latent" if pipe.vae is None else "pt"}
    flops = num_steps * velocity_work(pipe, scenario, device).flops + models.vae_flops()["decode"]
    return Work(lambda: pipe.detokenize(token_ids, num_steps, GUIDANCE_SCALE, **options), flops, num_repeats=2)


WORKS = {
    "velocity": velocity_work,
    "encode": encode_work,
    "encode_vae": vae_work,
    "decode_vae": vae_work,
    "tokenize": tokenize_work,
    "detokenize": detokenize_work,
}


def attention_rows(device: str, product_rate: float, is_tiny: bool) -> Iterator[dict[str, Any]]:
    """The ways to weigh merged registers, for the layout of 32 kept tokens."""
    batch_size, heads, length = (2, 2, 17) if is_tiny else (64, 12, 289)
    query, key, value = (torch.randn(batch_size, length, heads, 64, device=device, dtype=DTYPE) for _ in range(3))
    bias = torch.zeros(batch_size, length, device=device)
    bias[:, -1] = 5.4
    mask = bias.to(DTYPE)[:, None, None]
    ways = {
        "without bias": lambda: attend(query, key, value, scale=0.125),
        "bias as mask": lambda: attend(query, key, value, mask, scale=0.125),
        "bias as head dimensions": lambda: attend(
            *append_bias_dimensions(query, key, value, bias, 0.125), scale=0.125
        ),
    }
    for name, timing in harness.measure(ways, device, 20).items():
        yield {"name": f"attention {name}", "size": f"{length} x {heads}", "batch_size": batch_size, **timing}


def prior_rows(size: str, variant: str, batch_sizes: list[int], num_tokens: int, device: str) -> Iterator[dict]:
    """Tokens per second of the prior under guidance, against reading its weights once per token."""
    prior = models.build_prior(size, device, DTYPE)
    read, num_bytes = harness.read_call(device)
    bytes_per_s = num_bytes / harness.measure({"read": read}, device, 10)["read"]["median_s"]
    floor_s = models.step_bytes(prior) / bytes_per_s
    options = {} if variant == "eager" else {"cache_implementation": "static"}
    for batch_size in batch_sizes:
        start = time.perf_counter()
        write(prior, min(4, num_tokens), batch_size, device, **options)
        first_s = time.perf_counter() - start
        times = sorted(write(prior, num_tokens, batch_size, device, **options))
        token_s = times[len(times) // 2]
        yield {
            "name": "prior",
            "size": size,
            "variant": variant,
            "batch_size": batch_size,
            "num_tokens": num_tokens,
            "first_s": first_s,
            "median_s": token_s,
            "tokens_per_s": batch_size / token_s,
            "share_of_bandwidth": floor_s / token_s,
            "memory_gb_per_s": bytes_per_s / harness.GIGA,
        }


class Table:
    """Runs scenarios until the budget is spent; nothing that goes wrong in one of them ends the others."""

    def __init__(self, device: str, budget_s: float):
        self.device = device
        self.budget_s = budget_s
        self.rows: list[dict[str, Any]] = []
        product, flops = harness.matmul_call(DTYPE, device)
        self.product_rate = flops / harness.measure({"product": product}, device, 10)["product"]["median_s"]

    def attempt(self, label: str, estimate_s: float, produce: Callable[[], Iterator[dict[str, Any]]]) -> None:
        """Add the rows of `produce`, or say why there are none."""
        elapsed = time.perf_counter() - START
        if elapsed + estimate_s > self.budget_s:
            return self.add({"name": label, "error": f"skipped: {elapsed:.0f} s used, about {estimate_s:.0f} needed"})
        try:
            for row in produce():
                self.add(row)
        except Exception as error:  # whatever breaks on a machine nobody tried before
            traceback.print_exc()
            self.add({"name": label, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"})
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        shown = {name: harness.show(value) for name, value in row.items() if value is not None}
        print(f"{time.perf_counter() - START:6.1f} s {shown}", flush=True)

    def scenarios(self, pipe: FlexTokPipeline, scenarios: list[Scenario], estimate_s: float) -> None:
        """Time scenarios of one pipeline one by one."""
        for scenario in scenarios:
            label = f"{scenario.name} {scenario.size} {scenario.variant} {scenario.batch_size}"
            self.attempt(label, estimate_s, lambda scenario=scenario: iter([self.time(pipe, scenario)]))

    @torch.no_grad()
    def time(self, pipe: FlexTokPipeline, scenario: Scenario) -> dict[str, Any]:
        work = WORKS[scenario.name](pipe, scenario, self.device)
        timing = harness.measure({"call": work.call}, self.device, work.num_repeats)["call"]
        rate = work.flops * scenario.batch_size / timing["median_s"]
        return {
            **asdict(scenario),
            **timing,
            "images_per_s": scenario.batch_size / timing["median_s"],
            "tflop_per_s": rate / 1e12,
            "share_of_matmul": rate / self.product_rate,
            "peak_mib": harness.peak_memory(work.call, self.device) if scenario.name.endswith("tokenize") else None,
        }


def main() -> None:
    parser = harness.build_parser(__doc__)
    parser.add_argument("--budget", type=float, default=110, help="seconds after which nothing new is started (110)")
    parser.add_argument("--only", choices=GROUPS, nargs="+", default=list(GROUPS), help="groups of scenarios (all)")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the code")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (inductor)")
    options = parser.parse_args()
    device, is_tiny = options.device, options.tiny
    small, large = ("tiny", "tiny") if is_tiny else ("d12-d12", "d18-d28")
    many, few, length = (2, 2, 4) if is_tiny else (64, 16, 256)
    table = Table(device, options.budget)
    print(f"matrix products: {table.product_rate / 1e12:.1f} TFLOP/s", flush=True)
    compile_options = {"backend": options.backend}

    def cases(size: str, variant: str, *entries: tuple[str, int, int]) -> list[Scenario]:
        return [
            Scenario(name=name, size=size, variant=variant, batch_size=batch_size, num_tokens=num_tokens)
            for name, batch_size, num_tokens in entries
        ]

    parts = [("velocity", 1, 32), ("velocity", 1, 256), ("velocity", many, 32), ("velocity", many, 256)]
    parts += [("encode", 1, 256), ("encode", many, 256), ("encode", many, 32)]
    vae = [("encode_vae", few, 256), ("decode_vae", few, 256)]
    whole = [("tokenize", many, 256), ("detokenize", 1, 32), ("detokenize", many, 32), ("detokenize", many, 256)]
    if "attention" in options.only:
        table.attempt("attention", 2, lambda: attention_rows(device, table.product_rate, is_tiny))
    pipe = models.build_tokenizer(small, device, DTYPE)
    if "eager" in options.only:
        plain_parts = [("velocity", 1, 256), ("velocity", many, 256), ("encode", many, 256), *vae]
        table.scenarios(pipe, cases(small, "plain", *plain_parts), 2)
        table.scenarios(pipe, cases(small, "eager", *parts, *vae, *whole), 2)
    if "prior" in options.only:
        size = "tiny" if is_tiny else "113M"
        table.attempt("prior eager", 6, lambda: prior_rows(size, "eager", [1, many], length, device))
    if "compiled" in options.only:
        pipe.compile(**compile_options)
        table.scenarios(pipe, cases(small, "compiled", *parts, *whole), 8)
    if "compiled-prior" in options.only:
        size = "tiny" if is_tiny else "113M"
        table.attempt("prior compiled", 25, lambda: prior_rows(size, "compiled", [1], length, device))
    del pipe
    if {"large", "graphs"} & set(options.only):
        pipe = models.build_tokenizer(large, device, DTYPE)
        entries = [("velocity", 1, 32), ("velocity", few, 256), ("encode", few, 256), ("tokenize", few, 256)]
        entries += [("detokenize", 1, 32), ("detokenize", few, 256)]
        if "large" in options.only:
            table.scenarios(pipe, cases(large, "eager", *entries), 4)
            pipe.compile(**compile_options)
            table.scenarios(pipe, cases(large, "compiled", *entries), 10)
        del pipe
    if "large-prior" in options.only:
        size = "tiny" if is_tiny else "3B"
        table.attempt("prior large", 8, lambda: prior_rows(size, "eager", [1], min(length, 64), device))
    if "graphs" in options.only:
        pipe = models.build_tokenizer(small, device, DTYPE)
        mode = {} if options.backend != "inductor" else {"mode": "reduce-overhead"}
        pipe.compile(**compile_options, **mode)
        table.scenarios(pipe, cases(small, "graphs", ("velocity", 1, 32), ("detokenize", 1, 32)), 15)

    columns = ["name", "size", "variant", "batch_size", "num_tokens", "first_s", "median_s", "images_per_s"]
    columns += ["tokens_per_s", "tflop_per_s", "share_of_matmul", "share_of_bandwidth", "peak_mib", "error"]
    shown = [{column: row.get(column, "") for column in columns} for row in table.rows]
    text = harness.print_table([{k: "" if v is None else v for k, v in row.items()} for row in shown], columns)
    record = {
        "machine": harness.describe_machine(device),
        "matmul_tflop_per_s": table.product_rate / 1e12,
        "seconds": round(time.perf_counter() - START, 1),
        "rows": [
            {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}
            for row in table.rows
        ],
    }
    harness.finish("gpu", record, [text], options.results)


if __name__ == "__main__":
    main()
