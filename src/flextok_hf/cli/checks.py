"""Checks of a command's options together: paths, and options that only make sense with others; without PyTorch."""

import argparse
import os
import socket

from ..embedded import resolve_model
from ..utils.files import ANIMATED, IMAGE_EXTENSIONS, check_output_folder, check_output_path
from ..utils.image_formats import PHOTO_EXTENSIONS
from . import personalize


MAX_SHEET_ROWS = 200  # of 128 pixels or more


def check_options(options: argparse.Namespace) -> None:
    """Check the options of a command, and resolve `options.model` to a folder or Hub id.

    Raises:
        ValueError: if options do not fit together, an output cannot be written there, or the model is neither a folder
            nor a Hub id.
        FileNotFoundError: if a photo or token file does not exist.
        OSError: if the demo cannot listen on its port.
    """
    if options.command == "convert":
        check_output_folder(options.output)
        if options.tokenizer is None and options.prior is None:
            raise ValueError("pass a TOKENIZER, a --prior, or both")
        check_needed(options, "prior", "text_encoder", "prior_revision")
        check_needed(options, "tokenizer", "revision")
        return
    if options.command == "personalize":
        personalize.check(options)
        return
    if "photos" in options:
        options.photos, options.found = find_photos(options.photos)
    if options.command == "reconstruct" and not os.path.splitext(options.output)[1]:
        check_output_folder(options.output)
    elif "output" in options:
        kinds = {"tokenize": (".json",), "stream": (*IMAGE_EXTENSIONS, ".gif")}
        check_output_path(options.output, kinds.get(options.command, IMAGE_EXTENSIONS))
    check_inputs(options)
    if (
        options.command == "reconstruct"
        and len(options.photos) > MAX_SHEET_ROWS
        and os.path.splitext(options.output)[1]
    ):
        raise ValueError(
            f"{len(options.photos):,} photos are too many for one sheet: name a new folder as `--output`, for a sheet"
            " of each"
        )
    check_counts(options)
    if getattr(options, "frame_ms", None) is not None and not options.output.lower().endswith(ANIMATED):
        raise ValueError(f"`--frame-ms` is for an animation: pass an `--output` that ends in {' or '.join(ANIMATED)}")
    if getattr(options, "models", False) and options.model is not None:
        raise ValueError("`--models` lists what there is: leave out `--model`, or `--models` to describe that one")
    options.model = resolve_model(options.model)
    if options.command == "demo":
        check_port(options.host, options.port)


def find_photos(paths: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the files at these paths, folders replaced by the images below them, and the folder of each of these.

    Raises:
        ValueError: if there are no images below a folder.
    """
    photos: list[str] = []
    found: dict[str, str] = {}
    for path in paths:
        if not os.path.isdir(path):
            photos.append(path)
            continue
        files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
        images = sorted(file for file in files if is_photo(file))
        if not images:
            raise ValueError(f"the folder {path!r} holds no images ({', '.join(PHOTO_EXTENSIONS)})")
        photos += [file for file in images if file not in found]
        found |= dict.fromkeys(images, path)
    return photos, found


def is_photo(path: str) -> bool:
    """Whether a file in a folder is an image by its name, and not hidden."""
    name = os.path.basename(path).lower()
    return name.endswith(PHOTO_EXTENSIONS) and not name.startswith(".") and os.path.isfile(path)


def check_needed(options: argparse.Namespace, needed: str, *names: str) -> None:
    """Raise a ValueError if one of `names` is set without `needed`, which would be ignored."""
    for name in names:
        if getattr(options, name) is not None and getattr(options, needed) is None:
            raise ValueError(f"`--{name.replace('_', '-')}` is for a {needed}: pass one, or leave it out")


def check_inputs(options: argparse.Namespace) -> None:
    """Check that input files exist and that the output does not replace one of them."""
    if (getattr(options, "image", None) is None) != (getattr(options, "keep_tokens", None) is None):
        raise ValueError(
            "`--image` and `--keep-tokens` go together: a photo to vary and how many tokens of it to keep"
        )
    photos = [*getattr(options, "photos", ()), *filter(None, [getattr(options, "image", None)])]
    for path in photos:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"the photo {path!r} does not exist; check the path")
    if "ids" in options and not os.path.isfile(options.ids):
        raise FileNotFoundError(f"the file {options.ids!r} does not exist; `flextok tokenize` makes one from a photo")
    for path in photos:
        if os.path.exists(options.output) and os.path.samefile(path, options.output):
            raise ValueError(f"`output` {options.output!r} is the photo itself; choose another name")


def check_counts(options: argparse.Namespace) -> None:
    """Check numbers of tokens against each other; `commands.py` checks them against the model."""
    most = getattr(options, "max_tokens", None)
    counts = most if isinstance(most, list) else getattr(options, "token_counts", None)
    if counts is not None and counts != sorted(set(counts)):
        name = "--max-tokens" if counts is most else "--token-counts"
        raise ValueError(f"`{name}` must be growing numbers, such as 1 4 16, got {' '.join(map(str, counts))}")
    keep = getattr(options, "keep_tokens", None)
    if keep is not None and most is not None and keep > most:
        raise ValueError(f"`--keep-tokens` {keep} is above `--max-tokens` {most}; keep fewer tokens, or raise it")


def check_port(host: str, port: int) -> None:
    """Raise an OSError if the demo cannot listen there, before a model is loaded."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = addresses[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        raise OSError(f"cannot listen on `--host` {host} `--port` {port}: {error.strerror or error}") from None
