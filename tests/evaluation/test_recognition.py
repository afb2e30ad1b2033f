"""Baselines of equal bits and recognition among many originals, on images whose answers are known."""

import pytest
import torch

from flextok_hf.evaluation.options import ReconstructionOptions
from flextok_hf.evaluation.recognition import Candidates, color_thumbnails, edge_maps
from flextok_hf.evaluation.thumbnails import code_as_thumbnails, thumbnail_bits, thumbnail_size
from flextok_hf.utils.measures import peak_signal_to_noise


@pytest.mark.parametrize(
    ("bits", "size"),
    [(1, (1, 1)), (12, (1, 1)), (12.01, (1, 2)), (192, (4, 4)), (638, (7, 8)), (768, (8, 8)), (3072, (16, 16))],
)
def test_the_thumbnail_is_the_smallest_with_at_least_the_bits(bits, size):
    assert thumbnail_size(bits) == size
    assert thumbnail_bits(size) >= bits


@pytest.mark.parametrize("bits", [0, -1, float("inf"), float("nan")])
def test_bits_that_are_not_positive_are_refused(bits):
    with pytest.raises(ValueError, match="`bits` must be a positive number"):
        thumbnail_size(bits)


def test_an_image_of_one_color_of_the_palette_comes_back_exactly():
    images = torch.tensor([3 / 15, 1.0, 0.0]).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    torch.testing.assert_close(code_as_thumbnails(images, (3, 4)), images)


def test_colors_are_rounded_to_sixteen_values_per_channel():
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    coded = code_as_thumbnails(images, (8, 8))  # not enlarged: exactly the rounded values
    torch.testing.assert_close(coded * 15, (coded * 15).round())
    assert (coded - images).abs().max() <= 1 / 30 + 1e-6


def test_more_pixels_come_closer_to_a_smooth_image():
    slope = torch.linspace(0, 1, 64)
    images = (slope.view(1, 1, 64, 1) * slope.view(1, 1, 1, 64)).expand(1, 3, 64, 64)
    values = [peak_signal_to_noise(code_as_thumbnails(images, (n, n)), images).item() for n in (1, 2, 4, 8)]
    assert values == sorted(values) and values[-1] > 30


def test_a_thumbnail_larger_than_the_images_is_refused():
    with pytest.raises(ValueError, match="`size` must be at most that of the images"):
        code_as_thumbnails(torch.zeros(1, 3, 8, 8), (8, 9))


@pytest.fixture
def originals():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (300, 3, 64, 64), dtype=torch.uint8, generator=generator)


def test_originals_themselves_are_recognized(originals):
    found = Candidates(originals, range(300)).recognize(originals[40:50] / 255, range(40, 50))
    assert all(hits.all() for hits in found.values())


def test_the_images_of_other_rows_are_not_recognized(originals):
    found = Candidates(originals, range(300)).recognize(originals[40:50] / 255, range(41, 51))
    assert not any(hits.any() for hits in found.values())


def test_images_that_are_all_the_same_are_not_recognized(originals):
    gray = torch.full((10, 3, 64, 64), 0.5)
    found = Candidates(originals, range(300)).recognize(gray, range(10))
    assert found["thumbnail"].sum() <= 1 and not found["edges"].any()


def test_a_tie_with_another_original_is_not_recognized(originals):
    candidates = Candidates(torch.cat([originals, originals[:1]]), range(301))
    assert not any(hits.any() for hits in candidates.recognize(originals[:1] / 255, [0]).values())


def test_rows_may_have_gaps(originals):
    found = Candidates(originals[:3], [5, 9, 2]).recognize(originals[1:3] / 255, [9, 2])
    assert all(hits.all() for hits in found.values())


def test_edges_do_not_depend_on_brightness_or_contrast(originals):
    images = originals[:4] / 255
    torch.testing.assert_close(edge_maps(images), edge_maps(0.3 * images + 0.2), atol=1e-5, rtol=1e-4)


def test_edges_see_shapes_that_blurred_colors_have_lost():
    image = torch.zeros(1, 3, 128, 128)
    image[:, :, :, ::16] = 1  # stripes one cell of the thumbnail wide on average
    flat = image.mean().expand_as(image)
    assert (color_thumbnails(image) - color_thumbnails(flat)).abs().max() < 0.1
    assert edge_maps(image).norm() == pytest.approx(1) and edge_maps(flat).norm() == 0


def test_recognition_among_fewer_than_two_is_refused():
    with pytest.raises(ValueError, match="`recognition_among` must be 2 or more"):
        ReconstructionOptions(data="data", output="results", recognition_among=1)
