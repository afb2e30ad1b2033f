"""Registers our classes where the generic ones of Transformers and Diffusers look them up, on import."""

import diffusers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # by this path also without torchvision
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .models.configuration_encoder import FlexTokEncoderConfig
from .models.configuration_flextok import FlexTokConfig
from .models.configuration_prior import FlexTokPriorConfig
from .models.modeling_encoder import FlexTokEncoder
from .models.modeling_flextok import FlexTokModel
from .models.modeling_prior import FlexTokPriorForCausalLM
from .pipelines.image_processing import FlexTokImageProcessor
from .pipelines.pipeline_flextok import FlexTokPipeline


for config_class in (FlexTokConfig, FlexTokEncoderConfig, FlexTokPriorConfig):
    AutoConfig.register(config_class.model_type, config_class)
AutoModel.register(FlexTokConfig, FlexTokModel)
AutoModel.register(FlexTokEncoderConfig, FlexTokEncoder)
for config_class in (FlexTokConfig, FlexTokEncoderConfig):
    AutoImageProcessor.register(config_class, image_processor_classes={"pil": FlexTokImageProcessor})
AutoModelForCausalLM.register(FlexTokPriorConfig, FlexTokPriorForCausalLM)
# by this name `Trainer` knows that label smoothing has to shift the labels
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[FlexTokPriorConfig.model_type] = FlexTokPriorForCausalLM.__name__
diffusers.FlexTokPipeline = FlexTokPipeline  # for `DiffusionPipeline.from_pretrained`
