"""Building blocks shared by the encoder, the flow decoder and the prior.

Letters: B batch, L sequence, N patches, S slots for registers, D hidden size.
"""

import math

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor, nn

from ..utils import tuning
from .packed_linear import is_emulated, linear, num_calls_in_loop


LAYER_NORM_EPS = 1e-5
MATMULS = "matmuls"  # a way to compute attention
MAX_LOGITS = 2**24  # of a sample: what `attend_with_matmuls` may hold in memory

# Diffusers' backends that run on CPUs, and those that apply any mask; of a mask, "flash_varlen" sees only padding.
CPU_BACKENDS: tuple[str, ...] = ("native", "flex", "_native_math", "_native_flash")
MASK_BACKENDS: tuple[str, ...] = ("native", "flex", "xformers", "_native_math", "_native_efficient", "_native_cudnn")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    key_bias: Tensor | None = None,
    backend: AttentionBackendName | None = None,
) -> Tensor:
    """Scaled dot-product attention; the only function in the package that calls an attention kernel.

    Args:
        query: (B, Lq, heads, head_dim).
        key: (B, Lk, heads, head_dim).
        value: (B, Lk, heads, head_dim).
        attention_mask: broadcastable to (B, heads, Lq, Lk); boolean (true: may attend) or added to the logits.
        scale: factor on the logits; `None` means `head_dim ** -0.5`.
        is_causal: mask later keys; only with equal lengths and without `attention_mask`.
        key_bias: added to the logits of each key for all heads and queries, (B, Lk); not with `attention_mask`.
        backend: a Diffusers attention backend; `None` is the active one, by default PyTorch's SDPA.

    Returns:
        Context, (B, Lq, heads, head_dim).

    Raises:
        ValueError: if the backend does not run on this device, or would ignore the mask.
    """
    chosen = _AttentionBackendRegistry.get_active_backend()[0] if backend is None else backend
    is_default = backend is None and chosen == "native"
    use_matmuls = is_default and not is_causal and is_faster_with_matmuls(query, key, value)
    if key_bias is not None and (use_matmuls or query.device.type == "cuda" or chosen not in MASK_BACKENDS):
        # Kernels without a mask are the fastest here, so the bias is encoded in extra head dimensions.
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        query, key = append_bias_dimensions(query, key, key_bias, scale)
        padded_value = value if use_matmuls else F.pad(value, (0, query.shape[-1] - value.shape[-1]))
        context = attend(query, key, padded_value, scale=scale, is_causal=is_causal, backend=backend)
        return context[..., : value.shape[-1]]
    if key_bias is not None:
        # The other CPU kernels take a mask at no extra cost, and it may be more precise than the queries.
        attention_mask = key_bias.to(torch.float32 if query.device.type == "cpu" else query.dtype)[:, None, None]
    if attention_mask is not None and attention_mask.ndim == 2:
        # made explicit: Diffusers treats a (B, Lk) mask as padding, and a square mask can have that shape
        attention_mask = attention_mask[None, None]
    if use_matmuls:
        return attend_with_matmuls(query, key, value, attention_mask, scale)
    if not is_default:
        check_backend(chosen, query.device.type, attention_mask is not None)
    return dispatch_attention_fn(
        query, key, value, attn_mask=attention_mask, scale=scale, is_causal=is_causal, backend=backend
    )


def check_backend(backend: AttentionBackendName, device_type: str, has_mask: bool) -> None:
    """Refuse a backend that would fail inside a kernel or ignore the mask."""
    if device_type == "cpu" and backend not in CPU_BACKENDS:
        problem, allowed = "does not run on a CPU", CPU_BACKENDS
    elif has_mask and backend not in MASK_BACKENDS:
        problem, allowed = "does not apply the attention mask that this call needs", MASK_BACKENDS
    else:
        return
    name = AttentionBackendName(backend).value
    raise ValueError(f"The attention backend {name!r} {problem}. Choose another one: {', '.join(allowed)}.")


def is_faster_with_matmuls(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend_with_matmuls` beats PyTorch's fused kernel, which loops on a CPU find out by timing both."""
    is_slow = query.device.type != "cpu" or is_emulated(query.dtype)
    if is_slow or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    (num_queries, num_heads), num_keys = query.shape[1:3], key.shape[1]
    if num_queries * num_keys * num_heads > MAX_LOGITS or num_queries == 1:
        return False
    at_most = " x ".join(str(tuning.power_of_two(length)) for length in (num_queries, num_keys))
    choice = f"attention, {query.dtype}, {num_heads} heads of {query.shape[-1]}, up to {at_most}"

    def measure() -> tuning.Times:
        states = [part.transpose(1, 2) for part in (query, key, value)]
        sdpa = (tuning.LIBRARY, lambda: F.scaled_dot_product_attention(*states))
        return tuning.time_calls(
            tuning.NUM_TIMINGS * [sdpa, (MATMULS, lambda: attend_with_matmuls(query, key, value))]
        )

    times = tuning.loop_times(choice, 2, num_calls_in_loop(), measure)
    return tuning.fastest("attention", (tuning.LIBRARY, MATMULS), times) == MATMULS


def attend_with_matmuls(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Compute `attend` as two matmuls and a softmax, one sample at a time to reuse memory.

    Args:
        query, key: (B, L, heads, head_dim).
        value: (B, Lk, heads, value_dim).
        attention_mask: broadcastable to (B, heads, Lq, Lk); boolean, or added to the logits.
        scale: factor on the logits; `None` means `head_dim ** -0.5`.

    Returns:
        Context, (B, Lq, heads, value_dim).
    """
    batch_size, num_queries, num_heads, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        zeros = torch.zeros(attention_mask.shape, dtype=query.dtype)  # adding two dtypes would be slow
        attention_mask = zeros.masked_fill_(~attention_mask, -torch.inf)
    if attention_mask is not None:
        attention_mask = attention_mask.expand(batch_size, -1, -1, -1)
    weights = query.new_empty(num_heads, num_queries, key.shape[1])
    context = query.new_empty(batch_size, num_queries, num_heads, value.shape[-1])
    for sample in range(batch_size):
        # (heads, L, head_dim) each
        queries, keys, values = (states[sample].transpose(0, 1) for states in (query, key, value))
        torch.baddbmm(weights, queries, keys.mT, beta=0, alpha=scale, out=weights)
        if attention_mask is not None:
            weights.add_(attention_mask[sample])
        torch.softmax(weights, dim=-1, out=weights)
        context[sample] = torch.bmm(weights, values).transpose(0, 1)
    return context


def append_bias_dimensions(query: Tensor, key: Tensor, key_bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Widen the heads by 8, so that `scale * query @ key` includes `key_bias`; kernels want multiples of 8.

    Args:
        query, key: (B, L, heads, head_dim).
        key_bias: (B, L) float32; split into two terms to stay exact in half precision.
        scale: factor on the logits.

    Returns:
        Query and key, (B, L, heads, head_dim + 8).
    """
    coarse = key_bias.to(key.dtype)
    pair = torch.stack([coarse, (key_bias - coarse).to(key.dtype)], dim=-1)  # (B, L, 2)
    key = torch.cat([key, F.pad(pair, (0, 6))[:, :, None].expand(*key.shape[:-1], 8)], dim=-1)
    return F.pad(query, (0, 8), value=1 / scale), key


def layer_norm(hidden_states: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """Normalize the last dimension to mean 0 and variance 1, then apply `scale` and `shift`, (D,), if given.

    The kernels compute in float32 whatever the input dtype.
    """
    if scale is not None and shift is not None:
        scale, shift = scale.type_as(hidden_states), shift.type_as(hidden_states)
    return F.layer_norm(hidden_states, hidden_states.shape[-1:], scale, shift, LAYER_NORM_EPS).type_as(hidden_states)


# The next two functions process patches, then registers: a modulation vector per position would be larger than the
# states. Without registers, there is only one modulation vector per sample.


def norm_and_modulate(hidden_states: Tensor, shift: Tensor, scale: Tensor, num_patches: int) -> Tensor:
    """Normalize (B, N + S, D), then scale and shift; (B or 1, 2, D) holds vectors for patches and for registers."""
    parts = (hidden_states[:, :num_patches], hidden_states[:, num_patches:])[: scale.shape[1]]
    if scale.shape[0] == 1:  # one noise level for the batch: fused into the layer norm
        outputs = [layer_norm(part, 1 + scale[0, kind], shift[0, kind]) for kind, part in enumerate(parts)]
    else:
        outputs = [
            layer_norm(part) * (1 + scale[:, kind, None]) + shift[:, kind, None] for kind, part in enumerate(parts)
        ]
    return torch.cat(outputs, dim=1)


def add_gated(hidden_states: Tensor, update: Tensor, gate: Tensor, num_patches: int) -> Tensor:
    """Add an update (B, N + S, D) times its gate; (B or 1, 2, D) holds one for patches and one for registers."""
    parts = (slice(num_patches), slice(num_patches, None))[: gate.shape[1]]
    outputs = [
        torch.addcmul(hidden_states[:, part], gate[:, kind, None], update[:, part]) for kind, part in enumerate(parts)
    ]
    return torch.cat(outputs, dim=1)


class AttentionProcessor:
    """Holds the attention backend that Diffusers' `set_attention_backend` selects for a module."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attention: "Attention",
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        key_bias: Tensor | None = None,
    ) -> Tensor:
        return attend(query, key, value, mask, attention.scale, key_bias=key_bias, backend=self._attention_backend)


class Attention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with normalized queries and keys and no biases.

    The logit scale is `8 / head_dim`: the width-independent choice of maximal update parametrization (Yang et al.,
    2022, https://arxiv.org/abs/2203.03466), equal to the usual `head_dim ** -0.5` at the published head size of 64.
    """

    _default_processor_cls = AttentionProcessor
    _available_processors = [AttentionProcessor]
    _supports_qkv_fusion = False

    def __init__(self, hidden_size: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.scale = 8 / head_dim
        self.to_q = nn.Linear(hidden_size, hidden_size, bias=False)
        self.to_k = nn.Linear(hidden_size, hidden_size, bias=False)
        self.to_v = nn.Linear(hidden_size, hidden_size, bias=False)
        self.to_out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.processor = AttentionProcessor()

    def set_processor(self, processor: AttentionProcessor) -> None:
        """Replace the processor; raises `TypeError` for those of other models, which are called differently."""
        if not isinstance(processor, AttentionProcessor):
            raise TypeError(
                f"`processor` is a {type(processor).__name__}, but this model calls its processors with normalized"
                " queries, keys and values. Pass an instance of a subclass of"
                " `flextok_hf.models.layers.AttentionProcessor`."
            )
        super().set_processor(processor)

    def project(self, hidden_states: Tensor, first_query: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Project (B, L, D) to query, key and value, (B, L, heads, head_dim); queries start at `first_query`."""
        query = layer_norm(linear(self.to_q, hidden_states[:, first_query:]).unflatten(-1, (-1, self.head_dim)))
        key = layer_norm(linear(self.to_k, hidden_states).unflatten(-1, (-1, self.head_dim)))
        return query, key, linear(self.to_v, hidden_states).unflatten(-1, (-1, self.head_dim))

    def forward(self, hidden_states: Tensor, key_bias: Tensor | None = None) -> Tensor:
        """Attend along L of (B, L, D), with `key_bias` (B, L) added to the logits of each key."""
        context = self.processor(self, *self.project(hidden_states), key_bias=key_bias)  # (B, L, heads, head_dim)
        return linear(self.to_out, context.flatten(-2))  # (B, L, D)


class GatedMLP(nn.Module):
    """SwiGLU feed-forward layer (Shazeer, 2020, https://arxiv.org/abs/2002.05202).

    Args:
        hidden_size: width D.
        intermediate_size: inner width; `None` is 8/3 D, as in the published tokenizers.
        bias: whether the linear layers have a bias.
        is_fused: store gate and up as one weight, as the published priors do, instead of two.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int | None = None,
        bias: bool = False,
        is_fused: bool = False,
    ):
        super().__init__()
        intermediate_size = intermediate_size or 2 * (4 * hidden_size) // 3
        self.is_fused = is_fused
        if is_fused:
            self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias)  # rows: gate, up
        else:
            self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias)
            self.up_proj = nn.Linear(hidden_size, intermediate_size, bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply the MLP to every position of (B, L, D)."""
        if self.is_fused:
            gate, up = linear(self.gate_up_proj, hidden_states).chunk(2, dim=-1)
            return linear(self.down_proj, F.silu(gate) * up)
        gate, up = linear(self.gate_proj, hidden_states), linear(self.up_proj, hidden_states)
        if torch.is_grad_enabled() or self.gate_proj._forward_hooks:  # a hook may keep its output
            return linear(self.down_proj, F.silu(gate) * up)
        return linear(self.down_proj, F.silu(gate, inplace=True).mul_(up))  # in place, as these are the widest states


class TimestepEmbedder(nn.Module):
    """Noise level sigma in [0, `max_timestep`] -> conditioning vector.

    Sinusoidal features with base 256, cosines first, then a two-layer MLP. `max_timestep` only scales the
    frequencies: released checkpoints store it, and it changes every output.
    """

    def __init__(self, hidden_size: int, frequency_embedding_size: int, max_timestep: float):
        super().__init__()
        if frequency_embedding_size % 2:
            raise ValueError(f"`frequency_embedding_size` must be even, got {frequency_embedding_size}.")
        self.frequency_embedding_size = frequency_embedding_size
        self.frequency_scale = 1000.0 / max_timestep
        self.linear_1 = nn.Linear(frequency_embedding_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, sigma: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Embed noise levels (B,) as (B, D) in the precision of the model, which a quantized weight would not tell."""
        num_frequencies = self.frequency_embedding_size // 2
        exponents = torch.arange(num_frequencies, dtype=torch.float32, device=sigma.device) / num_frequencies
        # Scaled before multiplying by sigma: with angles up to 1000, the order of the factors changes the fifth digit,
        # and Diffusers' own function uses a different order.
        frequencies = torch.exp(-math.log(256) * exponents) * self.frequency_scale
        angles = sigma.float()[:, None] * frequencies  # (B, frequency_embedding_size / 2)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.linear_2(F.silu(self.linear_1(features.to(dtype))))
