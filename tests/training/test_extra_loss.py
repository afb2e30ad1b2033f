"""A loss of one's own: what it is called with, that it is learned, and that wrong ones are refused by name."""

import pytest
import torch
from tiny_models import make_decoder, make_encoder

from flextok_hf.training.arguments import TokenizerArguments
from flextok_hf.training.extra_loss import estimate_clean, load_extra_loss
from flextok_hf.training.step_rng import StepRng
from flextok_hf.training.tokenizer import TokenizerForTraining


LOSSES = """
import torch

seen = {}


def brightness(images, reconstructions, **known):
    seen.update(images=images, reconstructions=reconstructions, **known)
    return (images.mean(dim=(1, 2, 3)) - reconstructions.mean(dim=(1, 2, 3))).square().mean()


def per_image(images, reconstructions, **known):
    return (images - reconstructions).square().mean(dim=(1, 2, 3))


def number(**known):
    return 1.0


not_a_function = 3
"""


@pytest.fixture(autouse=True)
def losses(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(LOSSES)
    monkeypatch.syspath_prepend(tmp_path)


def make_model(**options):
    arguments = TokenizerArguments(output_dir="x", null_condition_probability=0.5, **options)
    return TokenizerForTraining(make_encoder(), make_decoder(), arguments).train()


def images():
    return {"pixel_values": torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1}


def test_one_step_from_noisy_latents_leads_back_to_the_latents():
    latents, noise, sigma = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), torch.tensor([0.3, 1.0])
    noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))
    torch.testing.assert_close(estimate_clean(noisy, noise - latents, sigma), latents)


@pytest.mark.parametrize("is_joint", [False, True])
def test_the_loss_gets_images_reconstructions_and_tokens_and_is_added_with_its_weight(is_joint):
    plain, own = (
        make_model(joint_lengths=is_joint),
        make_model(joint_lengths=is_joint, extra_loss="my_losses:brightness", extra_loss_weight=3.0),
    )
    (loss, _), (total, metrics) = (model(images(), 0, StepRng(0)) for model in (plain, own))
    torch.testing.assert_close(total, loss + 3.0 * metrics["extra_loss"])
    import my_losses

    rows = 16 if is_joint else 8
    seen = my_losses.seen
    assert seen["images"].shape == seen["reconstructions"].shape == (rows, 3, 16, 16)
    assert seen["images"][:8].equal(images()["pixel_values"])
    assert seen["token_ids"].shape == (rows, 6) and seen["sigma"].shape == seen["num_tokens"].shape == (rows,)
    assert 0 in seen["num_tokens"]  # of an image whose tokens were ignored
    assert seen["reconstructions"].requires_grad
    total.backward()
    assert own.decoder.velocity_proj.weight.grad.any()


def test_training_lowers_the_loss():
    model = make_model(extra_loss="my_losses:brightness", extra_loss_weight=10.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for step in range(20):
        loss, metrics = model(images(), step, StepRng(0))  # the same noise
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(metrics["extra_loss"].item())
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_losses", "must be of the form module:function"),
        ("my losses:f", "must be of the form module:function"),
        ("no_such_module:f", "'no_such_module:f' is not found"),
        ("my_losses:no_such_function", "is not found"),
        ("my_losses:not_a_function", "is a int, not a function"),
    ],
)
def test_names_that_lead_nowhere_are_refused(name, message):
    with pytest.raises(ValueError, match=f"`extra_loss` .*{message}"):
        load_extra_loss(name)


@pytest.mark.parametrize(("name", "got"), [("per_image", r"\(8,\)"), ("number", "float")])
def test_results_that_are_not_one_number_are_refused(name, got):
    with pytest.raises(ValueError, match=f"`extra_loss` must return a tensor with one number, got {got}"):
        make_model(extra_loss=f"my_losses:{name}")(images(), 0, StepRng(0))


def test_latents_without_images_are_refused_by_name():
    with pytest.raises(ValueError, match="`extra_loss` needs images, which `cache_latents` does not keep"):
        TokenizerArguments(output_dir="x", extra_loss="a:b", cache_latents=True)
