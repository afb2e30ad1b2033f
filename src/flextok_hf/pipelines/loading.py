"""A model that a user names, loaded onto a device that a user names."""

import torch

from ..embedded import resolve_model
from .pipeline_flextok import FlexTokPipeline


def load_pipeline(
    model: str | None = None, device: str | None = None, dtype: torch.dtype = torch.float32
) -> FlexTokPipeline:
    """Load a pipeline.

    Args:
        model: folder or Hub id; by default the embedded model.
        device: by default the best one of this machine.
        dtype: of the weights.

    Raises:
        ValueError: there is no such device, or the model cannot be read.
    """
    chosen = choose_device(device)
    name = resolve_model(model)
    try:
        pipe = FlexTokPipeline.from_pretrained(name, dtype=dtype)
    except Exception as error:  # a missing or damaged file can surface as almost anything in the libraries below
        raise ValueError(f"`model` {name!r} cannot be loaded; fetch or save it again: {error}") from error
    return pipe.to(chosen)


def choose_device(name: str | None) -> torch.device:
    """Return the device called `name`, or by default the best one of this machine.

    Raises:
        ValueError: PyTorch does not know such a device, or this machine has none.
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
        raise ValueError(f"`device` {name!r} cannot be used here; try cpu ({reason})") from error
    return device
