"""Two objects in an image: what the measure recognizes on canvases whose content is known, and what it refuses."""

import io
import json
import shutil
from importlib import import_module

import numpy as np
import paths  # noqa: F401  makes scripts importable
import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw
from tiny_models import make_text_pipeline

from flextok_hf.data.canvases import BACKGROUNDS, Canvas, PlacedDrawing, draw_canvas
from flextok_hf.evaluation.two_objects import ObjectNames, plain_prompt, split_name


SIDE = 64
KINDS = ("ball", "bar", "cross", "ring")


def drawing(kind, side=SIDE):
    image = Image.new("RGB", (side, side), "white")
    draw, unit = ImageDraw.Draw(image), side // 8
    if kind == "ball":
        draw.ellipse((unit, unit, 7 * unit, 7 * unit), fill="red")
    elif kind == "bar":
        draw.rectangle((unit, 3 * unit, 7 * unit, 5 * unit), fill="navy")
    elif kind == "cross":
        draw.rectangle((3 * unit, unit, 5 * unit, 7 * unit), fill="green")
        draw.rectangle((unit, 3 * unit, 7 * unit, 5 * unit), fill="green")
    else:  # white inside, which is part of the object
        draw.ellipse((unit, unit, 7 * unit, 7 * unit), outline="black", width=unit)
    return image


def to_pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def canvas(first, second, relation, color="yellow", side=128):
    places = [(0.27, 0.45), (0.73, 0.55)]
    if relation == "above":
        places = [(y, x) for x, y in places]
    placed = [PlacedDrawing(number, x, y, 0.38) for number, (x, y) in enumerate(places)]
    made = Canvas(*placed, relation, color, None, (), False)
    return draw_canvas(made, [drawing(first), drawing(second)], None, side)


@pytest.fixture(scope="module")
def names():
    return ObjectNames([to_pixels(drawing(kind)) for kind in KINDS], KINDS)


@pytest.mark.parametrize("color", BACKGROUNDS)
@pytest.mark.parametrize("relation", ["left of", "above"])
def test_both_names_and_their_arrangement_are_read_off_a_canvas(names, relation, color):
    image = to_pixels(canvas("ring", "ball", relation, color))
    wanted = [("ring", relation, "ball"), ("ball", relation, "ring"), ("ring", relation, "bar")]
    passed = names.check(image.expand(3, -1, -1, -1), wanted)
    assert passed["both_names"].tolist() == [True, True, False]
    assert passed["arrangement"].tolist() == [True, False, False]


def test_the_right_names_along_the_other_axis_are_not_the_right_arrangement(names):
    image = to_pixels(canvas("cross", "bar", "above"))[None]
    passed = names.check(image, [("cross", "left of", "bar")])
    assert passed["both_names"].tolist() == [True] and passed["arrangement"].tolist() == [False]


def test_an_empty_half_has_no_name(names):
    image = Image.new("RGB", (128, 128), "white")
    assert names.name_halves(to_pixels(image)) == {"left of": (None, None), "above": (None, None)}
    image.paste(drawing("ball").resize((48, 48)), (72, 40))
    assert names.name_halves(to_pixels(image))["left of"] == (None, "ball")


def test_specks_are_no_objects(names):
    image = canvas("ring", "ball", "left of", "white")
    for place in ((2, 2), (60, 3), (124, 120), (5, 100)):
        image.putpixel(place, (0, 0, 0))
    assert names.name_halves(to_pixels(image))["left of"] == ("ring", "ball")


def test_names_of_canvases_are_taken_apart():
    assert split_name("cup of tea left of traffic light") == ("cup of tea", "left of", "traffic light")
    with pytest.raises(ValueError, match="`name` 'a cat' has none of the relations"):
        split_name("a cat")


def test_the_prompt_names_the_plain_background():
    assert plain_prompt(["a cat left of a cup", "a cat left of a cup on a pink background"]).endswith(
        "pink background"
    )
    assert plain_prompt(["a cat left of a cup", "a cat left of a cup in front of a photo of a tree"]) is None


def test_drawings_that_show_nothing_are_refused():
    with pytest.raises(ValueError, match="Drawing 1, 'nothing', is of one color"):
        ObjectNames([to_pixels(drawing("ball")), torch.full((3, 8, 8), 255, dtype=torch.uint8)], ["ball", "nothing"])


def save(path, rows, columns):
    for row in rows:
        content = io.BytesIO()
        row["image"].save(content, "PNG")
        row["image"] = {"bytes": content.getvalue(), "path": None}
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=Features({"image": ImageFeature()} | columns)).to_parquet(path)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    root, text = tmp_path_factory.mktemp("two"), Value("string")
    drawings = [{"image": drawing(kind), "name": kind, "style": "flat", "everyday": True} for kind in KINDS]
    save(root / "drawings" / "train.parquet", drawings, {"name": text, "style": text, "everyday": Value("bool")})
    rows = []
    for number, relation in enumerate(("left of", "above", "left of")):
        prompt = f"a ball {relation} a bar"
        captions = [prompt, f"{prompt} on a pink background" if number < 2 else f"{prompt} in front of a photo"]
        image = canvas("ball", "bar", relation, "pink", 32)
        rows.append({"image": image, "name": f"ball {relation} bar", "captions": captions, "held_out": number == 1})
    columns = {"name": text, "captions": List(text), "held_out": Value("bool")}
    save(root / "canvases" / "validation.parquet", rows, columns)
    shutil.copy(root / "canvases" / "validation.parquet", root / "canvases" / "train.parquet")
    make_text_pipeline().save_pretrained(root / "model")
    values = {
        "data": root / "canvases",
        "drawings": root / "drawings",
        "model": root / "model",
        "output": root / "out",
    }
    sampling = ["--num_inference_steps", "1", "--token_counts", "1", "6", "--sheet_rows", "1"]
    return [word for name, value in values.items() for word in (f"--{name}", str(value))] + sampling


def test_the_command_measures_prompts_and_the_real_canvases_beside_them(flags):
    import_module("evaluate").main(["two_objects", *flags])
    folder = paths.Path(flags[flags.index("--output") + 1])
    record = json.loads((folder / "two_objects.json").read_text())
    assert record["protocol"]["num_prompts"] == {"trained_pairs": 1, "held_out_pairs": 1}  # none in front of a photo
    for table in record["results"].values():
        assert list(table) == ["real", "1", "6"] and all("both_names" in figures for figures in table.values())
    assert "arrangement of these" in (folder / "two_objects.md").read_text()
    assert (folder / "two_objects.png").is_file()


def test_data_without_the_columns_of_canvases_are_refused(flags):
    wrong = list(flags)
    wrong[wrong.index("--drawings") + 1] = wrong[1]
    with pytest.raises(ValueError, match="`drawings` .* lacks the columns everyday, style"):
        import_module("evaluate").main(["two_objects", *wrong])
