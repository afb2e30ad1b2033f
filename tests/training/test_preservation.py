"""What keeps a model as it was while its adapters learn: changes are measured against the model without them."""

import pytest
import torch
from PIL import Image
from tiny_models import make_text_pipeline

from flextok_hf.models.low_rank import low_rank_layers
from flextok_hf.training.personal_images import PersonalImages
from flextok_hf.training.personalize import Examples, PersonalizeOptions, Personalizer, read_examples
from flextok_hf.training.preservation import distribution_change, velocity_change
from flextok_hf.training.step_rng import StepRng


pytest.importorskip("peft")


@pytest.fixture(scope="module")
def trainer():
    pipe = make_text_pipeline()
    own = PersonalImages([Image.new("RGB", (16, 16), color) for color in ("red", "blue")], ["a zorp"] * 2, [])
    examples = read_examples(pipe, own)
    kept = Examples(examples.token_ids, examples.latents, ["a red square", "a blue square"])
    return Personalizer(pipe, examples, kept, PersonalizeOptions(steps=4))


def changes(trainer):
    ids, latents, captions = trainer.kept.token_ids, trainer.kept.latents, trainer.kept.captions
    return [
        velocity_change(trainer.tokenizer, ids, latents, StepRng(1)),
        distribution_change(trainer.prior, ids, captions, StepRng(1)),
    ]


def test_new_adapters_change_nothing_and_what_they_do_is_measured_with_gradients(trainer):
    trainer.tokenizer.train()
    trainer.prior.train()
    with torch.no_grad():  # rounding differs between kernels for training and inference
        assert all(0 <= change.item() < 1e-6 for change in changes(trainer))
    for model in (trainer.tokenizer.decoder, trainer.prior.prior):
        for layer in low_rank_layers(model).values():
            torch.nn.init.normal_(layer.lora_B["default"].weight)
    before = changes(trainer)
    assert all(change.item() > 1e-3 for change in before)
    sum(before).backward()
    assert all(weight.grad is not None for weight in trainer.trained)
    assert trainer.prior.training  # as it was
    assert [change.item() for change in changes(trainer)] == [change.item() for change in before]
