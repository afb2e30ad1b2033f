"""A small text encoder with its own tokenizer, for priors trained without a pretrained one."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel


PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def train_text_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (Sennrich et al., 2016, https://arxiv.org/abs/1508.07909) from captions.

    It is case-insensitive and appends an end token to each text, so that even the empty prompt has one token.

    Args:
        captions: texts to train on.
        vocab_size: maximum vocabulary size, special tokens included; at least 259.
        max_length: maximum text length in tokens; longer texts are truncated.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    end_id = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end_id)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_text_encoder(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int, dropout: float
) -> T5EncoderModel:
    """Build a new T5 encoder (Raffel et al., 2020, https://arxiv.org/abs/1910.10683) for a tokenizer's vocabulary."""
    head_dim = 32
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=hidden_size,
            d_kv=head_dim,
            num_heads=max(1, hidden_size // head_dim),
            d_ff=2 * hidden_size,
            num_layers=num_layers,
            feed_forward_proj="gated-gelu",
            dropout_rate=dropout,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
