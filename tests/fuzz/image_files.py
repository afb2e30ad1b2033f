"""Image files as strangers send them: every format and mode, damaged, mislabelled, or no images at all."""

import io
import random
import struct
from pathlib import Path

from outcomes import judge
from PIL import Image, PngImagePlugin

from flextok_hf import FlexTokPipeline


MODES = {
    "PNG": ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "I"],
    "JPEG": ["RGB", "L", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["P", "L"],
    "BMP": ["RGB", "L", "1", "P"],
    "TIFF": ["RGB", "RGBA", "L", "1", "F", "I;16", "CMYK"],
    "PPM": ["RGB", "L", "1"],
    "ICO": ["RGBA"],
    "EPS": ["RGB"],
    "PDF": ["RGB"],
    "TGA": ["RGB"],
    "PCX": ["RGB"],
}
ENDINGS = [".png", ".jpg", ".webp", ".gif", ".bmp", ".tiff", ".ppm", ".eps", ".txt", ""]
NO_IMAGES = [
    b"", b"\0" * 1000, b"text", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n", b"<svg/>", b"GIF89a",
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"BM", b"RIFF\0\0\0\0WEBP", b"II*\0", b"%PDF-1.4",
    b"P6 9999999 9999999 255 ", b"P6\n2 2\n255\n", b"\x80\x04\x95", b"PK\x03\x04",
]  # fmt: skip


def make_image(draw: random.Random) -> bytes:
    """Return an image file of a random format, mode and size."""
    kind = draw.choice(sorted(MODES))
    size = (draw.choice([1, 2, 7, 16, 40, 200]), draw.choice([1, 3, 16, 33, 500]))
    image = Image.effect_noise(size, 80).convert("RGB")
    mode = draw.choice(MODES[kind])
    image = Image.new(mode, size, draw.randrange(200)) if mode in ("I;16", "I", "F") else image.convert(mode)
    options: dict = {}
    if kind in ("PNG", "JPEG", "WEBP", "TIFF") and draw.random() < 0.3:
        exif = Image.Exif()
        exif[274] = draw.choice([0, 1, 3, 6, 8, 9, 65535])
        options["exif"] = exif.tobytes()
    if kind == "PNG" and draw.random() < 0.2:
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("note", "x" * draw.choice([1, 10**6]))
    file = io.BytesIO()
    try:
        image.save(file, kind, **options)
    except (OSError, ValueError):  # a size or mode that this version of Pillow does not write
        file = io.BytesIO()
        image.convert("RGB").save(file, "PNG")
    return file.getvalue()


def damage(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Return a damaged file and what was done."""
    changed = bytearray(content)
    kind = draw.choice(["none", "truncate", "flip", "start", "extend", "size", "double", "no image"])
    if kind == "truncate":
        changed = changed[: draw.randrange(len(changed))]
    elif kind in ("flip", "start"):
        end = len(changed) if kind == "flip" else min(80, len(changed))
        for _ in range(draw.choice([1, 3, 30])):
            changed[draw.randrange(end)] = draw.randrange(256)
    elif kind == "extend":
        changed += draw.randbytes(1000)
    elif kind == "size":  # width and height of a PNG; other formats get them somewhere else
        changed[16:24] = struct.pack(">II", draw.choice([0, 1, 2**16, 2**31 - 1]), draw.choice([0, 1, 2**15, 2**31]))
    elif kind == "double":
        changed += content
    elif kind == "no image":
        changed = bytearray(draw.choice(NO_IMAGES))
    return bytes(changed), kind


def judge_image(pipe: FlexTokPipeline, scratch: Path, seed: int) -> tuple[str, str]:
    """Tokenize a random file; returns what it was, and what is wrong or an empty string."""
    draw = random.Random(seed)
    content, kind = damage(make_image(draw), draw)
    path = scratch / f"image{seed}{draw.choice(ENDINGS)}"
    path.write_bytes(content)
    problem = judge(lambda: pipe.tokenize(path), [path.name], (ValueError, TypeError, OSError))
    path.unlink()
    return f"{path.name}: {kind}, starts with {content[:16]!r}", problem or ""
