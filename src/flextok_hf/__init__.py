"""FlexTok for Transformers and Diffusers: images as 1 to K ordered tokens."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_encoder import FlexTokEncoderConfig
from .configuration_prior import FlexTokPriorConfig
from .embedded import embedded_model
from .modeling_decoder import FlexTokFlowDecoder
from .modeling_encoder import FlexTokEncoder
from .modeling_prior import FlexTokPriorForCausalLM
from .pipeline_flextok import FlexTokPipeline, FlexTokPipelineOutput


__version__ = "0.1.0"

__all__ = [
    "FlexTokEncoder",
    "FlexTokEncoderConfig",
    "FlexTokFlowDecoder",
    "FlexTokPipeline",
    "FlexTokPipelineOutput",
    "FlexTokPriorConfig",
    "FlexTokPriorForCausalLM",
    "embedded_model",
]

AutoConfig.register(FlexTokEncoderConfig.model_type, FlexTokEncoderConfig)
AutoConfig.register(FlexTokPriorConfig.model_type, FlexTokPriorConfig)
AutoModel.register(FlexTokEncoderConfig, FlexTokEncoder)
AutoModelForCausalLM.register(FlexTokPriorConfig, FlexTokPriorForCausalLM)
