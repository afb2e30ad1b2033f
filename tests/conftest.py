"""Shared fixtures: the tiny models of `tiny_models.py`, and checkpoints to corrupt."""

import os
from collections.abc import Callable

import pytest
import torch
from refusals import place, prior, text_prior, tokenizer, tokenizer_file  # noqa: F401, fixtures
from tiny_models import make_class_pipeline, make_decoder, make_encoder, make_pipeline, make_text_pipeline

from flextok_hf.models.modeling_decoder import FlexTokFlowDecoder
from flextok_hf.models.modeling_encoder import FlexTokEncoder
from flextok_hf.pipelines.pipeline_flextok import FlexTokPipeline
from flextok_hf.utils import tuning


torch.set_num_threads(1)
os.environ["FLEXTOK_TUNING"] = "off"  # bit-equal results between processes; also in those that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first, so that no worker ends alone with one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def take(monkeypatch, tmp_path) -> Callable[[str, str | None], None]:
    """Returns a function that sets the way of a kind of choice, such as "product"; with `None`, timing decides."""
    monkeypatch.setenv("FLEXTOK_TUNING", "on")
    monkeypatch.setattr(tuning, "cache_file", lambda: tmp_path / "times.json")
    for name in ("measured", "forced"):
        monkeypatch.setattr(tuning, name, {})
    tuning.stored.cache_clear()
    yield lambda kind, way: tuning.forced.__setitem__(kind, way)
    tuning.stored.cache_clear()


@pytest.fixture
def tiny_encoder() -> FlexTokEncoder:
    return make_encoder()


@pytest.fixture
def tiny_decoder() -> FlexTokFlowDecoder:
    return make_decoder()


@pytest.fixture(scope="session")
def tiny_pipeline() -> FlexTokPipeline:
    """Text-conditional. Shared by all tests: do not modify it."""
    return make_text_pipeline()


@pytest.fixture(scope="session")
def tiny_class_pipeline() -> FlexTokPipeline:
    """Class-conditional with three classes. Shared by all tests: do not modify it."""
    return make_class_pipeline()


@pytest.fixture(scope="session")
def named_class_pipeline() -> FlexTokPipeline:
    """The same with class names. Shared by all tests: do not modify it."""
    pipe = make_class_pipeline()
    pipe.prior.config.id2label = {0: "cat", 1: "dog", 2: "red panda"}
    return pipe


@pytest.fixture(scope="session")
def tiny_tokenizer_pipeline() -> FlexTokPipeline:
    """Tokenizer without a prior. Shared by all tests: do not modify it."""
    return make_pipeline()
