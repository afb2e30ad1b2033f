"""The decoder behind Diffusers' calls: caches, attention backends, offloading and adapters.

Where Diffusers would go on with a wrong result, these methods do the right thing or raise an error.
"""

import os
import tempfile
from functools import wraps

from diffusers import FirstBlockCacheConfig, MagCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin


WORKING_CACHES = (FirstBlockCacheConfig, MagCacheConfig)


class DecoderToolsMixin(AttentionMixin, CacheMixin, PeftAdapterMixin):
    """Diffusers' tools for a denoising model; must precede `ModelMixin`, whose methods it refines."""

    def enable_cache(self, config) -> None:
        """Skip computations that change little between steps, with one of Diffusers' block caches.

        Args:
            config: a `FirstBlockCacheConfig` or `MagCacheConfig`. What to skip is decided per batch, so an image then
                depends on the others in its batch.

        Raises:
            ValueError: for other caches, which fail with this decoder or have no effect.
        """
        if not isinstance(config, WORKING_CACHES):
            known = " or ".join(kind.__name__ for kind in WORKING_CACHES)
            raise ValueError(f"`config` is a {type(config).__name__}, which does not work here. Use a {known}.")
        if isinstance(config, FirstBlockCacheConfig) and len(self.transformer_blocks) == 1:
            raise ValueError("`config` is a FirstBlockCacheConfig, but this decoder has a single block to skip none.")
        TransformerBlockRegistry.register(type(self.transformer_blocks[0]), TransformerBlockMetadata())
        super().enable_cache(config)

    def set_attention_backend(self, backend: str) -> None:
        """Choose the attention kernels of this model by Diffusers' name, such as "flash" or "flex".

        Diffusers would choose them for all models of the process, and the encoder needs masks that few backends apply.
        """
        active_backend, _ = _AttentionBackendRegistry.get_active_backend()
        super().set_attention_backend(backend)
        _AttentionBackendRegistry.set_active_backend(active_backend)

    def enable_group_offload(self, *args, offload_to_disk_path=None, **options) -> None:
        """Offload groups of layers, as in Diffusers, but in a new folder within `offload_to_disk_path`.

        Files are named after layers: Diffusers would load what another model or an earlier run left there.
        """
        if offload_to_disk_path is not None:
            os.makedirs(offload_to_disk_path, exist_ok=True)
            options["offload_to_disk_path"] = tempfile.mkdtemp(prefix="decoder_", dir=offload_to_disk_path)
        super().enable_group_offload(*args, **options)

    def load_lora_adapter(
        self, pretrained_model_name_or_path_or_dict, prefix: str | None = None, hotswap: bool = False, **options
    ) -> None:
        """Load what `save_lora_adapter` saved, or its tensors; options as in Diffusers.

        Pickle files (`.bin`) are read with `use_safetensors=False` only.

        Args:
            pretrained_model_name_or_path_or_dict: a folder, a Hub id, or a dictionary of tensors.
            prefix: of the tensor names, without its dot; others are ignored. "transformer" in files of pipelines.
            hotswap: replace the adapter `adapter_name` in place, without compiling again.

        Raises:
            ValueError: if no tensor has the prefix.
        """
        options.setdefault("use_safetensors", True)
        known = set(getattr(self, "peft_config", {}))
        super().load_lora_adapter(pretrained_model_name_or_path_or_dict, prefix, hotswap, **options)
        if not hotswap and set(self.peft_config if hasattr(self, "peft_config") else ()) == known:
            raise ValueError(
                f"`prefix` is {prefix!r}, but no tensor of the adapter begins so. Files of `save_lora_adapter` need"
                " `prefix=None`."
            )

    def set_adapters(self, adapter_names: list[str] | str, weights=None) -> None:
        """Activate adapters by name with optional weights, as in Diffusers; raises `ValueError` for unknown names."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        known = list(getattr(self, "peft_config", {}))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(
                f"`adapter_names` has {', '.join(map(repr, unknown))}, but this decoder's adapters are {known}. Load"
                " or add it first."
            )
        super().set_adapters(adapter_names, weights)

    # Pipelines pass only those options that they find in the signature
    @wraps(ModelMixin.save_pretrained, assigned=())
    def save_pretrained(self, save_directory, *args, **options) -> None:
        """Save weights and configuration, as in Diffusers; raises `ValueError` while there are adapters."""
        if getattr(self, "peft_config", None):
            raise ValueError(
                "This decoder has adapters, which would be saved under names that no decoder loads. Save them with"
                " `save_lora_adapter`, or merge them with `fuse_lora()` and `unload_lora()` first."
            )
        super().save_pretrained(save_directory, *args, **options)
