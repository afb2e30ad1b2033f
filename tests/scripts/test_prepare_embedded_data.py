"""Data of the embedded model: caption grammar and splits."""

from importlib import import_module

import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw


data = import_module("prepare_embedded_data")


def noun(name, form="count", synonyms=()):
    return data.Noun(source_name=name, name=name, form=form, synonyms=synonyms)


def drawing(color):
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).rectangle((20, 30, 60, 100), fill=color)
    return image


def small_source(names=("middle finger", "cat", "sun"), styles=("3d", "monochrome")):
    features = Features({"image": ImageFeature(), "name": Value("string"), "style": Value("string")})
    rows = [{"image": drawing("red"), "name": name, "style": style} for name in names for style in styles]
    splits = {"train": rows[:-1], "validation": rows[-1:]}
    return DatasetDict({split: Dataset.from_list(part, features=features) for split, part in splits.items()})


@pytest.mark.parametrize(
    ("word", "article"),
    [("cat", "a"), ("apple", "an"), ("unicorn", "a"), ("umbrella", "an"), ("ufo", "a"), ("hourglass", "an")],
)
def test_the_article_follows_the_sound_of_the_word(word, article):
    assert data.article_for(word) == article


def test_the_article_follows_the_style_when_a_style_comes_first():
    assert data.noun_phrases("apple", "count", "3d") == ["a 3d apple"]


@pytest.mark.parametrize("form", ["plural", "mass"])
def test_plural_and_mass_names_never_take_an_article(form):
    for style in data.STYLED_WORDINGS:
        for caption in data.make_captions(noun("grapes", form), style):
            assert "a grapes" not in caption
            assert f"a {style} grapes" not in caption


def test_unique_names_take_the_definite_article_first():
    assert data.make_captions(noun("sun", "unique"), "flat")[0] == "the sun"


def test_captions_mention_the_style_of_the_image_or_none():
    captions = data.make_captions(noun("cat"), "noto")
    assert {"a cat", "cat", "a picture of a cat", "cat emoji", "cat, noto emoji"} <= set(captions)
    assert not any("3d" in caption or "flat" in caption for caption in captions)


def test_captions_are_distinct_and_cover_synonyms():
    captions = data.make_captions(noun("rabbit", synonyms=("bunny",)), "3d")
    assert len(captions) == len(set(captions))
    assert "a bunny" in captions and "a rabbit" in captions


def test_a_line_of_the_list_is_parsed_into_name_form_and_synonyms():
    (parsed,) = data.read_names(["# a comment", "", "ear of corn = corn; mass; maize, ear of corn"])
    assert parsed.source_name == "ear of corn"
    assert (parsed.name, parsed.form, parsed.synonyms) == ("corn", "mass", ("maize", "ear of corn"))


def test_a_word_shared_by_two_names_is_refused():
    with pytest.raises(ValueError, match="'bunny' stands for both"):
        data.read_names(["rabbit; ; bunny", "hare; ; bunny"])


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="second field must be one of"):
        data.read_names(["grapes; many"])


def test_the_shipped_list_can_be_read_and_holds_everyday_names():
    names = {n.name for n in data.read_names(data.DEFAULT_NAMES_FILE.read_text(encoding="utf-8").splitlines())}
    assert {"cat", "dog", "apple", "pizza", "car", "rocket", "sun", "house", "heart"} <= names
    assert all(name == name.lower() for name in names)


def test_a_name_without_images_is_reported():
    with pytest.raises(ValueError, match="no image of .*no such thing"):
        data.prepare([(small_source(), None)], [noun("cat"), noun("no such thing")], resolution=16)


def test_the_splits_of_the_source_are_kept():
    source = small_source(names=("cat", "sun"))
    prepared = data.prepare([(source, None)], [], resolution=16)
    for split in ("train", "validation"):
        pairs = list(zip(prepared[split]["name"][:], prepared[split]["style"][:], strict=True))
        assert pairs == list(zip(source[split]["name"][:], source[split]["style"][:], strict=True))
        assert set(prepared[split]["split"][:]) == {split}


def test_images_have_the_requested_resolution():
    prepared = data.prepare([(small_source(), None)], [], resolution=16)
    assert {row["image"].size for row in prepared["train"]} == {(16, 16)}


def test_excluded_names_are_skipped():
    prepared = data.prepare([(small_source(), None)], [], resolution=16)
    assert set(prepared["train"]["name"][:]) == {"cat", "sun"}


def test_names_of_the_list_are_everyday_names_and_others_come_with_and_without_an_article():
    prepared = data.prepare([(small_source(names=("sun", "lotus", "x")), None)], [noun("sun", "unique")], 16)
    rows = {(row["name"], row["style"]): row for row in prepared["train"]}
    assert rows["sun", "3d"]["everyday"] and not rows["lotus", "3d"]["everyday"]
    assert rows["sun", "3d"]["prompt"] == "the sun"
    assert {"lotus", "a lotus"} <= set(rows["lotus", "3d"]["captions"])


@pytest.mark.parametrize("style", ["monochrome", "photo"])
def test_captions_of_black_and_white_drawings_and_photos_always_say_so(style):
    captions = data.make_captions(noun("cat"), style)
    words = {"monochrome": ("black and white",), "photo": ("photo",)}[style]
    assert captions and all(any(word in caption for word in words) for caption in captions)


def test_photos_get_common_names():
    source = small_source(names=("car_side", "Leopards"), styles=("",))
    prepared = data.prepare([(source, "photo")], [], resolution=16)
    assert prepared["train"][0]["name"] == "car"
    assert prepared["validation"][0]["styled_prompt"] == "a photo of leopard"
