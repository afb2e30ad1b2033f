"""Convert, load and run official checkpoints of published sizes with random weights, and measure time and memory.

python benchmarks/convert_published_sizes.py [--folder FOLDER] [--sizes d18_d28 prior_113m]

The largest size needs up to 21 GB of disk and 13 GB of memory and takes minutes, so this is not a test.
The last line of the output is JSON with all results.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch


sys.path.append(str(Path(__file__).parents[1] / "tests"))

import yaml  # noqa: E402
from official_checkpoints import (  # noqa: E402
    PRIOR,
    TOKENIZER,
    prior_config,
    prior_tensors,
    tokenizer_config,
    tokenizer_tensors,  # noqa: E402
)

from flextok_hf.conversion.vae import PUBLISHED_ARCHITECTURE  # noqa: E402
from flextok_hf.conversion.writing import write_safetensors  # noqa: E402


def tokenizer_shape(encoder_depth: int, decoder_depth: int) -> dict:
    """Return the shape of a published tokenizer: width 64 times depth."""
    shape = {**TOKENIZER, "channels": 16, "grid": 16, "registers": 256, "levels": [8, 8, 8, 5, 5, 5]}
    for part, depth in (("encoder", encoder_depth), ("decoder", decoder_depth)):
        shape.update({f"{part}_width": 64 * depth, f"{part}_depth": depth, f"{part}_head_dim": 64})
    return shape | {"frequencies": 256, "max_timestep": 1000.0}


def prior_shape(depth: int, hidden: int) -> dict:
    """Return the shape of a published text-conditional prior."""
    sizes = {"codes": 64000, "length": 256, "width": 64 * depth, "heads": depth, "depth": depth, "hidden": hidden}
    return {**PRIOR, **sizes, "text_dim": 2048}


SIZES = {
    "d12_d12": tokenizer_shape(12, 12),
    "d18_d18": tokenizer_shape(18, 18),
    "d18_d28": tokenizer_shape(18, 28),
    "prior_113m": prior_shape(12, 2048),
    "prior_382m": prior_shape(18, 3072),
}
STEPS = {
    "convert": "from flextok_hf.conversion.convert import convert_checkpoint; convert_checkpoint({ours!r}, {source})",
    "load_and_run": "{load_ours}; {run}",
    "from_original_and_run": "{load_original}; {run}",
}
TOKENIZER_CODE = {
    "source": "{official!r}",
    "load_ours": "from flextok_hf import FlexTokPipeline; pipe = FlexTokPipeline.from_pretrained({ours!r})",
    "load_original": "from flextok_hf import FlexTokPipeline; pipe = FlexTokPipeline.from_original({official!r})",
    "run": "import torch; ids = pipe.tokenize(torch.rand(3, 256, 256)); "
    "out = pipe.detokenize(ids[:, :32], 1, 1.0, output_type='pt').images; assert out.isfinite().all()",
}
PRIOR_CODE = {
    "source": "prior={official!r}",
    "load_ours": "from flextok_hf import FlexTokPriorForCausalLM as Prior; prior = Prior.from_pretrained({ours!r})",
    "run": "import torch; ids = prior.generate(encoder_hidden_states=torch.randn(1, 8, 2048), max_new_tokens=2);"
    "assert ids.shape == (1, 3)",
}


def write_official(folder: Path, shape: dict, is_prior: bool) -> int:
    """Write a random checkpoint tensor by tensor; return its number of parameters."""
    folder.mkdir()
    if is_prior:
        config = json.loads(json.dumps(prior_config(shape)))
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        tensors = prior_tensors(shape, seed=None)
    else:
        (folder / "config.json").write_text(json.dumps(tokenizer_config(shape)))
        tensors = tokenizer_tensors(shape, PUBLISHED_ARCHITECTURE, seed=None)
    generator = torch.Generator().manual_seed(0)
    layout = {name: (torch.float32, tuple(tensor.shape)) for name, tensor in tensors.items()}
    values = ((name, torch.randn(size, generator=generator) * 0.02) for name, (_, size) in layout.items())
    write_safetensors(folder / "model.safetensors", layout, values)
    return sum(tensor.numel() for tensor in tensors.values())


def measure(code: str) -> dict[str, float]:
    """Run Python code in a fresh process; return seconds and peak memory.

    The resident peak includes mapped files that happen to be in the page cache; the anonymous peak is what the process
    really needs.
    """
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code])
    peaks = {"RssAnon": 0, "VmRSS": 0}

    def watch() -> None:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            values = {
                name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if "kB" in rest
            }
            for name in peaks:
                peaks[name] = max(peaks[name], values.get(name, 0))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code_of_process = process.wait()
    watcher.join()
    if code_of_process:
        raise SystemExit(f"a step failed: {code}")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "anonymous_peak_gb": round(peaks["RssAnon"] / 1e6, 2),
        "resident_peak_gb": round(peaks["VmRSS"] / 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert, load and run official checkpoints of published sizes.")
    parser.add_argument("--folder", help="parent folder for the checkpoints, which are removed afterwards")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["d18_d28", "prior_113m"])
    options = parser.parse_args()
    results = []
    for size in options.sizes:
        is_prior = size.startswith("prior")
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            names = {"official": f"{folder}/official", "ours": f"{folder}/ours"}
            num_parameters = write_official(Path(names["official"]), SIZES[size], is_prior)
            parts = {name: text.format(**names) for name, text in (PRIOR_CODE if is_prior else TOKENIZER_CODE).items()}
            result = {"size": size, "num_parameters": num_parameters}
            for step, code in STEPS.items():
                if step == "from_original_and_run" and is_prior:
                    continue
                result[step] = measure(code.format(**names, **parts))
                print(size, step, result[step], flush=True)
            stored = [file.stat().st_size for file in Path(names["ours"]).rglob("*") if file.is_file()]
            results.append({**result, "gb_on_disk": round(sum(stored) / 1e9, 2)})
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "python": platform.python_version()}
    print(json.dumps({**machine, "results": results}))


if __name__ == "__main__":
    main()
