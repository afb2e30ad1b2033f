"""The actions of the demo on good and bad input; the page itself is tested in a browser, in tests/demo/browser."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import RepoCard
from paths import ROOT
from PIL import Image
from tiny_models import make_decoder, make_encoder

from flextok_hf import FlexTokPipeline
from flextok_hf.demo.actions import MAX_PROMPT_CHARACTERS, DemoActions
from flextok_hf.demo.uploads import MAX_PHOTO_BYTES, NOT_UPLOADED


PHOTO = str(ROOT / "docs" / "assets" / "parrots.jpg")


@pytest.fixture(scope="module")
def actions(tiny_pipeline):
    return DemoActions(tiny_pipeline, str(Path(PHOTO).parent))


def test_a_photo_is_reconstructed_with_figures(actions, tiny_pipeline):
    result = actions.reconstruct(PHOTO, 3, seed=5)
    expected = tiny_pipeline.reconstruct(PHOTO, [3], generator=torch.Generator().manual_seed(5))[0][0]
    assert result.image.tobytes() == expected.tobytes()
    assert result.original.size == result.image.size == (16, 16)
    assert (result.num_tokens, result.bits) == (3, pytest.approx(3 * math.log2(15)))
    pairs = list(zip(result.original.tobytes(), result.image.tobytes(), strict=True))
    error = sum((a - b) ** 2 for a, b in pairs) / len(pairs)
    assert result.psnr_db == pytest.approx(10 * math.log10(255**2 / error), abs=1e-3)


@pytest.fixture
def free_actions(tiny_pipeline, tmp_path):
    """Actions on a model for any shape, and a wide photo in its upload folder."""
    parts = make_encoder(positions="stretch"), make_decoder(positions="stretch"), FlowMatchEulerDiscreteScheduler()
    names = ("prior", "text_encoder", "tokenizer")
    pipe = FlexTokPipeline(*parts, **{name: getattr(tiny_pipeline, name) for name in names})
    Image.open(PHOTO).resize((160, 90)).save(tmp_path / "wide.png")
    return DemoActions(pipe, str(tmp_path))


def test_a_photo_keeps_its_proportions_on_request(free_actions, tmp_path):
    actions, pipe = free_actions, free_actions.pipe
    result = actions.reconstruct(str(tmp_path / "wide.png"), 3, 5, True)
    assert result.original.size == result.image.size == (20, 12)
    generator = torch.Generator().manual_seed(5)
    expected = pipe.reconstruct(str(tmp_path / "wide.png"), [3], generator=generator, size="keep")[0][0]
    assert result.image.tobytes() == expected.tobytes()
    assert actions.reconstruct(str(tmp_path / "wide.png"), 3, 5).image.size == (16, 16)


def test_variations_keep_the_proportions_of_the_photo_on_request(free_actions, tmp_path):
    pipe, path = free_actions.pipe, str(tmp_path / "wide.png")
    assert {image.size for _, image in free_actions.vary(path, 2, "", 1)} == {(16, 16)}
    shown = [image for _, image in free_actions.vary(path, 2, "", 1, True)]
    assert [image.size for image in shown] == [(20, 12)] * 5
    options = {"generator": torch.Generator().manual_seed(2), "height": 12, "width": 20}
    assert shown[2].tobytes() == pipe("", image=path, keep_tokens=2, **options).images[0].tobytes()


def test_tokens_of_a_photo_are_shown_in_its_proportions_on_request(free_actions, tmp_path):
    path = str(tmp_path / "wide.png")
    ids, size = free_actions.tokens_of_photo(path, True)
    assert size == (12, 20) and ids == free_actions.pipe.tokenize(path, size="keep")[0].tolist()
    _, before, after = free_actions.replace_token(ids, 1, (ids[0] + 1) % 15, 0, size)
    assert before.size == after.size == (20, 12) and before.tobytes() == free_actions.decode(ids, 0, size).tobytes()
    assert free_actions.tokens_of_photo(path)[1] == (16, 16)


@pytest.mark.parametrize("value, words", [(True, "squares only"), (1, "true or false"), ("yes", "true or false")])
def test_proportions_that_cannot_be_kept_give_a_readable_message(actions, value, words):
    for job in (
        lambda: actions.reconstruct(PHOTO, 3, 5, value),
        lambda: actions.vary(PHOTO, 3, "", 5, value),
        lambda: actions.tokens_of_photo(PHOTO, value),
    ):
        with pytest.raises(ValueError, match=f"^[A-Z][^`]*{words}[.]$"):
            job()


def test_a_prompt_gives_images_up_to_the_maximum_number_of_tokens(actions, tiny_pipeline):
    shown = list(actions.generate("a red circle", 3, seed=2))
    assert [(number, count) for number, count, _ in shown] == [(1, 1), (2, 2), (3, 3)]
    generator = torch.Generator().manual_seed(2)
    whole = tiny_pipeline("a red circle", max_tokens=3, generator=generator).images[0]
    assert shown[-1][2].tobytes() == whole.tobytes()


def test_variations_start_with_the_kept_tokens(actions, tiny_pipeline):
    shown = list(actions.vary(PHOTO, 2, "", seed=1))
    assert [title for title, _ in shown] == ["kept", *(f"variation {number}" for number in (1, 2, 3, 4))]
    kept = tiny_pipeline.reconstruct(PHOTO, [2], generator=torch.Generator().manual_seed(1))[0][0]
    assert shown[0][1].tobytes() == kept.tobytes()
    second = tiny_pipeline("", image=PHOTO, keep_tokens=2, generator=torch.Generator().manual_seed(2)).images[0]
    assert shown[2][1].tobytes() == second.tobytes()


def test_digits_encode_the_id(actions):
    for _, token_id, digits in actions.token_rows(list(range(15))):
        first, second = map(int, digits.split())
        assert first + 5 * second == token_id and first < 5 and second < 3


def test_one_token_is_replaced_and_the_rest_stays(actions):
    ids, _ = actions.tokens_of_photo(PHOTO)
    changed, before, after = actions.replace_token(ids, 2, (ids[1] + 1) % 15)
    assert [a == b for a, b in zip(ids, changed)] == [True, False, True, True, True, True]
    assert before.tobytes() == actions.decode(ids).tobytes() != after.tobytes()
    assert actions.replace_token(changed, 2, ids[1])[2].tobytes() == before.tobytes()


def bad_photos(folder: Path) -> dict[str, str]:
    (folder / "text.png").write_text("not an image")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.jpg").write_bytes(Path(PHOTO).read_bytes()[:5000])
    Image.new("1", (20000, 10000)).save(folder / "huge.png")
    Image.new("1", (10000, 6000)).save(folder / "large.png")
    (folder / "bomb.png").write_bytes((folder / "huge.png").read_bytes()[:2000])
    return {
        "text.png": "not an image",
        "empty.jpg": "not an image",
        "cut.jpg": "damaged or truncated",
        "huge.png": "too large",
        "large.png": "too large.*10000 x 6000",
        "bomb.png": "too large",
    }


def test_bad_photos_give_a_readable_message(tiny_pipeline, tmp_path):
    actions = DemoActions(tiny_pipeline, str(tmp_path))
    for name, words in bad_photos(tmp_path).items():
        with pytest.raises(ValueError, match=words) as caught:
            actions.open_photo(str(tmp_path / name))
        assert re.fullmatch(r"[A-Z][^/]*\.", str(caught.value)), "a sentence, without paths of the server"
    with pytest.raises(ValueError, match="Choose a photo"):
        actions.open_photo(None)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_only_regular_files_in_the_upload_folder_are_read(tiny_pipeline, tmp_path, monkeypatch):
    uploads, elsewhere = tmp_path / "uploads", tmp_path / "uploads-of-others"
    for folder in (uploads, elsewhere, uploads / "folder.png"):
        folder.mkdir()
    Image.new("RGB", (20, 20)).save(elsewhere / "secret.png")
    Image.new("RGB", (20, 20)).save(uploads / "photo.png")
    os.mkfifo(uploads / "pipe.png")
    os.symlink(elsewhere / "secret.png", uploads / "link.png")
    os.symlink(uploads / "photo.png", uploads / "inner.png")
    os.symlink(elsewhere, uploads / "linked")
    actions = DemoActions(tiny_pipeline, str(uploads))
    monkeypatch.chdir(uploads)
    for path in ("photo.png", uploads / "photo.png", f"{uploads}/folder.png/../photo.png"):
        assert actions.open_photo(str(path)).size == (16, 16)
    inside = ["pipe.png", "link.png", "inner.png", "linked/secret.png", "folder.png", "missing.png", "", "x" * 5000]
    outside = [
        elsewhere / "secret.png",
        "../uploads-of-others/secret.png",
        "/dev/zero",
        "/etc/passwd",
        "/missing",
        "/",
    ]
    for path in [*(uploads / name for name in inside), *outside, "a\0b", "http://localhost/photo.png", "\ud800"]:
        with pytest.raises(ValueError, match=f"^{re.escape(NOT_UPLOADED)}$"):
            actions.open_photo(str(path))


def test_large_files_are_refused_whatever_they_hold(tiny_pipeline, tmp_path):
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(MAX_PHOTO_BYTES + 1)
    with pytest.raises(ValueError, match="too large: upload one of at most 20 MB"):
        DemoActions(tiny_pipeline, str(tmp_path)).open_photo(str(tmp_path / "large.png"))


@pytest.mark.parametrize(
    "job",
    [
        lambda actions: actions.reconstruct(PHOTO, 2),
        lambda actions: list(actions.generate("a circle", 2)),
        lambda actions: list(actions.vary(PHOTO, 2)),
        lambda actions: actions.replace_token([1, 2], 1, 1),
    ],
)
def test_a_request_that_takes_too_long_is_stopped(actions, job, monkeypatch):
    monkeypatch.setattr("flextok_hf.demo.actions.MAX_SECONDS", -1)
    with pytest.raises(TimeoutError, match="Ask for fewer tokens"):
        job(actions)


def test_the_first_frame_of_an_animation_is_used(tiny_pipeline, tmp_path):
    actions = DemoActions(tiny_pipeline, str(tmp_path))
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert actions.open_photo(str(tmp_path / "two.gif")).getpixel((8, 8)) == (255, 0, 0)


@pytest.mark.parametrize(
    "job, words",
    [
        (lambda actions: actions.generate("", 3), "Enter a prompt"),
        (lambda actions: actions.generate("  \n", 3), "Enter a prompt"),
        (lambda actions: actions.generate(None, 3), "Enter a prompt"),
        (lambda actions: actions.generate("cat " * 2500, 3), f"9,999 characters.*{MAX_PROMPT_CHARACTERS}"),
        (lambda actions: actions.generate("a cat", 0), "from 1 to 6"),
        (lambda actions: actions.generate("a cat", float("nan")), "from 1 to 6"),
        (lambda actions: actions.generate("a cat", float("inf")), "from 1 to 6"),
        (lambda actions: actions.generate("a cat", 2.5), "from 1 to 6"),
        (lambda actions: actions.generate("a cat", 2, seed=None), "The seed"),
        (lambda actions: actions.generate("a cat", 2, seed=-1), "The seed"),
        (lambda actions: actions.generate("a cat", 2, 0, math.nan), "Guidance"),
        (lambda actions: actions.generate("a cat", 2, 0, 1, -1), "Guidance"),
        (lambda actions: actions.generate("a cat", 2, 0, 1, True), "Guidance"),
        (lambda actions: actions.generate("a cat", 2, 0, "3"), "Guidance"),
        (lambda actions: actions.vary(PHOTO, 7), "kept tokens"),
        (lambda actions: actions.vary(None, 2), "Choose a photo"),
        (lambda actions: actions.reconstruct(PHOTO, True), "number of tokens"),
        (lambda actions: actions.replace_token([], 1, 1), "no tokens to change"),
        (lambda actions: actions.replace_token([1, 2], 3, 1), "from 1 to 2"),
        (lambda actions: actions.replace_token([1, 2], 1, 15), "from 0 to 14"),
    ],
)
def test_wrong_requests_give_a_readable_message_before_any_work(actions, job, words):
    with pytest.raises(ValueError, match=words):
        job(actions)


def test_a_model_without_a_prior_still_reconstructs_photos(tiny_tokenizer_pipeline):
    actions = DemoActions(tiny_tokenizer_pipeline, str(Path(PHOTO).parent))
    assert not actions.reads_prompts
    assert actions.reconstruct(PHOTO, 1).num_tokens == 1
    with pytest.raises(ValueError, match="no text prior"):
        actions.generate("a cat", 1)


def test_the_space_has_what_the_hub_requires():
    space = ROOT / "space"
    card = RepoCard.load(space / "README.md").data.to_dict()
    assert (card["sdk"], card["license"]) == ("gradio", "apache-2.0")
    assert (space / card["app_file"]).is_file()
    assert len(card["short_description"]) <= 60
    assert {card["colorFrom"], card["colorTo"]} <= {
        "red",
        "yellow",
        "green",
        "blue",
        "indigo",
        "purple",
        "pink",
        "gray",
    }
    assert "flextok_hf[demo]" in (space / "requirements.txt").read_text().split()


def test_the_page_has_the_tabs_that_its_model_supports(tiny_pipeline, tiny_tokenizer_pipeline):
    pytest.importorskip("gradio")
    from flextok_hf.demo.page import build_demo

    def tabs(pipe):
        config = build_demo(pipe, "a model").get_config_file()
        return [part["props"]["label"] for part in config["components"] if part["type"] == "tabitem"]

    assert tabs(tiny_pipeline) == ["Generate", "Reconstruct", "Vary", "Tokens"]
    assert tabs(tiny_tokenizer_pipeline) == ["Reconstruct", "Tokens"]


def test_the_page_runs_one_job_at_a_time_and_contacts_no_other_host(tiny_pipeline):
    pytest.importorskip("gradio")
    from flextok_hf.demo.page import build_demo, launch_options

    page = build_demo(tiny_pipeline, "a model")
    jobs = [block for block in page.fns.values() if block.queue]
    assert jobs and {(job.concurrency_id, job.concurrency_limit) for job in jobs} == {("model", 1)}
    assert not page.analytics_enabled
    stylesheets = launch_options()["theme"]._stylesheets
    assert not stylesheets, json.dumps(stylesheets)
