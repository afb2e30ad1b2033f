"""Registers the models with Transformers' Auto classes on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .models.configuration_encoder import FlexTokEncoderConfig
from .models.configuration_prior import FlexTokPriorConfig
from .models.modeling_encoder import FlexTokEncoder
from .models.modeling_prior import FlexTokPriorForCausalLM


AutoConfig.register(FlexTokEncoderConfig.model_type, FlexTokEncoderConfig)
AutoConfig.register(FlexTokPriorConfig.model_type, FlexTokPriorConfig)
AutoModel.register(FlexTokEncoderConfig, FlexTokEncoder)
AutoModelForCausalLM.register(FlexTokPriorConfig, FlexTokPriorForCausalLM)
# by this name `Trainer` knows that label smoothing has to shift the labels
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[FlexTokPriorConfig.model_type] = FlexTokPriorForCausalLM.__name__
