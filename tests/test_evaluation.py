"""The measures themselves: feature space, intervals, picture quality, hashes, and the token-count loops."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from flextok_hf import evaluation


SHAPES = ("ellipse", "rectangle", "triangle", "cross")
COLORS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 70, 220), "yellow": (240, 200, 40)}


def draw_shape(shape, color, size=48):
    picture = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(picture)
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
    return picture


@pytest.fixture(scope="module")
def pictures():
    return evaluation.stack_pictures([draw_shape(shape, color) for shape in SHAPES for color in COLORS.values()])


@pytest.fixture(scope="module")
def index(pictures):
    names = [f"{color} {shape}" for shape in SHAPES for color in COLORS]
    return evaluation.PictureIndex(pictures, names, ["plain"] * len(names))


@pytest.mark.parametrize(
    "distort",
    [
        pytest.param(lambda x: x, id="none"),
        pytest.param(lambda x: x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), id="noise"),
        pytest.param(lambda x: evaluation.gaussian_blur(x, 2.0), id="blur"),
        pytest.param(lambda x: x.roll((2, 2), (2, 3)), id="shift"),
        pytest.param(lambda x: 0.5 + 0.8 * (x - 0.5), id="contrast"),
    ],
)
def test_a_damaged_picture_finds_its_own_name(index, pictures, distort):
    _, neighbors = index.search(distort(pictures).clamp(0, 1), count=1)
    assert neighbors[:, 0].tolist() == list(range(len(pictures)))


def test_distances_are_in_units_of_two_unrelated_pictures(index):
    assert torch.pdist(index.features).square().mean().item() == pytest.approx(1, abs=1e-3)


def test_a_picture_has_distance_zero_to_itself(index, pictures):
    distances, _ = index.search(pictures, count=1)
    assert distances.max().item() == 0
    assert evaluation.distance_between(index, pictures, pictures).max().item() == 0


def test_a_picture_left_out_is_not_found(index, pictures):
    leave_out = torch.arange(len(pictures))
    _, neighbors = index.search(pictures, count=5, leave_out=leave_out)
    assert not (neighbors == leave_out[:, None]).any()


def test_pictures_of_another_size_can_be_searched(index):
    larger = evaluation.stack_pictures([draw_shape(shape, COLORS["blue"], size=96) for shape in SHAPES])
    _, neighbors = index.search(larger, count=1)
    assert [index.names[i] for i in neighbors[:, 0].tolist()] == [f"blue {shape}" for shape in SHAPES]


def test_an_index_of_equal_pictures_is_refused():
    with pytest.raises(ValueError, match="All `pictures` are the same"):
        evaluation.PictureIndex(torch.ones(3, 3, 48, 48), ["a", "b", "c"], ["x"] * 3)


def test_pictures_of_different_sizes_are_not_stacked():
    with pytest.raises(ValueError, match="must be of one size"):
        evaluation.stack_pictures([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 5))])


def test_lab_of_white_black_and_red_are_the_published_values():
    colors = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0]]).T.reshape(1, 3, 1, 3)
    expected = torch.tensor([[100.0, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20]]).T.reshape(1, 3, 1, 3)
    torch.testing.assert_close(evaluation.rgb_to_lab(colors), expected, atol=0.05, rtol=0)


def test_an_edge_counts_for_its_own_orientation():
    picture = torch.zeros(1, 3, 16, 16)
    picture[..., 8:] = 1  # a vertical edge: the gradient points along the first orientation
    histogram = evaluation.oriented_gradients(picture, cell=8, orientations=4).view(4, 4)  # orientations, cells
    assert (histogram[0] > 0).all() and (histogram[1:] == 0).all()


def test_psnr_of_a_uniform_error_is_its_logarithm():
    originals = torch.full((2, 3, 8, 8), 0.5)
    values = evaluation.peak_signal_to_noise(originals + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1), originals)
    torch.testing.assert_close(values, torch.tensor([20.0, 40.0]))


def test_ssim_of_equal_pictures_is_one(pictures):
    torch.testing.assert_close(evaluation.structural_similarity(pictures, pictures), torch.ones(len(pictures)))


def test_ssim_agrees_with_scikit_image(pictures):
    metrics = pytest.importorskip("skimage.metrics")
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    noisy = (pictures + 0.1 * noise).clamp(0, 1)
    expected = [
        metrics.structural_similarity(
            x, y, channel_axis=0, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for x, y in zip(noisy.numpy(), pictures.numpy())
    ]
    values = evaluation.structural_similarity(noisy, pictures)
    np.testing.assert_allclose(values.numpy(), expected, atol=1e-3)


def test_more_damage_is_further_away_by_every_measure(index, pictures):
    light, heavy = evaluation.gaussian_blur(pictures, 1.0), evaluation.gaussian_blur(pictures, 3.0)
    assert (evaluation.peak_signal_to_noise(heavy, pictures) < evaluation.peak_signal_to_noise(light, pictures)).all()
    assert (
        evaluation.structural_similarity(heavy, pictures) < evaluation.structural_similarity(light, pictures)
    ).all()
    distances = [evaluation.distance_between(index, damaged, pictures) for damaged in (light, heavy)]
    assert (distances[1] > distances[0]).all()


@pytest.mark.parametrize(
    ("successes", "trials", "published"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_the_wilson_interval_is_the_published_one(successes, trials, published):
    # Newcombe (1998), Statistics in Medicine 17:857-872, table I, method 3
    interval = evaluation.wilson_interval(successes, trials)
    assert tuple(round(bound, 4) for bound in interval) == published


@pytest.mark.parametrize(("successes", "bounds"), [(0, (0, 0.5)), (10, (0.5, 1))])
def test_the_wilson_interval_stays_within_zero_and_one(successes, bounds):
    low, high = evaluation.wilson_interval(successes, 10)
    assert bounds[0] <= low < high <= bounds[1]


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_counts_are_refused(successes, trials):
    with pytest.raises(ValueError, match="`successes` must lie in"):
        evaluation.wilson_interval(successes, trials)


def test_the_bootstrap_interval_is_near_the_normal_one():
    values = np.random.default_rng(0).normal(10, 2, size=400)
    low, high = evaluation.bootstrap_interval(values)
    half_width = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half_width, abs=0.05)
    assert high == pytest.approx(values.mean() + half_width, abs=0.05)


def test_the_bootstrap_interval_repeats_with_its_seed():
    assert evaluation.bootstrap_interval([1.0, 2, 3], seed=1) == evaluation.bootstrap_interval([1.0, 2, 3], seed=1)


def test_the_hash_changes_with_one_weight():
    module = torch.nn.Linear(2, 2)
    before = evaluation.weights_hash({"part": module})
    assert evaluation.weights_hash({"part": module}) == before
    with torch.no_grad():
        module.weight[0, 0] += 1
    assert evaluation.weights_hash({"part": module}) != before


def test_the_hash_reads_half_precision_weights():
    modules = [torch.nn.Linear(2, 2).to(torch.bfloat16) for _ in range(2)]
    assert evaluation.weights_hash({"part": modules[0]}) != evaluation.weights_hash({"part": modules[1]})
