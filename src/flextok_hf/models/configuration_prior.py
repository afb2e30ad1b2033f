"""Configuration of the autoregressive prior."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from ..utils.words import MAX_CHARACTERS, MAX_WORDS, is_word


NORM_TYPES = ("rms_norm", "layer_norm")


@strict
class FlexTokPriorConfig(PreTrainedConfig):
    """Configuration of `FlexTokPriorForCausalLM`; defaults to the smallest published model, FlexAR-113M-T2I.

    Args:
        codebook_size (`int`): number of token ids, the tokenizer's codebook size; also called `vocab_size`.
        hidden_size (`int`): width; a multiple of `num_attention_heads`.
        num_hidden_layers (`int`): number of blocks.
        num_attention_heads (`int`): heads of self-attention and cross-attention.
        intermediate_size (`int`): inner width of the gated feed-forward layers.
        max_position_embeddings (`int`): maximum number of tokens per image, the tokenizer's `num_registers`.
        norm_type (`str`): "rms_norm" (scale) or "layer_norm" (scale and shift), applied before every layer.
        norm_eps (`float`): added to the mean square or variance in every normalization; also called `rms_norm_eps`.
        use_final_norm (`bool`): normalize after the last block.
        use_head_norm (`bool`): normalize again before the output layer, always with a layer norm.
        use_bias (`bool`): give every linear layer a bias.
        qk_norm (`bool`): normalize queries and keys per head in self-attention.
        cross_qk_norm (`bool`): the same in cross-attention.
        qk_norm_type (`str`): type of both query-key norms; `None` means `norm_type`.
        qk_norm_eps (`float`): epsilon of both; `None` means `norm_eps`.
        attention_scale (`float`): factor on the self-attention logits; `None` means 1 / sqrt(head size).
        text_hidden_size (`int`): width of the text encoder's hidden states; `None` for a model without text.
        projector_activation (`str`): activation between the two layers that project text to `hidden_size`.
        num_classes (`int`): number of classes; `None` for a model without classes.
        shape_conditioning (`bool`): whether the start token comes with the size and proportions of the image, as two
            numbers (`shape_features`); off in the published models.
        dropout (`float`): dropout probability on each residual update; 0 in the published models.
        initializer_range (`float`): standard deviation of newly initialized weights.
        bos_token_id (`int`): id of the start token, always `codebook_size`: the first id that is not a code.
        eos_token_id (`int`): code that ends a sequence, for models trained with one; `None` in the published models.
        pad_token_id (`int`): code that fills a row after its end; `None` means `eos_token_id`.
        use_cache (`bool`): return keys and values by default, except in training.
        tie_word_embeddings (`bool`): always False: the embedding has one more row than the output layer.
        known_names (`list[str]`): short captions that the model was trained on, without articles, to show to users.
        known_words (`list[str]`): words of all its captions, the most frequent first; the pipeline warns of others.
    """

    model_type = "flextok_prior"
    attribute_map = {"vocab_size": "codebook_size", "rms_norm_eps": "norm_eps"}
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    codebook_size: int = 64000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 2048
    max_position_embeddings: int = 256
    norm_type: str = "rms_norm"
    norm_eps: float = 1e-6
    use_final_norm: bool = True
    use_head_norm: bool = False
    use_bias: bool = False
    qk_norm: bool = False
    cross_qk_norm: bool = False
    qk_norm_type: str | None = None
    qk_norm_eps: float | None = None
    attention_scale: float | None = None
    text_hidden_size: int | None = 2048
    projector_activation: str = "gelu_pytorch_tanh"
    num_classes: int | None = None
    shape_conditioning: bool = False
    dropout: float = 0.0
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    known_names: list[str] | None = None
    known_words: list[str] | None = None

    def __post_init__(self, **kwargs):
        if self.bos_token_id is None:
            self.bos_token_id = self.codebook_size
        super().__post_init__(**kwargs)

    def validate_sizes(self):
        """Raise an error if a size is not 1 or more, or the heads do not share the width equally."""
        counts = ["codebook_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
        counts += ["max_position_embeddings", "text_hidden_size", "num_classes"]
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {value}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads`"
                f" ({self.num_attention_heads})."
            )

    def validate_architecture(self):
        """Raise an error if another value is out of its range."""
        for name in ("norm_type", "qk_norm_type"):
            value = getattr(self, name)
            if value not in NORM_TYPES and not (value is None and name == "qk_norm_type"):
                raise ValueError(f"`{name}` must be one of {', '.join(NORM_TYPES)}, got {value!r}.")
        if self.projector_activation not in ACT2FN:
            raise ValueError(
                f"`projector_activation` is {self.projector_activation!r}, which Transformers does not know. Use one"
                f" of {sorted(ACT2FN)}."
            )
        for name in ("norm_eps", "qk_norm_eps", "initializer_range", "attention_scale"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"`{name}` must be a finite number of 0 or more, got {value}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"`dropout` must lie in [0, 1), got {self.dropout}.")
        for name in ("known_names", "known_words"):
            texts = getattr(self, name) or []
            wrong = next((text for text in texts if not is_word(text)), None)
            if len(texts) > MAX_WORDS or wrong is not None:
                raise ValueError(
                    f"`{name}` must hold at most {MAX_WORDS:,} texts of 1 to {MAX_CHARACTERS} characters that can be"
                    f" printed, got {len(texts):,}" + ("." if wrong is None else f", such as {wrong[:80]!r}.")
                )
        if self.tie_word_embeddings:
            raise ValueError("`tie_word_embeddings` must be False: only the embedding has a start row.")

    def validate_token_ids(self):
        """Raise an error if `bos_token_id` is not the first id after the codes.

        Replaces Transformers' check, which expects every special token to be in the output vocabulary.
        """
        if self.bos_token_id != self.codebook_size:
            raise ValueError(
                f"`bos_token_id` is {self.bos_token_id}, but the start vector is row `codebook_size`"
                f" ({self.codebook_size}) of the embedding. Leave `bos_token_id` out."
            )
        for name in ("eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.codebook_size:
                raise ValueError(f"`{name}` is {value}, but it must be a code in [0, {self.codebook_size}) or None.")
