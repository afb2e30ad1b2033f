"""Opening the model of a command, and what commands print about their work."""

import argparse

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from ..pipelines.loading import load_pipeline
from ..pipelines.pipeline_flextok import FlexTokPipeline


def open_pipeline(options: argparse.Namespace) -> FlexTokPipeline:
    """Load the pipeline in the options onto their device."""
    set_verbosity(options)
    pipe = load_pipeline(
        options.model, options.device, getattr(torch, options.dtype), getattr(options, "decoder", None)
    )
    if getattr(options, "adapter", None) is not None:
        pipe.load_lora_weights(options.adapter)
    return pipe


def set_verbosity(options: argparse.Namespace) -> None:
    """Hide the loading bars of the libraries, and with `--quiet` also their warnings."""
    if options.quiet:
        diffusers_logging.set_verbosity_error()
        transformers_logging.set_verbosity_error()
    # Their loading bars would distract from the bars that show how long the work takes.
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def report(options: argparse.Namespace, line: str) -> None:
    """Print one line about a result, unless `--quiet` is set."""
    if not options.quiet:
        print(line)
