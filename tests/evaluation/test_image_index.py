"""Search for the most similar real images by color and shape."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from flextok_hf.evaluation.image_index import ImageIndex, gaussian_blur, oriented_gradients, rgb_to_lab


SHAPES = ("ellipse", "rectangle", "triangle", "cross")
COLORS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 70, 220), "yellow": (240, 200, 40)}


def draw_shape(shape, color, size=48):
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    low, high, middle = size // 6, size - size // 6, size // 2
    if shape == "ellipse":
        draw.ellipse((low, low, high, high), fill=color)
    elif shape == "rectangle":
        draw.rectangle((low, low, high, high), fill=color)
    elif shape == "triangle":
        draw.polygon([(middle, low), (low, high), (high, high)], fill=color)
    else:
        draw.line((low, low, high, high), fill=color, width=size // 6)
        draw.line((low, high, high, low), fill=color, width=size // 6)
    return image


def stack_images(images):
    arrays = [np.asarray(image, dtype=np.float32) / 255 for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def images():
    return stack_images([draw_shape(shape, color) for shape in SHAPES for color in COLORS.values()])


@pytest.fixture(scope="module")
def index(images):
    return ImageIndex(images)


@pytest.mark.parametrize(
    "distort",
    [
        pytest.param(lambda x: x, id="none"),
        pytest.param(lambda x: x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), id="noise"),
        pytest.param(lambda x: gaussian_blur(x, 2.0), id="blur"),
        pytest.param(lambda x: x.roll((2, 2), (2, 3)), id="shift"),
        pytest.param(lambda x: 0.5 + 0.8 * (x - 0.5), id="contrast"),
    ],
)
def test_a_damaged_image_finds_its_original(index, images, distort):
    _, neighbors = index.search(distort(images).clamp(0, 1), count=1)
    assert neighbors[:, 0].tolist() == list(range(len(images)))


def test_two_unrelated_images_have_distance_one(index):
    assert torch.pdist(index.features).square().mean().item() == pytest.approx(1, abs=1e-3)


def test_an_image_has_distance_zero_to_itself(index, images):
    distances, _ = index.search(images, count=1)
    assert distances.max().item() == 0
    assert index.distance_between(images, images).max().item() == 0


def test_an_excluded_image_is_not_found(index, images):
    leave_out = torch.arange(len(images))
    _, neighbors = index.search(images, count=5, leave_out=leave_out)
    assert not (neighbors == leave_out[:, None]).any()


def test_images_of_another_size_can_be_searched(index):
    larger = stack_images([draw_shape(shape, COLORS["blue"], size=96) for shape in SHAPES])
    _, neighbors = index.search(larger, count=1)
    blue = list(COLORS).index("blue")
    assert neighbors[:, 0].tolist() == [len(COLORS) * number + blue for number in range(len(SHAPES))]


def test_an_index_of_equal_images_is_refused():
    with pytest.raises(ValueError, match="All `images` are the same"):
        ImageIndex(torch.ones(3, 3, 48, 48))


def test_an_index_of_one_image_is_refused():
    with pytest.raises(ValueError, match="at least 2 reference images, got 1"):
        ImageIndex(torch.rand(1, 3, 48, 48))


def test_lab_of_white_black_and_red_match_published_values():
    colors = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0]]).T.reshape(1, 3, 1, 3)
    expected = torch.tensor([[100.0, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20]]).T.reshape(1, 3, 1, 3)
    torch.testing.assert_close(rgb_to_lab(colors), expected, atol=0.05, rtol=0)


def test_an_edge_is_counted_in_its_own_orientation():
    image = torch.zeros(1, 3, 16, 16)
    image[..., 8:] = 1  # a vertical edge: the gradient points along the first orientation
    histogram = oriented_gradients(image, cell=8, orientations=4).view(4, 4)  # orientations, cells
    assert (histogram[0] > 0).all() and (histogram[1:] == 0).all()


def test_more_damage_increases_the_distance(index, images):
    light, heavy = gaussian_blur(images, 1.0), gaussian_blur(images, 3.0)
    assert (index.distance_between(heavy, images) > index.distance_between(light, images)).all()


def test_the_search_matches_an_exhaustive_comparison(index, images):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    damaged = (images + 0.4 * noise).clamp(0, 1)
    everything = torch.cdist(
        index.describe(damaged), index.features, compute_mode="donot_use_mm_for_euclid_dist"
    ).sort(dim=1)
    distances, neighbors = index.search(damaged, count=3)
    torch.testing.assert_close(distances, everything.values[:, :3])
    assert neighbors.equal(everything.indices[:, :3])


def test_uint8_images_have_the_same_features_as_floats(index, images):
    pixels = (images * 255).round().byte()
    torch.testing.assert_close(index.describe(pixels), index.describe(pixels.float() / 255))
