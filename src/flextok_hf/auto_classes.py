"""Makes the models known to Transformers' Auto classes; importing this module is all it takes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .models.configuration_encoder import FlexTokEncoderConfig
from .models.configuration_prior import FlexTokPriorConfig
from .models.modeling_encoder import FlexTokEncoder
from .models.modeling_prior import FlexTokPriorForCausalLM


AutoConfig.register(FlexTokEncoderConfig.model_type, FlexTokEncoderConfig)
AutoConfig.register(FlexTokPriorConfig.model_type, FlexTokPriorConfig)
AutoModel.register(FlexTokEncoderConfig, FlexTokEncoder)
AutoModelForCausalLM.register(FlexTokPriorConfig, FlexTokPriorForCausalLM)
