"""Titles above the rows of a contact sheet."""

import pytest
from PIL import Image

from flextok_hf.utils.sheets import contact_sheet


COLORS = [(255, 0, 0), (0, 0, 255)]
ROWS = [[Image.new("RGB", (64, 64), "red")], [Image.new("RGB", (64, 64), "blue")]]


def ink(sheet: Image.Image) -> set:
    return {color for _, color in sheet.getcolors(2**16)}


def test_titles_of_rows_stand_above_images_of_unchanged_size():
    plain, titled = (contact_sheet(ROWS, ["1"], 64, row_titles=titles) for titles in (None, ["a cat", "a dog"]))
    assert titled.width == plain.width and titled.height > plain.height
    plain_counts, titled_counts = ({color: n for n, color in sheet.getcolors(2**16)} for sheet in (plain, titled))
    assert [plain_counts[color] for color in COLORS] == [titled_counts[color] for color in COLORS] == [64 * 64] * 2


def test_a_long_title_ends_within_the_sheet():
    sheet = contact_sheet(ROWS[:1], ["1"], 64, row_titles=["a cat " * 1000])
    assert ink(sheet.crop((sheet.width - 4, 0, *sheet.size))) == {(255, 255, 255)}


def test_every_row_needs_its_title():
    with pytest.raises(ValueError, match="`row_titles` has 1 titles"):
        contact_sheet(ROWS, ["1"], row_titles=["a cat"])
