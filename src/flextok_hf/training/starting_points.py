"""Training that starts from a trained model: what is loaded, and what of it is kept beside what is trained."""

import logging
import math
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.configuration_encoder import FlexTokEncoderConfig
from ..models.modeling_decoder import FlexTokFlowDecoder
from ..models.modeling_encoder import FlexTokEncoder
from ..models.modeling_prior import FlexTokPriorForCausalLM
from ..pipelines.loading import use_flow_decoder
from ..pipelines.pipeline_flextok import FlexTokPipeline
from .arguments import PriorArguments, TokenizerArguments, check_shapes
from .setup import loading


logger = logging.getLogger(__name__)

REGISTERS = {"register_tokens", "register_positions"}  # of the encoder, of the decoder
GROWTH_SPREAD = 0.3  # of new registers around the last one, relative to that of all
PRIOR_PARTS = ("prior", "text_encoder", "tokenizer")


def size_options(encoder: FlexTokEncoder, decoder: FlexTokFlowDecoder) -> dict[str, Any]:
    """Return the options of `TokenizerArguments` that describe this encoder and decoder."""
    return {
        "token_layout": encoder.config.token_layout,
        "num_registers": encoder.config.num_registers,
        "fsq_levels": list(encoder.config.fsq_levels),
        "head_dim": encoder.config.head_dim,
        "encoder_hidden_size": encoder.config.hidden_size,
        "encoder_num_layers": encoder.config.num_hidden_layers,
        "encoder_patch_size": encoder.config.patch_size,
        "decoder_hidden_size": decoder.config.hidden_size,
        "decoder_num_layers": decoder.config.num_layers,
        "decoder_patch_size": decoder.config.patch_size,
        "remove_dropped": decoder.config.remove_dropped,
        "positions": decoder.config.positions,
        "shape_conditioning": decoder.config.shape_conditioning,
    }


def load_tokenizer(
    arguments: TokenizerArguments, vae: AutoencoderKL | None
) -> tuple[FlexTokPipeline, TokenizerArguments]:
    """Load the pipeline `pretrained_tokenizer`; `vae` replaces its VAE if given.

    It keeps its prior if the encoder is frozen, so that token ids stay. With `remove_dropped`, a decoder that was
    trained with mask tokens learns to work without them. With `positions` "stretch" and `shape_conditioning`, a
    tokenizer of squares learns other shapes; for squares nothing changes. With a larger `num_registers`, it learns
    longer sequences; the first tokens of an image stay.

    Returns:
        The pipeline, and the options with its resolution and sizes.

    Raises:
        ValueError: `resolution` differs from that of the tokenizer, it cannot grow to `num_registers`, `buckets` or
            `max_area` need other positions, or the decoder is distilled.
    """
    name = arguments.pretrained_tokenizer
    assert name is not None
    is_whole = arguments.freeze_encoder and not arguments.lora_rank
    pipe = load_whole("pretrained_tokenizer", name, **({} if is_whole else dict.fromkeys(PRIOR_PARTS)))
    if not arguments.freeze_encoder:
        logger.info("Training the encoder changes token ids, so a prior of %s is left out.", name)
    load_flow_decoder(pipe, name)
    if vae is not None:
        pipe.register_modules(vae=vae)
    check_resolution(arguments.resolution, name, pipe)
    if arguments.remove_dropped:
        pipe.decoder.register_to_config(remove_dropped=True)
    encoder, decoder = pipe.encoder, pipe.decoder
    changes: dict[str, Any] = {}
    if arguments.positions == "stretch":
        is_told = arguments.shape_conditioning or decoder.config.shape_conditioning
        changes = {"positions": "stretch", "shape_conditioning": is_told}
    if arguments.num_registers not in (None, pipe.num_registers):
        check_growth(arguments, pipe)
        changes["num_registers"] = arguments.num_registers
    if changes:
        config = FlexTokEncoderConfig.from_dict({**encoder.config.to_dict(), **changes})
        encoder = copy_weights(encoder, FlexTokEncoder(config))
        decoder = copy_weights(decoder, FlexTokFlowDecoder(**decoder_settings(decoder, **changes)))
        pipe.register_modules(encoder=encoder, decoder=decoder)
    sizes = size_options(pipe.encoder, pipe.decoder)
    arguments = replace(arguments, resolution=pipe.resolution, **sizes)
    check_shapes(arguments, pipe.decoder.config.positions)
    return pipe, arguments


def load_flow_decoder(pipe: FlexTokPipeline, name: str) -> None:
    """Replace a distilled decoder of the pipeline `pretrained_tokenizer` by the one that it learned from.

    Raises:
        ValueError: the pipeline does not have that.
    """
    try:
        is_replaced = use_flow_decoder(pipe, name)
    except ValueError as error:
        raise ValueError(
            f"`pretrained_tokenizer` {name!r} is distilled to few steps: its decoder predicts the mean velocity, which"
            " this stage does not train. Start from the model that it was distilled from, and distill it again."
        ) from error
    if is_replaced:
        logger.info("%s is distilled to few steps; training starts from its flow decoder.", name)


def check_resolution(resolution: int | None, name: str, pipe: FlexTokPipeline) -> None:
    """Raise a ValueError if the option `resolution` is set, and not to that of the pipeline `pretrained_tokenizer`."""
    if resolution not in (None, pipe.resolution):
        raise ValueError(
            f"`resolution` is {resolution}, but `pretrained_tokenizer` {name!r} works at {pipe.resolution} pixels."
            " Leave `resolution` out."
        )


def check_growth(arguments: TokenizerArguments, pipe: FlexTokPipeline) -> None:
    """Raise a ValueError if `num_registers` is not a length that the pipeline `pretrained_tokenizer` can grow to."""
    asked, own = arguments.num_registers, pipe.num_registers
    said = f"`num_registers` is {asked}, but `pretrained_tokenizer` {arguments.pretrained_tokenizer!r} has {own}"
    if pipe.encoder.config.token_layout == "grid":
        raise ValueError(f"{said}, one for each patch of its grid. Leave `num_registers` out.")
    if asked < own:
        raise ValueError(f"{said}: a tokenizer can only grow. Leave `num_registers` out, or pass more than {own}.")
    for name in ("freeze_encoder", "lora_rank"):
        if getattr(arguments, name):
            raise ValueError(
                f"{said}: new registers have to be learned, which `{name}` does not do. Leave `num_registers` out, or"
                f" `{name}`."
            )


def decoder_settings(decoder: FlexTokFlowDecoder, **changes: Any) -> dict[str, Any]:
    """Return the settings of a decoder with changes, as its constructor takes them.

    `from_config` would ignore changes of settings that the file of an older model does not mention.
    """
    return {name: value for name, value in decoder.config.items() if not name.startswith("_")} | changes


def load_whole(option: str, name: str, **components: Any) -> FlexTokPipeline:
    """Load a pipeline to train; adapters that it was saved with become part of its weights."""
    with loading(option, name):
        pipe = FlexTokPipeline.from_pretrained(name, **components)
    if pipe.get_active_adapters():
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe


def copy_weights(source: nn.Module, target: nn.Module) -> nn.Module:
    """Give a model the weights of one that may lack registers and the layers for shapes, and return it."""
    weights = source.state_dict()
    for name in REGISTERS & weights.keys():
        weights[name] = lengthened(weights[name], len(target.get_parameter(name)))
    left = target.load_state_dict(weights, strict=False)
    assert set(left.missing_keys) <= {"shape_proj.weight"} and not left.unexpected_keys
    return target


def lengthened(vectors: Tensor, length: int) -> Tensor:
    """Return (K, D) as (length, D): new rows begin near the last one, but not equal, or their tokens would be, too."""
    last, spread = vectors[-1], vectors.float().std()
    added = last + GROWTH_SPREAD * spread * torch.randn(length - len(vectors), len(last)).to(last)
    return torch.cat([vectors, added])


def load_prior(
    arguments: PriorArguments, config: FlexTokEncoderConfig, class_names: list[str] | None
) -> tuple[FlexTokPriorForCausalLM, PreTrainedModel | None, PreTrainedTokenizerBase | None, PriorArguments]:
    """Load the prior of `pretrained_prior` with its text encoder, which is frozen, and its text tokenizer.

    Args:
        arguments: options of the stage.
        config: of the tokenizer's encoder.
        class_names: of the training data, if it has classes.

    Returns:
        These, and the options with the sizes of the prior.

    Raises:
        ValueError: it has no prior, or one for other tokens, or for another kind of condition or other classes.
    """
    name = arguments.pretrained_prior
    assert name is not None
    source = load_whole("pretrained_prior", name)
    prior, said = source.prior, f"`pretrained_prior` {name!r}"
    if prior is None:
        raise ValueError(f"{said} has no prior. Pass a pipeline that generates images, or train one without it.")
    pairs = [
        ("codes", prior.config.codebook_size, math.prod(config.fsq_levels)),
        ("tokens per image", prior.config.max_position_embeddings, config.num_registers),
    ]
    for what, own, needed in pairs:
        if own != needed:
            raise ValueError(f"{said} is for {own} {what}, but `tokenizer` has {needed}. Pass those made together.")
    needs = "captions" if prior.config.num_classes is None else "classes"
    if (class_names is None) != (prior.config.num_classes is None):
        raise ValueError(f"{said} is conditioned on {needs}: set `{needs[:-1].removesuffix('e')}_column`.")
    if class_names is not None:
        known = [prior.config.id2label.get(index, str(index)) for index in range(prior.config.num_classes)]
        if len(class_names) != len(known) or (known != class_names and class_names[0] != "0"):
            raise ValueError(f"{said} has {len(known)} classes ({', '.join(known[:5])} ...), other than `train_data`.")
    text_encoder = source.text_encoder
    if text_encoder is not None:
        text_encoder.requires_grad_(False).eval()
    sizes = {
        "hidden_size": prior.config.hidden_size,
        "num_layers": prior.config.num_hidden_layers,
        "num_heads": prior.config.num_attention_heads,
        "qk_norm": prior.config.qk_norm,
        "dropout": prior.config.dropout,
    }
    return prior, text_encoder, source.tokenizer, replace(arguments, **sizes)
