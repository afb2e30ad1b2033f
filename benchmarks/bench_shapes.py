"""Time reading and drawing images of other shapes and sizes than the trained square; the last line is JSON.

python benchmarks/bench_shapes.py [--model FOLDER_OR_ID] [--repeats 5] [--processor_time]
"""

import math
import time

import torch
from harness import build_parser, describe_machine, finish, measure, print_table

from flextok_hf import FlexTokPipeline, embedded_model
from flextok_hf.pipelines.loading import use_flow_decoder


SIDES = (1.0, 1.5, 2.0)  # against the side of the trained square
PROPORTIONS = (16 / 9, 9 / 16, 4.0)  # width against height, at the area of the square
NUM_STEPS = 10


def sizes_to_time(pipe: FlexTokPipeline) -> list[tuple[int, int]]:
    """Return the squares, and other shapes of the area of the first."""
    rules = pipe.size_rules
    squares = [(round(side * rules.side / rules.step) * rules.step,) * 2 for side in SIDES]
    return squares + [rules.keep(1000, round(1000 * ratio)) for ratio in PROPORTIONS]


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--model", help="folder or Hub id of a model for any shape (default: the embedded model)")
    parser.add_argument(
        "--processor_time", action="store_true", help="measure CPU time, for a busy machine; use with one thread"
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = options.model or embedded_model()
    pipe = FlexTokPipeline.from_pretrained(model)
    use_flow_decoder(pipe, model)
    pipe.to(options.device)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, pipe.codebook_size, (1, pipe.num_registers), generator=generator)
    calls = {}
    for height, width in (sizes := sizes_to_time(pipe)):
        image = torch.rand(1, 3, height, width, generator=generator)
        drawn = {"num_inference_steps": NUM_STEPS, "guidance_scale": 1.0, "height": height, "width": width}
        calls[f"tokenize {height} x {width}"] = lambda image=image: pipe.tokenize(image, size=tuple(image.shape[2:]))
        calls[f"detokenize {height} x {width}"] = lambda drawn=drawn: pipe.detokenize(token_ids, **drawn)
    clock = time.process_time if options.processor_time else time.perf_counter
    timings = measure(calls, options.device, options.repeats or 5, clock=clock)
    rows = []
    for height, width in sizes:
        row = {
            "height x width": f"{height} x {width}",
            "area": round(math.prod((height, width)) / pipe.resolution**2, 2),
        }
        for name in ("tokenize", "detokenize"):
            seconds, square = (timings[f"{name} {h} x {w}"]["median_s"] for h, w in ((height, width), sizes[0]))
            row |= {f"{name}, s": seconds, f"{name}, times the square": round(seconds / square, 2)}
        rows.append(row)
    table = print_table(rows, list(rows[0]))
    machine = describe_machine(options.device)
    record = {"clock": clock.__name__, "steps": NUM_STEPS, "machine": machine, "timings": timings, "rows": rows}
    finish("shapes", record, [table], options.results)


if __name__ == "__main__":
    main()
