"""FlexTok for Transformers and Diffusers: images as 1 to K ordered tokens."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from .embedded import embedded_model, list_models


if TYPE_CHECKING:
    from .models.configuration_encoder import FlexTokEncoderConfig
    from .models.configuration_flextok import FlexTokConfig
    from .models.configuration_prior import FlexTokPriorConfig
    from .models.modeling_decoder import FlexTokFlowDecoder
    from .models.modeling_encoder import FlexTokEncoder
    from .models.modeling_flextok import FlexTokModel
    from .models.modeling_prior import FlexTokPriorForCausalLM
    from .pipelines.image_processing import FlexTokImageProcessor
    from .pipelines.pipeline_flextok import FlexTokPipeline, FlexTokPipelineOutput


__version__ = "0.1.0"

__all__ = [
    "FlexTokConfig",
    "FlexTokEncoder",
    "FlexTokEncoderConfig",
    "FlexTokFlowDecoder",
    "FlexTokImageProcessor",
    "FlexTokModel",
    "FlexTokPipeline",
    "FlexTokPipelineOutput",
    "FlexTokPriorConfig",
    "FlexTokPriorForCausalLM",
    "embedded_model",
    "list_models",
]

# Modules of the public classes, imported on first use because their dependencies take seconds to load.
_MODULES = {
    "FlexTokConfig": "models.configuration_flextok",
    "FlexTokEncoder": "models.modeling_encoder",
    "FlexTokEncoderConfig": "models.configuration_encoder",
    "FlexTokFlowDecoder": "models.modeling_decoder",
    "FlexTokImageProcessor": "pipelines.image_processing",
    "FlexTokModel": "models.modeling_flextok",
    "FlexTokPipeline": "pipelines.pipeline_flextok",
    "FlexTokPipelineOutput": "pipelines.pipeline_flextok",
    "FlexTokPriorConfig": "models.configuration_prior",
    "FlexTokPriorForCausalLM": "models.modeling_prior",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(".auto_classes", __name__)
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value  # cached: the next lookup skips this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Importing this package registers our models with `AutoModel` and the other Auto classes. Only the `flextok` command,
# which starts from the module `flextok_command`, skips this, so that its help and argument errors need not wait for
# PyTorch; it imports what it uses on its own.
if "flextok_command" not in sys.modules:
    importlib.import_module(".auto_classes", __name__)
