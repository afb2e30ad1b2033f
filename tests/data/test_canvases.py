"""Two-object canvases: captions say what is where, and held-out pairs stay out of training."""

import pytest
from PIL import Image, ImageDraw

from flextok_hf.data.canvases import (
    BACKGROUNDS,
    CanvasComposer,
    Drawing,
    cut_out,
    draw_canvas,
    is_held_out_pair,
)


NAMES = [f"thing {letter}" for letter in "abcdefghijklmnop"]
STYLES = ("3d", "flat")


@pytest.fixture(scope="module")
def composer():
    drawings = [Drawing(name, style, f"a {name}", f"a {style} {name}") for name in NAMES for style in STYLES]
    return CanvasComposer(drawings, ["a photo of a cup", "a photo of a chair"])


def drawing(color, box=(30, 20, 90, 110)):
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).rectangle(box, fill=color)
    return image


def names_of(composer, canvas):
    return [composer.drawings[place.drawing].name for place in (canvas.first, canvas.second)]


def test_a_canvas_depends_on_seed_index_and_split_alone(composer):
    again = CanvasComposer(composer.drawings, composer.photos)
    canvases = [composer.compose(index, 3) for index in range(20)]
    assert canvases == [again.compose(index, 3) for index in range(20)]
    assert len({canvas.captions for canvas in canvases}) == 20
    assert composer.compose(0, 3) != composer.compose(0, 4)
    assert composer.compose(0, 3) != composer.compose(0, 3, "validation")


def test_held_out_pairs_never_stand_in_train_and_in_every_second_image_of_validation(composer):
    assert not any(is_held_out_pair(*names_of(composer, composer.compose(index))) for index in range(500))
    for index in range(40):
        canvas = composer.compose(index, split="validation")
        assert canvas.is_held_out == is_held_out_pair(*names_of(composer, canvas)) == (index % 2 == 1)


def test_a_held_out_pair_is_held_out_in_either_order():
    assert all(is_held_out_pair(a, b) == is_held_out_pair(b, a) for a in NAMES for b in NAMES)


def test_captions_name_both_objects_in_the_order_of_their_places(composer):
    for index in range(60):
        canvas = composer.compose(index)
        first, second = names_of(composer, canvas)
        assert canvas.captions[0] == f"a {first} {canvas.relation} a {second}"
        reverse = {"left of": "right of", "above": "below"}[canvas.relation]
        assert f"a {second} {reverse} a {first}" in canvas.captions
        other = {"left of": "above", "above": "left of"}[canvas.relation]
        assert not any(f" {other} " in caption or f" {reverse} a {second}" in caption for caption in canvas.captions)
        assert all(first in caption and second in caption for caption in canvas.captions)


@pytest.mark.parametrize("size", [48])
def test_each_object_stays_in_its_half(composer, size):
    for index in range(60):
        canvas = composer.compose(index)
        photo = None if canvas.photo is None else Image.new("RGB", (32, 32), "black")
        image = draw_canvas(canvas, [drawing((255, 0, 0)), drawing((0, 0, 255))], photo, size)
        pixels = image.load()
        for x in range(size):
            for y in range(size):
                along = x if canvas.relation == "left of" else y
                if pixels[x, y] == (255, 0, 0):
                    assert along <= size / 2
                if pixels[x, y] == (0, 0, 255):
                    assert along >= size / 2 - 1


def test_the_background_is_what_the_caption_says(composer):
    canvases = [composer.compose(index) for index in range(80)]
    plain = next(canvas for canvas in canvases if canvas.photo is None and canvas.background == "blue")
    image = draw_canvas(plain, [drawing("red"), drawing("red")], None, 64)
    assert image.getpixel((0, 0)) == BACKGROUNDS["blue"]
    assert any(caption.endswith("on a blue background") for caption in plain.captions)
    behind = next(canvas for canvas in canvases if canvas.photo is not None)
    image = draw_canvas(behind, [drawing("red"), drawing("red")], Image.new("RGB", (32, 32), (1, 2, 3)), 64)
    assert image.getpixel((0, 0)) == (1, 2, 3)
    assert any(caption.endswith(f"in front of {behind.background}") for caption in behind.captions)
    assert not any("background" in caption for caption in behind.captions)


def test_a_cutout_keeps_white_inside_the_drawing_and_drops_it_outside():
    image = drawing("red")
    ImageDraw.Draw(image).rectangle((50, 50, 60, 60), fill="white")
    cut = cut_out(image)
    assert cut.size == (61, 91)
    assert cut.getpixel((25, 35)) == (255, 255, 255, 255)
    assert cut.getextrema()[3] == (255, 255)


def test_a_white_image_cannot_be_cut_out():
    with pytest.raises(ValueError, match="`image` is white all over"):
        cut_out(Image.new("RGB", (8, 8), "white"))


def test_a_photo_that_does_not_belong_to_the_canvas_is_refused(composer):
    canvas = next(canvas for canvas in map(composer.compose, range(80)) if canvas.photo is None)
    with pytest.raises(ValueError, match="`photo` must be None"):
        draw_canvas(canvas, [drawing("red")] * 2, drawing("red"), 64)


def test_too_few_names_are_refused():
    with pytest.raises(ValueError, match="`drawings` have 1 names"):
        CanvasComposer([Drawing("cat", "3d", "a cat", "a 3d cat")])


def test_an_unknown_split_is_refused(composer):
    with pytest.raises(ValueError, match="`split` must be one of"):
        composer.compose(0, split="test")
