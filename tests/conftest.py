"""Shared fixtures: the tiny models of `tiny_models.py`, and checkpoints to corrupt."""

import pytest
import torch
from refusals import place, prior, text_prior, tokenizer, tokenizer_file  # noqa: F401, fixtures
from tiny_models import CAPTIONS, make_decoder, make_encoder, make_pipeline, make_prior

from flextok_hf.models.modeling_decoder import FlexTokFlowDecoder
from flextok_hf.models.modeling_encoder import FlexTokEncoder
from flextok_hf.pipelines.pipeline_flextok import FlexTokPipeline
from flextok_hf.training.text import build_text_encoder, train_text_tokenizer


torch.set_num_threads(1)


@pytest.fixture
def tiny_encoder() -> FlexTokEncoder:
    return make_encoder()


@pytest.fixture
def tiny_decoder() -> FlexTokFlowDecoder:
    return make_decoder()


@pytest.fixture(scope="session")
def tiny_pipeline() -> FlexTokPipeline:
    """Text-conditional. Shared by all tests: do not modify it."""
    text_tokenizer = train_text_tokenizer(CAPTIONS, vocab_size=300, max_length=24)
    torch.manual_seed(3)
    text_encoder = build_text_encoder(text_tokenizer, hidden_size=32, num_layers=1, dropout=0.0).eval()
    return make_pipeline(prior=make_prior(text_hidden_size=32), text_encoder=text_encoder, tokenizer=text_tokenizer)


@pytest.fixture(scope="session")
def tiny_class_pipeline() -> FlexTokPipeline:
    """Class-conditional with three classes. Shared by all tests: do not modify it."""
    return make_pipeline(prior=make_prior(text_hidden_size=None, num_classes=3))


@pytest.fixture(scope="session")
def named_class_pipeline() -> FlexTokPipeline:
    """The same with class names. Shared by all tests: do not modify it."""
    pipe = make_pipeline(prior=make_prior(text_hidden_size=None, num_classes=3))
    pipe.prior.config.id2label = {0: "cat", 1: "dog", 2: "red panda"}
    return pipe


@pytest.fixture(scope="session")
def tiny_tokenizer_pipeline() -> FlexTokPipeline:
    """Tokenizer without a prior. Shared by all tests: do not modify it."""
    return make_pipeline()
