"""Recolored drawings of the embedded model's data: what changes, what stays, and that no caption is contradicted."""

import io
from importlib import import_module

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw

from flextok_hf.data.canvases import BACKGROUNDS


augmentation = import_module("embedded_augmentation")
data = import_module("prepare_embedded_data")

BOX = (8, 8, 23, 23)


def drawing(color="red", background="white"):
    image = Image.new("RGB", (32, 32), background)
    ImageDraw.Draw(image).rectangle(BOX, fill=color)
    ImageDraw.Draw(image).rectangle((14, 14, 17, 17), fill="white")  # white inside, which is no background
    return image


def copies(image, captions, count=30, **options):
    made = [augmentation.recolor(image, captions, str(key), **options) for key in range(count)]
    return [copy for copy in made if copy is not None]


def colors_at(images, place):
    return {image.getpixel(place) for image in images}


def test_hue_and_background_change_and_white_inside_stays():
    made = copies(drawing(), ["a cat"])
    assert len(made) == 30 and len(colors_at(made, (10, 10))) > 20
    assert (255, 0, 0) not in colors_at(made, (10, 10))
    assert colors_at(made, (0, 0)) == set(BACKGROUNDS.values())
    assert colors_at(made, (15, 15)) == {(255, 255, 255)}


@pytest.mark.parametrize("caption", ["a red cat", "cat, Red", "an orange", "black and white cat", "a rose"])
def test_the_hue_stays_if_a_caption_names_a_color(caption):
    made = copies(drawing(), ["a cat", caption])
    assert colors_at(made, (10, 10)) == {(255, 0, 0)} and len(colors_at(made, (0, 0))) > 1


@pytest.mark.parametrize("caption", ["a reddish bored cat", "a tangerine", "a greenhouse"])
def test_only_whole_words_count_as_colors(caption):
    assert not augmentation.names_color([caption])


def test_a_copy_depends_on_its_key_only():
    first, again = copies(drawing(), ["a cat"]), copies(drawing(), ["a cat"])
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again, strict=True))


def test_a_drawing_without_white_around_it_and_with_a_named_color_has_no_copy():
    assert copies(drawing(background="navy"), ["a blue cat"]) == []


def test_lightness_survives_a_change_of_hue():
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (4, 1))).convert("RGB")
    assert augmentation.shift_hue(ramp, 100).tobytes() == ramp.tobytes()
    values = np.asarray(augmentation.shift_hue(drawing("maroon"), 100)).max(axis=2)
    assert np.abs(values.astype(int) - np.asarray(drawing("maroon")).max(axis=2)).max() <= 1


def test_copies_are_added_to_train_only_and_photos_and_flags_keep_their_colors():
    features = Features({"image": ImageFeature(), "name": Value("string"), "style": Value("string")})
    rows = [{"image": drawing(), "name": name, "style": style} for name in "ab" for style in ("3d", "plain")]
    source = Dataset.from_list(rows, features=features)
    source = DatasetDict({"train": source, "validation": source})
    sources = [(source, None), (source.remove_columns("style"), "photo")]
    plain, more = (data.prepare(sources, [], 32, recolored_copies=count) for count in (0, 3))
    assert plain["validation"].to_dict() == more["validation"].to_dict()
    originals, added = more["train"].select(range(8)), more["train"].select(range(8, len(more["train"])))
    assert originals.to_dict() == plain["train"].to_dict()
    assert set(added["style"]) == {"3d", "plain"} and 8 <= len(added) <= 12  # a flag may get the background it has
    flags = [row["image"] for row in added if row["style"] == "plain"]
    content = [np.asarray(image.convert("RGB"))[10, 10] for image in flags]
    assert content and all(red > 200 and max(green, blue) < 40 for red, green, blue in content)


def test_a_negative_number_of_copies_is_refused():
    with pytest.raises(ValueError, match="`recolored_copies` must be 0 or more, got -1"):
        data.prepare([], [], 32, recolored_copies=-1)


@pytest.mark.parametrize(("keep_proportions", "size"), [(False, (16, 16)), (True, (32, 16))])
def test_images_are_squares_unless_they_keep_their_proportions(keep_proportions, size):
    content = data.compress(drawing().resize((64, 32)), 16, "3d", keep_proportions)
    assert Image.open(io.BytesIO(content)).size == size
