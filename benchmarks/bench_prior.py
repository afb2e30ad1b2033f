"""Token generation at the FlexAR-113M size: the package compared with the plain path and with memory bandwidth.

    python benchmarks/bench_prior.py [--device cuda] [--results FOLDER] [--size 382M] [--plain-tokens 256]

Batch 1 with guidance, so two rows per step. Weights are random. Last line: JSON.
"""

import itertools
import statistics
import time
from typing import Any

import harness
import models
import plain_path as plain
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from flextok_hf import FlexTokPriorForCausalLM


GUIDANCE_SCALE = 3.0


class Clock(LogitsProcessor):
    """Records the time right before each token is sampled."""

    def __init__(self, device: str):
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        harness.synchronize(self.device)
        self.times.append(time.perf_counter())
        return scores


def sample(prior: FlexTokPriorForCausalLM, num_tokens: int, batch_size: int, device: str, **options) -> list[float]:
    """Generate sequences with `options` of `generate`; return the seconds of every token after the first."""
    conditions, negative = models.text_conditions(prior, batch_size)
    clock = Clock(device)
    prior.generate(
        **conditions,
        **{f"negative_{name}": value for name, value in negative.items()},
        guidance_scale=GUIDANCE_SCALE,
        max_new_tokens=num_tokens,
        do_sample=True,
        generator=torch.Generator(device).manual_seed(0),
        **options,
        logits_processor=LogitsProcessorList([clock]),
    )
    return [later - earlier for earlier, later in itertools.pairwise(clock.times)]


@torch.no_grad()
def run(dtype: str, size: str, num_tokens: int, plain_tokens: int, num_repeats: int, device: str) -> dict[str, Any]:
    """Time the whole call, each of its tokens, and the plain path for `plain_tokens` tokens."""
    prior = models.build_prior(size, device, getattr(torch, dtype))
    sample(prior, 2, 1, device)  # warm-up
    tokens: list[list[float]] = []
    read, num_bytes = harness.read_call(device)
    calls = {"package": lambda: tokens.append(sample(prior, num_tokens, 1, device)), "read": read}
    timings = harness.measure(calls, device, num_repeats, has_warm_up=False)
    per_token = [statistics.median(times) for times in zip(*tokens, strict=True)]
    conditions, negative = models.text_conditions(prior, 1)

    def plain_call() -> None:
        plain.generate(prior, plain_tokens, conditions, negative, GUIDANCE_SCALE)

    plain_timing = harness.measure({"plain": plain_call}, device, 1, has_warm_up=False)["plain"]
    token_s = statistics.median(per_token)
    bytes_per_s, read_per_s = models.step_bytes(prior) / token_s, num_bytes / timings["read"]["median_s"]
    return {
        "size": size,
        "dtype": dtype,
        "num_tokens": num_tokens,
        "package_s": timings["package"]["median_s"],
        "token_ms": 1000 * token_s,
        "10th_token_ms": 1000 * statistics.median(per_token[5:15]),
        "last_token_ms": 1000 * statistics.median(per_token[-10:]),
        "tokens_per_s": 1 / token_s,
        "weights_gb_per_s": bytes_per_s / harness.GIGA,
        "memory_gb_per_s": read_per_s / harness.GIGA,
        "share_of_memory": bytes_per_s / read_per_s,
        "plain_tokens": plain_tokens,
        "plain_s": plain_timing["median_s"],
        "package_s_for_plain_tokens": sum(per_token[: plain_tokens - 1]) + token_s,
        # in separate processes, since this one keeps memory from earlier calls
        "package_peak_mib": harness.in_new_process(peak_memory, dtype, size, "package", device),
        "plain_peak_mib": harness.in_new_process(peak_memory, dtype, size, "plain", device),
        "timings": timings,
    }


@torch.no_grad()
def peak_memory(dtype: str, size: str, way: str, device: str, num_tokens: int = 16) -> int | None:
    """Return the peak MiB during generation; few tokens reach the peak that many have."""
    prior = models.build_prior(size, device, getattr(torch, dtype))
    ways = {
        "package": lambda: sample(prior, num_tokens, 1, device),
        "plain": lambda: plain.generate(prior, num_tokens, *models.text_conditions(prior, 1), GUIDANCE_SCALE),
    }
    return harness.peak_memory(ways[way], device)


def main() -> None:
    parser = harness.build_parser(__doc__)
    parser.add_argument("--size", choices=models.PRIORS, default="113M", help="shape of the prior (113M)")
    parser.add_argument("--num-tokens", type=int, default=256, help="tokens to generate (256)")
    parser.add_argument("--plain-tokens", type=int, default=64, help="tokens for the plain path, which is slow (64)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for dtype in ("float32", "bfloat16"):
        lengths = (options.num_tokens, options.plain_tokens)
        rows.append(run(dtype, options.size, *lengths, options.repeats or 3, options.device))
        rows[-1]["speed_up"] = rows[-1]["plain_s"] / rows[-1]["package_s_for_plain_tokens"]
        print({name: harness.show(value) for name, value in rows[-1].items() if name != "timings"}, flush=True)
    columns = ["size", "dtype", "num_tokens", "package_s", "10th_token_ms", "last_token_ms", "tokens_per_s"]
    columns += ["weights_gb_per_s", "memory_gb_per_s", "share_of_memory", "plain_tokens", "plain_s", "speed_up"]
    table = harness.print_table(rows, [*columns, "plain_peak_mib", "package_peak_mib"])
    record = {"machine": harness.describe_machine(options.device), "rows": rows}
    harness.finish("prior", record, [table], options.results)


if __name__ == "__main__":
    main()
