import os

import datasets
import pytest
from image_rows import png

from flextok_hf.data.sources import load_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def fill(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(0))
    return root


def found(root, split="train", streaming=False):
    """Paths of the images, relative to the folder, and class names or None."""
    rows = load_rows(root, split, streaming)
    label = rows.features.get("label")
    rows = rows.cast_column("image", datasets.Image(decode=False))
    names = [os.path.relpath(row["image"]["path"], root) for row in rows]
    if label is not None:
        labels = [label.int2str(row["label"]) for row in rows]
        assert labels == [os.path.basename(os.path.dirname(name)) for name in names]
    return sorted(names), label and label.names


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["cat.jpg", "dog.jpg", "steam train.jpg"], None),
        (["cat.jpg", "test tubes.jpg"], None),
        (["bus/1.jpg", "car/1.jpg", "train/1.jpg"], ["bus", "car", "train"]),
        (["exam/1.png", "test/1.png"], ["exam", "test"]),
        (["x/cat/1.png", "y/dog/1.png"], ["cat", "dog"]),
        (["A.PNG", "b.JpG", "c.jpeg"], None),
        (["a[1].png", "b*.png", "c%20.png", "d e.png", "f::g?.png"], None),
        (["[a]/1.png", "b*/1.png", "100% c/1.png"], ["100% c", "[a]", "b*"]),
    ],
)
def test_every_image_is_a_row_whatever_its_name(tmp_path, names, classes, streaming):
    assert found(fill(tmp_path / "a [1] * train", *names), streaming=streaming) == (sorted(names), classes)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("other", ["a.txt", "a.json", "a.csv", "a.xml", ".a.png", ".hidden/a.png", "__MACOSX/a.png"])
def test_other_and_hidden_files_are_ignored(tmp_path, other, streaming):
    assert found(fill(tmp_path / "images", "a.jpg", other), streaming=streaming) == (["a.jpg"], None)


@pytest.mark.parametrize("streaming", [False, True])
def test_links_are_followed_but_not_in_loops(tmp_path, streaming):
    root, other = fill(tmp_path / "images", "dogs/a.png"), fill(tmp_path / "other", "b.png")
    os.symlink(other, root / "cats")
    os.symlink(other / "b.png", root / "dogs" / "linked.png")
    os.symlink(tmp_path / "nothing", root / "dogs" / "broken.png")
    os.symlink(root, root / "dogs" / "loop")
    assert found(root, streaming=streaming) == (["cats/b.png", "dogs/a.png", "dogs/linked.png"], ["cats", "dogs"])


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_split_folders_are_splits(tmp_path, name):
    root = fill(tmp_path / "images", "train/cat/1.png", "train/dog/1.png", f"{name}/cat/2.png")
    assert found(root) == (["train/cat/1.png", "train/dog/1.png"], ["cat", "dog"])
    assert found(root, "validation") == ([f"{name}/cat/2.png"], ["cat", "dog"])


@pytest.mark.parametrize("streaming", [False, True])
def test_metadata_works_in_a_folder_with_special_characters(tmp_path, streaming):
    root = fill(tmp_path / "test [1]*", "a.png", "b.png")
    (root / "metadata.csv").write_text("file_name,text\na.png,one\nb.png,two\n")
    assert [row["text"] for row in load_rows(root, "train", streaming)] == ["one", "two"]


@pytest.mark.parametrize("names", [[], ["a.txt"], [".a.png"]])
def test_a_folder_without_images_is_an_error(tmp_path, names):
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="`source` .*images holds no images"):
        load_rows(fill(tmp_path / "images", *names), "train")
