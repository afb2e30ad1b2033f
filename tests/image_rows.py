"""Small datasets of images whose color says which row they are."""

from io import BytesIO

import datasets
from PIL import Image

from flextok_hf.data.samples import ImageTransform


R = 16
TRANSFORM = ImageTransform(R)


def png(shade, size=(R, R)):
    content = BytesIO()
    Image.new("RGB", size, (shade, 255 - shade, 7)).save(content, format="PNG")
    return content.getvalue()


def write_parquet(path, num_rows=10, damaged=(), **columns):
    """Write rows whose images have the row number as shade; rows in `damaged` hold junk bytes instead."""
    images = [{"bytes": b"jk%02d" % row if row in damaged else png(row), "path": None} for row in range(num_rows)]
    features = datasets.Dataset.from_dict({name: values[:num_rows] for name, values in columns.items()}).features
    features["image"] = datasets.Image()
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"image": images, **columns}, features=features).to_parquet(str(path))
    return path
