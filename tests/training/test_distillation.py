"""The loss of distillation: the mean velocity of known flows, its gradients, randomness and options."""

import math

import pytest
import torch
from tiny_models import NUM_REGISTERS, make_decoder, make_encoder
from torch import nn

from flextok_hf.pipelines.guidance import Guidance
from flextok_hf.training.distillation import (
    DistillationForTraining,
    adaptive_loss,
    build_student,
    follow,
    mean_velocities,
)
from flextok_hf.training.distillation_arguments import STEP_COUNTS, DistillationArguments
from flextok_hf.training.step_rng import StepRng


BATCH_SIZE = 16


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def arguments_for(**options):
    scales = {"min_guidance_scale": 1.0, "max_guidance_scale": 3.0}
    return DistillationArguments(output_dir="unused", pretrained_tokenizer="unused", **{**scales, **options})


def make_model(**options):
    # smooth in the noise level, as trained decoders are
    arguments, teacher = arguments_for(**options), make_decoder(max_timestep=1000.0)
    student = build_student(teacher, arguments)
    return DistillationForTraining(student, teacher, make_encoder(), arguments).train()


def batch(size=BATCH_SIZE):
    return {"pixel_values": torch.rand(size, 3, 16, 16, generator=seeded(1)) * 2 - 1}


# A flow in two dimensions that is known exactly: data from a normal distribution, as latents (B, 2, 1, 1)


MEAN, SPREAD = torch.tensor([0.8, -0.5]).view(1, 2, 1, 1), torch.tensor([0.3, 0.9]).view(1, 2, 1, 1)


def column(values):
    return values.view(-1, 1, 1, 1)


def width_at(sigma):
    return (((1 - column(sigma)) * SPREAD).square() + column(sigma).square()).sqrt()


def path_velocity(points, sigma):
    """Return the velocity of the flow at points (B, 2, 1, 1)."""
    growth = (column(sigma) - (1 - column(sigma)) * SPREAD.square()) / width_at(sigma).square()
    return growth * (points - (1 - column(sigma)) * MEAN) - MEAN


def mean_velocity(points, sigma, next_sigma):
    """Return the exact mean of the velocity on the way from one noise level to a lower one."""
    center = (1 - column(sigma)) * MEAN
    end = (1 - column(next_sigma)) * MEAN + width_at(next_sigma) / width_at(sigma) * (points - center)
    return (points - end) / column(sigma - next_sigma)


def draw_paths(count, generator, num_steps=8, num_intervals=8):
    """Follow the flow, and return intervals of its runs, each in (P * B, ...), with the targets."""
    noise = torch.randn(count, 2, 1, 1, generator=generator)
    points, velocities = follow(lambda at, level: path_velocity(at, torch.full((count,), level)), noise, num_steps)
    ends = torch.randint(0, num_steps + 1, (2, num_intervals, count), generator=generator)
    start, end = ends.amin(0).clamp(max=num_steps - 1), ends.amax(0)
    target = mean_velocities(points, velocities, start, end)
    noisy_latents = points[start, torch.arange(count)]
    sigmas = (1 - start.flatten() / num_steps, 1 - end.flatten() / num_steps)
    return noisy_latents.flatten(0, 1), *sigmas, target.flatten(0, 1)


def root_mean_square(values):
    return values.square().mean().sqrt()


def test_the_targets_of_a_known_flow_are_its_mean_velocities():
    for num_steps, tolerance in ((8, 3e-2), (32, 3e-3)):
        points, sigma, next_sigma, target = draw_paths(500, seeded(), num_steps)
        is_empty = sigma == next_sigma
        exact = mean_velocity(points, sigma, next_sigma)
        assert root_mean_square((target - exact)[~is_empty]) < tolerance
        torch.testing.assert_close(target[is_empty], path_velocity(points, sigma)[is_empty])


def test_a_run_starts_with_its_noise_and_lists_the_velocities_at_its_points():
    noise = torch.randn(3, 2, 1, 1, generator=seeded())
    points, velocities = follow(lambda at, level: at * level, noise, 4)
    assert points.shape == (5, 3, 2, 1, 1) and velocities.shape == (4, 3, 2, 1, 1)
    assert points[0].equal(noise)
    torch.testing.assert_close(velocities, points[:-1] * torch.tensor([1, 0.75, 0.5, 0.25]).view(-1, 1, 1, 1, 1))


def test_a_run_is_exact_where_the_velocity_changes_at_a_constant_rate():
    noise = torch.zeros(1, 1, 1, 1)
    points, _ = follow(lambda at, level: torch.full_like(at, 3.0 * level), noise, 8)
    after_first = points[1] - torch.tensor(3 / 2 * (0.875**2 - 0))  # what is left to do from there
    torch.testing.assert_close(points[-1], after_first)


class Toy(nn.Module):
    """Mean velocity from a point and both noise levels, with a scale and a shift that a small network learns."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))

    def forward(self, points, sigma, next_sigma):
        scale, shift = self.layers(torch.stack([sigma, next_sigma], dim=1)).chunk(2, dim=1)
        return scale[..., None, None] * points + shift[..., None, None]


def test_a_toy_learns_the_exact_mean_velocity_from_runs():
    torch.manual_seed(0)
    toy, generator, num_steps = Toy(), seeded(), 1000
    optimizer = torch.optim.Adam(toy.parameters(), lr=2e-2, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: math.cos(math.pi / 2 * step / num_steps) ** 2)
    for _ in range(num_steps):
        points, sigma, next_sigma, target = draw_paths(32, generator, num_steps=32)
        loss = (toy(points, sigma, next_sigma) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    points, sigma, next_sigma, _ = draw_paths(500, seeded(1), num_steps=64)
    keep = sigma > next_sigma
    points, sigma, next_sigma = points[keep], sigma[keep], next_sigma[keep]
    exact = mean_velocity(points, sigma, next_sigma)
    with torch.no_grad():
        assert root_mean_square(toy(points, sigma, next_sigma) - exact) < 1e-2
    assert root_mean_square(path_velocity(points, sigma) - exact) > 0.1  # far from the velocity itself


# The loss


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["float32", "mixed"])
def test_every_parameter_of_the_student_receives_a_finite_gradient_and_no_other(precision):
    model = make_model()
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        loss, _ = model(batch(), 0, StepRng(0))
    loss.backward()
    unused = {"decoder.null_token"}  # guidance is in the weights: no row is unconditional
    without = {name for name, tensor in model.named_parameters() if tensor.grad is None or not tensor.grad.any()}
    assert without == unused
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    for frozen in (model.frozen["teacher"], model.frozen["encoder"]):
        assert all(parameter.grad is None for parameter in frozen.parameters())


def test_an_untrained_student_errs_only_where_the_interval_is_not_empty():
    model = make_model(max_guidance_scale=1.0).eval()
    with torch.no_grad():
        _, errors = model(batch(), 0, StepRng(0))
    assert errors["velocity_error"] < 1e-10 < 1e-4 < errors["mean_velocity_error"]


def test_with_guidance_an_untrained_student_errs_everywhere():
    with torch.no_grad():
        _, errors = make_model(min_guidance_scale=3.0).eval()(batch(), 0, StepRng(0))
    assert errors["velocity_error"] > 1e-3


def test_training_on_one_batch_brings_the_teachers_guided_flow_into_the_weights():
    model = make_model(teacher_steps=4, intervals_per_image=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for _ in range(20):
        loss, errors = model(batch(8), 0, StepRng(0))
        history.append((errors["velocity_error"] + errors["mean_velocity_error"]).item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert history[-1] < 0.5 * history[0]


def test_samples_weigh_the_same_whatever_their_error():
    prediction = torch.zeros(2, 1, 1, 1, requires_grad=True)
    loss, errors = adaptive_loss(prediction, torch.tensor([10.0, 1.0]).view(2, 1, 1, 1))
    loss.backward()
    assert errors.tolist() == [100.0, 1.0]
    # the gradient has the direction of the error, and the same length whatever the error
    torch.testing.assert_close(prediction.grad.flatten(), torch.tensor([-1.0, -1.0]), rtol=0.01, atol=0)


def test_randomness_does_not_depend_on_how_a_step_is_split():
    model = make_model()
    pixel_values = batch()["pixel_values"]
    with torch.no_grad():
        whole, _ = model({"pixel_values": pixel_values}, 0, StepRng(5))
        for share in (1, 3, 4):
            parts = [
                model({"pixel_values": part}, 0, StepRng(5, first=first, total=BATCH_SIZE))[0] * len(part)
                for first, part in zip(range(0, BATCH_SIZE, share), pixel_values.split(share), strict=True)
            ]
            torch.testing.assert_close(torch.stack(parts).sum() / BATCH_SIZE, whole)


def test_the_draws_follow_the_options():
    options = {"teacher_steps": 8, "intervals_per_image": 3, "empty_share": 0.4}
    model = make_model(**options, min_guidance_scale=1.0, max_guidance_scale=3.0)
    num_tokens, scale, start, end = model.draw(4000, StepRng(0))
    assert start.shape == end.shape == (3, 4000)
    assert scale.min() >= 1 and scale.max() <= 3 and abs(scale.mean() - 2) < 0.05
    assert set(num_tokens.tolist()) == {1, 2, 4, NUM_REGISTERS}
    assert abs((num_tokens == NUM_REGISTERS).float().mean() - 0.5 / 4) < 0.03
    is_empty = start == end
    assert abs(is_empty.float().mean() - 0.4) < 0.03 and set(start[is_empty].tolist()) == set(range(8))
    drawn = set(zip(start[~is_empty].tolist(), end[~is_empty].tolist(), strict=True))
    assert drawn == {(i * 8 // count, (i + 1) * 8 // count) for count in STEP_COUNTS for i in range(count)}


def test_the_limit_of_guidance_is_that_of_many_steps():
    conditional, unconditional = torch.randn(2, 3, 2, 4, 4, generator=seeded()) * 0.3
    scale = torch.tensor([1.0, 2.5, 6.0])
    limit = Guidance("apg").limit(conditional, unconditional, scale)
    for index, value in enumerate(scale.tolist()):
        guide = Guidance("apg")
        for _ in range(60):
            stepped = guide(conditional, unconditional, value)
        torch.testing.assert_close(limit[index], stepped[index])
    plain = Guidance("cfg").limit(conditional, unconditional, scale)
    torch.testing.assert_close(plain[1], Guidance("cfg")(conditional, unconditional, 2.5)[1])


# Options


def test_a_third_of_the_blocks_read_the_end_of_a_step_unless_said_otherwise():
    teacher = make_decoder(num_layers=4)
    assert build_student(teacher, arguments_for()).config.interval_blocks == 2
    assert build_student(teacher, arguments_for(interval_blocks=1)).config.interval_blocks == 1
    with pytest.raises(ValueError, match="`interval_blocks` must be"):
        build_student(teacher, arguments_for(interval_blocks=5))


def test_a_distilled_decoder_is_not_distilled_again():
    student = build_student(make_decoder(), arguments_for())
    with pytest.raises(ValueError, match="distilled already"):
        build_student(student, arguments_for())


@pytest.mark.parametrize(
    "options, name",
    [
        ({"min_guidance_scale": None}, "`min_guidance_scale` and `max_guidance_scale`"),
        ({"min_guidance_scale": 5.0}, "`min_guidance_scale`"),
        ({"teacher_steps": 6}, "`teacher_steps`"),
        ({"teacher_steps": 0}, "`teacher_steps`"),
        ({"intervals_per_image": 0}, "`intervals_per_image`"),
        ({"empty_share": 1.5}, "`empty_share`"),
        ({"interval_blocks": -1}, "`interval_blocks`"),
    ],
)
def test_options_out_of_bounds_are_refused(options, name):
    with pytest.raises(ValueError, match=name):
        arguments_for(**options)
