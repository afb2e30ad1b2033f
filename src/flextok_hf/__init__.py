"""FlexTok for Transformers and Diffusers: images as 1 to K ordered tokens."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .embedded import embedded_model


if TYPE_CHECKING:
    from .configuration_encoder import FlexTokEncoderConfig
    from .configuration_prior import FlexTokPriorConfig
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

# Where the public classes are; they are imported on first use, because the libraries under them take seconds to load.
_MODULES = {
    "FlexTokEncoder": "modeling_encoder",
    "FlexTokEncoderConfig": "configuration_encoder",
    "FlexTokFlowDecoder": "modeling_decoder",
    "FlexTokPipeline": "pipeline_flextok",
    "FlexTokPipelineOutput": "pipeline_flextok",
    "FlexTokPriorConfig": "configuration_prior",
    "FlexTokPriorForCausalLM": "modeling_prior",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(".auto_classes", __name__)
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# `AutoModel` and its like know our models once this package is imported. Only the command `flextok` goes without, so
# that its help and its complaints about arguments need not wait for PyTorch; it imports the classes it uses by itself.
if Path(next(iter(getattr(sys, "argv", [])), "")).stem != "flextok":
    importlib.import_module(".auto_classes", __name__)
