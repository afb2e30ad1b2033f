"""The cache of `generate`: a dynamic cache that is not copied at every step."""

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from flextok_hf.models.prior_cache import PreallocatedLayer


def states(length, seed, batch_size=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch_size, 2, length, 4, generator=generator) for _ in range(2)]


def assert_equal(layer, reference):
    assert layer.get_seq_length() == reference.get_seq_length()
    assert layer.keys.equal(reference.keys) and layer.values.equal(reference.values)


@pytest.mark.parametrize("capacity", [1, 4, 5, 20])
def test_it_matches_a_dynamic_layer(capacity):
    layer, reference = PreallocatedLayer(capacity), DynamicLayer()
    for step, length in enumerate((3, 1, 1, 2)):
        keys, values = layer.update(*states(length, step))
        expected = reference.update(*states(length, step))
        assert keys.equal(expected[0]) and values.equal(expected[1])
        assert_equal(layer, reference)


def test_it_is_not_copied_while_it_fits():
    layer = PreallocatedLayer(8)
    places = {layer.update(*states(1, step))[0].data_ptr() for step in range(8)}
    assert len(places) == 1


def test_it_is_rarely_copied_when_it_grows():
    layer = PreallocatedLayer(2)
    places = [layer.update(*states(1, step))[0].data_ptr() for step in range(32)]
    assert sum(place != next_place for place, next_place in zip(places, places[1:])) == 4  # at 2, 4, 8 and 16


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
        lambda layer: layer.crop(-2),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([0, 2])),
        lambda layer: layer.batch_select_indices(torch.tensor([0])),
    ],
)
def test_it_continues_after_changes_by_beam_search_and_similar_methods(change):
    layer, reference = PreallocatedLayer(10), DynamicLayer()
    for each in (layer, reference):
        each.update(*states(4, seed=0))
        change(each)
        each.update(*states(1, seed=1, batch_size=each.keys.shape[0]))
        each.update(*states(1, seed=2, batch_size=each.keys.shape[0]))
    assert_equal(layer, reference)
