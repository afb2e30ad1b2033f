"""Figures agree with independent implementations and do not depend on how the data is split."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import linalg
from skimage import metrics as skimage_metrics
from torchmetrics.image.inception import InceptionScore

from flextok_hf.evaluation.accumulators import Checksum, GroupedMean, MeanWithInterval, StreamedMedian
from flextok_hf.evaluation.distributions import (
    FeatureMoments,
    FeatureReservoir,
    StreamedScore,
    frechet_distance,
    precision_and_recall,
)
from flextok_hf.evaluation.image_measures import PLAIN_MEASURES, load_lpips, measure_images
from flextok_hf.evaluation.images import image_checksums
from flextok_hf.evaluation.intervals import NUM_GROUPS, jackknife, wilson_interval
from flextok_hf.models.packed_linear import PACKED
from flextok_hf.utils import tuning
from flextok_hf.utils.flops import FlopCounter


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


REAL = torch.randn(300, 12, generator=seeded(1)) * torch.linspace(0.2, 3, 12) + 1
FAKE = torch.randn(260, 12, generator=seeded(2)) @ torch.randn(12, 12, generator=seeded(3)) / 3
LOGITS = torch.randn(90, 7, generator=seeded(4)) * 3
IMAGES = torch.rand(6, 3, 40, 32, generator=seeded(5))
ORIGINALS = (IMAGES + 0.1 * torch.randn(IMAGES.shape, generator=seeded(6))).clamp(0, 1)


def filled(metric, values, batch_size=64):
    for start in range(0, len(values), batch_size):
        part = values[start : start + batch_size]
        metric.update(part, range(start, start + len(part)))
    return metric


def frechet(real=REAL, fake=FAKE, is_paired=False, batch_size=64):
    moments = [filled(FeatureMoments(12), features, batch_size) for features in (real, fake)]
    return frechet_distance(*moments, is_paired)


def scipy_frechet(real, fake):
    real, fake = real.double().numpy(), fake.double().numpy()
    covariances = [np.cov(features, rowvar=False) for features in (real, fake)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    distance = ((real.mean(0) - fake.mean(0)) ** 2).sum()
    return distance + np.trace(covariances[0] + covariances[1] - 2 * root)


def test_the_frechet_distance_matches_scipy():
    assert frechet()["value"] == pytest.approx(scipy_frechet(REAL, FAKE), rel=1e-6)


def test_the_frechet_distance_of_shifted_features_is_the_square_of_the_shift():
    assert frechet(REAL, REAL + 2)["value"] == pytest.approx(12 * 4, rel=1e-6)
    assert frechet(REAL, REAL)["value"] == pytest.approx(0, abs=1e-5)


def test_the_jackknife_leaves_out_the_samples_of_a_group():
    kept = torch.arange(len(FAKE)) % NUM_GROUPS != 3
    moments = filled(FeatureMoments(12), FAKE)
    count, total, products = moments.without_group(3)
    assert count == kept.sum()
    torch.testing.assert_close(total, FAKE[kept].double().sum(dim=0))
    torch.testing.assert_close(products, FAKE[kept].double().T @ FAKE[kept].double())


def test_the_jackknife_of_a_mean_has_its_standard_error():
    values = torch.randn(800, generator=seeded(), dtype=torch.float64)
    groups = torch.arange(800) % NUM_GROUPS
    result = jackknife(lambda group: values[groups != (-1 if group is None else group)].mean().item())
    half_width = (result["high"] - result["low"]) / 2
    assert half_width == pytest.approx(2.36 * values.std().item() / math.sqrt(800), rel=0.5)


def test_a_frechet_distance_of_fewer_samples_is_larger_and_has_a_narrow_interval():
    truth = frechet(*(torch.randn(20_000, 12, generator=seeded(seed)) for seed in (10, 11)))["value"]
    result = frechet(*(torch.randn(2_000, 12, generator=seeded(seed)) for seed in (12, 13)))
    assert 0 < truth < result["value"]  # fewer samples, larger distance: the known bias
    assert result["low"] < result["value"] < result["high"]
    assert result["high"] - result["low"] < result["value"]


def test_a_frechet_distance_of_too_few_images_is_refused():
    with pytest.raises(ValueError, match="of 12 features needs more than 12 images, got 12"):
        frechet(REAL, FAKE[:12])


def test_the_score_matches_torchmetrics():
    class Logits(torch.nn.Module):
        def forward(self, features):
            return features

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchmetrics warns that it keeps all features
        expected = InceptionScore(Logits(), splits=1)
    expected.update(LOGITS)
    result = filled(StreamedScore(7), LOGITS.log_softmax(dim=1)).compute()
    assert result["value"] == pytest.approx(expected.compute()[0].item(), rel=1e-5)
    assert result["low"] < result["value"] < result["high"]


def test_the_score_is_one_for_a_uniform_classifier_and_the_number_of_classes_for_a_perfect_one():
    certain = torch.full((70, 7), -1e4).scatter_(1, (torch.arange(70) % 7).unsqueeze(1), 1e4).log_softmax(dim=1)
    assert filled(StreamedScore(7), torch.zeros(70, 7).log_softmax(dim=1)).compute()["value"] == pytest.approx(1)
    assert filled(StreamedScore(7), certain).compute()["value"] == pytest.approx(7)


def brute_force_share(samples, manifold, k):
    samples, manifold = samples.double().numpy(), manifold.double().numpy()
    radii = [sorted(np.linalg.norm(manifold - center, axis=1))[k] for center in manifold]
    inside = [
        any(np.linalg.norm(sample - center) <= radius for center, radius in zip(manifold, radii)) for sample in samples
    ]
    return sum(inside) / len(inside)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_match_brute_force(k):
    real, fake = REAL[:80], FAKE[:70] + 1
    precision, recall = precision_and_recall(real, fake, k)
    assert 0 < precision < 1 and 0 < recall < 1
    assert precision == pytest.approx(brute_force_share(fake, real, k), abs=1e-12)
    assert recall == pytest.approx(brute_force_share(real, fake, k), abs=1e-12)


def test_precision_and_recall_of_too_few_images_are_refused():
    with pytest.raises(ValueError, match="need more than 3 images per set, got 300 real and 3 generated"):
        precision_and_recall(REAL, FAKE[:3])


@pytest.mark.parametrize("batch_size", [1, 7, 260])
def test_a_reservoir_keeps_the_same_samples_regardless_of_the_batches(batch_size):
    expected = filled(FeatureReservoir(12, size=20), FAKE, 64).compute()
    kept = filled(FeatureReservoir(12, size=20), FAKE, batch_size).compute()
    assert kept.shape == (20, 12)
    assert kept.equal(expected)


def test_a_reservoir_draws_uniformly():
    numbers = torch.arange(2000.0).unsqueeze(1)
    kept = filled(FeatureReservoir(1, size=400), numbers).compute()
    assert kept.mean().item() == pytest.approx(1000, abs=4 * 577 / 20)


def test_a_reservoir_larger_than_the_data_keeps_all():
    kept = filled(FeatureReservoir(12), FAKE).compute()
    assert kept.sort(dim=0).values.equal(FAKE.sort(dim=0).values)


def test_psnr_and_ssim_match_scikit_image():
    values = measure_images(PLAIN_MEASURES, IMAGES, ORIGINALS)
    pairs = list(zip(IMAGES.double().numpy(), ORIGINALS.double().numpy()))
    psnr = [skimage_metrics.peak_signal_noise_ratio(original, image, data_range=1) for image, original in pairs]
    np.testing.assert_allclose(values["psnr_db"], psnr, rtol=1e-5)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    ssim = [skimage_metrics.structural_similarity(*pair, channel_axis=0, data_range=1, **window) for pair in pairs]
    np.testing.assert_allclose(values["ssim"], ssim, atol=1e-5)
    np.testing.assert_allclose(values["mae"], [np.abs(x - y).mean() for x, y in pairs], rtol=1e-5)


def test_equal_images_have_the_best_values():
    values = measure_images(PLAIN_MEASURES, IMAGES, IMAGES)
    assert values["psnr_db"].tolist() == [100] * 6 and values["mae"].tolist() == [0] * 6
    torch.testing.assert_close(values["ssim"], torch.ones(6))


def test_measures_of_an_image_do_not_depend_on_its_batch():
    together = measure_images(PLAIN_MEASURES, IMAGES, ORIGINALS)
    alone = [measure_images(PLAIN_MEASURES, IMAGES[i : i + 1], ORIGINALS[i : i + 1]) for i in range(6)]
    for name, values in together.items():
        torch.testing.assert_close(values, torch.cat([one[name] for one in alone]), msg=name)


@pytest.mark.parametrize("shape", [(6, 3, 32, 40), (6, 1, 40, 32), (5, 3, 40, 32)])
def test_images_of_another_shape_than_their_originals_are_refused(shape):
    with pytest.raises(ValueError, match=r"must both have the shape \(batch, 3, height, width\)"):
        measure_images(PLAIN_MEASURES, torch.zeros(shape), ORIGINALS)


def test_the_error_for_a_measure_without_its_package_names_it():
    pytest.importorskip("torchmetrics")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="`lpips` needs torchvision: `pip install torchvision`"):
            load_lpips("cpu")


def test_the_bootstrap_interval_is_near_the_normal_one():
    values = 10 + 2 * torch.randn(400, generator=seeded())
    result = filled(MeanWithInterval(), values).compute()
    half_width = 1.96 * values.std().item() / 20
    assert result["mean"] == pytest.approx(values.mean().item())
    assert result["low"] == pytest.approx(values.mean().item() - half_width, abs=0.06)
    assert result["high"] == pytest.approx(values.mean().item() + half_width, abs=0.06)


METRICS = {
    "mean": (MeanWithInterval, FAKE[:, 0]),
    "moments": (lambda: FeatureMoments(12), FAKE),
    "score": (lambda: StreamedScore(7), LOGITS.log_softmax(dim=1)),
    "reservoir": (lambda: FeatureReservoir(12, size=30), FAKE),
}


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("num_parts", [2, 3])
def test_merged_sums_of_parts_equal_the_sums_of_all(kind, num_parts):
    make, values = METRICS[kind]
    whole, first = filled(make(), values), make()
    for part in range(num_parts):
        chosen = range(part, len(values), num_parts)
        metric = make()
        metric.update(values[list(chosen)], chosen)
        first.merge_state(metric)
    if kind == "reservoir":
        assert first.compute().equal(whole.compute())
    for name, state in whole.state_dict().items():
        torch.testing.assert_close(getattr(first, name), state, rtol=1e-9, atol=1e-9)


def test_a_streamed_median_is_accurate_to_half_a_bin():
    values = torch.rand(1001, generator=seeded()) * 2
    metric = StreamedMedian()
    for part in values.split(100):
        metric.update(part)
    assert metric.compute() == pytest.approx(values.median().item(), abs=StreamedMedian.BIN)


def test_the_mean_of_a_group_is_that_of_its_samples():
    values = torch.arange(12.0).view(6, 2)
    metric = GroupedMean(["a", "b", "unused"], 2)
    metric.update(values[:4], ["a", "b", "a", "b"])
    metric.update(values[4:], ["a", "a"])
    assert metric.compute() == {"a": (4, [5.5, 6.5]), "b": (2, [4.0, 5.0])}


def test_a_checksum_identifies_a_set_of_images_in_any_order():
    pixels = (IMAGES * 255).byte()

    def checksum(*parts):
        metric = Checksum()
        for part in parts:
            metric.update(image_checksums(part))
        return metric.compute()

    assert checksum(pixels) == checksum(pixels[3:], pixels[:3])
    changed = pixels.clone()
    changed[2, 1, 5, 5] += 1
    assert checksum(changed) != checksum(pixels)


@pytest.mark.parametrize(
    ("successes", "trials", "published"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_the_wilson_interval_matches_published_values(successes, trials, published):
    # Newcombe (1998), Statistics in Medicine 17:857-872, table I, method 3
    interval = wilson_interval(successes, trials)
    assert tuple(round(bound, 4) for bound in interval) == published


@pytest.mark.parametrize(("successes", "bounds"), [(0, (0, 0.5)), (10, (0.5, 1))])
def test_the_wilson_interval_stays_within_zero_and_one(successes, bounds):
    low, high = wilson_interval(successes, 10)
    assert bounds[0] <= low < high <= bounds[1]


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_counts_are_refused(successes, trials):
    with pytest.raises(ValueError, match="`successes` must lie in"):
        wilson_interval(successes, trials)


@torch.no_grad()
def test_every_step_counts_the_same_operations_packed_or_not(tiny_tokenizer_pipeline, take):
    counts = []
    for num_steps, way in ((2, tuning.LIBRARY), (3, tuning.LIBRARY), (4, PACKED)):
        take("product", way)
        with FlopCounter() as counter:
            tiny_tokenizer_pipeline.detokenize(torch.zeros(1, 2, dtype=torch.long), num_inference_steps=num_steps)
        counts.append(counter.total)
    assert counts[2] - counts[1] == counts[1] - counts[0] > 0
