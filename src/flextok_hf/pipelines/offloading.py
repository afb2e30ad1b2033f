"""Offloading of a pipeline's parts: to files of their own, and with one part offloaded alone."""

import os
import tempfile
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from torch import nn


class OffloadingMixin(DiffusionPipeline):
    """What a pipeline does about offloading beyond Diffusers."""

    @property
    def _execution_device(self) -> torch.device:
        """The device of inputs: where offloaded weights are sent, not the meta device that they wait on."""
        device = super()._execution_device
        if device.type != "meta":
            return device
        parts = [part for part in self.components.values() if isinstance(part, nn.Module)]
        hooks = [getattr(module, "_hf_hook", None) for part in parts for module in part.modules()]
        targets = [target for hook in hooks if (target := getattr(hook, "execution_device", None)) is not None]
        return torch.device(targets[0]) if targets else device

    def enable_group_offload(
        self,
        onload_device: torch.device,
        *args,
        offload_to_disk_path: str | os.PathLike | None = None,
        exclude_modules: str | list[str] | None = None,
        **options,
    ) -> None:
        """Offload groups of layers of all models, as in Diffusers, each model to a new folder on disk.

        Files are named after layers: Diffusers would load what another model or an earlier run left there.
        """
        if offload_to_disk_path is None:
            super().enable_group_offload(onload_device, *args, exclude_modules=exclude_modules, **options)
            return
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules or []
        Path(offload_to_disk_path).mkdir(parents=True, exist_ok=True)
        for name, part in self.components.items():
            if isinstance(part, nn.Module) and name in excluded:
                part.to(onload_device)
            elif isinstance(part, nn.Module):
                folder = tempfile.mkdtemp(prefix=f"{name}_", dir=offload_to_disk_path)
                apply_group_offloading(part, onload_device, *args, offload_to_disk_path=folder, **options)
