"""The decoder behind Diffusers' calls: offloading, backends, caches, adapters, saving."""

import diffusers
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor2_0
from tiny_models import FSQ_LEVELS, NUM_REGISTERS, make_decoder, make_encoder, make_pipeline

from flextok_hf import FlexTokFlowDecoder
from flextok_hf.models.layers import CPU_BACKENDS, AttentionProcessor
from flextok_hf.models.packed_linear import PackedWeights


CPU = torch.device("cpu")
LATENTS, CODES = (
    torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for shape in [(3, 3, 16, 16), (3, NUM_REGISTERS, len(FSQ_LEVELS))]
)
SIGMA = torch.tensor([0.1, 0.5, 1.0])
SHORT = 3  # fewer codes than registers: dropped ones add a bias to the attention


@torch.no_grad()
def velocity(decoder, num_codes=SHORT):
    return decoder(LATENTS, SIGMA, CODES[:, :num_codes]).velocity


def assert_same_as_plain(decoder):
    for num_codes in (SHORT, NUM_REGISTERS):
        torch.testing.assert_close(velocity(decoder, num_codes), velocity(make_decoder(), num_codes))


@pytest.fixture
def backend_of_process():
    before, _ = _AttentionBackendRegistry.get_active_backend()
    yield before
    _AttentionBackendRegistry.set_active_backend(before)


# Offloading


OFFLOADS = {
    "cpu": lambda decoder, folder: cpu_offload(decoder, CPU),
    "disk": lambda decoder, folder: disk_offload(decoder, folder, CPU),
    "blocks": lambda decoder, folder: decoder.enable_group_offload(CPU, num_blocks_per_group=1),
    "leaves": lambda decoder, folder: decoder.enable_group_offload(CPU, offload_type="leaf_level"),
    "blocks on disk": lambda decoder, folder: decoder.enable_group_offload(
        CPU, num_blocks_per_group=1, offload_to_disk_path=folder
    ),
    "leaves on disk": lambda decoder, folder: decoder.enable_group_offload(
        CPU, offload_type="leaf_level", offload_to_disk_path=folder
    ),
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_offloading_changes_nothing(tmp_path, offload):
    decoder = make_decoder()
    offload(decoder, tmp_path)
    assert_same_as_plain(decoder)
    assert_same_as_plain(decoder)  # weights that were loaded and freed again


@pytest.mark.parametrize("offload", ["blocks on disk", "leaves on disk"])
def test_two_decoders_may_be_offloaded_to_the_same_folder(tmp_path, offload):
    """Diffusers names the files after the layers, and loads those that are there."""
    first, second = make_decoder(), make_decoder()
    with torch.no_grad():
        first.velocity_proj.weight.zero_()
    for decoder in (first, second):
        OFFLOADS[offload](decoder, tmp_path)
    assert_same_as_plain(second)


def test_modulation_is_refused_while_its_weights_are_offloaded(tmp_path):
    for name in OFFLOADS:
        decoder = make_decoder()
        OFFLOADS[name](decoder, tmp_path / name)
        if name.startswith("blocks"):
            with pytest.raises(ValueError, match="`compute_modulation` has no weights"):
                decoder.compute_modulation(SIGMA)
        else:
            torch.testing.assert_close(decoder.compute_modulation(SIGMA), make_decoder().compute_modulation(SIGMA))


def test_streams_are_refused_on_a_cpu(tiny_decoder):
    with pytest.raises(ValueError, match="use_stream=False"):
        tiny_decoder.enable_group_offload(CPU, offload_type="leaf_level", use_stream=True)


def test_a_device_map_may_leave_blocks_on_disk(tmp_path):
    make_decoder().save_pretrained(tmp_path / "model", max_shard_size="30KB", variant="fp16")
    num_bytes = sum(parameter.nbytes for parameter in make_decoder().parameters())
    options = {"variant": "fp16", "device_map": "auto", "max_memory": {"cpu": int(0.7 * num_bytes)}}
    decoder = FlexTokFlowDecoder.from_pretrained(tmp_path / "model", offload_folder=tmp_path / "disk", **options)
    assert decoder.transformer_blocks[1].attention.to_q.weight.device.type == "meta"
    assert_same_as_plain(decoder)


# Attention


@pytest.mark.parametrize("backend", list(AttentionBackendName), ids=lambda backend: backend.value)
def test_an_attention_backend_works_or_is_refused_by_name(backend_of_process, backend):
    decoder = make_decoder()
    try:
        decoder.set_attention_backend(backend.value)
        for num_codes in (SHORT, NUM_REGISTERS):
            expected = velocity(make_decoder(), num_codes)
            torch.testing.assert_close(velocity(decoder, num_codes), expected, atol=1e-5, rtol=1e-5)
        assert backend in CPU_BACKENDS
    except (ValueError, RuntimeError) as error:
        assert backend not in CPU_BACKENDS
        assert f"'{backend.value}'" in str(error)


def test_an_attention_backend_is_chosen_for_one_model(backend_of_process):
    decoder, encoder, features = make_decoder(), make_encoder(), make_encoder()(LATENTS).codes
    decoder.set_attention_backend("_native_flash")
    assert encoder(LATENTS).codes.equal(features)
    assert _AttentionBackendRegistry.get_active_backend()[0] == backend_of_process
    decoder.reset_attention_backend()
    assert {block.attention.processor._attention_backend for block in decoder.transformer_blocks} == {None}


class Doubled(AttentionProcessor):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


def test_an_own_attention_processor_is_used(tiny_decoder):
    expected = velocity(tiny_decoder)
    processors = tiny_decoder.attn_processors
    assert list(processors) == [f"transformer_blocks.{index}.attention.processor" for index in range(2)]
    tiny_decoder.set_attn_processor(Doubled())
    assert not torch.allclose(velocity(tiny_decoder), expected)
    tiny_decoder.set_attn_processor(processors)
    assert velocity(tiny_decoder).equal(expected)


@pytest.mark.parametrize(
    "processor", [AttnProcessor2_0(), None, print, AttentionProcessor], ids=["other", "None", "function", "class"]
)
def test_attention_processors_of_other_models_are_refused(tiny_decoder, processor):
    with pytest.raises(TypeError, match="`processor` is a .*AttentionProcessor"):
        tiny_decoder.set_attn_processor(processor)


# Caches


CACHES = {
    "FirstBlockCacheConfig": {"threshold": 10.0},
    "MagCacheConfig": {"num_inference_steps": 8, "mag_ratios": [1.0] * 8},
    "PyramidAttentionBroadcastConfig": {"spatial_attention_block_skip_range": 2},
    "LayerSkipConfig": {"indices": [0]},
    "SmoothedEnergyGuidanceConfig": {"indices": [0]},
}
CONFIGS = [getattr(diffusers.hooks, name) for name in dir(diffusers.hooks) if name.endswith("Config")]
TOKEN_IDS = torch.zeros(1, 2, dtype=torch.long)


@pytest.mark.parametrize("kind", [*CONFIGS, type(None)], ids=lambda kind: kind.__name__)
def test_a_cache_works_or_is_refused_by_name(kind):
    """Of all configurations in the installed version of Diffusers."""
    pipe = make_pipeline()
    options = {"num_inference_steps": 8, "output_type": "latent", "latents": torch.zeros(1, 3, 16, 16)}
    config = kind(**CACHES.get(kind.__name__, {}))
    if kind.__name__ not in ("FirstBlockCacheConfig", "MagCacheConfig"):
        with pytest.raises(ValueError, match=f"`config` is a {kind.__name__}"):
            pipe.decoder.enable_cache(config)
        assert not pipe.decoder.is_cache_enabled
        return
    expected = pipe.detokenize(TOKEN_IDS, **options).images
    pipe.decoder.enable_cache(config)
    cached, again = (pipe.detokenize(TOKEN_IDS, **options).images for _ in range(2))
    assert cached.equal(again)
    assert not cached.equal(expected)
    pipe.decoder.disable_cache()
    assert pipe.detokenize(TOKEN_IDS, **options).images.equal(expected)


def test_a_cache_of_the_first_block_needs_a_second_block():
    with pytest.raises(ValueError, match="`config` is a FirstBlockCacheConfig, but this decoder has a single block"):
        make_decoder(num_layers=1).enable_cache(diffusers.FirstBlockCacheConfig())


# Adapters


def adapted(seed=0, rank=2, alpha=2, name="default", decoder=None, targets=("to_q", "gate_proj", "modulation")):
    peft = pytest.importorskip("peft")
    decoder = decoder or make_decoder()
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=False)
    decoder.add_adapter(config, name)
    return decoder


def test_an_adapter_is_saved_loaded_and_swapped(tmp_path):
    small, large = adapted(0), adapted(1, rank=5, alpha=3)
    for name, decoder in [("small", small), ("large", large)]:
        decoder.save_lora_adapter(tmp_path / name)
    assert not torch.allclose(velocity(small), velocity(make_decoder()))

    decoder = make_decoder()
    decoder.enable_lora_hotswap(target_rank=8)
    decoder.load_lora_adapter(tmp_path / "small", adapter_name="style")
    torch.testing.assert_close(velocity(decoder), velocity(small))
    for name, expected in [("large", large), ("small", small)]:
        decoder.load_lora_adapter(tmp_path / name, adapter_name="style", hotswap=True)
        torch.testing.assert_close(velocity(decoder), velocity(expected))


def test_weights_of_adapters_add_up():
    decoder = adapted(1, name="b", decoder=adapted(0, name="a"))
    for weights, expected in [([1.0, 0.0], adapted(0)), ([0.0, 1.0], adapted(1)), ([0.0, 0.0], make_decoder())]:
        decoder.set_adapters(["a", "b"], weights)
        torch.testing.assert_close(velocity(decoder), velocity(expected))


def test_a_merged_adapter_gives_the_same_and_can_be_removed():
    decoder, expected = adapted(), velocity(adapted())
    decoder.fuse_lora()
    torch.testing.assert_close(velocity(decoder), expected, atol=1e-5, rtol=1e-5)
    decoder.unfuse_lora()
    torch.testing.assert_close(velocity(decoder), expected, atol=1e-5, rtol=1e-5)
    decoder.fuse_lora()
    decoder.unload_lora()
    torch.testing.assert_close(velocity(decoder), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("names", ["b", ["a", "b"], ["default"]])
def test_unknown_adapters_are_refused(names):
    decoder = adapted(name="a")
    with pytest.raises(ValueError, match=r"`adapter_names` has '(b|default)'.*adapters are \['a'\]"):
        decoder.set_adapters(names)


def test_a_prefix_that_no_tensor_has_is_refused(tmp_path):
    adapted().save_lora_adapter(tmp_path)
    with pytest.raises(ValueError, match="`prefix` is 'transformer'"):
        make_decoder().load_lora_adapter(tmp_path, prefix="transformer")


def test_a_decoder_with_adapters_is_not_saved_whole(tmp_path):
    decoder = adapted()
    with pytest.raises(ValueError, match="save_lora_adapter"):
        decoder.save_pretrained(tmp_path)
    decoder.fuse_lora()
    decoder.unload_lora()
    decoder.save_pretrained(tmp_path)
    torch.testing.assert_close(velocity(FlexTokFlowDecoder.from_pretrained(tmp_path)), velocity(decoder))


def test_layers_with_adapters_are_not_packed():
    decoder = adapted(targets=["to_q"])
    packed = PackedWeights(decoder, num_calls=100).layers
    assert not packed.keys() & {block.attention.to_q.base_layer for block in decoder.transformer_blocks}
