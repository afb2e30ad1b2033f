"""Aspect ratio buckets: their shapes, batches of one shape, and resuming at any batch."""

import itertools
import json
from collections import Counter
from io import BytesIO

import datasets
import pytest
import torch
from image_rows import png
from PIL import Image

from flextok_hf.data.batches import EpochBatchSampler, TrainingBatches, build_dataloader
from flextok_hf.data.buckets import ShapeStacks, bucket_shapes, nearest_shape
from flextok_hf.data.samples import ImageTransform
from flextok_hf.data.training_dataset import load_training_dataset


SHAPES = ((16, 16), (12, 20), (20, 12))
TRANSFORM = ImageTransform(16, shapes=SHAPES)
SIZES = ((16, 16), (33, 20), (20, 33), (17, 16))  # width, height
OF_SIZES = ((16, 16), (12, 20), (20, 12), (16, 16))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_mixed(path, num_rows=24, damaged=(), name="a"):
    """Write rows of four sizes in turn, whose images have the row number as shade."""
    contents = [b"junk" if row in damaged else png(row, SIZES[row % 4]) for row in range(num_rows)]
    features = datasets.Features({"image": datasets.Image()})
    path.mkdir(exist_ok=True)
    rows = {"image": [{"bytes": content, "path": None} for content in contents]}
    datasets.Dataset.from_dict(rows, features).to_parquet(str(path / f"{name}.parquet"))
    return path


def shades(batch):
    return ((batch["pixel_values"][:, 0, 0, 0] / 2 + 0.5) * 255).round().long().tolist()


def take(batches, count):
    return list(itertools.islice(batches, count))


def same(first, second):
    pairs = zip(first, second, strict=True)
    return all(one["pixel_values"].equal(other["pixel_values"]) for one, other in pairs)


# Shapes


@pytest.mark.parametrize("area, unit", [(32 * 32, 4), (64 * 64, 8), (256 * 256, 16), (384 * 384, 16), (90_000, 8)])
def test_shapes_have_about_the_area_and_whole_patches(area, unit):
    shapes = bucket_shapes(area, unit)
    assert len(shapes) >= 5 and len(set(shapes)) == len(shapes)
    for height, width in shapes:
        assert height % unit == width % unit == 0 and max(height, width) <= 4 * min(height, width)
        assert 0.85 * area <= height * width <= area
        assert (width, height) in shapes


@pytest.mark.parametrize("side, unit", [(16, 4), (32, 4), (64, 8), (256, 16), (1024, 1)])
def test_the_square_of_the_area_is_one_of_the_shapes(side, unit):
    assert (side, side) in bucket_shapes(side**2, unit)
    assert bucket_shapes(side**2, unit, only_square=True) == ((side, side),)


@pytest.mark.parametrize("area, unit, expected", [(16, 4, {(4, 4)}), (100, 10, {(10, 10)}), (32, 4, {(4, 8), (8, 4)})])
def test_small_areas_have_few_shapes(area, unit, expected):
    assert set(bucket_shapes(area, unit)) == expected


@pytest.mark.parametrize("only_square", [False, True])
def test_an_area_below_one_patch_is_refused(only_square):
    with pytest.raises(ValueError, match="`max_area` is 63, but sides are multiples of 8 pixels: set 64 or more"):
        bucket_shapes(63, 8, only_square)


@pytest.mark.parametrize(
    "size, expected",
    [
        ((100, 100), (16, 16)),
        ((1, 900), (12, 20)),
        ((900, 1), (20, 12)),
        ((9, 16), (12, 20)),
        ((1000, 1100), (16, 16)),
    ],
)
def test_an_image_goes_to_the_shape_with_the_closest_proportions(size, expected):
    assert nearest_shape(size, SHAPES) == expected


# Images


@pytest.mark.parametrize("shape", [*SHAPES, (4, 16), (16, 4)])
def test_random_crops_have_the_proportions_of_the_shape(shape):
    transform = ImageTransform(16, random_crop=True, min_crop_scale=0.5)
    generator = torch.Generator().manual_seed(0)
    for width, height in ((200, 120), (120, 200), (160, 160)):
        boxes = [transform.draw_box(width, height, generator, shape) for _ in range(50)]
        assert len(set(boxes)) > 10
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert (right - left) / (bottom - top) == pytest.approx(shape[1] / shape[0], rel=0.1)


def test_rows_have_the_shape_of_their_images_however_they_are_kept(tmp_path):
    folder = write_mixed(tmp_path / "data")
    plain = load_training_dataset(folder, transform=TRANSFORM, num_workers=2)
    cached = load_training_dataset(folder, transform=TRANSFORM, cache_in_memory=True)
    stream = load_training_dataset(folder, transform=TRANSFORM, streaming=True, shuffle_buffer=0)
    for row, sample in enumerate(stream):
        pixel_values = sample["pixel_values"]
        assert pixel_values.shape[1:] == plain.row_shapes[row] == cached.row_shapes[row] == OF_SIZES[row % 4]
        assert pixel_values.equal(plain[row, 0]["pixel_values"]) and pixel_values.equal(cached[row, 0]["pixel_values"])


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_turned_photos_go_to_the_bucket_of_the_upright_image(tmp_path, orientation):
    exif, content = Image.Exif(), BytesIO()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 24)).save(content, format="JPEG", exif=exif)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpg").write_bytes(content.getvalue())
    dataset = load_training_dataset(tmp_path / "images", transform=TRANSFORM)
    assert dataset.row_shapes == [(12, 20) if orientation in (1, 3) else (20, 12)]
    assert TRANSFORM(dataset.rows[0]["image"] and Image.open(content)).shape[1:] == dataset.row_shapes[0]


def test_an_unreadable_row_is_replaced_in_its_own_shape(tmp_path):
    folder = write_mixed(tmp_path / "data", 8, damaged=(1, 4))
    dataset = load_training_dataset(folder, transform=TRANSFORM)
    assert dataset.row_shapes[1] == (16, 16)  # unknown
    dataset.row_shapes[1] = (12, 20)  # as if the header were whole
    sample = dataset[1, 0]
    assert sample["pixel_values"].shape[1:] == (12, 20) and set(dataset.skipped) == {1}
    assert shades({"pixel_values": sample["pixel_values"][None]}) == [2]


def test_stacks_return_each_tensor():
    tensors = [torch.full((3, *OF_SIZES[number % 4]), number) for number in range(9)]
    stacks = ShapeStacks(tensors)
    assert len(stacks) == 9 and len(stacks.stacks) == 3
    assert all(stacks[number].equal(tensor) for number, tensor in enumerate(tensors))


# Batches


BUCKETS = [(16, 16)] * 30 + [(12, 20)] * 17 + [(20, 12)] * 3


def test_every_batch_is_of_one_bucket_and_no_row_comes_twice():
    sampler = EpochBatchSampler(50, 4, True, 0, True, buckets=BUCKETS)
    orders = []
    for epoch in range(3):
        sampler.set_position(epoch)
        batches = [[row for row, _ in batch] for batch in sampler]
        assert len(batches) == len(sampler) == 7 + 4
        assert all(len({BUCKETS[row] for row in batch}) == 1 for batch in batches)
        assert max(Counter(row for batch in batches for row in batch).values()) == 1
        orders.append([BUCKETS[batch[0]] for batch in batches])
    assert orders[0] != orders[1] != orders[2] and orders[0] != sorted(orders[0])


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_take_slices_of_the_same_batches(num_processes, drop_last):
    whole = list(EpochBatchSampler(50, 2 * num_processes, True, 0, drop_last, buckets=BUCKETS))
    shares = [
        list(EpochBatchSampler(50, 2, True, 0, drop_last, process, num_processes, BUCKETS))
        for process in range(num_processes)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
        joined = [row for part in parts for row in part]
        assert joined[: len(batch)] == batch and all(len(part) == 2 for part in parts)
        assert len({BUCKETS[row] for row, _ in joined}) == 1


def test_a_sampler_without_buckets_keeps_its_order():
    one_bucket = EpochBatchSampler(50, 4, False, 0, True, buckets=[(1, 1)] * 50)
    assert list(one_bucket) == list(EpochBatchSampler(50, 4, False, 0, True))


def test_buckets_without_a_full_batch_are_an_error(tmp_path):
    dataset = load_training_dataset(write_mixed(tmp_path / "data", 8), transform=TRANSFORM)
    with pytest.raises(ValueError, match="8 rows do not fill one batch of `batch_size` 5 in any bucket on 1"):
        build_dataloader(dataset, 5)


@pytest.mark.parametrize("cached", [False, True])
def test_training_in_buckets_resumes_at_any_batch(tmp_path, cached):
    folder = write_mixed(tmp_path / "data", damaged=(6,))
    transform = ImageTransform(16, random_flip=True, shapes=SHAPES)

    def batches(first_batch=0, num_workers=0):
        dataset = load_training_dataset(folder, transform=transform, cache_in_memory=cached)
        return TrainingBatches(build_dataloader(dataset, 3, seed=1, num_workers=num_workers)).start(first_batch)

    whole = take(batches(), 20)
    assert {batch["pixel_values"].shape[2:] for batch in whole} == set(SHAPES)
    for first_batch in (1, 6, 7, 11):
        assert same(take(batches(first_batch), 20 - first_batch), whole[first_batch:])
    assert same(take(batches(3, num_workers=2), 17), whole[3:])


STREAMS = {
    "one reader": {},
    "two readers": {"num_workers": 2},
    "in order": {"shuffle_buffer": 0},
    "small blocks": {"shuffle_buffer": 3},
    "second of two processes with two readers": {"process_index": 1, "num_processes": 2, "num_workers": 2},
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_in_buckets_resumes_after_any_batch(tmp_path, name):
    for number, count in enumerate((25, 14, 19, 22)):
        folder = write_mixed(tmp_path / "data", count, damaged=(number,), name=f"train-{number}")
    options = dict(STREAMS[name])
    data = {"streaming": True, "shuffle_buffer": options.pop("shuffle_buffer", 7)}
    transform = ImageTransform(16, random_flip=True, shapes=SHAPES)

    def batches():
        dataset = load_training_dataset(folder, transform=transform, **data)
        return TrainingBatches(build_dataloader(dataset, 3, seed=1, **options))

    source, whole, states = batches(), [], []
    for batch in itertools.islice(source.start(), 30):
        whole.append(batch)
        states.append(json.dumps(source.state()))
    assert {batch["pixel_values"].shape[2:] for batch in whole} == set(SHAPES)
    assert any('"waiting"' in state for state in states)
    for stop in range(30) if name == "small blocks" else (0, 6, 13, 19, 28):
        resumed = batches().start(state=json.loads(states[stop]))
        assert same(take(resumed, 29 - stop), whole[stop + 1 :])


def test_a_stream_in_buckets_yields_every_row_once(tmp_path):
    folder = write_mixed(tmp_path / "data", 24)
    dataset = load_training_dataset(folder, transform=TRANSFORM, streaming=True, shuffle_buffer=5)
    batches = list(build_dataloader(dataset, 5, drop_last=False))
    assert sorted(shade for batch in batches for shade in shades(batch)) == list(range(24))
