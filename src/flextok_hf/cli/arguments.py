"""The command line, `flextok COMMAND`.

This module parses arguments; `checks.py` checks them together. The commands are in `commands.py`, which is imported
only afterwards, so that mistakes are reported without waiting for PyTorch.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from . import personalize
from .parser import OneLineErrorParser, WideHelpFormatter


# Errors that a user can cause and fix. Anything else is a bug of ours and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError)

DTYPES = ("float32", "bfloat16", "float16")

EPILOGS = {
    "generate": 'example:\n  flextok generate "a cat" --max-tokens 64 --output cat.png',
    "stream": 'example:\n  flextok stream "a cat" --token-counts 1 4 16 --output cat.webp',
    "tokenize": "example:\n  flextok tokenize photo.jpg --max-tokens 8 --output ids.json",
    "detokenize": "example:\n  flextok detokenize ids.json --output out.png",
    "reconstruct": "example:\n  flextok reconstruct photo.jpg --max-tokens 1 4 16 --output sheet.png",
    "demo": "example:\n  flextok demo --port 7860",
    "personalize": 'example:\n  flextok personalize photos --name "my dog" --output my_dog',
    "convert": "example:\n  flextok convert EPFL-VILAB/flextok_d18_d28_dfn --output flextok_d18_d28",
    "info": "example:\n  flextok info --json",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = OneLineErrorParser(
        prog="flextok",
        description="Images as ordered token sequences of any length, and back.",
        epilog=f"See `flextok COMMAND --help` for the options of a command.\n\n{EPILOGS['generate']}",
        formatter_class=WideHelpFormatter,
    )
    parser.add_argument("--version", action=PrintVersion, help="print the installed version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_stream(commands)
    _add_tokenize(commands)
    _add_detokenize(commands)
    _add_reconstruct(commands)
    parser_of_own = _add_command(commands, "personalize", personalize.SUMMARY)
    _add_shared(personalize.add_options(parser_of_own, positive_int), has_adapter=False)
    _add_demo(commands)
    _add_convert(commands)
    _add_info(commands)
    parser.parsers = commands.choices
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: what follows `flextok`; by default those of the process.

    Returns:
        The exit code: 0 success, 1 closed output pipe, 2 wrong input (one line on stderr), 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the console's encoding lacks must not stop the work
            stream.reconfigure(errors="backslashreplace")
    options = build_parser().parse_args(arguments)
    try:
        from .checks import check_options

        check_options(options)
        from .commands import COMMANDS

        COMMANDS[options.command](options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader closed the pipe, as in `flextok info | head -1`; leave nothing to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("flextok: interrupted; files that were not finished are not written", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if options.traceback:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"flextok: error: {message}", file=sys.stderr)
        return 2
    return 0


class PrintVersion(argparse.Action):
    """Look up the installed version only when it is asked for."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        """Print the version and exit with code 0."""
        from importlib.metadata import version

        parser.exit(0, f"flextok_hf {version('flextok_hf')}\n")


def positive_int(text: str) -> int:
    """Parse an integer of at least 1."""
    return _bounded(int, text, "an integer of at least 1", lambda value: value >= 1)


def non_negative_int(text: str) -> int:
    """Parse an integer of at least 0."""
    return _bounded(int, text, "an integer of at least 0", lambda value: value >= 0)


def port(text: str) -> int:
    """Parse a port number."""
    return _bounded(int, text, "an integer from 1 to 65535", lambda value: 1 <= value < 2**16)


def seed(text: str) -> int:
    """Parse a seed that leaves room for the seeds of further images within the range of PyTorch."""
    return _bounded(int, text, "an integer from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63)


def non_negative_float(text: str) -> float:
    """Parse a finite number of at least 0."""
    return _bounded(float, text, "a number of at least 0", lambda value: 0 <= value < float("inf"))


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    return _bounded(float, text, "a number above 0", lambda value: 0 < value < float("inf"))


def probability(text: str) -> float:
    """Parse a number above 0 and up to 1."""
    return _bounded(float, text, "a number above 0 and up to 1", lambda value: 0 < value <= 1)


def size(text: str) -> tuple[int, int]:
    """Parse the side of a square, or height and width with an x between them."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and 0 < int(side) < 2**31 for side in sides):
        raise argparse.ArgumentTypeError(f"expected a side, such as 128, or HxW, such as 96x160, got {text!r}")
    return int(sides[0]), int(sides[-1])


def size_or_keep(text: str) -> str | tuple[int, int]:
    """Parse `keep`, or a size."""
    return text if text == "keep" else size(text)


def _bounded(kind, text: str, allowed: str, is_allowed):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not is_allowed(value):
        raise argparse.ArgumentTypeError(f"expected {allowed}, got {text!r}")
    return value


def _add_command(commands, name: str, summary: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=EPILOGS[name],
        formatter_class=WideHelpFormatter,
    )


def _add_shared(parser: argparse.ArgumentParser, has_seed: bool = True, has_adapter: bool = True) -> None:
    if has_seed:
        parser.add_argument("--seed", type=seed, default=0, metavar="N", help="same seed, same result (0)")
    parser.add_argument("--model", metavar="PATH_OR_ID", help="folder or Hub id (the embedded model)")
    if has_adapter:
        parser.add_argument("--adapter", metavar="PATH_OR_ID", help="adapter (LoRA) for it: folder or Hub id")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (best available)")
    parser.add_argument(
        "--dtype", metavar="TYPE", choices=DTYPES, default="float32", help="float32, bfloat16, float16 (float32)"
    )
    _add_verbosity(parser)


def _add_verbosity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no summary")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")


def _add_size(parser: argparse.ArgumentParser, of_photos: bool) -> None:
    if of_photos:
        help_text = "keep: each photo's proportions; or a side, or HxW (the model's square)"
        parser.add_argument("--size", type=size_or_keep, metavar="SIZE", help=help_text)
    else:
        parser.add_argument("--size", type=size, metavar="SIZE", help="a side, or HxW, in pixels (the model's square)")


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-inference-steps", type=positive_int, metavar="N", help="decoder steps (the model's)")
    parser.add_argument(
        "--decoder", metavar="NAME", help="flow_decoder: of a distilled model, for any guidance and many steps"
    )
    parser.add_argument(
        "--guidance-scale",
        type=non_negative_float,
        metavar="X",
        help="decoder guidance, 1 is off (the model's)",
    )


def _add_generate(commands) -> None:
    parser = _add_command(commands, "generate", "generate one or more images from a prompt")
    parser.add_argument("prompt", help='what to generate, such as "a cat"; or a class')
    parser.add_argument("--output", required=True, metavar="FILE", help="image file; several are numbered: cat-1.png")
    parser.add_argument("--max-tokens", type=positive_int, metavar="N", help="maximum number of tokens (all)")
    parser.add_argument("--num-images", type=positive_int, default=1, metavar="N", help="number of images (1)")
    parser.add_argument("--image", metavar="PHOTO", help="photo to vary")
    parser.add_argument("--keep-tokens", type=positive_int, metavar="K", help="keep the first K tokens of PHOTO")
    _add_size(parser, of_photos=False)
    _add_prior(parser)
    _add_decoding(parser)
    _add_shared(parser)


def _add_stream(commands) -> None:
    parser = _add_command(commands, "stream", "show an image while its tokens are being generated")
    parser.add_argument("prompt", help='what to generate, such as "a cat"; or a class')
    parser.add_argument(
        "--output", required=True, metavar="FILE", help=".webp or .gif: one animation; others: cat-04.png, ..."
    )
    parser.add_argument(
        "--token-counts", type=positive_int, nargs="+", metavar="N", help="counts to show, increasing (1 2 4 ... all)"
    )
    _add_size(parser, of_photos=False)
    parser.add_argument(
        "--frame-ms", type=positive_int, metavar="N", help="milliseconds per frame of an animation (700)"
    )
    _add_prior(parser)
    _add_decoding(parser)
    _add_shared(parser)


def _add_prior(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prior-guidance-scale",
        type=non_negative_float,
        metavar="X",
        help="prior guidance, 1 is off (the model's)",
    )
    parser.add_argument(
        "--temperature", type=positive_float, default=1.0, metavar="X", help="higher values vary more (1)"
    )
    parser.add_argument(
        "--top-k", type=non_negative_int, default=0, metavar="N", help="sample from the top N codes, 0 is off (0)"
    )
    parser.add_argument(
        "--top-p", type=probability, default=1.0, metavar="P", help="sample from the top probability mass P (1)"
    )


def _add_tokenize(commands) -> None:
    parser = _add_command(commands, "tokenize", "turn photos into token ids")
    parser.add_argument(
        "photos", nargs="+", metavar="PHOTO", help="image files, transparency becomes white; or folders of them"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON file for the ids")
    parser.add_argument("--max-tokens", type=positive_int, metavar="N", help="maximum number of tokens (all)")
    _add_size(parser, of_photos=True)
    _add_shared(parser, has_seed=False)


def _add_detokenize(commands) -> None:
    parser = _add_command(commands, "detokenize", "turn token ids back into images")
    parser.add_argument("ids", metavar="IDS", help="JSON file from `flextok tokenize`, or a plain list of ids")
    parser.add_argument("--output", required=True, metavar="FILE", help="image file; several are numbered: cat-1.png")
    parser.add_argument("--max-tokens", type=positive_int, metavar="N", help="use only the first N tokens (all)")
    parser.add_argument("--size", type=size, metavar="SIZE", help="a side, or HxW (as in IDS, or the square)")
    _add_decoding(parser)
    _add_shared(parser)


def _add_reconstruct(commands) -> None:
    parser = _add_command(commands, "reconstruct", "reconstruct photos from increasing numbers of tokens")
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="image files of any size, or folders; one row each")
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="image file for the contact sheet; or a new folder, a sheet each",
    )
    parser.add_argument(
        "--max-tokens",
        type=positive_int,
        nargs="+",
        metavar="N",
        help="token counts, one column each (1 2 4 ... all)",
    )
    _add_size(parser, of_photos=True)
    _add_decoding(parser)
    _add_shared(parser)


def _add_demo(commands) -> None:
    parser = _add_command(commands, "demo", "serve a demo in the browser (needs the extra flextok_hf[demo])")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="NAME", help="0.0.0.0 allows other machines (127.0.0.1)"
    )
    parser.add_argument("--port", type=port, default=7860, metavar="N", help="port to listen on (7860)")
    parser.add_argument("--share", action="store_true", help="a public address for a week, through Gradio's servers")
    _add_shared(parser, has_seed=False)


def _add_convert(commands) -> None:
    parser = _add_command(commands, "convert", "convert official checkpoints to a model of this package")
    parser.add_argument("tokenizer", nargs="?", metavar="TOKENIZER", help="Hub id, folder or safetensors file")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to create")
    parser.add_argument("--prior", metavar="PRIOR", help="Hub id, folder or safetensors file; also on its own")
    parser.add_argument("--text-encoder", metavar="NAME", help="Hub id or folder (the prior's own)")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the tokenizer on the Hub")
    parser.add_argument("--prior-revision", metavar="NAME", help="the same for the prior")
    parser.add_argument("--dtype", metavar="TYPE", choices=DTYPES, help="float32, bfloat16, float16 (as stored)")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="KEY", help="ignore a setting: --ignore pipeline.new_key"
    )
    _add_verbosity(parser)


def _add_info(commands) -> None:
    parser = _add_command(commands, "info", "describe a model: components, sizes, resolution, codebook")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    lists = parser.add_mutually_exclusive_group()
    lists.add_argument("--models", action="store_true", help="list the models known by name instead")
    lists.add_argument("--machine", action="store_true", help="list the fastest ways to compute on this machine")
    lists.add_argument("--names", action="store_true", help="list names, classes and words the model knows instead")
    _add_shared(parser, has_seed=False)
