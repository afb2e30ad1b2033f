"""Opening images of raster formats only: for others, Pillow may start a program, such as Ghostscript for EPS."""

from pathlib import Path
from typing import IO

from PIL import Image


# By Pillow's names; TGA is last, since files of this format have no signature.
RASTER_FORMATS = "JPEG PNG WEBP GIF BMP TIFF AVIF JPEG2000 PPM ICO QOI SGI PCX TGA".split()


# Endings of the files that are looked for in a folder
PHOTO_EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".avif", ".jp2", ".ppm", ".qoi", ".tga"),
)


def open_image(file: str | Path | IO[bytes]) -> Image.Image:
    """Open an image as `PIL.Image.open` does, whatever its ending; its pixels are read later.

    Raises:
        PIL.UnidentifiedImageError: if it is not an image of a raster format.
        OSError: if it cannot be read; other errors of Pillow, if it is damaged.
    """
    Image.init()  # registers all formats, once; some Pillows lack AVIF
    return Image.open(file, formats=[name for name in RASTER_FORMATS if name in Image.OPEN])
