"""Tiny real models for all tests: 16 x 16 pixels without a VAE, 4 x 4 patches, 6 registers, 15 codes."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flextok_hf.models.configuration_encoder import FlexTokEncoderConfig
from flextok_hf.models.configuration_prior import FlexTokPriorConfig
from flextok_hf.models.modeling_decoder import FlexTokFlowDecoder
from flextok_hf.models.modeling_encoder import FlexTokEncoder
from flextok_hf.models.modeling_prior import FlexTokPriorForCausalLM
from flextok_hf.pipelines.pipeline_flextok import FlexTokPipeline
from flextok_hf.training.text import build_text_encoder, train_text_tokenizer


NUM_REGISTERS, FSQ_LEVELS, CODEBOOK_SIZE = 6, [5, 3], 15
SHAPES = {"in_channels": 3, "patch_size": 4, "grid_size": 4, "hidden_size": 32, "head_dim": 16}
CAPTIONS = ["a red circle", "a blue square on white", "a small green star", "two crosses, one above the other"]


def make_encoder(**changes) -> FlexTokEncoder:
    torch.manual_seed(0)
    config = {**SHAPES, "num_hidden_layers": 2, "num_registers": NUM_REGISTERS, "fsq_levels": FSQ_LEVELS, **changes}
    return FlexTokEncoder(FlexTokEncoderConfig(**config)).eval()


def make_decoder(**changes) -> FlexTokFlowDecoder:
    """Return a decoder whose output depends on all inputs; a freshly initialized one always predicts zero."""
    torch.manual_seed(1)
    config = {**SHAPES, "num_layers": 2, "num_registers": NUM_REGISTERS, "code_dim": len(FSQ_LEVELS), **changes}
    decoder = FlexTokFlowDecoder(**config).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
            elif parameter.std() < 0.03:  # learned vectors are initialized with a standard deviation of 0.02
                parameter.mul_(20)
    return decoder


def make_prior(**condition) -> FlexTokPriorForCausalLM:
    torch.manual_seed(2)
    config = FlexTokPriorConfig(
        codebook_size=CODEBOOK_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=NUM_REGISTERS,
        initializer_range=0.3,  # large enough that the condition affects the tokens
        **condition,
    )
    return FlexTokPriorForCausalLM(config).eval()


def make_text_pipeline() -> FlexTokPipeline:
    text_tokenizer = train_text_tokenizer(CAPTIONS, vocab_size=300, max_length=24)
    torch.manual_seed(3)
    text_encoder = build_text_encoder(text_tokenizer, hidden_size=32, num_layers=1, dropout=0.0).eval()
    return make_pipeline(prior=make_prior(text_hidden_size=32), text_encoder=text_encoder, tokenizer=text_tokenizer)


def make_class_pipeline() -> FlexTokPipeline:
    return make_pipeline(prior=make_prior(text_hidden_size=None, num_classes=3))


def make_pipeline(**components) -> FlexTokPipeline:
    decoder = components.pop("decoder", None) or make_decoder()
    pipe = FlexTokPipeline(make_encoder(), decoder, FlowMatchEulerDiscreteScheduler(), **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe
