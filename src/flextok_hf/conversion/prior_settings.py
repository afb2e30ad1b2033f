"""Settings of an official prior -> our configuration, and the text encoder to use.

What the tensors reveal, such as the width of the feed-forward layers, is read from them. What they do not, such as
heads and the kind of normalization, must be in the configuration. Unsupported settings are refused by name.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from .components import check_shape
from .settings import Section, shorten
from .source import Weights


L3M = "l3m.model"
OWN = "flextok_ar.model"
IMAGE_PREFIX, TEXT_PREFIX = "models.ar_image_model.", "models.text_encoder.mlp."
BLOCKS_PREFIX = f"{IMAGE_PREFIX}trunk.blocks."
DEFAULT_TEXT_ENCODER = "google/flan-t5-xl"

NORMS = {
    f"{L3M}.layers.normalization.RMSNorm": ("rms_norm", 1e-6),
    f"{L3M}.layers.normalization.LayerNorm": ("layer_norm", None),
    "torch.nn.RMSNorm": ("rms_norm", None),
    "torch.nn.LayerNorm": ("layer_norm", 1e-5),
}
# (class, `approximate` of a GELU) -> name in Transformers
ACTIVATIONS = {
    ("torch.nn.GELU", "tanh"): "gelu_pytorch_tanh",
    ("torch.nn.GELU", "none"): "gelu",
    ("torch.nn.SiLU", None): "silu",
    ("torch.nn.ReLU", None): "relu",
}
SELF_ATTENTIONS = tuple(
    f"{L3M}.layers.attention.{name}" for name in ("EfficientAttention", "GenericAttention", "HFAttention")
)
HEAD = f"{L3M}.heads.classifier.LinearClassifier"


@dataclass(frozen=True)
class TextSettings:
    """The text encoder of a prior (the value `reference` of the setting `where`), and the maximum length of texts."""

    reference: str
    where: str
    max_length: int | None


@dataclass(frozen=True)
class PriorSettings:
    """What the configuration of an official prior says.

    config: arguments of `FlexTokPriorConfig`.
    text: of the text encoder; `None` for a prior without text.
    generation: sampling defaults of the official code.
    tokenizer: the tokenizer that the prior was trained with, if specified.
    """

    config: dict[str, Any]
    text: TextSettings | None
    generation: dict[str, Any]
    tokenizer: str | None


def read_prior_settings(settings: Section, weights: Weights) -> PriorSettings:
    """Read the configuration of an official prior, checked against the names and shapes of its tensors."""
    model = settings.section("model")
    model.skip("remove_image_tokenizer")
    container = model.section("meta_model")
    container.target(f"{L3M}.meta_models.InSeriesMetaModels")
    models = container.section("models")
    image_model = models.section("ar_image_model")
    image_model.target(f"{L3M}.meta_models.MetaModel")
    image_model.section("postprocessor").target("torch.nn.Identity")
    has_text = "text_encoder" in models

    trunk = read_trunk(image_model.section("trunk"), weights, has_text)
    width = trunk["hidden_size"]
    config = {**read_preprocessor(image_model.section("preprocessor"), width), **trunk}
    config.update(read_head(image_model.section("head"), weights, width, config["codebook_size"]))
    text = None
    config["text_hidden_size"] = None
    if has_text:
        text_encoder = models.section("text_encoder")
        text_encoder.target(f"{OWN}.text_encoder.T5EmbedderWithMLP")
        text = read_text_embedder(text_encoder.section("t5_embedder"))
        config.update(read_projector(text_encoder.section("mlp"), weights, width))
    config["use_bias"] = bool(layers_with_bias(weights))

    tokenizer = read_tokenizer_name(models)
    generation = settings.values.get("generation", {})
    settings.skip("generation", "decode")
    return PriorSettings(config, text, generation if isinstance(generation, dict) else {}, tokenizer)


def own_tensors(weights: Weights) -> list[str]:
    """Return the names of the tensors that belong to the prior itself."""
    return [name for name in weights.shapes if name.startswith((IMAGE_PREFIX, TEXT_PREFIX))]


def read_tokenizer_name(models: Section) -> str | None:
    """Skip the settings of the image tokenizer, which has its own repository; return its name."""
    models.skip("image_tokenizer")
    values = models.values.get("image_tokenizer")
    name = values.get("model_id") if isinstance(values, dict) else None
    return name if isinstance(name, str) else None


def read_preprocessor(part: Section, width: int) -> dict[str, Any]:
    """Read the vocabulary size, the sequence length and the number of classes."""
    part.target(f"{OWN}.preprocessors.ARImageEmbedPreprocessor")
    part.expect("embed_dim", width)
    # each kind is stored as a table in the checkpoint, and read from there
    part.expect("pos_embed_type", "absolute", "sincos1d", "sincos2d")
    part.skip("init_style", "cond_dropout_prob")  # training only
    return {
        "codebook_size": part.count("codebook_size"),
        "max_position_embeddings": math.prod(part.counts("token_grid_size", 2)),
        "num_classes": part.count("num_classes", None),
    }


def read_trunk(trunk: Section, weights: Weights, has_text: bool) -> dict[str, Any]:
    """Read the transformer."""
    decoder, plain = f"{L3M}.trunks.transformer_decoder.TransformerDecoder", f"{L3M}.trunks.transformer.Transformer"
    trunk.target(decoder if has_text else plain)
    width, depth = trunk.count("embed_dim"), trunk.count("num_blocks")
    trunk.skip("mlp_ratio", "mlp_hidden_dim")  # the width of the feed-forward layers is read from the tensors
    feed_forward = trunk.section("ffn_target")
    feed_forward.target(f"{L3M}.layers.ffn.SwiGLUFFN")
    feed_forward.skip("multiple_of")
    norm_type, norm_eps = read_norm(trunk.section("norm_layer"))
    attention = trunk.section("self_attn_target" if has_text else "attn_target")
    config = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "intermediate_size": read_feed_forward_width(weights, width),
        "norm_type": norm_type,
        "norm_eps": norm_eps,
        "use_final_norm": trunk.flag("post_trunk_norm", False),
        **read_self_attention(attention, weights, width),
    }
    if has_text:
        cross = trunk.section("cross_attn_target")
        config["cross_qk_norm"] = read_cross_attention(cross, weights, config)
    of_trunk = {name for name in layers_with_bias(weights) if re.fullmatch(r"mlp\..*|\w*attn\.o?_?proj", name)}
    check_biases(trunk, "use_bias", True, of_trunk)
    return config


def read_feed_forward_width(weights: Weights, width: int) -> int:
    """Read the hidden width of the feed-forward layers from a tensor, since several settings can specify it."""
    name = f"{BLOCKS_PREFIX}0.mlp.fc1.weight"
    shape = weights.shapes.get(name, (0, 0))
    check_shape(weights, name, (shape[0] if shape else 0, width))
    return shape[0]


def read_self_attention(attention: Section, weights: Weights, width: int) -> dict[str, Any]:
    """Read the heads, the scale and the normalization of queries and keys."""
    name = attention.target(*SELF_ATTENTIONS)
    attention.expect("dim", width)
    attention.expect("is_causal", True, default=True)
    num_heads = attention.count("num_heads")
    if width % num_heads:
        raise ValueError(f"{attention.describe('num_heads')} is {num_heads}, which does not divide the width {width}.")
    config: dict[str, Any] = {"num_attention_heads": num_heads, "qk_norm": False}
    if name.endswith("EfficientAttention"):  # the only class that honors it
        config["attention_scale"] = attention.number("qk_scale", None)
    else:
        attention.expect("qk_scale", None, default=None)
    norm = read_qk_norm(attention)
    if norm is not None:
        config.update(qk_norm=True, qk_norm_type=norm[0], qk_norm_eps=norm[1])
    of_attention = re.compile(r"(self_)?attn\.(qkv|[qkv]_proj)")
    check_biases(attention, "qkv_bias", False, set(filter(of_attention.fullmatch, layers_with_bias(weights))))
    return config


def read_cross_attention(attention: Section, weights: Weights, config: dict[str, Any]) -> bool:
    """Read the cross-attention to the text; returns whether its queries and keys are normalized."""
    attention.target(f"{OWN}.attention.GeneralizedAttentionWithMask")
    attention.expect("dim", config["hidden_size"])
    attention.expect("encoder_dim", config["hidden_size"], default=config["hidden_size"])
    attention.expect("num_heads", config["num_attention_heads"])
    attention.expect("qk_scale", None, default=None)
    attention.expect("is_causal", False, default=False)
    norm = read_qk_norm(attention)
    if norm is not None and config["qk_norm"] and norm != (config["qk_norm_type"], config["qk_norm_eps"]):
        raise ValueError(
            f"{attention.describe('qk_norm')} differs from that of self-attention; both must be the same."
        )
    if norm is not None:
        config.update(qk_norm_type=norm[0], qk_norm_eps=norm[1])
    of_attention = {name for name in layers_with_bias(weights) if name.startswith("cross_attn.W")}
    check_biases(attention, "qkv_bias", False, of_attention)
    return norm is not None


def read_norm(part: Section) -> tuple[str, float]:
    """Read the kind and the epsilon of a normalization."""
    kind, default_eps = NORMS[part.target(*NORMS)]
    part.expect("elementwise_affine", True, default=True)
    if kind == "layer_norm":
        part.expect("bias", True, default=True)
    return kind, part.number("eps") if default_eps is None else part.number("eps", default_eps)


def read_qk_norm(attention: Section) -> tuple[str, float] | None:
    """Read the per-head normalization of queries and keys, if there is one."""
    if not attention.values.get("qk_norm"):  # null, false or missing
        attention.skip("qk_norm")
        return None
    return read_norm(attention.section("qk_norm"))


def read_head(head: Section, weights: Weights, width: int, codebook_size: int) -> dict[str, Any]:
    """Read the output layer."""
    head.target(HEAD)
    head.expect("in_features", width)
    head.expect("out_features", codebook_size)
    of_head = {name for name in layers_with_bias(weights) if name.startswith(f"{IMAGE_PREFIX}head.")}
    check_biases(head, "use_bias", True, of_head)
    return {"use_head_norm": head.flag("use_layernorm", False)}


def read_text_embedder(embedder: Section) -> TextSettings:
    """Read which text encoder is used, and the maximum length of texts."""
    embedder.target(f"{OWN}.text_encoder.T5Embedder")
    embedder.skip("decoder_seqlen", "cond_dropout_p")  # a mask size, which follows from the tokens; training only
    return TextSettings(
        reference=embedder.text("hf_hub_path", DEFAULT_TEXT_ENCODER),
        where=embedder.describe("hf_hub_path"),
        max_length=embedder.count("encoder_seqlen_max", None),
    )


def read_projector(mlp: Section, weights: Weights, width: int) -> dict[str, Any]:
    """Read the layers that project text states to the width of the prior."""
    mlp.target(f"{OWN}.text_encoder.TextToEmbedMLP")
    mlp.expect("embed_dim", width)
    check_biases(mlp, "use_bias", False, {name for name in layers_with_bias(weights) if name.startswith(TEXT_PREFIX)})
    activation = mlp.section("act_layer")
    kind = activation.target(*dict.fromkeys(name for name, _ in ACTIVATIONS))
    approximate = activation.text("approximate", "none") if kind == "torch.nn.GELU" else None
    activation.skip("inplace")
    if (kind, approximate) not in ACTIVATIONS:
        raise ValueError(f"{activation.describe('approximate')} is {shorten(approximate)}; it must be none or tanh.")
    return {"text_hidden_size": mlp.count("text_dim"), "projector_activation": ACTIVATIONS[kind, approximate]}


def layers_with(weights: Weights, kind: str) -> set[str]:
    """Return the layers with a tensor of this kind: `mlp.fc1` if it is in any block, full names outside blocks."""
    names = [name.removesuffix(f".{kind}") for name in own_tensors(weights) if name.endswith(f".{kind}")]
    return {re.sub(rf"^{re.escape(BLOCKS_PREFIX)}\d+\.", "", name) for name in names}


def layers_with_bias(weights: Weights) -> set[str]:
    """Return the layers other than normalizations that have a bias, named as in `layers_with`."""
    return {name for name in layers_with(weights, "bias") if "norm" not in name}


def check_biases(part: Section, name: str, default: bool, found: set[str]) -> None:
    """Refuse a checkpoint whose biases contradict its configuration.

    Args:
        part: the section with the setting.
        name: of the setting.
        default: its value where it is missing.
        found: the layers under this setting that have a bias.
    """
    says = part.flag(name, default)
    if says != bool(found):
        state = f"its tensors have them in {', '.join(sorted(found))}" if found else "its tensors have none"
        raise ValueError(f"{part.describe(name)} says {'biases' if says else 'no biases'}, but {state}.")
