"""Transformers' common model tests, run on tiny configurations of our classes.

Not collected by `make test`: `make peer-tests` puts this file beside the library's own tests, which it imports.
"""

import unittest

import torch
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin

import flextok_hf
from flextok_hf.models.configuration_encoder import FlexTokEncoderConfig
from flextok_hf.models.configuration_prior import FlexTokPriorConfig


BATCH, TEXT_LENGTH, TEXT_SIZE = 3, 4, 24
ENCODER = {
    "in_channels": 3,
    "patch_size": 4,
    "grid_size": 4,
    "hidden_size": 32,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "num_registers": 6,
    "fsq_levels": [5, 3],
}
PRIOR = {
    "codebook_size": 15,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,  # the library's prompts are longer than an image has tokens
}


class EncoderTester:
    """Configuration and inputs of an encoder: 16 x 16 latents, 16 patches, 6 registers."""

    config_class = FlexTokEncoderConfig
    batch_size, is_training = BATCH, False  # the loss is the decoder's
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 2
    seq_length = 16 + 6  # patches and registers

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self) -> FlexTokEncoderConfig:
        return self.config_class(**ENCODER)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"latents": torch.randn(BATCH, 3, 16, 16)}


class PriorTester:
    """Configuration and inputs of a prior without a condition, with classes, or with text."""

    config_class = FlexTokPriorConfig
    batch_size, seq_length, is_training = BATCH, 7, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 2

    def __init__(self, parent: unittest.TestCase, **condition):
        self.parent, self.condition = parent, condition
        self.causal_lm_class = flextok_hf.FlexTokPriorForCausalLM

    def get_config(self) -> FlexTokPriorConfig:
        return self.config_class(**PRIOR, **self.condition)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = torch.randint(config.codebook_size, (BATCH, self.seq_length))
        input_ids[:, 0] = config.bos_token_id
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if config.num_classes is not None:
            inputs["class_labels"] = torch.arange(BATCH)
        if config.text_hidden_size is not None:
            inputs["encoder_hidden_states"] = torch.randn(BATCH, TEXT_LENGTH, TEXT_SIZE)
        return config, inputs


class EncoderLibraryTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (flextok_hf.FlexTokEncoder,)
    test_resize_embeddings = False  # it has no vocabulary

    def setUp(self):
        self.model_tester = EncoderTester(self)
        self.config_tester = ConfigTester(self, FlexTokEncoderConfig, has_text_modality=False, **ENCODER)

    def test_config(self):
        self.config_tester.run_common_tests()


class PriorLibraryTests(ModelTesterMixin, TrainingTesterMixin):
    all_model_classes = (flextok_hf.FlexTokPriorForCausalLM,)
    test_resize_embeddings = False  # the vocabulary is the codebook; refused by name
    model_tester = None  # replaces the abstract property
    condition: dict = {}

    def setUp(self):
        self.model_tester = PriorTester(self, **self.condition)
        self.config_tester = ConfigTester(self, FlexTokPriorConfig, **PRIOR)

    def test_config(self):
        self.config_tester.run_common_tests()


class UnconditionalPriorLibraryTest(PriorLibraryTests, unittest.TestCase):
    condition = {"text_hidden_size": None}


class ClassPriorLibraryTest(PriorLibraryTests, unittest.TestCase):
    condition = {"num_classes": 10, "text_hidden_size": None}


class TextPriorLibraryTest(PriorLibraryTests, unittest.TestCase):
    condition = {"text_hidden_size": TEXT_SIZE}
