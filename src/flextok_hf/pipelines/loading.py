"""Loading a model by name onto a device."""

import torch

from ..embedded import resolve_model
from ..models.modeling_decoder import FlexTokFlowDecoder
from .pipeline_flextok import FlexTokPipeline


FLOW_DECODER = "flow_decoder"  # subfolder of a distilled pipeline, with the decoder that its own one learned from


def load_pipeline(
    model: str | None = None,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    decoder: str | None = None,
) -> FlexTokPipeline:
    """Load a pipeline onto a device.

    Args:
        model: folder or Hub id; the embedded model by default.
        device: the best one of this machine by default.
        dtype: of the weights.
        decoder: subfolder of another decoder than the pipeline's own, such as "flow_decoder".

    Raises:
        ValueError: if the device is not available or the model cannot be loaded.
    """
    chosen = choose_device(device)
    name = resolve_model(model)
    parts = {} if decoder is None else {"decoder": load_decoder(name, decoder, dtype)}
    try:
        pipe = FlexTokPipeline.from_pretrained(name, dtype=dtype, **parts)
    except (ValueError, OSError) as error:
        raise ValueError(f"`model` {name!r} cannot be loaded; download or save it again: {error}") from error
    return pipe.to(chosen)


def load_decoder(model: str, subfolder: str, dtype: torch.dtype) -> FlexTokFlowDecoder:
    """Load the decoder in a subfolder of a pipeline.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    try:
        return FlexTokFlowDecoder.from_pretrained(model, subfolder=subfolder, torch_dtype=dtype)
    except (ValueError, OSError) as error:
        hint = f"Distilled models have one in {FLOW_DECODER!r}, and all in 'decoder'."
        raise ValueError(f"`decoder` {subfolder!r} of {model!r} cannot be loaded. {hint} ({error})") from error


def use_flow_decoder(pipe: FlexTokPipeline, model: str) -> bool:
    """Replace the distilled decoder of a pipeline by the flow decoder that it learned from, which can be trained.

    Args:
        pipe: changed in place; nothing is done if its decoder is not distilled.
        model: where it was loaded from.

    Returns:
        Whether it was replaced.

    Raises:
        ValueError: the decoder is distilled, and the other one is not there.
    """
    if not pipe.decoder.predicts_mean:
        return False
    decoder = load_decoder(model, FLOW_DECODER, pipe.decoder.dtype)
    pipe.register_modules(decoder=decoder.to(pipe.decoder.device))
    return True


def choose_device(name: str | None) -> torch.device:
    """Return the device called `name`, by default the best one of this machine.

    Raises:
        ValueError: if PyTorch does not know the device or this machine does not have it.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`device` {name!r} is not available; try cpu ({reason})") from error
    return device
