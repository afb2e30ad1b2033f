r"""Make the data of the study in docs/reproduction.md: one drawn shape per image, and prompts of growing detail.

    python scripts/prepare_reproduction_data.py --output data/reproduction

Writes train.parquet and validation.parquet with the columns

    image            PNG, RGB, resolution x resolution
    captions         the three prompts; draw one per training step
    color_prompt     the color only ("a red shape")
    object_prompt    shape, color and size ("a large red circle")
    scene_prompt     a full sentence ("a large red circle in the top left")
    shape, color, size, place   what the image shows
    object           size, color and shape together, the classes of a feature network

The scenes are those of `flextok_hf.data.synthetic` with one shape on gray, made larger: 480 combinations, and a little
play in position. About half of the validation split shows a combination of shape and color that the train split never
has.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from itertools import count, islice
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value

from flextok_hf.data.synthetic import Scene, draw_scene, make_scene
from flextok_hf.utils.files import write_atomically


PROMPTS = ("color_prompt", "object_prompt", "scene_prompt")
ATTRIBUTES = ("shape", "color", "size", "place")
# A background that varies makes up nine tenths of the variance of pixels, and a short training learns nothing else.
BACKGROUND = "gray"
DIAMETERS = {"small": 0.36, "large": 0.64}  # in sides of the image
SPREAD = 0.68  # of the places around the middle, so that large shapes stay in the image


def describe(scene: Scene) -> dict[str, str]:
    """Return the prompts and attributes of a scene with one shape."""
    item = scene.objects[0]
    place = "in the middle" if scene.relation == "center" else f"in the {scene.relation}"
    return {
        "color_prompt": f"a {item.color} shape",
        "object_prompt": f"a {item.size} {item.color} {item.shape}",
        "scene_prompt": f"a {item.size} {item.color} {item.shape} {place}",
        "shape": item.shape,
        "color": item.color,
        "size": item.size,
        "place": scene.relation,
        "object": f"{item.size} {item.color} {item.shape}",
    }


def single_scenes(split: str, seed: int) -> Iterator[Scene]:
    """Yield the scenes of the synthetic data set that show one shape on `BACKGROUND`, without end."""
    scenes = (make_scene(index, seed, split) for index in count())
    return (scene for scene in scenes if len(scene.objects) == 1 and scene.background == BACKGROUND)


def enlarge(scene: Scene) -> Scene:
    """Return the scene with larger shapes, closer to the middle."""
    objects = [
        replace(item, diameter=DIAMETERS[item.size], x=0.5 + SPREAD * (item.x - 0.5), y=0.5 + SPREAD * (item.y - 0.5))
        for item in scene.objects
    ]
    return replace(scene, objects=tuple(objects))


def make_split(split: str, size: int, resolution: int, seed: int) -> Dataset:
    """Draw the images of one split."""
    rows = []
    for scene in islice(single_scenes(split, seed), size):
        content = BytesIO()
        draw_scene(enlarge(scene), resolution).save(content, format="PNG")
        row = describe(scene)
        image = {"bytes": content.getvalue(), "path": None}
        rows.append(row | {"image": image, "captions": [row[key] for key in PROMPTS]})
    texts = {name: Value("string") for name in (*PROMPTS, *ATTRIBUTES, "object")}
    return Dataset.from_list(rows, features=Features({"image": Image(), "captions": List(Value("string"))} | texts))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=Path, help="folder for train.parquet and validation.parquet")
    parser.add_argument("--resolution", type=int, default=24, help="side of the images in pixels")
    parser.add_argument("--num_train", type=int, default=8000, help="images of the split train")
    parser.add_argument("--num_validation", type=int, default=500, help="images of the split validation")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other images")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    for split, size in (("train", options.num_train), ("validation", options.num_validation)):
        rows = make_split(split, size, options.resolution, options.seed)
        write_atomically(options.output / f"{split}.parquet", rows.to_parquet)
        print(f"{split}: {len(rows)} images of {len(set(rows['object']))} objects")


if __name__ == "__main__":
    main()
