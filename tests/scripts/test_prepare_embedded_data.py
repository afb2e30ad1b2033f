"""Data of the embedded model: caption grammar and splits."""

from importlib import import_module

import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw


data = import_module("prepare_embedded_data")
grammar = import_module("embedded_captions")


def noun(name, form="count", synonyms=()):
    return grammar.Noun(source_name=name, name=name, form=form, synonyms=synonyms)


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
    assert grammar.article_for(word) == article


def test_the_article_follows_the_style_when_a_style_comes_first():
    assert grammar.noun_phrases("apple", "count", "3d") == ["a 3d apple"]


@pytest.mark.parametrize("form", ["plural", "mass"])
def test_plural_and_mass_names_never_take_an_article(form):
    for style in grammar.STYLED_WORDINGS:
        for caption in grammar.make_captions(noun("grapes", form), style):
            assert "a grapes" not in caption
            assert f"a {style} grapes" not in caption


def test_unique_names_take_the_definite_article_first():
    assert grammar.make_captions(noun("sun", "unique"), "flat")[0] == "the sun"


def test_captions_mention_the_style_of_the_image_or_none():
    captions = grammar.make_captions(noun("cat"), "noto")
    assert {"a cat", "cat", "a picture of a cat", "cat emoji", "cat, noto emoji"} <= set(captions)
    assert not any("3d" in caption or "flat" in caption for caption in captions)


def test_captions_are_distinct_and_cover_synonyms():
    captions = grammar.make_captions(noun("rabbit", synonyms=("bunny",)), "3d")
    assert len(captions) == len(set(captions))
    assert "a bunny" in captions and "a rabbit" in captions


def test_a_line_of_the_list_is_parsed_into_name_form_and_synonyms():
    (parsed,) = grammar.read_names(["# a comment", "", "ear of corn = corn; mass; maize, ear of corn"])
    assert parsed.source_name == "ear of corn"
    assert (parsed.name, parsed.form, parsed.synonyms) == ("corn", "mass", ("maize", "ear of corn"))


def test_a_word_shared_by_two_names_is_refused():
    with pytest.raises(ValueError, match="'bunny' stands for both"):
        grammar.read_names(["rabbit; ; bunny", "hare; ; bunny"])


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="second field must be one of"):
        grammar.read_names(["grapes; many"])


def test_the_shipped_list_can_be_read_and_holds_everyday_names():
    names = {n.name for n in grammar.read_names(data.DEFAULT_NAMES_FILE.read_text(encoding="utf-8").splitlines())}
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
    captions = grammar.make_captions(noun("cat"), style)
    words = {"monochrome": ("black and white",), "photo": ("photo",)}[style]
    assert captions and all(any(word in caption for word in words) for caption in captions)


def test_photos_get_common_names():
    source = small_source(names=("car_side", "Leopards"), styles=("",))
    prepared = data.prepare([(source, "photo")], [], resolution=16)
    assert prepared["train"][0]["name"] == "car"
    assert prepared["validation"][0]["styled_prompt"] == "a photo of leopard"


def clip_art_source():
    features = Features(
        {"image": ImageFeature(), "text": Value("string"), "keywords": List(Value("string")), "label": Value("string")}
    )
    rows = [
        {"image": drawing("red"), "text": text, "keywords": keywords, "label": label}
        for text, keywords, label in [
            ("Cat 02", ["pet", "animal"], "animals"),
            ("action", ["icon"], "computer"),
            *[("various things", ["tool", "hammer"], "tools")] * 4,
        ]
    ]
    part = Dataset.from_list(rows, features=features)
    return DatasetDict({"train": part, "validation": part.select([0])})


def test_clip_art_is_named_by_its_title_and_where_that_says_nothing_by_keyword_or_folder():
    prepared = data.prepare([(data.read_clip_art(clip_art_source(), False), "clip art")], [noun("cat")], 16)
    rows = prepared["train"][:]
    assert rows["name"] == ["cat", "computer", *["hammer"] * 4]
    assert rows["everyday"] == [True, False, *[False] * 4]
    assert rows["captions"][1] == ["clip art", "clip art, computer"]
    assert "clip art of a cat" in rows["captions"][0] and not prepared["validation"][0]["held_out"]


def test_clip_art_of_things_leaves_out_folders_whose_titles_say_nothing():
    assert data.read_clip_art(clip_art_source(), True)["train"]["name"][:] == ["cat", *["hammer"] * 4]


@pytest.mark.parametrize("style", [*grammar.STYLED_WORDINGS])
def test_more_captions_are_sentences_and_keywords_that_name_the_style_where_captions_must(style):
    more = grammar.make_more_captions(noun("cat"), style, ["Cat", "pet", "furry", "whiskers", "tail"])
    assert any(caption.startswith("this is ") for caption in more)
    assert any("pet, furry, whiskers" in caption for caption in more)
    assert not any("tail" in caption for caption in more)
    if style in grammar.STYLES_NAMED_ALWAYS:
        word = {"monochrome": "black and white"}.get(style, style)
        assert all(word in caption for caption in more)


def test_held_out_combinations_are_in_validation_only_and_their_names_stay_in_train():
    names = [f"thing {number}" for number in range(40)]
    source = small_source(names=names, styles=("3d", "flat", "noto"))
    prepared = data.prepare([(source, None)], [], resolution=8, held_out_share=0.2)
    train, validation = prepared["train"][:], prepared["validation"][:]
    trained = set(zip(train["name"], train["style"]))
    held_out = {
        (name, style)
        for name, style, marked in zip(validation["name"], validation["style"], validation["held_out"])
        if marked
    }
    assert 10 < len(held_out) < 45 and not held_out & trained  # 24 of 120 expected
    assert {name for name, _ in held_out} <= {name for name, _ in trained}
    assert not any(train["held_out"])


def test_a_name_with_a_single_style_is_never_held_out():
    names = [f"thing {number}" for number in range(60)]
    source = small_source(names=names, styles=("3d",))
    prepared = data.prepare([(source, None)], [], resolution=8, held_out_share=0.5)
    assert len(prepared["train"]) == 59


def test_a_share_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="`held_out_share` must lie in"):
        data.prepare([(small_source(), None)], [], resolution=8, held_out_share=1.5)
