"""The embedded model's data: caption grammar, cropping, and which combinations are held out."""

import sys
from collections import defaultdict
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
emoji = import_module("prepare_emoji")


def noun(name, form="count", synonyms=()):
    return emoji.Noun(source_name=name, name=name, form=form, synonyms=synonyms)


def drawing(color, box=(20, 30, 60, 100)):
    picture = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(picture).rectangle(box, fill=color)
    return picture


def small_source(num_names=30):
    features = Features({"image": ImageFeature(), "name": Value("string"), "style": Value("string")})
    rows = [
        {"image": drawing((8 * number, 90, 200)), "name": f"thing {number}", "style": style}
        for number in range(num_names)
        for style in ("3d", "noto", "flat", "gradient")
    ]
    # every tenth picture is in the source's own validation split
    splits = {"train": [row for i, row in enumerate(rows) if i % 10], "validation": rows[::10]}
    return DatasetDict({split: Dataset.from_list(part, features=features) for split, part in splits.items()})


def prepare_small(seed=0):
    nouns = [noun(f"thing {number}") for number in range(30)]
    return emoji.prepare(small_source(), nouns, emoji.STYLES, resolution=16, held_out_share=0.1, seed=seed)


@pytest.mark.parametrize(
    ("word", "article"),
    [("cat", "a"), ("apple", "an"), ("unicorn", "a"), ("umbrella", "an"), ("ufo", "a"), ("hourglass", "an")],
)
def test_the_article_follows_the_sound_of_the_word(word, article):
    assert emoji.article_for(word) == article


def test_the_article_follows_the_style_when_a_style_comes_first():
    assert emoji.noun_phrases("apple", "count", "3d") == ["a 3d apple"]


@pytest.mark.parametrize("form", ["plural", "mass"])
def test_plural_and_mass_names_never_take_an_article(form):
    for style in emoji.STYLES:
        for caption in emoji.make_captions(noun("grapes", form), style):
            assert "a grapes" not in caption
            assert f"a {style} grapes" not in caption


def test_unique_names_take_the_definite_article_first():
    assert emoji.make_captions(noun("sun", "unique"), "flat")[0] == "the sun"


def test_captions_name_the_style_of_the_picture_or_none():
    captions = emoji.make_captions(noun("cat"), "noto")
    assert {"a cat", "cat", "a picture of a cat", "cat emoji", "cat, noto emoji"} <= set(captions)
    assert not any("3d" in caption or "flat" in caption for caption in captions)


def test_captions_are_distinct_and_cover_synonyms():
    captions = emoji.make_captions(noun("rabbit", synonyms=("bunny",)), "3d")
    assert len(captions) == len(set(captions))
    assert "a bunny" in captions and "a rabbit" in captions


def test_a_line_of_the_list_gives_name_form_and_synonyms():
    (parsed,) = emoji.read_names(["# a comment", "", "ear of corn = corn; mass; maize, ear of corn"])
    assert parsed.source_name == "ear of corn"
    assert (parsed.name, parsed.form, parsed.synonyms) == ("corn", "mass", ("maize", "ear of corn"))


def test_a_word_for_two_names_is_refused():
    with pytest.raises(ValueError, match="'bunny' stands for both"):
        emoji.read_names(["rabbit; ; bunny", "hare; ; bunny"])


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="second field must be one of"):
        emoji.read_names(["grapes; many"])


def test_the_shipped_list_can_be_read_and_holds_everyday_names():
    names = {n.name for n in emoji.read_names(emoji.DEFAULT_NAMES_FILE.read_text(encoding="utf-8").splitlines())}
    assert {"cat", "dog", "apple", "pizza", "car", "rocket", "sun", "house", "heart"} <= names
    assert all(name == name.lower() for name in names)


def test_a_name_without_pictures_is_reported():
    with pytest.raises(ValueError, match="no picture of .*no such thing"):
        emoji.prepare(small_source(), [noun("thing 1"), noun("no such thing")], emoji.STYLES, 16, 0.1, 0)


def test_held_out_names_are_in_train_in_another_style():
    prepared = prepare_small()
    styles_of = defaultdict(set)
    for row in prepared["train"]:
        styles_of[row["name"]].add(row["style"])
    assert len(prepared["validation"]) > 0
    for row in prepared["validation"]:
        assert styles_of[row["name"]] and row["style"] not in styles_of[row["name"]]


def test_every_chosen_picture_is_in_exactly_one_split():
    prepared = prepare_small()
    pairs = [(row["name"], row["style"]) for split in prepared.values() for row in split]
    assert sorted(pairs) == sorted((f"thing {n}", style) for n in range(30) for style in emoji.STYLES)


def test_pictures_of_the_source_validation_split_are_held_out_first():
    source = small_source()
    preferred = {
        (row["name"], row["style"])
        for row in source["validation"].remove_columns("image")
        if row["style"] != "gradient"
    }
    held_out = {(row["name"], row["style"]) for row in prepare_small()["validation"]}
    assert preferred <= held_out


def test_the_same_seed_gives_the_same_data():
    first, second = prepare_small(), prepare_small()
    for split in first:
        for before, after in zip(first[split], second[split], strict=True):
            assert before["image"].tobytes() == after["image"].tobytes()
            before, after = before | {"image": None}, after | {"image": None}
            assert before == after


def test_another_seed_holds_out_other_pairs():
    pairs = [(f"name {n}", style) for n in range(40) for style in emoji.STYLES]
    assert emoji.choose_held_out(pairs, set(), 0.1, seed=0) != emoji.choose_held_out(pairs, set(), 0.1, seed=1)


def test_adding_names_moves_no_held_out_pair():
    pairs = [(f"name {n}", style) for n in range(40) for style in emoji.STYLES]
    more = pairs + [(f"another {n}", style) for n in range(40) for style in emoji.STYLES]
    before = emoji.choose_held_out(pairs, set(), 0.1, seed=0)
    after = emoji.choose_held_out(more, set(), 0.1, seed=0)
    assert before == after & set(pairs)


def test_cropping_leaves_the_drawing_centered_with_a_small_margin():
    cropped = emoji.crop_to_drawing(drawing("red", box=(20, 30, 59, 109)), margin=0.1)
    rows, columns = np.nonzero((np.asarray(cropped) != 255).any(axis=-1))
    assert cropped.size == (100, 100)
    assert (rows.min(), rows.max()) == (10, 89)
    assert (columns.min(), columns.max()) == (30, 69)


def test_an_empty_picture_is_refused():
    with pytest.raises(ValueError, match="white all over"):
        emoji.crop_to_drawing(Image.new("RGB", (128, 128), "white"))
