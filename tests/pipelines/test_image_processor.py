"""The image processor for Transformers: what the pipeline does, as a BatchFeature."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from flextok_hf import FlexTokConfig, FlexTokEncoderConfig, FlexTokImageProcessor
from flextok_hf.pipelines.images import prepare_images


R = 16
IMAGES = {
    "PIL": Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 30, 3)),
    "PIL with transparency": Image.new("RGBA", (20, 10), (255, 0, 0, 100)),
    "NumPy": np.linspace(0, 1, 20 * 24 * 3).reshape(20, 24, 3),
    "NumPy, gray": np.full((R, R), 7, dtype=np.uint8),
    "tensor": torch.linspace(0, 1, 3 * R * R).view(3, R, R),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_one_image_is_prepared_as_in_the_pipeline(kind):
    inputs = FlexTokImageProcessor(size=R)(IMAGES[kind], return_tensors="pt")
    assert type(inputs) is BatchFeature and set(inputs) == {"pixel_values"}
    assert inputs.pixel_values.equal(prepare_images(IMAGES[kind], R))


def test_lists_mix_all_kinds(tmp_path):
    IMAGES["PIL"].save(tmp_path / "image.png")
    images = [*IMAGES.values(), tmp_path / "image.png"]
    assert FlexTokImageProcessor(size=R)(images, return_tensors="pt").pixel_values.equal(prepare_images(images, R))


@pytest.mark.parametrize(("kind", "expected"), [("pt", torch.Tensor), ("np", np.ndarray), (None, list)])
def test_the_type_of_the_result_is_chosen(kind, expected):
    values = FlexTokImageProcessor(size=R)(list(IMAGES.values()), return_tensors=kind)["pixel_values"]
    assert type(values) is expected and len(values) == len(IMAGES) and values[0].shape == (3, R, R)


@pytest.mark.parametrize("config_class", [FlexTokConfig, FlexTokEncoderConfig])
def test_a_saved_processor_is_found_by_name_or_by_configuration(tmp_path, config_class):
    FlexTokImageProcessor(size=R).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
    assert AutoImageProcessor.from_pretrained(tmp_path).to_dict() == FlexTokImageProcessor(size=R).to_dict()
    (tmp_path / "preprocessor_config.json").write_text('{"size": 8}')
    config_class().save_pretrained(tmp_path)
    found = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(found) is FlexTokImageProcessor and found.size == {"height": 8, "width": 8}


def test_the_size_of_a_call_or_of_loading_wins(tmp_path):
    FlexTokImageProcessor(size=R).save_pretrained(tmp_path)
    processor = FlexTokImageProcessor.from_pretrained(tmp_path, size=8)
    assert processor(IMAGES["PIL"], return_tensors="pt").pixel_values.shape == (1, 3, 8, 8)
    values = processor(IMAGES["PIL"], return_tensors="pt", size={"height": 4, "width": 4}).pixel_values
    assert values.equal(prepare_images(IMAGES["PIL"], 4))
    values = processor(IMAGES["PIL"], return_tensors="pt", size={"height": 4, "width": 12}).pixel_values
    assert values.equal(prepare_images(IMAGES["PIL"], (4, 12)))


@pytest.mark.parametrize(
    "size", [0, -1, 1.5, True, "16", None, [16], {"height": 8, "width": 0}, {"shortest_edge": 16}, {"height": 16}]
)
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="`size` must be a whole number R of 1 or more"):
        FlexTokImageProcessor(size=size)
    if size is not None:
        with pytest.raises(ValueError, match="`size` must be a whole number R of 1 or more"):
            FlexTokImageProcessor(size=R)(IMAGES["PIL"], size=size)


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        ([], {}, ValueError, "`images` is empty"),
        (torch.full((3, R, R), 255.0), {}, ValueError, "divide by 255"),
        ("nowhere.png", {}, FileNotFoundError, "is not an existing file"),
        (None, {}, TypeError, "of type NoneType"),
        (IMAGES["PIL"], {"return_tensors": "tf"}, ValueError, "`return_tensors` must be"),
        (IMAGES["PIL"], {"device": "nowhere"}, ValueError, "`device` 'nowhere'"),
        (IMAGES["PIL"], {"do_resize": False}, TypeError, "do_resize"),
    ],
)
def test_wrong_input_is_refused_as_in_the_pipeline(images, options, error, message):
    with pytest.raises(error, match=message):
        FlexTokImageProcessor(size=R)(images, **options)
