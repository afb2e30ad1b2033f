"""Images of any kind -> `pixel_values` (B, 3, R, R) in [-1, 1], and back to PIL, numpy or torch.

Letters: B batch, R resolution (side of the square image), H W height and width.
"""

import errno
import struct
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import ExifTags, Image
from torch import Tensor

from ..utils.image_formats import RASTER_FORMATS, open_image


Result = TypeVar("Result")

OUTPUT_TYPES = ("pil", "np", "pt")
WHITE = (255, 255, 255)
# What Pillow raises for files that are not images, or are truncated or damaged; it varies by format.
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, LookupError, OverflowError, struct.error, zlib.error)
# The system's errors have a number; Pillow's have none. A wrong position in a damaged file gives these.
NUMBERS_OF_DAMAGE = (None, errno.EINVAL, errno.EOVERFLOW)
# What turns images of EXIF orientation 2, 3, ... 8 upright.
TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
SHORT = 3  # the type of the orientation in EXIF
PILLOW_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class ImageValueError(ValueError):
    """The values of a whole image are out of range; the message continues "This image"."""


def load_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """Read an image file, or take a PIL image, as upright RGB; from an animation, the first frame.

    Large JPEG files are deliberately decoded at full size: the decoder's own downscaling gives slightly different
    pixels, so the tokens of an image would depend on how it was passed.

    Args:
        source: path or bytes of an image file, or an image.

    Raises:
        TypeError: if it is something else.
        FileNotFoundError: if there is no such file.
        OSError: if the system cannot read the file, regardless of its content.
        ValueError: if the file is not an image of one of `RASTER_FORMATS`, is truncated or damaged, is too large to
            decode safely, or has values out of range.
    """
    return to_rgb(source) if isinstance(source, Image.Image) else _read_file(source, to_rgb)


def image_size(source: str | Path | bytes) -> tuple[int, int]:
    """Return height and width of an image file, upright, from its header; raises the errors of `load_image`."""

    def read(image: Image.Image) -> tuple[int, int]:
        is_turned = read_orientation(image) in (5, 6, 7, 8)
        return image.size if is_turned else image.size[::-1]

    return _read_file(source, read)


def _read_file(source: str | Path | bytes, read: Callable[[Image.Image], Result]) -> Result:
    """Return what `read` makes of an image file."""
    file: str | Path | BytesIO
    if isinstance(source, (str, Path)):
        name, file = f"'{source}'", source
        if not Path(source).is_file():
            kind = "a folder" if Path(source).is_dir() else "not an existing file"
            raise FileNotFoundError(
                f"{name} is {kind}. Pass the path of an image file; download images from the web first."
            )
    elif isinstance(source, bytes):
        name, file = f"a file of {len(source)} bytes", BytesIO(source)
    else:
        raise TypeError(f"`source` must be a path, bytes or a PIL image, got {type(source).__name__}.")
    try:
        with open_image(file) as image:
            return read(image)
    except Image.UnidentifiedImageError as error:
        formats = ", ".join(RASTER_FORMATS)
        raise ValueError(
            f"{name} is not an image, or of a format that is not read. Convert it to one of {formats}."
        ) from error
    except ImageValueError as error:
        raise ImageValueError(f"{name} {error}") from error
    except PILLOW_BOMBS as error:
        raise ValueError(_bomb_message(name, error)) from error
    except PILLOW_ERRORS as error:
        if isinstance(error, OSError) and error.errno not in NUMBERS_OF_DAMAGE:
            raise OSError(error.errno, f"{name} cannot be read: {error.strerror}") from error
        raise ValueError(f"{name} is damaged or truncated ({error}). Download or save the file again.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL image to upright (EXIF) RGB: transparency on white, 16 bits as 8, broken metadata ignored."""
    image.load()
    orientation = read_orientation(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_to_gray(image)
    if image.mode in ("RGBa", "La"):  # Pillow converts premultiplied alpha only to straight alpha
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    if "transparency" in image.info and image.mode in ("1", "L", "P", "RGB"):
        try:
            image = image.convert("RGBA")
        except (*PILLOW_ERRORS, TypeError):  # left behind by another mode
            image = image.copy()
            del image.info["transparency"]
    if image.mode in ("RGBA", "LA", "PA"):
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")  # convert copies even to the same mode
        image = Image.new("RGB", rgba.size, WHITE)
        image.paste(rgba, mask=rgba)
    image = image if image.mode == "RGB" else image.convert("RGB")
    if orientation in range(2, 9):  # ImageOps.exif_transpose would rewrite all tags, which fails if one is broken
        image = image.transpose(Image.Transpose[TURNS[int(orientation) - 2]])
        image.info = {}  # or the image would be turned again
    return image


def read_orientation(image: Image.Image) -> Any:
    """Return the EXIF orientation of an image, 1 to 8 if it is valid, or `None`; other tags may be broken."""
    with suppress(Exception):  # what broken EXIF raises varies by tag
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        if orientation is not None:
            return orientation
        # Pillow skips all tags that follow one with a value outside of the block
        block = image.info["exif"].removeprefix(b"Exif\0\0")
        order = "<" if block.startswith(b"II") else ">"
        (start,) = struct.unpack_from(order + "I", block, 4)
        (num_tags,) = struct.unpack_from(order + "H", block, start)
        tags = struct.iter_unpack(order + "HHIHxx", block[start + 2 : start + 2 + 12 * num_tags])
        return next(value for *key, value in tags if key == [ExifTags.Base.Orientation, SHORT, 1])
    return None


def resize_and_crop(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """Resize until `size`, a side or height and width, is covered (Lanczos, antialiased), then crop the center."""
    height, width = (size, size) if isinstance(size, int) else size
    if image.size == (width, height):
        return image
    box_width = min(image.width, image.height * width / height)
    box_height = min(image.height, image.width * height / width)
    # One call does both, so that only the region that is kept is resampled.
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def prepare_images(images: Any, resolution: int | tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """Convert one or more images to `pixel_values` (B, 3, R, R), float32 in [-1, 1].

    Args:
        images: an image or a list of images of any mix of sizes and types. An image is a path, a PIL image, an
            array (H, W) or (H, W, 1 | 3), or a tensor (H, W) or (1 | 3, H, W); uint8 in 0..255 or float in [0, 1].
            Batches (B, H, W, 1 | 3) of numpy and (B, 1 | 3, H, W) of torch are accepted too.
        resolution: R, or height and width. Tensors and arrays of exactly this size are not resampled.
        device: device of the result, the CPU by default.

    Raises:
        TypeError: if an image has a type or data type not listed above.
        ValueError: if an image is damaged, empty, out of range, not finite, or has an unsupported number of channels.
    """
    size = resolution if isinstance(resolution, tuple) else (resolution, resolution)
    if len(size) != 2 or not all(type(side) is int and side >= 1 for side in size):
        raise ValueError(f"`resolution` must be a whole number of 1 or more, got {resolution!r}.")
    return torch.stack(prepare_each(images, lambda height, width: size, device))


def prepare_each(
    images: Any, choose_size: Callable[[int, int], tuple[int, int]], device: torch.device | str | None = None
) -> list[Tensor]:
    """Convert images as `prepare_images` does, each to the size that `choose_size` returns for its own."""
    if isinstance(images, (list, tuple)):
        items: Sequence[Any] = images
    elif isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        items = list(images)
    else:
        items = [images]
    if len(items) == 0:
        raise ValueError("`images` is empty. Pass at least one image.")
    try:
        target = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise ValueError(f"`device` {device!r} is not known to PyTorch: {error}") from error
    is_single = items is not images and len(items) == 1
    names = ["`images`"] if is_single else [f"`images[{index}]`" for index in range(len(items))]
    return [_prepare_one(*pair, choose_size).to(target) for pair in zip(items, names, strict=True)]


def pixels_to_values(pixels: Tensor) -> Tensor:
    """Map uint8 pixels of any shape to float32 in [-1, 1], bit-identical to converting their [0, 1] form."""
    return pixels.float() / 255 * 2 - 1


def image_to_pixels(image: Image.Image) -> Tensor:
    """Copy an RGB image into a uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_output(images: Tensor, output_type: str = "pil") -> list[Image.Image] | np.ndarray | Tensor:
    """Convert a model's images (B, 3, H, W) in [-1, 1] to the requested output type.

    Args:
        images: values slightly outside [-1, 1], as samplers produce them, are clipped.
        output_type: "pil" for a list of PIL images, "np" for (B, H, W, 3) or "pt" for (B, 3, H, W), float32 in [0, 1].

    Raises:
        ValueError: if `output_type` is unknown or `images` contains NaN or infinity.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
    if not torch.isfinite(images).all():
        raise ValueError(
            "The images contain NaN or infinity: the weights of the VAE that decoded them are damaged, or its"
            " precision is too low. Load it again in bfloat16 or float32."
        )
    return VaeImageProcessor().postprocess(images.detach().float(), output_type=output_type)


def _prepare_one(image: Any, name: str, choose_size: Callable[[int, int], tuple[int, int]]) -> Tensor:
    """Convert one image of any accepted type to (3, H, W) of the chosen size, float32 in [-1, 1]."""
    if isinstance(image, (str, Path)):
        image = load_image(image)
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"{name} is empty: its size is {image.size[0]} x {image.size[1]} pixels.")
        try:
            rgb = to_rgb(image)
        except ImageValueError as error:
            raise ValueError(f"{name} {error}") from error
        except PILLOW_BOMBS as error:
            raise ValueError(_bomb_message(name, error)) from error
        except PILLOW_ERRORS as error:
            raise ValueError(
                f"{name}, a PIL image of mode {image.mode}, cannot be decoded ({error})."
                " Load or save the file again, or convert the image to RGB."
            ) from error
        return pixels_to_values(image_to_pixels(resize_and_crop(rgb, choose_size(rgb.height, rgb.width))))
    if isinstance(image, np.ndarray):
        _check_shape(image.shape, ("H, W", "H, W, 1", "H, W, 3"), -1, name, "array")
        pixels = _array_to_tensor(image, name)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    elif isinstance(image, Tensor):
        _check_shape(image.shape, ("H, W", "1, H, W", "3, H, W"), 0, name, "tensor")
        pixels = image.detach()
        pixels = pixels[None] if pixels.ndim == 2 else pixels
    else:
        raise TypeError(
            f"{name} is of type {type(image).__name__}. Allowed are a path, a PIL image, a numpy array, a tensor, or"
            " a flat list of them."
        )
    pixels = _check_values(pixels, name).expand(3, -1, -1)
    size = choose_size(*pixels.shape[-2:])
    if pixels.shape[-2:] != size:
        pixels = _resize_tensor(pixels.cpu(), size)
    return pixels_to_values(pixels) if pixels.dtype == torch.uint8 else pixels.float() * 2 - 1


def _array_to_tensor(array: np.ndarray, name: str) -> Tensor:
    """Copy a numpy array into a tensor; raise a TypeError for data types that images do not have."""
    if array.dtype not in (np.uint8, np.float16, np.float32, np.float64):
        raise TypeError(_dtype_message(name, array.dtype))
    # Copied because torch cannot view reversed or read-only memory, or the other byte order.
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _check_shape(shape: Sequence[int], allowed: Sequence[str], channel_axis: int, name: str, kind: str) -> None:
    """Raise a ValueError if an array or tensor of this shape is not an image."""
    if 0 in shape:
        raise ValueError(f"{name} is empty: its shape is {tuple(shape)}.")
    if len(shape) == 2 or (len(shape) == 3 and shape[channel_axis] in (1, 3)):
        return
    remedy = "Pass one image, with one (gray) or three (RGB) channels."
    if len(shape) == 3 and shape[-1 - channel_axis] in (1, 3):
        move = "permute(2, 0, 1)" if kind == "tensor" else "transpose(1, 2, 0)"
        remedy = f"Its channels seem to be on the wrong axis: call `.{move}`."
    elif len(shape) == 3 and shape[channel_axis] in (2, 4):
        remedy = "For a transparent image, pass a PIL image: it is put on white. Latents cannot be passed here."
    raise ValueError(f"{name} is a {kind} of shape {tuple(shape)}; allowed are ({'), ('.join(allowed)}). {remedy}")


def _check_values(pixels: Tensor, name: str) -> Tensor:
    """Return `pixels` if they are uint8 or floats in [0, 1]; otherwise raise an error that says how to fix them."""
    if pixels.dtype == torch.uint8:
        return pixels
    if not pixels.is_floating_point():
        raise TypeError(_dtype_message(name, pixels.dtype))
    if not torch.isfinite(pixels).all():
        raise ValueError(f"{name} contains NaN or infinity. Fix the image, for example with `torch.nan_to_num`.")
    low, high = pixels.min().item(), pixels.max().item()
    if 0 <= low and high <= 1:
        return pixels
    remedy = "If the excess is rounding error, call `clip(0, 1)`."
    if high > 2:
        remedy = "If it is in 0..255, divide by 255 or convert it to uint8."
    elif -1 <= low and high <= 1:
        remedy = "If it is in [-1, 1], pass `images / 2 + 0.5`."
    raise ValueError(f"{name} has floats from {low:.6g} to {high:.6g}; floats must lie in [0, 1]. {remedy}")


def _resize_tensor(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize and crop (3, H, W): uint8 as a PIL image, floats channel by channel, without rounding to 8 bits."""
    if pixels.dtype == torch.uint8:
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        return image_to_pixels(resize_and_crop(image, size))
    channels = [Image.fromarray(channel) for channel in pixels.float().contiguous().numpy()]
    resized = np.stack([np.array(resize_and_crop(channel, size)) for channel in channels])
    return torch.from_numpy(resized).clamp(0, 1)  # Lanczos overshoots at edges; 8-bit resizing clips it too


def _deep_to_gray(image: Image.Image) -> Image.Image:
    """Scale a gray image of 16 bits (also as 32-bit integers) or of floats in [0, 1] to 8 bits."""
    values = np.array(image)
    low, high = values.min(), values.max()
    full = 1 if image.mode == "F" else 65535
    if not (low >= 0 and high <= full):  # also true for NaN
        raise ImageValueError(
            f"has values from {low} to {high}, but mode {image.mode} allows 0 to {full}. Scale them to 8 bits first."
        )
    if image.mode == "F":
        gray = np.rint(values * 255).astype(np.uint8)
    else:
        if isinstance(image.info.get("transparency"), int):
            values[values == image.info["transparency"]] = full  # the transparent color becomes white
        gray = ((values.astype(np.uint32) * 255 + full // 2) // full).astype(np.uint8)
    return Image.fromarray(gray)


def _dtype_message(name: str, dtype: object) -> str:
    return (
        f"{name} is of data type {dtype}; allowed are uint8 (0..255) and floats (0 to 1). Convert 16-bit images with"
        " `array / 65535`, 8-bit ones with `array.astype('uint8')`."
    )


def _bomb_message(name: str, error: Exception) -> str:
    return f"{name} is too large to decode safely ({error}). Downscale it, or increase `PIL.Image.MAX_IMAGE_PIXELS`."
