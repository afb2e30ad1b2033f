"""Loading a model by name onto a device."""

import torch

from ..embedded import resolve_model
from .pipeline_flextok import FlexTokPipeline


def load_pipeline(
    model: str | None = None, device: str | None = None, dtype: torch.dtype = torch.float32
) -> FlexTokPipeline:
    """Load a pipeline onto a device.

    Args:
        model: folder or Hub id; the embedded model by default.
        device: the best one of this machine by default.
        dtype: of the weights.

    Raises:
        ValueError: if the device is not available or the model cannot be loaded.
    """
    chosen = choose_device(device)
    name = resolve_model(model)
    try:
        pipe = FlexTokPipeline.from_pretrained(name, dtype=dtype)
    except (ValueError, OSError) as error:
        raise ValueError(f"`model` {name!r} cannot be loaded; download or save it again: {error}") from error
    return pipe.to(chosen)


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
