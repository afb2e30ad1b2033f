"""Time the public calls of the pipeline; the last line of the output is JSON with all results.

python benchmarks/bench_pipeline.py [--model FOLDER_OR_ID] [--repeats 5]
"""

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import diffusers
import torch
import transformers

from flextok_hf import FlexTokPipeline, embedded_model


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One call, as data."""

    name: str
    batch_size: int  # images per call
    num_tokens: int  # tokens kept per image
    num_inference_steps: int = 20


def build_call(pipe: FlexTokPipeline, scenario: Scenario) -> Callable[[], object]:
    """Prepare inputs outside of the timed code and return the call to time."""
    generator = torch.Generator().manual_seed(0)
    size, count = scenario.batch_size, scenario.num_tokens
    images = torch.rand(size, 3, pipe.resolution, pipe.resolution, generator=generator)
    token_ids = torch.randint(0, pipe.codebook_size, (size, count), generator=generator)
    steps = scenario.num_inference_steps
    calls = {
        "tokenize": lambda: pipe.tokenize(images, count),
        "detokenize": lambda: pipe.detokenize(token_ids, steps, generator=torch.Generator().manual_seed(0)),
        "generate": lambda: pipe(["a cat"] * size, count, num_inference_steps=steps),
    }
    return calls[scenario.name]


def measure(scenario: Scenario, call: Callable[[], object], num_repeats: int) -> dict[str, object]:
    """Time `call`; the first run, which includes setup, is reported separately."""
    latencies_s = []
    for _ in range(1 + num_repeats):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        latencies_s.append(time.perf_counter() - start)
    median_s = statistics.median(latencies_s[1:])
    return {
        **asdict(scenario),
        "first_call_s": round(latencies_s[0], 4),
        "median_latency_s": round(median_s, 4),
        "spread_s": round(max(latencies_s[1:]) - min(latencies_s[1:]), 4),
        "images_per_s": round(scenario.batch_size / median_s, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="folder or Hub id (default: the embedded model)")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls per scenario")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    start = time.perf_counter()
    pipe = FlexTokPipeline.from_pretrained(options.model or embedded_model()).to(options.device)
    load_s = time.perf_counter() - start
    pipe.set_progress_bar_config(disable=True)
    most = pipe.num_registers
    scenarios = [
        Scenario(name=name, batch_size=batch_size, num_tokens=num_tokens)
        for name in (("tokenize", "detokenize") if pipe.prior is None else ("tokenize", "detokenize", "generate"))
        for batch_size in (1, 8)
        for num_tokens in (max(1, most // 8), most)
    ]
    results = []
    for scenario in scenarios:
        results.append(measure(scenario, build_call(pipe, scenario), options.repeats))
        print(results[-1], flush=True)
    record = {
        "load_s": round(load_s, 3),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "device": options.device,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, diffusers)},
        "results": results,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
