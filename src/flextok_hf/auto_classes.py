"""Registers the models with Transformers' Auto classes on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .models.configuration_encoder import FlexTokEncoderConfig
from .models.configuration_prior import FlexTokPriorConfig
from .models.modeling_encoder import FlexTokEncoder
from .models.modeling_prior import FlexTokPriorForCausalLM


AutoConfig.register(FlexTokEncoderConfig.model_type, FlexTokEncoderConfig)
AutoConfig.register(FlexTokPriorConfig.model_type, FlexTokPriorConfig)
AutoModel.register(FlexTokEncoderConfig, FlexTokEncoder)
AutoModelForCausalLM.register(FlexTokPriorConfig, FlexTokPriorForCausalLM)
