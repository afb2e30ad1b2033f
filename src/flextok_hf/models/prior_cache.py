"""Caches of the prior, including one with preallocated memory: the last token costs as much as the first.

Letters: B batch, S keys so far.
"""

from dataclasses import fields

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_prior import FlexTokPriorConfig


# Transformers calls the cache `past_key_values` up to 5.23 and `cache` from 5.24 on, in arguments and outputs alike.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer, (B, heads, S, head_dim) each: a `DynamicLayer` that is not copied at every step.

    Args:
        capacity: number of positions to allocate first; when full, everything is copied to twice the memory.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.buffers: list[Tensor | None] = [None, None]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (B, heads, L, head_dim) to keys and values; returns all of them as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append(0, self.keys, key_states)
        self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def _append(self, index: int, states: Tensor, new: Tensor) -> Tensor:
        start = states.shape[-2] if states.numel() else 0
        end = start + new.shape[-2]
        buffer = self.buffers[index]
        # beam search and similar methods replace the views with other tensors
        is_view = buffer is not None and (states.data_ptr(), states.shape[0]) == (buffer.data_ptr(), buffer.shape[0])
        if buffer is None or not is_view or end > buffer.shape[-2]:
            capacity = max(self.capacity, 2 * start, end)
            buffer = new.new_empty(*new.shape[:-2], capacity, new.shape[-1])
            if start:
                buffer[..., :start, :] = states
            self.buffers[index] = buffer
        buffer[..., start:end, :] = new
        return buffer[..., :end, :]


def static_shape(cache: Cache) -> tuple | None:
    """Return rows, text length, dtype and device of a static cache, to check its fit; `None` while it is empty."""
    text_cache = None
    if isinstance(cache, EncoderDecoderCache):
        cache, text_cache = cache.self_attention_cache, cache.cross_attention_cache
    keys = cache.layers[0].keys
    if not cache.layers[0].is_initialized:
        return None
    text_length = 0 if text_cache is None else text_cache.layers[0].keys.shape[2]
    return keys.shape[0], text_length, keys.dtype, keys.device


def prepare_cache(config: FlexTokPriorConfig, cache: Cache | None, use_cache: bool | None) -> Cache | None:
    """Return the cache of one forward pass: the given one, a new one if requested, or `None`."""
    if cache is None and use_cache:
        cache = DynamicCache(config=config)
    return None if cache is None else with_text_cache(config, cache)


def with_text_cache(config: FlexTokPriorConfig, cache: Cache) -> Cache:
    """Add room for the text's keys and values to the cache of a model with text, unless it has it already."""
    if config.text_hidden_size is None or isinstance(cache, EncoderDecoderCache):
        return cache
    return EncoderDecoderCache(cache, DynamicCache(config=config))
