"""Hostile input at the three doors: the right result, or an error of the right type that names its cause."""

import pytest
import torch
from doors import faults
from public_calls import TWINS, VALUES, public_calls
from tiny_models import make_class_pipeline, make_text_pipeline


CALLS = public_calls(make_text_pipeline(), make_class_pipeline())
INPUTS = {"calls": 600, "folders": 150, "images": 300}  # `make fuzz` tries thousands


@pytest.mark.parametrize("name", sorted(CALLS))
def test_every_argument_takes_every_kind_of_value_or_refuses_it_by_name(name):
    call = CALLS[name]
    problems = {(key, value): call.judge({key: value}) for key in call.valid for value in VALUES}
    assert not {key: problem for key, problem in problems.items() if problem}


@pytest.mark.parametrize("value", TWINS)
@pytest.mark.parametrize("name", ["pipe(prompt)", "generate_tokens", "detokenize", "reconstruct", "tokenize"])
@torch.no_grad()
def test_numbers_of_numpy_mean_what_they_are(name, value):
    """Where the plain number is right, so is its twin, and the result is the same."""
    call = CALLS[name]

    def run(key, number):
        torch.manual_seed(0)
        arguments = {**call.valid, "generator": None} if "generator" in call.valid else call.valid
        result = call.run(**{**arguments, key: number})
        return result.images if hasattr(result, "images") else torch.stack([*result]).float()

    compared = []
    for key in call.valid.keys() & {"max_tokens", "num_inference_steps", "guidance_scale", "temperature", "top_k"}:
        try:
            expected = run(key, TWINS[value])
        except (ValueError, TypeError):
            continue
        assert run(key, VALUES[value]()).equal(expected), key
        compared.append(key)
    assert compared or value in ("np.float32(0.5)", "np.array([1, 2])")


@pytest.mark.parametrize("door", INPUTS)
def test_random_inputs_have_no_wrong_outcome(door):
    assert list(faults(door, range(INPUTS[door]))) == []
