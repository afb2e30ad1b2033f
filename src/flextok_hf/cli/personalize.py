"""`flextok personalize`: an adapter that draws one's own images on request; parsing waits for no PyTorch."""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path

from ..embedded import embedded_model, resolve_model


SUMMARY = "learn your own images, to draw them from a prompt"
CAPTIONS = ("auto", "name", "files", "metadata")


def add_options(parser: argparse.ArgumentParser, count: Callable[[str], int]) -> argparse.ArgumentParser:
    """Add the options of the command and return the parser; `count` parses an integer of at least 1."""
    parser.add_argument("folder", metavar="FOLDER", help="5 to 500 images, and captions in metadata.jsonl if you like")
    parser.add_argument("--name", required=True, metavar="WORDS", help='what they show, such as "my dog"')
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to create for the adapter")
    parser.add_argument(
        "--captions",
        choices=CAPTIONS,
        default="auto",
        metavar="FROM",
        help="name, files (their names), metadata; or auto: metadata if there is any, else the name (auto)",
    )
    parser.add_argument("--steps", type=count, metavar="N", help="more learn better and take longer (120)")
    parser.add_argument("--lora-rank", type=count, metavar="N", help="size of the adapter (8)")
    return parser


def check(options: argparse.Namespace) -> None:
    """Check the options, and resolve the model, before PyTorch is loaded."""
    # here, as it loads Pillow, for which `flextok --help` must not wait
    from ..utils.files import check_image_folder, check_output_folder

    check_output_folder(options.output)
    check_image_folder(Path(options.folder))
    options.name = " ".join(options.name.split())
    if not options.name:
        raise ValueError("`--name` is empty: pass words for what the images show")
    if options.dtype != "float32":
        raise ValueError(f"`--dtype` {options.dtype} is too coarse to learn in: leave it out")
    options.model = resolve_model(options.model)


def run(options: argparse.Namespace) -> None:
    """Learn the images of a folder, and print the two commands that use the result."""
    from ..pipelines.loading import use_flow_decoder
    from ..training.personal_images import read_personal_images  # here, so that other commands do not wait for it
    from ..training.personalize import PREVIEW_FILE, PersonalizeOptions, personalize
    from .opening import open_pipeline, report

    images = read_personal_images(Path(options.folder), options.name, options.captions)
    for note in images.notes:
        report(options, f"note: {note}")
    report(options, f"{len(images.images)} images, learned as {options.name!r}")
    pipe = open_pipeline(options)
    use_flow_decoder(pipe, options.model)
    given = {"steps": options.steps, "lora_rank": options.lora_rank, "seed": options.seed}
    how = PersonalizeOptions(**{name: value for name, value in given.items() if value is not None})
    folder = Path(options.output)
    report(
        options,
        f"Watch {folder / PREVIEW_FILE} for previews. Once it counts steps, Ctrl-C keeps what was learned.",
    )
    done = personalize(pipe, images, options.name, folder, how, options.quiet)
    if done == 0:
        raise KeyboardInterrupt  # before the first step: there is nothing to use
    model = "" if options.model == embedded_model() else f" --model {shlex.quote(options.model)}"
    use = f"{shlex.quote(options.name)} --adapter {shlex.quote(str(folder))}{model}"
    report(options, f"{folder}: an adapter, {done} of {how.steps} steps. Use it:")
    report(options, f"  flextok generate {use} --output image.png")
    report(options, f"  flextok stream {use} --output image.webp")
