"""Compose two-object images with exact captions from a set made by scripts/prepare_embedded_data.py.

    python scripts/prepare_canvases.py --data data/everyday128 --output data/canvases128 --num_train 20000

Writes train.parquet and validation.parquet with the same columns as that set, so that both can be trained together:
`name` is "cat left of cup", `style` is "two objects", `prompt` the plain sentence, `held_out` whether its names never
stand together in train (every second image of validation). See `flextok_hf.data.canvases`.
"""

import argparse
import io
from pathlib import Path

from datasets import Dataset, Features, load_dataset

from flextok_hf.data.canvases import CanvasComposer, Drawing, draw_canvas
from flextok_hf.utils.plain_errors import plain_errors


STYLE = "two objects"
PHOTO = "photo"
STYLES_WITHOUT_CUTOUT = (PHOTO, "plain", "clip art")  # names of clip art come from its titles and are less reliable
WEBP_QUALITY = 90


def make_rows(data: Dataset, split: str, count: int, seed: int, resolution: int) -> list[dict]:
    """Return `count` rows composed of the everyday drawings and the photos in `data`."""
    columns = ("name", "style", "everyday", "prompt", "styled_prompt")
    records = list(zip(range(len(data)), *(data[column][:] for column in columns), strict=True))
    drawings = [record for record in records if record[3] and record[2] not in STYLES_WITHOUT_CUTOUT]
    photos = [record for record in records if record[2] == PHOTO]
    composer = CanvasComposer(
        [Drawing(name, style, prompt, styled) for _, name, style, _, prompt, styled in drawings],
        [styled for *_, styled in photos],
    )
    rows = []
    for index in range(count):
        canvas = composer.compose(index, seed, split)
        first, second = (composer.drawings[place.drawing] for place in (canvas.first, canvas.second))
        images = [data[drawings[place.drawing][0]]["image"] for place in (canvas.first, canvas.second)]
        photo = None if canvas.photo is None else data[photos[canvas.photo][0]]["image"]
        content = io.BytesIO()
        draw_canvas(canvas, images, photo, resolution).save(content, "WEBP", quality=WEBP_QUALITY)
        rows.append(
            {
                "image": {"bytes": content.getvalue(), "path": None},
                "captions": list(canvas.captions),
                "everyday": False,
                "held_out": canvas.is_held_out,
                "name": f"{first.name} {canvas.relation} {second.name}",
                "style": STYLE,
                "split": split,
                "prompt": canvas.captions[0],
                "styled_prompt": f"{first.styled_phrase} {canvas.relation} {second.styled_phrase}",
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder made by scripts/prepare_embedded_data.py")
    parser.add_argument("--output", required=True, type=Path, help="folder for train.parquet and validation.parquet")
    parser.add_argument("--num_train", type=int, default=20_000, help="training images (20000)")
    parser.add_argument("--num_validation", type=int, default=500, help="validation images (500)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other images (0)")
    parser.add_argument("--resolution", type=int, default=128, help="side of the images in pixels (128)")
    options = parser.parse_args(argv)
    for name in ("num_train", "num_validation", "resolution"):
        if getattr(options, name) < 1:
            raise ValueError(f"`{name}` must be 1 or more, got {getattr(options, name)}.")
    data = load_dataset(options.data, split="train")
    if "held_out" not in data.column_names:
        raise ValueError(
            f"`data` {options.data} has no column `held_out`: make it with scripts/prepare_embedded_data.py."
        )
    options.output.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", options.num_train), ("validation", options.num_validation)):
        rows = make_rows(data, split, count, options.seed, options.resolution)
        made = Dataset.from_list(rows, features=Features({name: data.features[name] for name in data.column_names}))
        made.to_parquet(options.output / f"{split}.parquet")
        print(f"{split}: {len(made)} images, {sum(made['held_out'][:])} of held-out pairs")


if __name__ == "__main__":
    with plain_errors():
        main()
