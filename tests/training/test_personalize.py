"""Learning one's own images: what is read, what is learned and kept, and how it ends."""

import json
import os
import signal

import pytest
import torch
from PIL import Image
from tiny_models import make_class_pipeline, make_pipeline, make_text_pipeline

from flextok_hf.training import personalize as module
from flextok_hf.training.personal_images import PersonalImages, read_personal_images
from flextok_hf.training.personalize import PersonalizeOptions, personalize


pytest.importorskip("peft")
NAME = "a zorp"
COLORS = ["red", "blue", "green", "purple"]
OPTIONS = {"steps": 20, "num_kept": 8, "previews": 2, "learning_rate": 0.02, "prior_batch": 8}


def write_images(folder, count=4):
    folder.mkdir()
    for number in range(count):
        image = Image.new("RGB", (20, 16), COLORS[number % 4])
        image.paste("white", (number, 2, number + 6, 12))
        image.save(folder / f"zorp_{number}.png")
    return folder


FEW = "4 of at least 5 images: the adapter will draw little else than these."


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    own = read_personal_images(write_images(folder / "images"), NAME)
    pipe = make_text_pipeline()
    state = torch.get_rng_state()
    done = personalize(pipe, own, NAME, folder / "adapter", PersonalizeOptions(**OPTIONS), is_quiet=True)
    assert done == 20 and torch.get_rng_state().equal(state)
    return folder


@torch.no_grad()
def nats(pipe, own, prompt):
    ids = pipe.tokenize(own.images)
    input_ids = pipe.prior.prepend_bos(ids)
    states, mask = pipe.encode_prompt([prompt] * len(ids))
    return pipe.prior(input_ids, states, mask, labels=input_ids).loss.item()


def test_the_name_draws_what_was_learned_and_token_ids_stay(learned):
    own = read_personal_images(learned / "images", NAME)
    before, after = make_text_pipeline(), make_text_pipeline()
    after.load_lora_weights(learned / "adapter")
    assert after.get_list_adapters() == {"decoder": ["default_0"], "prior": ["default_0"]}
    assert after.tokenize(own.images).equal(before.tokenize(own.images))
    assert nats(after, own, NAME) < 0.7 * nats(before, own, NAME)


def test_a_card_and_a_sheet_of_previews_lie_beside_the_adapter(learned):
    card = (learned / "adapter" / "README.md").read_text()
    assert "`a zorp`" in card and "Token ids stay the same" in card and "Learned in 20 steps from 4 images" in card
    with Image.open(learned / "adapter" / "preview.png") as sheet:  # own images, and rows at steps 0, 10 and 20
        assert sheet.height > 4 * sheet.width / 5


def test_what_the_model_drew_before_is_kept_by_learning_it_too(tmp_path):
    """Without its own drawings, the same training makes the model forget them."""
    own = PersonalImages([Image.new("RGB", (16, 16), color) for color in COLORS], [NAME] * 4, [])
    losses = []
    for num_kept in (0, 8):
        pipe = make_text_pipeline()
        options = PersonalizeOptions(**{**OPTIONS, "num_kept": num_kept, "previews": 0, "decoder_batch": 1})
        kept = module.draw_examples(make_text_pipeline(), PersonalizeOptions(num_kept=8), True, lambda: False)
        personalize(pipe, own, NAME, tmp_path / str(num_kept), options, is_quiet=True)
        with torch.no_grad():
            input_ids = pipe.prior.prepend_bos(kept.token_ids)
            states, mask = pipe.encode_prompt(kept.captions)
            losses.append(pipe.prior(input_ids, states, mask, labels=input_ids).loss.item())
    assert losses[1] < losses[0]


def test_the_same_seed_learns_the_same(learned, tmp_path):
    own = read_personal_images(learned / "images", NAME)
    weights = []
    for number in range(2):
        pipe = make_text_pipeline()
        options = PersonalizeOptions(**{**OPTIONS, "steps": 3, "previews": number})  # previews change nothing
        personalize(pipe, own, NAME, tmp_path / str(number), options, is_quiet=True)
        weights.append([tensor.clone() for name, tensor in pipe.prior.state_dict().items() if "lora" in name])
    assert all(one.equal(two) for one, two in zip(*weights, strict=True))


def test_ctrl_c_keeps_what_was_learned(learned, tmp_path, monkeypatch):
    own = read_personal_images(learned / "images", NAME)
    step = module.Personalizer.train_step

    def interrupted(self, number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    monkeypatch.setattr(module.Personalizer, "train_step", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    assert personalize(make_text_pipeline(), own, NAME, tmp_path, PersonalizeOptions(**OPTIONS), is_quiet=True) == 3
    assert signal.getsignal(signal.SIGINT) is handler
    make_text_pipeline().load_lora_weights(tmp_path)
    assert "Learned in 3 steps" in (tmp_path / "README.md").read_text()


def test_ctrl_c_before_the_first_step_saves_nothing(learned, tmp_path, monkeypatch):
    own = read_personal_images(learned / "images", NAME)
    monkeypatch.setattr(module, "draw_examples", lambda *arguments: os.kill(os.getpid(), signal.SIGINT))
    assert personalize(make_text_pipeline(), own, NAME, tmp_path, PersonalizeOptions(**OPTIONS), is_quiet=True) == 0
    assert not list(tmp_path.glob("*.safetensors"))


# Captions


def test_captions_come_from_metadata_file_names_or_the_name(tmp_path):
    folder = write_images(tmp_path / "images")
    assert read_personal_images(folder, NAME).captions == [NAME] * 4
    assert read_personal_images(folder, "my", "files").captions == ["my, zorp"] * 4
    rows = [{"file_name": "zorp_0.png", "text": "a zorp at night"}, {"file_name": "zorp_2.png", "text": "sleeping"}]
    rows += [{"file_name": "gone.png", "text": "x"}, {"file_name": "zorp_3.png", "text": " "}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = read_personal_images(folder, NAME)
    assert own.captions == ["a zorp at night", NAME, "a zorp, sleeping", NAME]
    assert own.notes == [
        "2 images without a caption, learned as the name alone: zorp_1.png, zorp_3.png.",
        "1 image captioned but missing: gone.png.",
        FEW,
    ]
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text('file_name,text\nzorp_1.png,"a zorp, blue"\n')
    assert read_personal_images(folder, NAME).captions == [NAME, "a zorp, blue", NAME, NAME]


def test_unreadable_images_are_skipped_and_named(tmp_path):
    folder = write_images(tmp_path / "images")
    (folder / "broken.jpg").write_bytes(b"not an image")
    (folder / "notes.txt").write_text("x")
    own = read_personal_images(folder, NAME)
    assert len(own.images) == 4 and own.notes == ["1 image unreadable and skipped: broken.jpg.", FEW]


def folder_of(tmp_path, kind):
    folder = tmp_path / "images"
    if kind == "missing":
        return folder
    write_images(folder, count=0 if kind in ("empty", "broken") else 2)
    if kind == "broken":
        (folder / "a.png").write_bytes(b"")
    if kind == "metadata":
        (folder / "metadata.jsonl").write_text('{"file": "a.png"}')
    if kind == "many":
        for number in range(501):
            (folder / f"{number}.png").touch()
    return folder


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("missing", "auto", "`folder` .* is no folder"),
        ("empty", "auto", "`folder` .* has no images"),
        ("broken", "auto", "none of its 1 images can be read"),
        ("many", "auto", "has 503 images, but at most 500"),
        ("metadata", "auto", "must have lines with `file_name` and `text`"),
        ("fine", "metadata", "has no metadata.jsonl or metadata.csv, as `captions` asks"),
        ("fine", "words", "`captions` must be one of"),
    ],
)
def test_folders_that_cannot_be_learned_are_refused_by_name(tmp_path, kind, source, message):
    with pytest.raises((ValueError, OSError), match=message):
        read_personal_images(folder_of(tmp_path, kind), NAME, source)


@pytest.mark.parametrize(
    ("pipe", "name", "message"),
    [
        (make_pipeline, NAME, "`model` has no prior that reads text"),
        (make_class_pipeline, NAME, "`model` has no prior that reads text"),
        (make_text_pipeline, " ", "`name` ' ' is nothing to the model's text tokenizer"),
    ],
)
def test_models_and_names_that_cannot_work_are_refused(tmp_path, pipe, name, message):
    own = PersonalImages([Image.new("RGB", (16, 16))], [name], [])
    with pytest.raises(ValueError, match=message):
        personalize(pipe(), own, name, tmp_path / "out", PersonalizeOptions())
    assert not (tmp_path / "out").exists()
