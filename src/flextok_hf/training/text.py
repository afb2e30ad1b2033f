"""A small text encoder with its own tokenizer, for priors that are trained without a pretrained one."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel


PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def train_text_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE tokenizer (Sennrich et al., 2016, https://arxiv.org/abs/1508.07909) from captions.

    Upper and lower case are the same to it. Each text ends with an end token, so that the empty prompt is not empty.

    Args:
        captions: texts to learn from.
        vocab_size: most pieces, special ones included; at least 259.
        max_length: longest text in pieces; longer ones are cut.
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
    """Make a fresh T5 encoder (Raffel et al., 2020, https://arxiv.org/abs/1910.10683) for a tokenizer's pieces."""
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
