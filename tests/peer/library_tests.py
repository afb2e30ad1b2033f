"""Transformers' common model tests, run on tiny configurations of our classes.

Not collected by `make test`: `make peer-tests` puts this file beside the library's own tests, which it imports.
"""

import unittest

import torch
from tests.test_configuration_common import ConfigTester
from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
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


class TokenizerTester(EncoderTester):
    """Configuration and inputs of a whole tokenizer, VAE and encoder, for images of 32 x 32 pixels."""

    config_class = flextok_hf.FlexTokConfig
    vae = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [4, 4],
        "norm_num_groups": 2,
        "latent_channels": 3,
    }

    def get_config(self) -> flextok_hf.FlexTokConfig:
        return self.config_class(encoder_config=ENCODER, vae_config=self.vae)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": torch.rand(BATCH, 3, 32, 32) * 2 - 1}


class ProcessorTester(ImageProcessingTester):
    def __init__(self, parent: unittest.TestCase, **kwargs):
        super().__init__(parent, size={"height": 32, "width": 32}, **kwargs)

    def _get_image_processing_classes(self) -> dict:
        return {"pil": flextok_hf.FlexTokImageProcessor}  # the library finds its own by the name of the test's folder

    def prepare_image_processor_dict(self) -> dict:
        return {"size": self.size}


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


class TokenizerLibraryTest(EncoderLibraryTest):
    all_model_classes = (flextok_hf.FlexTokModel,)

    def setUp(self):
        self.model_tester = TokenizerTester(self)
        vae = {**TokenizerTester.vae, "latent_channels": FlexTokEncoderConfig().in_channels}
        self.config_tester = ConfigTester(self, flextok_hf.FlexTokConfig, has_text_modality=False, vae_config=vae)


class ImageProcessorLibraryTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ProcessorTester


class PriorLibraryTests(ModelTesterMixin, TrainingTesterMixin):
    all_model_classes = (flextok_hf.FlexTokPriorForCausalLM,)
    test_resize_embeddings = False  # the vocabulary is the codebook; refused by name
    model_tester = None  # replaces the abstract property
    additional_model_inputs = ["class_labels", "encoder_hidden_states"]
    condition: dict = {}

    def setUp(self):
        self.model_tester = PriorTester(self, **self.condition)
        self.config_tester = ConfigTester(self, FlexTokPriorConfig, **PRIOR)

    def test_config(self):
        self.config_tester.run_common_tests()

    def _create_text_training_batch(self, *args, **kwargs):
        batch = super()._create_text_training_batch(*args, **kwargs)
        batch["input_ids"][:, 0] = self.model_tester.get_config().bos_token_id  # every row starts with it
        return batch


class UnconditionalPriorLibraryTest(PriorLibraryTests, unittest.TestCase):
    condition = {"text_hidden_size": None}


class ClassPriorLibraryTest(PriorLibraryTests, unittest.TestCase):
    condition = {"num_classes": 10, "text_hidden_size": None}


class TextPriorLibraryTest(PriorLibraryTests, unittest.TestCase):
    condition = {"text_hidden_size": TEXT_SIZE}
