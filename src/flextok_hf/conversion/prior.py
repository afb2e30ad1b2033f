"""Official prior -> `FlexTokPriorForCausalLM`, with the names of its tensors in official checkpoints."""

import re
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..models.configuration_prior import FlexTokPriorConfig
from ..models.modeling_prior import FlexTokPriorForCausalLM
from .components import Component, Recipe, build, check_nothing_left, check_num_blocks
from .prior_settings import BLOCKS_PREFIX, IMAGE_PREFIX, TEXT_PREFIX, PriorSettings, layers_with, read_prior_settings
from .source import Checkpoint, Weights


# Parts that have their own repositories, but may be in the file as well
OTHER_PREFIXES = ("models.text_encoder.t5_embedder.", "models.image_tokenizer.")

PREPROCESSOR = f"{IMAGE_PREFIX}preprocessor."
# Ours -> official layers, whose rows are concatenated; several choices where the official classes use different names
LAYERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "class_embedding": ((f"{PREPROCESSOR}cls_embedding",),),
    "text_projector.fc1": ((f"{TEXT_PREFIX}fc1",),),
    "text_projector.fc2": ((f"{TEXT_PREFIX}fc2",),),
    "norm": ((f"{IMAGE_PREFIX}trunk.post_trunk_norm",),),
    "head_norm": ((f"{IMAGE_PREFIX}head.norm",),),
    "head": ((f"{IMAGE_PREFIX}head.linear",), (f"{IMAGE_PREFIX}head.module",)),
}
# Names in priors with text. Without text, `self_attn` is called `attn`, and `norm_3` is `norm_2`.
BLOCK_LAYERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "self_attention_norm": (("norm_1",),),
    "self_attention.qkv_proj": (("self_attn.qkv",), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "self_attention.out_proj": (("self_attn.proj",), ("self_attn.o_proj",)),
    "self_attention.query_norm": (("self_attn.q_norm",),),
    "self_attention.key_norm": (("self_attn.k_norm",),),
    "cross_attention_norm": (("norm_2",),),
    "cross_attention.query_proj": (("cross_attn.Wq",),),
    "cross_attention.key_value_proj": (("cross_attn.Wk", "cross_attn.Wv"),),
    "cross_attention.out_proj": (("cross_attn.proj",),),
    "cross_attention.query_norm": (("cross_attn.q_norm",),),
    "cross_attention.key_norm": (("cross_attn.k_norm",),),
    "mlp_norm": (("norm_3",),),
    "mlp.gate_up_proj": (("mlp.fc1", "mlp.fc3"),),
    "mlp.down_proj": (("mlp.fc2",),),
}


def join(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors)


def append_start(embedding: Tensor, start: Tensor) -> Tensor:
    """Append the start vector (1, 1, D) to the embedding (V, D) as its last row."""
    return torch.cat([embedding, start[0]])


@dataclass(frozen=True)
class Prior:
    """An official prior, with its configuration read.

    component: the model.
    settings: from its configuration.
    """

    component: Component
    settings: PriorSettings


def read_prior(checkpoint: Checkpoint) -> Prior:
    """Read the configuration of an official prior and the names and shapes of its tensors, but no values.

    Args:
        checkpoint: the opened checkpoint.

    Raises:
        ValueError: if anything is missing, unknown or not supported; the message names it.
    """
    weights = checkpoint.weights
    if "encoder" in checkpoint.settings and "model" not in checkpoint.settings:
        raise ValueError(f"{checkpoint.name!r} is a tokenizer, not a prior. Pass it as the tokenizer.")
    settings = read_prior_settings(checkpoint.settings, weights)
    checkpoint.settings.close()
    check_num_blocks(weights, BLOCKS_PREFIX, settings.config["num_hidden_layers"])
    model = build(lambda: FlexTokPriorForCausalLM(FlexTokPriorConfig(**settings.config)), checkpoint.name)
    component = Component(model, make_recipes(model, weights), weights)
    component.check()
    check_nothing_left(weights, [component], lambda name: name.startswith(OTHER_PREFIXES))
    return Prior(component, settings)


def make_recipes(model: FlexTokPriorForCausalLM, weights: Weights) -> dict[str, Recipe]:
    """Map each tensor of the prior to official ones; layers without a bias in the checkpoint get zeros."""
    with_weight = layers_with(weights, "weight")
    groups_with_bias = {bias_group(name) for name in layers_with(weights, "bias")}
    embedding, start = f"{PREPROCESSOR}embedding.weight", f"{PREPROCESSOR}sos_token_embed"
    recipes = {
        "token_embedding.weight": Recipe((embedding, start), append_start),
        "position_embedding.weight": Recipe((f"{PREPROCESSOR}positional_embedding",)),
    }
    for name, tensor in model.state_dict().items():
        if name in recipes:
            continue
        layer, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", layer)
        choices = BLOCK_LAYERS[block[2]] if block else LAYERS[layer]
        if block and model.config.text_hidden_size is None:
            choices = tuple(tuple(map(name_without_text, names)) for names in choices)
        # take the choice with most names in the file; what it lacks is then reported as missing
        names = max(choices, key=lambda names: len(with_weight.intersection(names)))
        if kind == "bias" and "norm" not in layer and groups_with_bias.isdisjoint(map(bias_group, names)):
            recipes[name] = Recipe((), partial(torch.zeros, tensor.shape))
        else:
            prefix = f"{BLOCKS_PREFIX}{block[1]}." if block else ""
            recipes[name] = Recipe(tuple(f"{prefix}{one}.{kind}" for one in names), join)
    return recipes


def bias_group(name: str) -> str:
    """Return the common name of layers that either all have a bias or none: `mlp.fc` for `mlp.fc1` to `mlp.fc3`."""
    return name.rstrip("123qkv")


def name_without_text(name: str) -> str:
    """Return the name of a block's layer in models without text."""
    return {"norm_3": "norm_2"}.get(name, name.replace("self_attn.", "attn."))
