r"""Create the data of the study in docs/reproduction.md: one shape per image, and increasingly detailed prompts.

    python scripts/prepare_reproduction_data.py --output data/reproduction

Writes train.parquet and validation.parquet with the columns

    image            PNG, RGB, resolution x resolution
    captions         the three prompts; training samples one per step
    color_prompt     the color only ("a red shape")
    object_prompt    shape, color and size ("a large red circle")
    scene_prompt     a full sentence ("a large red circle in the top left")
    shape, color, size, place   attributes of the image
    object           size, color and shape combined, the classes of a feature network

The scenes are the single-shape ones of `flextok_hf.data.synthetic` on gray, enlarged: 480 combinations, plus a little
positional jitter. About half of the validation images show a shape-color combination that is not in the train split.
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
from flextok_hf.utils.plain_errors import plain_errors


PROMPTS = ("color_prompt", "object_prompt", "scene_prompt")
ATTRIBUTES = ("shape", "color", "size", "place")
# A varying background makes up nine tenths of the pixel variance, and a short training run learns nothing else.
BACKGROUND = "gray"
DIAMETERS = {"small": 0.36, "large": 0.64}  # as a fraction of the image side
SPREAD = 0.68  # scale of the offsets from the center, so that large shapes stay inside the image


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
    """Yield scenes of the synthetic dataset with one shape on `BACKGROUND`, indefinitely."""
    scenes = (make_scene(index, seed, split) for index in count())
    return (scene for scene in scenes if len(scene.objects) == 1 and scene.background == BACKGROUND)


def enlarge(scene: Scene) -> Scene:
    """Return the scene with larger shapes, closer to the center."""
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
    parser.add_argument("--num_train", type=int, default=8000, help="number of training images")
    parser.add_argument("--num_validation", type=int, default=500, help="number of validation images")
    parser.add_argument("--seed", type=int, default=0, help="a different seed gives different images")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    for split, size in (("train", options.num_train), ("validation", options.num_validation)):
        rows = make_split(split, size, options.resolution, options.seed)
        write_atomically(options.output / f"{split}.parquet", rows.to_parquet)
        print(f"{split}: {len(rows)} images of {len(set(rows['object']))} objects")


if __name__ == "__main__":
    with plain_errors():
        main()
