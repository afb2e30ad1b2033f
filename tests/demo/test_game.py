"""The game of the demo, the difference of two images, the animation, and what is said about prompts."""

import random

import pytest
import torch
from PIL import Image
from tiny_models import make_text_pipeline


pytest.importorskip("gradio")
from flextok_hf.demo.actions import DemoActions  # noqa: E402
from flextok_hf.demo.game import Riddle, new_riddle  # noqa: E402


NAMES = ["apple", "bird", "cat", "dog", "egg"]


@pytest.fixture
def actions(tmp_path):
    pipe = make_text_pipeline()
    pipe.prior.config.known_names, pipe.prior.config.known_words = NAMES, ["a", *NAMES]
    return DemoActions(pipe, str(tmp_path))


def test_a_riddle_has_its_answer_among_four_names_and_all_tokens(actions):
    riddle = new_riddle(actions, Riddle(), random.Random(0))
    assert riddle.answer in riddle.choices and len(set(riddle.choices)) == 4 and set(riddle.choices) <= set(NAMES)
    assert len(riddle.token_ids) == actions.num_registers and riddle.count == 1


def test_guesses_are_counted_with_the_tokens_that_right_ones_needed(actions):
    riddle = new_riddle(actions, Riddle(), random.Random(0))
    riddle.count = 4
    assert riddle.guess(riddle.answer) == "**Right**, from 4 tokens. 1 of 1 right, 4.0 tokens on average."
    riddle = new_riddle(actions, riddle, random.Random(1))
    wrong = next(name for name in riddle.choices if name != riddle.answer)
    assert riddle.guess(wrong) == f"**No**, it is: {riddle.answer}. 1 of 2 right, 4.0 tokens on average."


@pytest.mark.parametrize("choice", [None, "sun", 3, [], "apple " * 1000])
def test_a_guess_that_is_no_choice_does_not_count(actions, choice):
    riddle = new_riddle(actions, Riddle(), random.Random(0))
    with pytest.raises(ValueError, match="Choose one"):
        riddle.guess(choice)
    assert riddle.is_open and riddle.asked == 0


def test_nobody_guesses_twice(actions):
    riddle = new_riddle(actions, Riddle(), random.Random(0))
    riddle.guess(riddle.answer)
    with pytest.raises(ValueError, match="new image"):
        riddle.guess(riddle.answer)


def test_the_difference_is_white_where_it_is_largest():
    before = Image.new("RGB", (4, 2), "black")
    after = before.copy()
    after.putpixel((1, 0), (51, 0, 0))
    after.putpixel((2, 0), (0, 102, 0))
    gray, mean = DemoActions.difference(before, after)
    assert [gray.getpixel((x, 0)) for x in range(4)] == [0, 128, 255, 0]
    assert mean == pytest.approx((0.2 + 0.4) / 8, abs=1e-6)
    assert DemoActions.difference(before, before)[1] == 0


def test_an_animation_has_a_frame_of_one_size_per_image(actions):
    images = [
        (Image.new("RGB", (16, 16), color), title) for color, title in [("red", "1 token"), ("blue", "64 tokens")]
    ]
    with Image.open(actions.animation(images, "a cat")) as animation:
        assert animation.format == "GIF" and animation.n_frames == 2 and min(animation.size) > 256


def test_a_photo_is_reconstructed_from_few_tokens_to_all_as_by_the_pipeline(actions, tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    results = list(actions.reconstruct_all(str(tmp_path / "red.png"), 3))
    expected = actions.pipe.reconstruct(str(tmp_path / "red.png"), generator=torch.Generator().manual_seed(3))
    assert [result.num_tokens for result in results] == [1, 2, 4, 6]
    assert [result.image.tobytes() for result in results] == [column[0].tobytes() for column in expected]


def test_notes_name_what_the_model_does_not_know(actions):
    assert (
        "'skateboard'" in actions.notes("a dog on a skateboard")[0]
        and actions.notes("a dog") == actions.notes("") == []
    )


@pytest.mark.parametrize("step", [0, 5, 1.5, None, "2", float("nan"), True])
def test_steps_that_were_not_drawn_are_refused(actions, step):
    with pytest.raises(ValueError, match="The step must be a whole number from 1 to 4"):
        actions.check_step(step, 4)
