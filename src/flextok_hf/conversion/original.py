"""Open and check official checkpoints: the models they hold, their defaults, and where they came from."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging

from ..models.saved_model import named_errors
from .components import Component
from .prior import Prior, read_prior
from .prior_settings import TextSettings
from .source import DTYPES, Checkpoint, open_checkpoint
from .text_encoder import load_text_encoder
from .tokenizer import Tokenizer, read_tokenizer


# Official sampling defaults that our pipeline shares; guidance scales are saved with the pipeline instead
SAMPLING_DEFAULTS = {
    "sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 0.0,
    "num_samples": 1,
    "timesteps": 25,
    "tokenizer_perform_norm_guidance": True,
}

logger = logging.get_logger(__name__)


@dataclass
class Original:
    """Official checkpoints, read except for the tensor values.

    components: models, by their names in the pipeline.
    others: already loaded: text encoder and text tokenizer.
    defaults: guidance scales to save with the pipeline.
    text: the text encoder of the prior, if it takes text.
    record: where everything came from, and settings that our configurations have no field for.
    notes: what differs from the official code, for the user.
    """

    components: dict[str, Component] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, float] = field(default_factory=dict)
    text: TextSettings | None = None
    record: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def pipeline_arguments(self, models: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of `FlexTokPipeline`, with `models` under the names of `components`."""
        return {"scheduler": FlowMatchEulerDiscreteScheduler(), **models, **self.others, **self.defaults}


def load_original(
    tokenizer: str | os.PathLike,
    prior: str | os.PathLike | None = None,
    text_encoder: str | os.PathLike | None = None,
    dtype: torch.dtype | None = torch.float32,
    **options: Any,
) -> dict[str, Any]:
    """Load official checkpoints and return the arguments of `FlexTokPipeline` (see its `from_original`)."""
    with named_errors(f"the checkpoint {str(tokenizer)!r}" + f" or its prior {str(prior)!r}" * bool(prior), ""):
        original = read_original(tokenizer, prior, text_encoder, dtype=dtype, **options)
        for note in original.notes:
            logger.warning(note)
        return original.pipeline_arguments({name: one.load(dtype) for name, one in original.components.items()})


def read_original(
    tokenizer: str | os.PathLike | None,
    prior: str | os.PathLike | None,
    text_encoder: str | os.PathLike | None,
    dtype: torch.dtype | None,
    revision: str | None = None,
    prior_revision: str | None = None,
    ignore: Sequence[str] = (),
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Original:
    """Open and check official checkpoints; no tensor values are read yet, except those of a text encoder."""
    if dtype not in (None, *DTYPES.values()):
        raise ValueError(f"`dtype` must be {', '.join(map(str, DTYPES.values()))} or None, got {dtype!r}.")
    original = Original()
    hub_options = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    if tokenizer is None and prior is None:
        raise ValueError("Pass `tokenizer`, `prior`, or both.")
    if tokenizer is not None:
        checkpoint = open_checkpoint(tokenizer, "tokenizer", ignore, revision=revision, **hub_options)
        add_tokenizer(original, checkpoint, read_tokenizer(checkpoint, **hub_options))
    elif revision is not None:
        raise ValueError("`revision` is for a tokenizer. For a prior, pass `prior_revision`.")
    if prior is None:
        if text_encoder is not None or prior_revision is not None:
            raise ValueError("`text_encoder` and `prior_revision` need a prior. Pass one as `prior`.")
        return original
    checkpoint = open_checkpoint(prior, "prior", ignore, revision=prior_revision, **hub_options)
    add_prior(original, checkpoint, read_prior(checkpoint))
    if original.text is None and text_encoder is not None:
        raise ValueError(f"{str(prior)!r} does not take text. Leave out `text_encoder`.")
    if original.text is not None and tokenizer is not None:  # a prior on its own is saved without its text encoder
        width = original.components["prior"].model.config.text_hidden_size
        original.others["text_encoder"], original.others["tokenizer"] = load_text_encoder(
            text_encoder, original.text, checkpoint, width, dtype, **hub_options
        )
    return original


def add_tokenizer(original: Original, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Add encoder, decoder and VAE."""
    original.components.update(tokenizer.components)
    original.notes += tokenizer.notes
    original.record["tokenizer"] = {**origin(checkpoint), "training": tokenizer.training}


def add_prior(original: Original, checkpoint: Checkpoint, prior: Prior) -> None:
    """Add a prior; its tokens must be those of the tokenizer."""
    settings, model = prior.settings, prior.component.model
    if "encoder" in original.components:
        encoder = original.components["encoder"].model
        ours = (encoder.quantizer.codebook_size, encoder.config.num_registers)
        theirs = (model.config.codebook_size, model.config.max_position_embeddings)
        if ours != theirs:
            raise ValueError(
                f"{checkpoint.name!r} generates {theirs[1]} tokens of {theirs[0]} codes, but the tokenizer has"
                f" {ours[1]} tokens of {ours[0]} codes. They do not match."
            )
    original.components["prior"], original.text = prior.component, settings.text
    original.record["prior"] = {**origin(checkpoint), "generation": settings.generation}
    if settings.text is not None:
        original.record["prior"]["text_encoder"] = settings.text.reference
    if settings.tokenizer is not None:
        original.record["prior"]["tokenizer"] = settings.tokenizer
        source = original.record.get("tokenizer", {}).get("source", settings.tokenizer)
        if source != settings.tokenizer:
            original.notes.append(
                f"The prior was trained with the tokenizer {settings.tokenizer!r}; its tokens are meaningless to any"
                f" other. Here it is {source!r}."
            )
    names = {"default_prior_guidance_scale": "cfg_factor", "default_guidance_scale": "tokenizer_cfg_factor"}
    for name, key in names.items():
        value = settings.generation.get(key, "missing")
        value = 1.0 if value is None else value  # null means no guidance
        if isinstance(value, int | float) and not isinstance(value, bool):
            original.defaults[name] = float(value)
    sampling = {key: settings.generation.get(key, value) for key, value in SAMPLING_DEFAULTS.items()}
    changed = {key: value for key, value in sampling.items() if value != SAMPLING_DEFAULTS[key]}
    if changed:
        original.notes.append(f"The official code samples with {changed} by default; here, pass them in each call.")


def origin(checkpoint: Checkpoint) -> dict[str, str]:
    """Return where a checkpoint came from, without local paths."""
    if checkpoint.is_local:
        return {"source": checkpoint.folder.resolve().name}
    return {"source": checkpoint.name, "commit": checkpoint.folder.name}
