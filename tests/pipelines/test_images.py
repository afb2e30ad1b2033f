import errno
import struct
import subprocess
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from flextok_hf.pipelines.images import load_image, prepare_images, to_output, to_rgb
from flextok_hf.utils.image_formats import RASTER_FORMATS


R = 16
RED = (200, 30, 40)


def photo(width=R, height=R, seed=0):
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def as_bytes_values(image):
    """The expected uint8 pixels (3, R, R) of a PIL image of the right size."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def test_every_way_to_pass_the_same_image_gives_the_same_values(tmp_path):
    image = photo()
    image.save(tmp_path / "photo.png")
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = prepare_images(image, R)

    assert expected.shape == (1, 3, R, R) and expected.dtype == torch.float32
    for same in (
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        [image],
        array,
        array[None],
        tensor,
        tensor[None],
        tensor.float() / 255,
        array.astype(np.float32) / 255,
        array[::-1][::-1],
    ):
        assert torch.equal(prepare_images(same, R), expected)


def test_floats_of_the_right_size_are_only_scaled():
    images = torch.rand(2, 3, R, R, generator=torch.Generator().manual_seed(0))
    assert torch.equal(prepare_images(images, R), images * 2 - 1)


def test_a_list_may_mix_kinds_and_sizes():
    images = [photo(40, 20), np.zeros((9, 9), dtype=np.uint8), torch.ones(3, 5, 50), photo().convert("L")]
    values = prepare_images(images, R)
    assert values.shape == (4, 3, R, R)
    assert (values[1] == -1).all() and (values[2] == 1).all()


def test_inputs_are_left_unchanged():
    images = torch.rand(1, 3, R, R)
    before = images.clone()
    prepare_images(images, R).add_(1)
    assert torch.equal(images, before)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_opaque_modes_become_their_rgb_form(mode):
    image = photo().convert(mode)
    assert torch.equal(prepare_images(image, R)[0], as_bytes_values(image).float() / 255 * 2 - 1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_transparent_pixels_become_white(mode):
    image = Image.new("RGBA", (R, R), (0, 0, 0, 0))
    image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode)).convert(mode)
    assert (prepare_images(image, R) == 1).all()


def test_half_transparent_pixels_are_mixed_with_white():
    image = Image.new("RGBA", (R, R), (0, 0, 0, 128))
    assert prepare_images(image, R).unique().item() == pytest.approx(127 / 255 * 2 - 1)


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_color_marked_as_transparent_in_a_file_becomes_white(tmp_path, mode):
    image = Image.new(mode, (R, R), 0)
    image.paste(image.getpixel((0, 0)), (0, 0, R, R))
    image.save(tmp_path / "marked.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert (prepare_images(tmp_path / "marked.png", R) == 1).all()


def test_sixteen_bits_are_scaled_to_the_nearest_eight(tmp_path):
    deep = np.linspace(0, 65535, R * R).round().astype(np.uint16).reshape(R, R)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    expected = torch.from_numpy(np.rint(deep / 257)).float() / 255 * 2 - 1

    for image in (tmp_path / "deep.png", Image.fromarray(deep), Image.fromarray(deep.astype(np.int32))):
        assert torch.equal(prepare_images(image, R)[0], expected.float().expand(3, R, R))


def test_float_pil_images_are_scaled_from_0_to_1():
    assert (prepare_images(Image.new("F", (R, R), 1.0), R) == 1).all()
    with pytest.raises(ValueError, match="mode F allows 0 to 1"):
        prepare_images(Image.new("F", (R, R), 100.0), R)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path, orientation):
    # The side with the red half once the stored image is upright.
    red_side = {1: "top", 2: "top", 3: "bottom", 4: "bottom", 5: "left", 6: "right", 7: "right", 8: "left"}[
        orientation
    ]
    image = Image.new("RGB", (R, R), "white")
    image.paste(RED, (0, 0, R, R // 2))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)

    green = prepare_images(tmp_path / "turned.png", R)[0, 1]
    sides = {"top": green[0], "bottom": green[-1], "left": green[:, 0], "right": green[:, -1]}
    darkest = min(sides, key=lambda side: sides[side].mean())
    assert darkest == red_side


SHORT = 3
TAGS = {
    "a width that is text": (256, 2, 4, b"abc\0"),
    "a resolution that is text": (282, 2, 4, b"abc\0"),
    "a date that is a number": (306, SHORT, 1, b"\1\0\0\0"),
    "a camera folder that is text": (34665, 2, 4, b"abc\0"),
    "a data type that does not exist": (271, 99, 1, b"abc\0"),
    "a text outside the file": (315, 2, 1000, b"\xff\xff\xff\0"),
    "an earlier text outside the file": (270, 2, 1000, b"\xff\xff\xff\0"),
    "an earlier number outside the file": (259, 5, 1, b"\xff\xff\xff\x7f"),
    "an earlier text that runs out of the file": (271, 2, 1000, b"\x08\0\0\0"),
}


def encode(kind, *tags, orientation=6, size=(32, 24)):
    """An image file with an orientation and raw EXIF tags: number, type, count, 4 bytes."""
    tags = sorted((*tags, (274, SHORT, 1, struct.pack("<HH", orientation, 0))))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags))
    exif += b"".join(struct.pack("<HHI4s", *tag) for tag in tags) + bytes(4)
    return encode_with(kind, exif, size)


def encode_with(kind, exif, size=(32, 24)):
    file = BytesIO()
    photo(*size).save(file, kind, exif=exif)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Possibly corrupt EXIF", "ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("tag", TAGS)
def test_an_orientation_next_to_a_broken_tag_is_applied_once(kind, tag):
    upright = load_image(encode(kind, TAGS[tag]))
    assert upright.size == (24, 32)
    assert np.array_equal(np.array(upright), np.rot90(np.array(load_image(encode(kind, orientation=1))), -1))
    assert to_rgb(upright).size == (24, 32)


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("order", "<>")
def test_the_byte_order_of_tags_after_a_broken_one_is_respected(order):
    tags = [(270, 2, 1000, 0xFFFFFF), (274, SHORT, 1, 6 if order == "<" else 6 << 16)]
    header = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(tags))
    exif = b"Exif\0\0" + header + b"".join(struct.pack(order + "HHII", *tag) for tag in tags) + bytes(4)
    assert load_image(encode_with("JPEG", exif)).size == (24, 32)


@pytest.mark.parametrize("orientation", [0, 1, 9, 65535])
@pytest.mark.parametrize("tag", [None, *TAGS])
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_an_orientation_that_is_no_known_value_is_ignored(orientation, tag):
    tags = [] if tag is None else [TAGS[tag]]
    image = load_image(encode("PNG", *tags, orientation=orientation))
    assert np.array_equal(np.array(image), np.array(photo(32, 24)))


@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF", "ignore:not enough data")
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbagegarbage",
        b"Exif\0\0II*\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHI4s", 274, 2, 2, b"6\0\0\0"),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_that_does_not_parse_is_ignored(kind, exif):
    pixels = np.array(Image.open(BytesIO(encode_with(kind, exif))).convert("RGB"))
    assert np.array_equal(np.array(load_image(encode_with(kind, exif))), pixels)


def test_deep_images_are_turned_next_to_a_broken_tag():
    file = BytesIO()
    exif = Image.open(BytesIO(encode("PNG", TAGS["a width that is text"]))).info["exif"]
    Image.fromarray(np.full((24, 32), 257 * 9, dtype=np.uint16)).save(file, "PNG", exif=exif)
    upright = load_image(file.getvalue())
    assert upright.size == (24, 32) and (np.array(upright) == 9).all()


@pytest.mark.parametrize("orientation", range(2, 9))
def test_an_image_turned_upright_is_not_turned_again(orientation):
    image = Image.open(BytesIO(encode("PNG", orientation=orientation)))
    upright = to_rgb(image)
    assert np.array_equal(np.array(to_rgb(upright)), np.array(upright))
    assert np.array_equal(np.array(to_rgb(image)), np.array(upright))  # the image passed in is left unchanged


@pytest.mark.parametrize("mode", ["1", "CMYK", "HSV", "YCbCr"])
def test_a_palettes_transparency_left_by_a_conversion_is_ignored(mode):
    file = BytesIO()
    Image.new("RGBA", (R, R), (255, 0, 0, 128)).quantize(4).save(file, "PNG")
    image = Image.open(file).convert(mode)
    assert "transparency" in image.info
    assert torch.equal(prepare_images(image, R)[0], as_bytes_values(image).float() / 255 * 2 - 1)


@pytest.mark.parametrize(
    ("mode", "transparency"),
    [("RGB", b"\0\x80"), ("RGB", 3), ("L", b"\0"), ("L", (1, 2, 3)), ("1", b"\0"), ("P", (0, 0, 0)), ("CMYK", 0)],
)
def test_a_transparency_that_does_not_suit_the_mode_is_ignored(mode, transparency):
    image = photo().convert(mode)
    expected = as_bytes_values(image)
    image.info["transparency"] = transparency
    assert torch.equal(prepare_images(image, R)[0], expected.float() / 255 * 2 - 1)
    assert image.info["transparency"] == transparency


def test_the_shorter_side_is_resized_and_the_center_is_cropped():
    resized = photo(60, 20).resize((30, 10), Image.Resampling.LANCZOS)
    assert torch.equal(prepare_images(photo(60, 20), 10), prepare_images(resized.crop((10, 0, 20, 10)), 10))


def test_shrinking_averages_fine_patterns():
    stripes = np.zeros((160, 160), dtype=np.uint8)
    stripes[:, ::2] = 255
    assert prepare_images(stripes, R)[..., 2:-2].abs().max() < 0.02


def test_floats_and_bytes_are_resized_alike():
    array = np.array(photo(50, 37))
    difference = prepare_images(array, R) - prepare_images(array.astype(np.float64) / 255, R)
    assert difference.abs().max() <= 2 * 2 / 255  # two levels: bytes are rounded after each of the two passes


def test_a_single_pixel_fills_the_image():
    assert torch.equal(
        prepare_images(Image.new("RGB", (1, 1), RED), R), prepare_images(Image.new("RGB", (R, R), RED), R)
    )
    assert prepare_images(photo(1, 300), R).shape == (1, 3, R, R)


def test_a_photo_of_60_megapixels_is_downscaled(tmp_path):
    Image.new("RGB", (9000, 6700), RED).save(tmp_path / "large.jpg")
    values = prepare_images(tmp_path / "large.jpg", R)
    assert (values[0, :, 0, 0] / 2 + 0.5) * 255 == pytest.approx(torch.tensor(RED), abs=3)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    photo(40, 40).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="bomb.png' is too large to decode safely"):
        load_image(tmp_path / "bomb.png")


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "letter.png").write_text("Dear reader, this is no image.")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("letter.png", "empty.png"):
        with pytest.raises(ValueError, match=f"{name}' is not an image"):
            load_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="'nowhere.png' is not an existing file"):
        prepare_images("nowhere.png", R)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_image(tmp_path)


# What Pillow would hand to Ghostscript, and to Windows
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
PLACEABLE_WMF = b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hH", 0, 0, 96, 96, 96) + bytes(6) + b"\1\0\t\0" + bytes(40)


@pytest.mark.parametrize("suffix", ["eps", "png", "jpg"])
@pytest.mark.parametrize("content", [EPS, PLACEABLE_WMF, b"%PDF-1.4\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_formats_that_are_no_raster_formats_are_refused_under_any_ending(tmp_path, monkeypatch, content, suffix):
    monkeypatch.setattr(subprocess, "Popen", None)  # Pillow starts no program
    path = tmp_path / f"image.{suffix}"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(ValueError, match="not an image, or of a format that is not read.*JPEG, PNG"):
            load_image(source)


@pytest.mark.parametrize("name", RASTER_FORMATS)
def test_raster_formats_are_read_under_any_ending(tmp_path, name):
    Image.init()
    if name not in Image.SAVE:
        pytest.skip(f"this Pillow has no {name}")
    photo(32, 32).save(tmp_path / "image.dat", name)
    assert load_image(tmp_path / "image.dat").size == (32, 32)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.full((R, R), -3, dtype=np.int32), "has values from -3 to -3, but mode I allows 0 to 65535"),
        (np.full((R, R), 70000, dtype=np.int32), "from 70000 to 70000"),
        (np.full((R, R), 2.5, dtype=np.float32), "from 2.5 to 2.5, but mode F allows 0 to 1. Scale"),
        (np.full((R, R), np.nan, dtype=np.float32), "from nan to nan"),
    ],
)
def test_images_of_values_out_of_range_are_not_called_damaged(tmp_path, values, found):
    path = tmp_path / "deep.tiff"
    Image.fromarray(values).save(path)
    for read, name in ((load_image, "deep.tiff'"), (lambda path: prepare_images(Image.open(path), R), "`images`")):
        with pytest.raises(ValueError, match=f"{name} has values .*{found.removeprefix('has values ')}") as error:
            read(path)
        assert "damaged" not in str(error.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tiff", "bmp"])
def test_truncated_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    photo(64, 64).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"cut.{suffix}' is (damaged or truncated|not an image)"):
        load_image(path)


def test_a_file_that_the_system_cannot_read_is_not_called_damaged(tmp_path, monkeypatch):
    photo().save(tmp_path / "whole.png")

    def too_many_files(*args, **options):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", too_many_files)
    with pytest.raises(OSError, match="Too many open files"):
        load_image(tmp_path / "whole.png")


def test_a_truncated_file_opened_by_the_caller_is_refused(tmp_path):
    path = tmp_path / "cut.png"
    photo(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"`images\[1\]`, a PIL image of mode RGB, cannot be decoded"):
        prepare_images([photo(), Image.open(path)], R)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "`images` is empty"),
        (np.zeros((0, 4, 4, 3), dtype=np.uint8), ValueError, "`images` is empty"),
        (torch.full((3, R, R), float("nan")), ValueError, "`images` contains NaN or infinity"),
        (torch.full((3, R, R), float("inf")), ValueError, "`images` contains NaN or infinity"),
        (torch.full((3, R, R), -1.0), ValueError, "images / 2 \\+ 0.5"),
        (np.full((R, R, 3), 255.0), ValueError, "divide by 255"),
        (np.full((R, R, 3), 1.001), ValueError, "clip\\(0, 1\\)"),
        (torch.zeros(4, R, R), ValueError, "transparent image, pass a PIL image"),
        (torch.zeros(R, R, 3), ValueError, "permute\\(2, 0, 1\\)"),
        (np.zeros((3, R, R)), ValueError, "transpose\\(1, 2, 0\\)"),
        (torch.zeros(5, R, R), ValueError, "with one \\(gray\\) or three"),
        (torch.zeros(R), ValueError, "allowed are \\(H, W\\)"),
        (np.zeros((0, R, 3), dtype=np.uint8), ValueError, "is empty: its shape"),
        (torch.zeros(3, R, R, dtype=torch.int64), TypeError, "data type torch.int64"),
        (np.zeros((R, R), dtype=np.uint16), TypeError, "array / 65535"),
        (np.zeros((R, R), dtype=bool), TypeError, "data type bool"),
        (None, TypeError, "of type NoneType"),
        ([[torch.zeros(3, R, R)]], TypeError, "`images\\[0\\]` is of type list"),
    ],
)
def test_wrong_input_is_refused_with_a_remedy(images, error, message):
    with pytest.raises(error, match=message):
        prepare_images(images, R)


@pytest.mark.parametrize("resolution", [0, -1, 1.5, True, "16"])
def test_a_wrong_resolution_is_refused(resolution):
    with pytest.raises(ValueError, match="`resolution` must be a whole number"):
        prepare_images(photo(), resolution)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_outputs_can_be_passed_back_in(output_type):
    values = prepare_images([photo(seed=1), photo(seed=2)], R)
    outputs = to_output(values, output_type)
    torch.testing.assert_close(prepare_images(outputs, R), values, rtol=0, atol=1e-6)


def test_outputs_out_of_range_are_clipped():
    outputs = to_output(torch.tensor([-1.5, 1.5]).view(2, 1, 1, 1).expand(2, 3, 4, 4), "pt")
    assert outputs.unique().tolist() == [0.0, 1.0]


def test_outputs_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="contain NaN or infinity"):
        to_output(torch.full((1, 3, 4, 4), float("nan")))
    with pytest.raises(ValueError, match="`output_type` must be one of pil, np, pt"):
        to_output(torch.zeros(1, 3, 4, 4), "jpeg")


def test_an_image_file_may_be_open_already():
    image = Image.new("RGBA", (4, 3), (255, 0, 0, 0))
    assert load_image(image).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("source", [None, 3, [b""], np.zeros((2, 2, 3), np.uint8)], ids=lambda s: type(s).__name__)
def test_what_is_no_image_file_is_refused_by_type(source):
    with pytest.raises(TypeError, match=f"`source` must be .* got {type(source).__name__}"):
        load_image(source)
