import pickle

import pytest
import torch

from flextok_hf.data.synthetic import (
    BACKGROUNDS,
    COLORS,
    MIN_RESOLUTION,
    OUTLINES,
    SHAPES,
    SyntheticShapes,
    draw_scene,
    is_held_out,
    make_scene,
)
from flextok_hf.data.synthetic_captions import OPENINGS, parse_caption


NUM_SCENES = 1000


def scenes(split, seed=0):
    return [make_scene(index, seed, split) for index in range(NUM_SCENES)]


def test_an_image_depends_only_on_its_number_the_seed_and_the_resolution():
    alone = SyntheticShapes(8, seed=3, resolution=32)[5]
    among_more = SyntheticShapes(20, seed=3, resolution=32)[5]
    streamed = list(SyntheticShapes(8, seed=3, resolution=32, streaming=True))[5]
    assert alone == among_more == streamed
    assert SyntheticShapes(8, seed=4, resolution=32)[5] != alone


def test_a_scene_is_pinned_for_all_versions_of_python():
    assert make_scene(0, seed=0).caption == (
        "from left to right a big blue disc, a small green star and a little pink cross, gray background"
    )


def test_streaming_visits_every_image_once():
    streamed = SyntheticShapes(600, resolution=MIN_RESOLUTION, streaming=True)
    assert streamed.num_shards > 1
    assert [row["text"] for row in streamed] == [make_scene(index).caption for index in range(600)]


def test_the_streamed_form_can_be_pickled_for_workers():
    streamed = pickle.loads(pickle.dumps(SyntheticShapes(3, resolution=MIN_RESOLUTION, streaming=True)))
    assert len(list(streamed)) == 3


@pytest.mark.parametrize("resolution", [32, 64, 100])
def test_images_have_the_given_colors_at_the_given_positions(resolution):
    for scene in scenes("validation")[:200]:
        image = draw_scene(scene, resolution)
        assert image.size == (resolution, resolution) and image.mode == "RGB"
        for item in scene.objects:
            assert image.getpixel((int(item.x * resolution), int(item.y * resolution))) == COLORS[item.color]
        for corner in ((0, 0), (0, resolution - 1), (resolution - 1, 0), (resolution - 1, resolution - 1)):
            assert image.getpixel(corner) == BACKGROUNDS[scene.background]


def test_shapes_stay_apart_and_inside_the_image():
    for scene in scenes("train"):
        for item in scene.objects:
            assert item.diameter / 2 < item.x < 1 - item.diameter / 2
            assert item.diameter / 2 < item.y < 1 - item.diameter / 2
        for first, second in zip(scene.objects, scene.objects[1:], strict=False):
            distance = ((first.x - second.x) ** 2 + (first.y - second.y) ** 2) ** 0.5
            # Corners of a square lie beyond its radius only along the diagonals, where its neighbors are not.
            assert distance > (first.diameter + second.diameter) / 2


def test_the_given_relation_holds_between_the_centers():
    for scene in scenes("train"):
        centers = [(item.x, item.y) for item in scene.objects]
        if scene.relation in ("left of", "left to right"):
            assert centers == sorted(centers)
        elif scene.relation in ("above", "top to bottom"):
            assert centers == sorted(centers, key=lambda center: center[1])
        else:
            (x, y) = centers[0]
            assert ("left" in scene.relation) == (x < 0.4) and ("right" in scene.relation) == (x > 0.6)
            assert ("top" in scene.relation) == (y < 0.4) and ("bottom" in scene.relation) == (y > 0.6)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_captions_parse_back_to_the_attributes(split):
    for scene in scenes(split):
        objects = [{"size": item.size, "color": item.color, "shape": item.shape} for item in scene.objects]
        expected = {"objects": objects, "relation": scene.relation, "background": scene.background}
        assert parse_caption(scene.caption) == expected


def test_captions_vary():
    captions = [scene.caption for scene in scenes("train")]
    assert len(set(captions)) > 0.95 * NUM_SCENES
    assert all(any(caption.startswith(opening) for caption in captions) for opening in OPENINGS)


def test_other_sentences_are_not_parsed():
    for caption in ("a cat", "", "a large red circle", "a large red circle on a white background please"):
        with pytest.raises(ValueError, match="does not follow the synthetic grammar"):
            parse_caption(caption)


def test_held_out_combinations_never_occur_in_train():
    for seed in (0, 1):
        for scene in scenes("train", seed):
            assert not any(is_held_out(item.shape, item.color) for item in scene.objects)


def test_every_second_validation_image_has_a_held_out_combination():
    assert [scene.is_held_out for scene in scenes("validation")] == [False, True] * (NUM_SCENES // 2)


def test_all_combinations_occur_and_each_shape_and_color_is_in_train():
    def pairs(split):
        return {(item.shape, item.color) for scene in scenes(split) for item in scene.objects}

    every_pair = {(shape, color) for shape in SHAPES for color in COLORS}
    assert pairs("validation") == every_pair
    assert every_pair - pairs("train") == {pair for pair in every_pair if is_held_out(*pair)}
    assert {shape for shape, _ in pairs("train")} == set(SHAPES)
    assert {color for _, color in pairs("train")} == set(COLORS)


def test_every_shape_but_the_circle_has_an_outline():
    assert set(OUTLINES) == set(SHAPES) - {"circle"}


def test_edges_are_smooth():
    circle = next(scene for scene in scenes("train") if [item.shape for item in scene.objects] == ["circle"])
    assert len(draw_scene(circle, 64).getcolors()) > 10


def test_invalid_arguments_are_refused_immediately():
    with pytest.raises(ValueError, match="`num_examples` must be 1 or more"):
        SyntheticShapes(0)
    with pytest.raises(ValueError, match="`resolution` must be 16 or more"):
        SyntheticShapes(3, resolution=8, streaming=True)
    with pytest.raises(ValueError, match="`split` must be one of train, validation"):
        SyntheticShapes(3, split="test")


def test_drawing_images_does_not_touch_the_global_generator():
    state = torch.get_rng_state()
    SyntheticShapes(3, resolution=MIN_RESOLUTION)
    assert torch.equal(torch.get_rng_state(), state)
