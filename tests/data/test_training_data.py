import errno
import itertools
import json
import logging
import os
import pickle
import tarfile
from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
from image_rows import TRANSFORM, R, png, write_parquet
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from flextok_hf.data.batches import EpochBatchSampler, TrainingBatches, build_dataloader
from flextok_hf.data.columns import Columns
from flextok_hf.data.samples import ImageTransform, collate
from flextok_hf.data.training_dataset import load_training_dataset


TEXT = Columns(caption="text")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` writes out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def shade_of(pixel_values):
    """The shade that was passed to `png`, read back from (3, R, R) or a batch of it."""
    return ((pixel_values[..., 0, 0, 0] / 2 + 0.5) * 255).round().long().tolist()


def same_batches(first, second):
    return len(first) == len(second) and all(
        torch.equal(one["pixel_values"], other["pixel_values"]) and one.get("captions") == other.get("captions")
        for one, other in zip(first, second, strict=True)
    )


def take(batches, count):
    return list(itertools.islice(batches, count))


# Sources


def test_a_parquet_file_gives_batches_with_captions_and_classes(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", text=[f"row {row}" for row in range(10)], label=list(range(10)))
    columns = Columns(caption="text", class_label="label", num_classes=10)
    dataset = load_training_dataset(path, transform=TRANSFORM, columns=columns)
    batch = next(iter(build_dataloader(dataset, 4, shuffle=False)))

    assert batch["pixel_values"].shape == (4, 3, R, R) and batch["pixel_values"].dtype == torch.float32
    assert shade_of(batch["pixel_values"]) == [0, 1, 2, 3]
    assert batch["captions"] == ["row 0", "row 1", "row 2", "row 3"]
    assert batch["class_labels"].tolist() == [0, 1, 2, 3] and batch["class_labels"].dtype == torch.int64


def test_captions_and_classes_are_absent_by_default(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", text=["x"] * 10, label=[0] * 10)
    for cached in (False, True):
        dataset = load_training_dataset(path, transform=TRANSFORM, cache_in_memory=cached)
        assert set(next(iter(build_dataloader(dataset, 4)))) == {"pixel_values"}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_parquet_files_has_splits(tmp_path, streaming):
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", 4)
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", 3)
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", 2)
    for split, count in (("train", 7), ("validation", 2)):
        dataset = load_training_dataset(
            tmp_path / "data", split, transform=TRANSFORM, streaming=streaming, shuffle_buffer=0
        )
        assert len(list(dataset)) == count
    with pytest.raises(ValueError, match="test"):
        load_training_dataset(tmp_path / "data", "test", transform=TRANSFORM, streaming=streaming)


def test_several_parquet_files_are_one_split(tmp_path):
    paths = [write_parquet(tmp_path / f"{name}.parquet", 3) for name in "ab"]
    assert len(load_training_dataset(paths, "validation", transform=TRANSFORM)) == 6


def test_a_folder_of_images_takes_captions_from_its_metadata(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for row in range(3):
        (folder / f"{row}.png").write_bytes(png(row, size=(20, 30)))
    lines = [json.dumps({"file_name": f"{row}.png", "text": f"image {row}"}) for row in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))

    dataset = load_training_dataset(folder, transform=TRANSFORM, columns=Columns(caption="text"))
    assert [(shade_of(sample["pixel_values"]), sample["captions"]) for sample in dataset] == [
        (row, f"image {row}") for row in range(3)
    ]


def test_a_folder_of_class_folders_gives_classes(tmp_path):
    for row, name in enumerate(("cat", "dog")):
        (tmp_path / "animals" / name).mkdir(parents=True)
        (tmp_path / "animals" / name / "one.png").write_bytes(png(row))
    dataset = load_training_dataset(tmp_path / "animals", transform=TRANSFORM, columns=Columns(class_label="label"))
    assert dataset.class_names == ["cat", "dog"]
    assert [sample["class_labels"] for sample in dataset] == [0, 1]


def test_a_folder_saved_to_disk_can_be_loaded(tmp_path):
    rows = datasets.load_dataset("parquet", data_files=str(write_parquet(tmp_path / "a.parquet", 5)), split="train")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved")
    assert len(load_training_dataset(tmp_path / "saved", transform=TRANSFORM)) == 5
    with pytest.raises(ValueError, match="`split` 'validation' is not in .* which has train"):
        load_training_dataset(tmp_path / "saved", "validation", transform=TRANSFORM)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_synthetic_dataset_needs_no_files(tmp_path, streaming):
    dataset = load_training_dataset(
        "synthetic", transform=TRANSFORM, columns=Columns(caption="text"), max_samples=6, streaming=streaming
    )
    batch = next(iter(build_dataloader(dataset, 6)))
    assert batch["pixel_values"].shape == (6, 3, R, R) and len(set(batch["captions"])) > 1
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) == 0  # lock files are empty


def test_max_samples_keeps_the_first_rows(tmp_path):
    path = write_parquet(tmp_path / "a.parquet")
    for streaming in (False, True):
        dataset = load_training_dataset(
            path, transform=TRANSFORM, max_samples=3, streaming=streaming, shuffle_buffer=0
        )
        assert [shade_of(sample["pixel_values"]) for sample in dataset] == [0, 1, 2]


# Transform


@pytest.mark.parametrize("size", [(R, R), (50, 20), (3, 7)])
def test_the_transform_gives_values_in_range_for_any_size_and_survives_pickling(size):
    transform = pickle.loads(pickle.dumps(TRANSFORM))
    values = transform(Image.new("LA", size, (255, 255)))
    assert values.shape == (3, R, R) and values.dtype == torch.float32 and (values == 1).all()


def test_half_of_the_images_are_mirrored():
    image = Image.fromarray(np.arange(R * R, dtype=np.uint8).reshape(R, R)).convert("RGB")
    straight = TRANSFORM(image)
    generator = torch.Generator().manual_seed(0)
    draws = [ImageTransform(R, random_flip=True)(image, generator) for _ in range(100)]
    mirrored = [torch.equal(draw, straight.flip(-1)) for draw in draws]
    assert all(is_mirrored or torch.equal(draw, straight) for draw, is_mirrored in zip(draws, mirrored, strict=True))
    assert 30 < sum(mirrored) < 70


def test_random_crops_move_along_the_longer_side_only():
    image = Image.linear_gradient("L").resize((R, 4 * R))
    generator = torch.Generator().manual_seed(0)
    tops = [ImageTransform(R, random_crop=True)(image, generator)[0, 0, 0].item() for _ in range(20)]
    assert len(set(tops)) > 10 and min(tops) < -0.8 and max(tops) > 0.3


def test_random_crops_are_squares_of_the_allowed_sizes_inside_the_image():
    transform = ImageTransform(R, random_crop=True, min_crop_scale=0.5)
    generator = torch.Generator().manual_seed(0)
    boxes = [transform.draw_box(100, 60, generator) for _ in range(200)]
    sides = [right - left for left, _, right, _ in boxes]
    assert all(right - left == bottom - top for left, top, right, bottom in boxes)
    assert min(sides) in range(30, 34) and max(sides) in range(57, 61)
    assert all(left >= 0 and top >= 0 and right <= 100 and bottom <= 60 for left, top, right, bottom in boxes)
    assert len({left for left, *_ in boxes}) > 20 and len({top for _, top, *_ in boxes}) > 10


def test_one_of_several_captions_is_drawn_each_time(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", 2, text=[["a", "b", "c"], ["d"]])
    for cached in (False, True):
        dataset = load_training_dataset(
            path, transform=TRANSFORM, columns=Columns(caption="text"), cache_in_memory=cached
        )
        assert {dataset[0, draw]["captions"] for draw in range(30)} == {"a", "b", "c"}
        assert dataset[1]["captions"] == "d"
        assert dataset[0, 5]["captions"] == dataset[0, 5]["captions"]


# Damaged rows


@pytest.mark.parametrize("cached", [False, True])
def test_damaged_rows_are_counted_reported_and_never_used(tmp_path, caplog, cached):
    path = write_parquet(tmp_path / "a.parquet", damaged=(3, 4, 9))
    with caplog.at_level(logging.WARNING):
        dataset = load_training_dataset(path, transform=TRANSFORM, cache_in_memory=cached)
        loader = build_dataloader(dataset, 5, drop_last=False)
        shades = [shade for batch in [*loader, *loader] for shade in shade_of(batch["pixel_values"])]

    assert set(shades) == {0, 1, 2, 5, 6, 7, 8}
    assert len(dataset.skipped) == 3 and set(dataset.skipped) == {3, 4, 9}
    messages = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
    assert len(messages) == 3 and any("Row 4 is skipped" in m and "of 4 bytes is not an image" in m for m in messages)


def test_a_damaged_row_is_replaced_by_the_next_so_that_batches_keep_their_size(tmp_path):
    dataset = load_training_dataset(write_parquet(tmp_path / "a.parquet", damaged=(9,)), transform=TRANSFORM)
    assert shade_of(dataset[9]["pixel_values"]) == 0


def test_damaged_rows_of_a_stream_are_skipped(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", damaged=(3, 4))
    dataset = load_training_dataset(path, transform=TRANSFORM, streaming=True, shuffle_buffer=0)
    assert [shade_of(sample["pixel_values"]) for sample in dataset] == [0, 1, 2, 5, 6, 7, 8, 9]
    assert len(dataset.skipped) == 2


@pytest.mark.parametrize("captions", [["a", None, "b"], [["a"], [], ["b"]], [["a"], None, ["b"]]])
def test_rows_without_a_caption_are_skipped(tmp_path, captions):
    path = write_parquet(tmp_path / "a.parquet", 3, text=captions)
    for cached in (False, True):
        dataset = load_training_dataset(
            path, transform=TRANSFORM, columns=Columns(caption="text"), cache_in_memory=cached
        )
        assert [sample["captions"] for sample in dataset if sample["captions"] == "a"] == ["a"]
        assert {sample["captions"] for sample in dataset} == {"a", "b"}
        assert set(dataset.skipped) == {1}


def test_a_draw_does_not_depend_on_when_an_unusable_row_was_found(tmp_path):
    """The flip is drawn before the missing caption is noticed."""
    path = write_parquet(tmp_path / "a.parquet", 2, text=[None, ["a", "b", "c", "d", "e", "f"]])

    def load():
        return load_training_dataset(path, transform=ImageTransform(R, random_flip=True), columns=TEXT)

    found = [load()[0, draw]["captions"] for draw in range(8)]
    known = load()
    assert known[0, 0] and set(known.skipped) == {0}
    assert [known[0, draw]["captions"] for draw in range(8)] == found


def test_a_folder_without_the_split_says_where_to_put_it(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(png(0))
    with pytest.raises(ValueError, match="'validation' is not in .*train.* Put .* into .*/validation"):
        load_training_dataset(tmp_path / "images", "validation", transform=TRANSFORM)


def test_missing_image_files_are_skipped(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for row in range(2):
        (folder / f"{row}.png").write_bytes(png(row))
    dataset = load_training_dataset(folder, transform=TRANSFORM)
    (folder / "0.png").unlink()
    assert shade_of(dataset[0]["pixel_values"]) == 1 and "0.png' is not an existing file" in dataset.skipped[0]


NOT_THE_FILE = [errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT]


@pytest.mark.parametrize("number", NOT_THE_FILE, ids=errno.errorcode.get)
@pytest.mark.parametrize("moment", ["open", "load"])
def test_an_error_of_the_system_is_not_the_fault_of_a_row(tmp_path, monkeypatch, number, moment):
    fail_to_read(monkeypatch, number, moment)
    dataset = load_training_dataset(write_parquet(tmp_path / "a.parquet", 2), transform=TRANSFORM)
    with pytest.raises(OSError, match="cannot be read: ") as error:
        dataset[0]
    assert error.value.errno == number and not dataset.skipped


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM], ids=errno.errorcode.get)
def test_a_file_that_may_not_be_read_is_skipped_and_not_called_damaged(tmp_path, monkeypatch, number):
    (tmp_path / "images").mkdir()
    for row in range(2):
        (tmp_path / "images" / f"{row}.png").write_bytes(png(row))
    dataset = load_training_dataset(tmp_path / "images", transform=TRANSFORM)
    fail_to_read(monkeypatch, number, "open", "0.png")
    assert shade_of(dataset[0]["pixel_values"]) == 1
    reason = dataset.skipped[0]
    assert f"0.png' cannot be read: {os.strerror(number)}" in reason and "damaged" not in reason


def fail_to_read(monkeypatch, number, moment, name=""):
    """Let Pillow get an error of the system for files with this name."""
    where, function = (Image, "open") if moment == "open" else (PngImageFile, "load")
    original = getattr(where, function)

    def fail(first, *rest, **options):
        if name in str(first):
            raise OSError(number, os.strerror(number))
        return original(first, *rest, **options)

    monkeypatch.setattr(where, function, fail)


@pytest.mark.parametrize("options", [{}, {"cache_in_memory": True}, {"streaming": True, "shuffle_buffer": 0}])
def test_a_dataset_without_a_usable_image_is_an_error(tmp_path, monkeypatch, options):
    monkeypatch.setattr("flextok_hf.data.image_dataset.MAX_UNREADABLE_ROWS", 5)
    monkeypatch.setattr("flextok_hf.data.image_stream.MAX_UNREADABLE_ROWS", 5)
    path = write_parquet(tmp_path / "a.parquet", damaged=range(10))
    with pytest.raises(ValueError, match="No usable image in .* Check `image_column`"):
        next(iter(load_training_dataset(path, transform=TRANSFORM, **options)))


# Order


@pytest.mark.parametrize("cached", [False, True])
def test_training_resumes_at_any_batch_with_the_same_draws(tmp_path, cached):
    path = write_parquet(
        tmp_path / "a.parquet", 10, text=[[f"{row}{letter}" for letter in "abcdef"] for row in range(10)]
    )
    transform = ImageTransform(R, random_flip=True)

    def batches(first_batch=0, num_workers=0):
        dataset = load_training_dataset(
            path, transform=transform, columns=Columns(caption="text"), cache_in_memory=cached
        )
        return TrainingBatches(build_dataloader(dataset, 4, seed=1, num_workers=num_workers)).start(first_batch)

    whole = take(batches(), 7)  # three epochs of two batches, and one more batch
    for first_batch in (1, 2, 5):
        assert same_batches(take(batches(first_batch), 7 - first_batch), whole[first_batch:])
    assert same_batches(take(batches(3, num_workers=2), 4), whole[3:])
    assert whole[0]["captions"] != whole[2]["captions"] != whole[4]["captions"]


STREAMS = {
    "one reader": {},
    "two readers": {"num_workers": 2},
    "three readers of unequal parts": {"num_workers": 3},
    "in order": {"shuffle_buffer": 0},
    "only the first rows": {"max_samples": 23},
    "only the first rows, two readers": {"max_samples": 23, "num_workers": 2},
    "second of two processes": {"process_index": 1, "num_processes": 2},
    "second of two processes with two readers": {"process_index": 1, "num_processes": 2, "num_workers": 2},
}


def write_sharded(kind, folder):
    """Write 40 images, three of them damaged, to 5 files of different sizes."""
    numbers, sizes = iter(range(40)), (12, 5, 9, 6, 8)
    for shard, size in enumerate(sizes):
        rows = [next(numbers) for _ in range(size)]
        images = [b"junk" if row in (3, 20, 21) else png(row) for row in rows]
        path = folder / f"train-{shard}.{kind}"
        folder.mkdir(exist_ok=True)
        if kind == "parquet":
            features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
            values = {"image": [{"bytes": image, "path": None} for image in images], "text": map(str, rows)}
            datasets.Dataset.from_dict({**values, "text": list(values["text"])}, features).to_parquet(str(path))
        else:
            write_tar(
                path,
                {
                    f"{row:03d}": {"png": image, "txt": str(row).encode()}
                    for row, image in zip(rows, images, strict=True)
                },
            )
    return folder


def write_tar(path, samples):
    """Write samples as a WebDataset: files of one sample share the name before the extension."""
    with tarfile.open(path, "w") as archive:
        for key, parts in samples.items():
            for ending, content in parts.items():
                entry = tarfile.TarInfo(f"{key}.{ending}")
                entry.size = len(content)
                archive.addfile(entry, BytesIO(content))


@pytest.mark.parametrize(
    ("kind", "name"), [*(("parquet", name) for name in STREAMS), ("tar", "one reader"), ("tar", "two readers")]
)
def test_a_stream_resumes_after_any_batch(tmp_path, kind, name):
    folder = write_sharded(kind, tmp_path / "data")
    columns = Columns(caption="text") if kind == "parquet" else Columns("png", caption="txt")
    options = dict(STREAMS[name])
    shuffle_buffer, max_samples = options.pop("shuffle_buffer", 7), options.pop("max_samples", None)

    def batches():
        transform = ImageTransform(R, random_flip=True)
        data = {"columns": columns, "streaming": True, "shuffle_buffer": shuffle_buffer, "max_samples": max_samples}
        return TrainingBatches(
            build_dataloader(load_training_dataset(folder, transform=transform, **data), 3, seed=1, **options)
        )

    source, whole, states = batches(), [], []
    for batch in itertools.islice(source.start(), 20):
        whole.append(batch)
        states.append(json.dumps(source.state()))
    for stop in range(20) if (kind, name) == ("parquet", "one reader") else (0, 5, 12, 18):
        resumed = batches().start(state=json.loads(states[stop]))
        assert same_batches(take(resumed, 19 - stop), whole[stop + 1 :])


def test_epochs_of_a_stream_have_different_orders(tmp_path):
    folder = write_sharded("parquet", tmp_path / "data")

    def captions(shuffle_buffer):
        data = {"columns": Columns(caption="text"), "streaming": True, "shuffle_buffer": shuffle_buffer}
        batches = TrainingBatches(build_dataloader(load_training_dataset(folder, transform=TRANSFORM, **data), 37))
        return [batch["captions"] for batch in take(batches.start(), 3)]

    readable = [str(row) for row in range(40) if row not in (3, 20, 21)]
    assert captions(0) == [readable] * 3
    shuffled = captions(10)
    assert all(sorted(epoch) == sorted(readable) for epoch in shuffled)
    assert len({tuple(epoch) for epoch in [readable, *shuffled]}) == 4
    assert {epoch[0] for epoch in shuffled} != {readable[0]}


@pytest.mark.parametrize(("num_rows", "batch_size", "drop_last"), [(10, 3, True), (10, 3, False), (12, 4, True)])
def test_an_epoch_visits_every_row_once(num_rows, batch_size, drop_last):
    batches = list(EpochBatchSampler(num_rows, batch_size, shuffle=True, seed=0, drop_last=drop_last))
    rows = [row for batch in batches for row, _ in batch]
    assert len(set(rows)) == len(rows) == (num_rows // batch_size * batch_size if drop_last else num_rows)


@pytest.mark.parametrize("drop_last", [True, False])
def test_processes_split_the_batches_of_a_single_one(drop_last):
    def batches(batch_size, process_index=0, num_processes=1):
        sampler = EpochBatchSampler(21, batch_size, True, 0, drop_last, process_index, num_processes)
        return list(sampler)

    single = batches(8)
    shared = [first + second for first, second in zip(batches(4, 0, 2), batches(4, 1, 2), strict=True)]
    assert [batch[: len(whole)] for batch, whole in zip(shared, single, strict=True)] == single
    assert all(len(batch) == 8 for batch in shared)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_few_rows_still_fill_a_batch_on_every_process(num_rows):
    for process_index in range(4):
        batches = list(EpochBatchSampler(num_rows, 2, True, 0, False, process_index, 4))
        assert [len(batch) for batch in batches] == [2]


def test_processes_read_different_parts_of_a_stream(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", 10)
    shades = []
    for process_index in range(2):
        dataset = load_training_dataset(path, transform=TRANSFORM, streaming=True, shuffle_buffer=0)
        loader = build_dataloader(dataset, 5, process_index=process_index, num_processes=2)
        shades.append(shade_of(next(iter(loader))["pixel_values"]))
    assert sorted(shades[0] + shades[1]) == list(range(10))


def test_workers_of_a_stream_split_its_shards():
    dataset = load_training_dataset(
        "synthetic",
        transform=TRANSFORM,
        columns=Columns(caption="text"),
        max_samples=600,
        streaming=True,
        shuffle_buffer=0,
    )
    loader = build_dataloader(dataset, 50, num_workers=2, drop_last=False)
    with_workers = [caption for batch in loader for caption in batch["captions"]]
    assert sorted(with_workers) == sorted(sample["captions"] for sample in dataset)


def test_loading_does_not_touch_the_global_generator(tmp_path):
    dataset = load_training_dataset(
        write_parquet(tmp_path / "a.parquet"), transform=ImageTransform(R, random_flip=True)
    )
    state = torch.get_rng_state()
    list(build_dataloader(dataset, 4, num_workers=1))
    list(build_dataloader(dataset, 4))
    assert torch.equal(torch.get_rng_state(), state)


# Wrong arguments


def test_wrong_columns_are_refused_and_the_existing_ones_listed(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", text=["x"] * 10, score=[0.5] * 10)
    for arguments, error, message in (
        ({"image": "photo"}, ValueError, "`image_column` is 'photo', but .* columns .*text"),
        ({"caption": "words"}, ValueError, "`caption_column` is 'words'"),
        ({"class_label": "label"}, ValueError, "`class_column` is 'label'"),
        ({"image": "text"}, TypeError, "not images"),
        ({"caption": "score"}, TypeError, "must hold strings"),
        ({"class_label": "text"}, TypeError, "class_encode_column"),
    ):
        for streaming in (False, True):
            with pytest.raises(error, match=message):
                load_training_dataset(path, transform=TRANSFORM, columns=Columns(**arguments), streaming=streaming)


def test_wrong_options_are_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="turn off either"):
        load_training_dataset(path, transform=TRANSFORM, streaming=True, cache_in_memory=True)
    with pytest.raises(ValueError, match="turn off `random_crop`"):
        load_training_dataset(path, transform=ImageTransform(R, random_crop=True), cache_in_memory=True)
    with pytest.raises(ValueError, match="`max_samples` must be 1 or more"):
        load_training_dataset(path, transform=TRANSFORM, max_samples=0)
    with pytest.raises(ValueError, match="`split` of the synthetic dataset must be train or validation"):
        load_training_dataset("synthetic", "test", transform=TRANSFORM)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "nowhere.parquet"])
def test_paths_that_do_not_exist_are_not_looked_up_on_the_hub(source):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_training_dataset(source, transform=TRANSFORM)


def test_files_of_another_kind_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no images")
    with pytest.raises(ValueError, match="files of one kind, .parquet or .tar"):
        load_training_dataset(tmp_path / "notes.txt", transform=TRANSFORM)


def test_a_batch_larger_than_the_dataset_is_refused(tmp_path):
    dataset = load_training_dataset(write_parquet(tmp_path / "a.parquet"), transform=TRANSFORM)
    with pytest.raises(ValueError, match="10 rows do not fill one batch of `batch_size` 11"):
        build_dataloader(dataset, 11)
    with pytest.raises(ValueError, match="`batch_size` must be 1 or more"):
        build_dataloader(dataset, 0)
    stream = load_training_dataset(tmp_path / "a.parquet", transform=TRANSFORM, streaming=True, shuffle_buffer=0)
    with pytest.raises(ValueError, match="did not fill one batch"):
        next(TrainingBatches(build_dataloader(stream, 11)).start())


@pytest.mark.parametrize("kind", ["parquet", "saved", "token ids"])
@pytest.mark.parametrize(
    "options", [{}, {"cache_in_memory": True}, {"streaming": True}], ids=["rows", "cache", "stream"]
)
def test_a_dataset_without_rows_says_so(tmp_path, kind, options):
    features = datasets.Features({"image": datasets.Image(), "ids": datasets.List(datasets.Value("int64"))})
    rows = datasets.Dataset.from_dict({"image": [], "ids": []}, features=features)
    path = tmp_path / "empty.parquet"
    if kind == "saved":
        rows.save_to_disk(path)
    else:
        rows.to_parquet(path)
    columns = Columns(token_ids="ids") if kind == "token ids" else Columns()
    with pytest.raises(
        ValueError, match="`source` .*empty.parquet has no rows in split 'train'|The stream has no rows"
    ):
        dataset = load_training_dataset(path, transform=TRANSFORM, columns=columns, **options)
        next(TrainingBatches(build_dataloader(dataset, 1)).start())


def test_collate_stacks_what_the_samples_have():
    batch = collate([{"pixel_values": torch.zeros(3, 2, 2), "class_labels": label} for label in (4, 0)])
    assert batch["pixel_values"].shape == (2, 3, 2, 2) and batch["class_labels"].tolist() == [4, 0]
    assert "captions" not in batch
