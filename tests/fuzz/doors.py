"""The three doors through which strangers' input comes: public calls, saved folders, image files.

Run by `test_fuzz.py` on a few inputs, and by `make fuzz N=5000` on many. Inputs depend only on their seed.
"""

import argparse
import multiprocessing
import random
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from image_files import judge_image
from official_checkpoints import write_prior, write_tokenizer
from outcomes import MEMORY_LIMIT
from public_calls import Call, public_calls, random_values
from saved_folders import judge_folder
from tiny_models import make_class_pipeline, make_pipeline, make_text_pipeline
from tqdm import tqdm

from flextok_hf import FlexTokPipeline


FORK = multiprocessing.get_context("fork")  # a child inherits the models that were built
STUCK_AFTER = 30  # seconds

Judge = Callable[[int], tuple[str, str]]  # seed -> what the input was, what is wrong or an empty string


def judge_call(calls: dict[str, Call], seed: int) -> tuple[str, str]:
    draw = random.Random(seed)
    name = draw.choice(sorted(calls))
    values = random_values(calls[name], draw)
    return f"{name} with {values}", calls[name].judge(values) or ""


def calls_door(folder: Path) -> Judge:
    return partial(judge_call, public_calls(make_text_pipeline(), make_class_pipeline()))


def images_door(folder: Path) -> Judge:
    return partial(judge_image, make_pipeline(), folder)


def folders_door(folder: Path) -> Judge:
    """Models saved by us (one file per component, and sharded) and two of the official formats, in turns."""
    torch.manual_seed(0)
    pipe = make_text_pipeline()
    pipe.save_pretrained(folder / "ours")
    pipe.decoder.save_pretrained(folder / "ours" / "decoder", max_shard_size="20KB")
    (folder / "ours" / "decoder" / "diffusion_pytorch_model.safetensors").unlink()
    tokenizer, _, _ = write_tokenizer(folder / "official" / "tokenizer")
    write_prior(folder / "official" / "prior", classes=5)

    def load_official(copy: Path) -> FlexTokPipeline:
        return FlexTokPipeline.from_original(copy / "tokenizer", copy / "prior")

    def judge_one(seed: int) -> tuple[str, str]:
        if seed % 2:
            return judge_folder(folder / "official", folder, load_official, seed)
        return judge_folder(folder / "ours", folder, FlexTokPipeline.from_pretrained, seed)

    return judge_one


DOORS: dict[str, Callable[[Path], Judge]] = {"calls": calls_door, "folders": folders_door, "images": images_door}


def faults(door: str, seeds: range) -> Iterator[str]:
    """Yield one line for every input with a wrong outcome.

    Inputs run in a child process, since some reads can neither be interrupted nor limited from within: one that is
    stuck or dies is reported, and a new child goes on with the next seed.
    """
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(seeds), desc=door, disable=None) as bar:
        judge_one = DOORS[door](Path(folder))
        seed = seeds.start
        while seed < seeds.stop:
            receiver, sender = FORK.Pipe(duplex=False)
            child = FORK.Process(target=work, args=(judge_one, range(seed, seeds.stop), sender), daemon=True)
            child.start()
            sender.close()
            while seed < seeds.stop:
                try:
                    problem = receiver.recv() if receiver.poll(STUCK_AFTER) else f"stuck for {STUCK_AFTER} s"
                except EOFError:
                    problem = "ends the process"
                if problem:
                    yield f"{door}, seed {seed}: {problem}"
                seed += 1
                bar.update()
                if problem.startswith(("stuck", "ends")):
                    break
            child.kill()
            child.join()


def work(judge_one: Judge, seeds: range, sender: Connection) -> None:
    """Judge one input after the other, within the memory limit, and send what is wrong or an empty string."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + 2 * MEMORY_LIMIT,) * 2)
    for seed in seeds:
        done, problem = judge_one(seed)
        sender.send(problem and f"{done}: {problem}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--door", choices=DOORS, nargs="+", default=list(DOORS))
    parser.add_argument("--inputs", type=int, default=5000, help="number of inputs per door")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first input; the others follow")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    number = 0
    for door in args.door:
        for fault in faults(door, range(args.seed, args.seed + args.inputs)):
            print(fault, flush=True)
            number += 1
    print(f"{number} faults in {args.inputs} inputs each of {', '.join(args.door)}.")
    return int(number > 0)


if __name__ == "__main__":
    sys.exit(main())
